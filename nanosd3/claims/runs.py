"""The finished main job that experiments start from, and the runs that their networks train in."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from nanosd3.claims.experiment import Conditions
from nanosd3.config_types import Config
from nanosd3.data.sources import Source
from nanosd3.machine.distributed import SINGLE_PROCESS
from nanosd3.random_streams import rng
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.storage.run import Run
from nanosd3.training.cached_features import Features, encoded
from nanosd3.training.stages import Job

FIRST_DRAWS = 256


def open_main_run(conditions: Conditions) -> FinishedRun:
    """The finished main job, on the CPU. Raises InputError if there is none."""
    return open_finished_run(conditions.run, None, torch.device("cpu"))


def open_encoded(conditions: Conditions, images: bool = True) -> tuple[FinishedRun, Features]:
    """The finished main job, and its latents and text (or text alone), which are kept in the folder
    of the records. Raises InputError if there is none."""
    finished = open_main_run(conditions)
    folder, encoders = conditions.out / "cache", finished.encoders(finished.config)
    return finished, encoded(folder, finished.source, encoders, [], SINGLE_PROCESS, images)


def network_job(
    conditions: Conditions,
    finished: FinishedRun,
    name: str,
    config: Config,
    seed: int,
    source: Source | None = None,
    **also: object,
) -> Job:
    """The training run of an experiment's network, in a folder of its own, on the main job's images
    or those of `source`. `also` is what the network depends on besides its config: the folder of
    another one is refused."""
    source = source or finished.source
    identity = {
        "config": asdict(config),
        "finished": finished.fingerprint,
        "data": source.fingerprint,
        "draws": first_draws(source),
        "seed": seed,
        **also,
    }
    run = Run.open(conditions.networks / f"{name}-{seed}", identity)
    return Job(run, config, source, finished.device, seed)


def first_draws(source: Source) -> str:
    """Tells apart sources of the same images that leave some out or have other captions."""
    generator = rng("first draws")
    index = source.draw(FIRST_DRAWS, generator)
    captions = source.captions(index, torch.rand(len(index), generator=generator))
    return hashlib.sha256(torch.stack([index, captions]).numpy().tobytes()).hexdigest()[:16]


def measured_once(run: Run, what: str, measure: Callable[[], Any]) -> Any:
    """What has been measured of a run's network, now or before, as JSON keeps it."""
    if what not in run.stages:
        with run.alone():
            run.finish(what, {"found": measure()})
    return run.stages[what]["found"]
