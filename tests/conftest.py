"""A finished tiny run, trained once for all tests that need one."""

import gc
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

# One thread, in commands and processes that tests start too: the models here are too small to
# share, and threads that wait for each other take the time of the tests beside them.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import HealthCheck, settings
from support import short_runs, tiny_official, without_posix

import train_mnist
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.machine import matmul
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import export
from nanosd3.storage.files import read_json, write_json
from nanosd3.training import options, train_flow

# The same examples every time, and no clock: a busy machine fails no test.
settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """What is there by now stays: the collections that tests ask for need not look at it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever the tests before have set: with more, some operations take more memory."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def in_short():
    """A shorter report of a run. Files need not survive a power cut, so nothing waits for the
    disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        short_runs.observe_less(patch)
        short_runs.read_once(patch)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, in_short) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_mnist.main(["--config", "tiny", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def run_before_flow(tiny_run, tmp_path_factory) -> Path:
    """The same run just before its flow stage, with all features cached. Copy it."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("before-flow") / "run")
    content = read_json(run / "run.json")
    for stage in ("flow", "samples"):
        del content["stages"][stage]
    write_json(run / "run.json", content)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_flow, "fit_flow", interrupt)
        assert run_main(lambda: train_mnist.main(["--config", "tiny", "--out", str(run)])) == 130
    return run


@pytest.fixture
def one_step(monkeypatch):
    """Give `tiny` a single step in every stage."""
    tiny = CONFIGS["tiny"]
    names = ("judge", "autoencoder", "clip", "t5", "flow")
    short = {name: replace(getattr(tiny.training, name), steps=1) for name in names}
    config = replace(tiny, training=replace(tiny.training, **short))
    monkeypatch.setitem(options.CONFIGS, "tiny", config)


@pytest.fixture
def unobserved(monkeypatch):
    """Skip what is measured and drawn beside training, which takes most of the time."""
    short_runs.observe_nothing(monkeypatch)


@pytest.fixture(scope="session")
def official_parts(in_short) -> dict[str, dict]:
    return tiny_official.parts()


@pytest.fixture(scope="session")
def official_file(tmp_path_factory, official_parts) -> Path:
    """A single file with everything in it, as the official ones."""
    path = tmp_path_factory.mktemp("official") / "tiny_incl_clips_t5.safetensors"
    return tiny_official.write_single(official_parts, path)


@pytest.fixture(scope="session")
def official_folder(official_file) -> Path:
    """The same model as a diffusers folder."""
    folder = official_file.with_name("tiny-diffusers")
    export(open_checkpoint(official_file), "diffusers", folder)
    return folder


@pytest.fixture
def hidden_posix():
    """Modules, functions, signals and files that POSIX systems alone have are not there."""
    matmul.onednn_multiplies_faster.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        without_posix.hide(patch)
        yield
    matmul.onednn_multiplies_faster.cache_clear()
