"""A finished tiny run, trained once for all tests that need one."""

from pathlib import Path

import pytest
import torch

import train_mnist

torch.set_num_threads(1)  # the models here are too small to share


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """So that tests take the same time beside other work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanosd3.runtime.cores", lambda: 1)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, one_thread) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_mnist.main(["--config", "tiny", "--out", str(folder)]) == 0
    return folder
