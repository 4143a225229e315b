"""A finished tiny run, trained once for all tests that need one."""

from pathlib import Path

import pytest
import torch
from support import tiny_official, without_posix

import train_mnist
from nanosd3.machine import matmul
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import export

torch.set_num_threads(1)  # the models here are too small to share


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """So that tests take the same time beside other work; and a shorter report of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanosd3.machine.device.cores", lambda: 1)
        patch.setattr("nanosd3.training.report.EXACT_STEPS", 20)
        patch.setattr("nanosd3.training.report.SOLVER_EVALUATIONS", (5, 9))
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, one_thread) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_mnist.main(["--config", "tiny", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def official_parts(one_thread) -> dict[str, dict]:
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
