"""Tiny trainings made shorter: what is measured and drawn beside them takes most of their time."""

from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from nanosd3.data import mnist


def observe_less(patch: pytest.MonkeyPatch) -> None:
    """One thread, and of everything in the log and the report only a little. For all tests, so that
    runs of different tests and processes can be compared."""
    patch.setattr("nanosd3.machine.device.cores", lambda: 1)
    patch.setattr("nanosd3.training.train_flow.VALIDATION_TIMES", 2)
    patch.setattr("nanosd3.training.report.EXACT_STEPS", 8)
    patch.setattr("nanosd3.training.report.SOLVER_EVALUATIONS", (3, 5))


def read_once(patch: pytest.MonkeyPatch) -> None:
    """Unpack the package's images once for all tests, which takes half a second."""
    original, package = mnist.read_idx, mnist.MNIST_FOLDER
    kept = cache(original)

    def read(path: Path, dims: int) -> Tensor:
        return kept(path, dims) if path.parent == package else original(path, dims)

    patch.setattr(mnist, "read_idx", read)


def observe_nothing(patch: pytest.MonkeyPatch) -> None:
    """No validation, previews and comparison of solvers, and no animation."""
    patch.setattr("nanosd3.training.train_flow.validation_loss", lambda *_: [])
    patch.setattr("nanosd3.training.report.preview", lambda *_: None)
    patch.setattr("nanosd3.training.report.draw_trajectory", lambda *_: None)
    patch.setattr("nanosd3.training.report.solver_errors", lambda *_: {"euler": [(1, 0.5)]})
