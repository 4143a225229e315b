"""What experiments start from: a run folder for each network, which no other takes for its own."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import first_draws, network_job
from nanosd3.claims.sd3_captions import with_kind
from nanosd3.errors import InputError
from nanosd3.related.finished_run import FinishedRun, open_finished_run


@pytest.fixture(scope="module")
def finished(tiny_run) -> FinishedRun:
    return open_finished_run(Path(tiny_run), None, torch.device("cpu"))


class Half:
    """A source of which every second image is left out."""

    def __init__(self, source):
        self.source = source

    def __getattr__(self, name):
        return getattr(self.source, name)

    def draw(self, batch, generator):
        return self.source.draw(batch, generator) // 2 * 2


def test_first_draws_tell_sources_apart(finished):
    source = finished.source
    others = [with_kind(source, "original"), with_kind(source, "rich"), Half(source)]
    assert all(other.fingerprint == source.fingerprint for other in others)
    assert len({first_draws(each) for each in (source, *others)}) == 4
    assert first_draws(copy.copy(source)) == first_draws(source)


def test_a_folder_has_one_network(finished, tmp_path):
    """Of its config, seed, source and whatever else it depends on; opened again it is the same."""
    conditions = Conditions((0,), True, finished.run.folder, tmp_path)
    config, also = finished.config, {"rank": 4, "way": "both"}
    job = network_job(conditions, finished, "net", config, 3, **also)
    assert job.run.folder == tmp_path / "fast" / "networks" / "net-3"
    assert job.seed == 3 and job.config == config and job.source is finished.source
    again = network_job(conditions, finished, "net", config, 3, **also)
    assert again.run.identity == job.run.identity
    other = replace(config, sampling=replace(config.sampling, steps=99))
    for changed in (
        lambda: network_job(conditions, finished, "net", other, 3, **also),
        lambda: network_job(conditions, finished, "net", config, 3, Half(finished.source), **also),
        lambda: network_job(conditions, finished, "net", config, 3, **also | {"rank": 8}),
        lambda: network_job(conditions, finished, "net", config, 3, way="both"),
    ):
        with pytest.raises(InputError, match="net-3"):
            changed()
