"""Tiny trainings made shorter: what is measured and drawn beside them takes most of their time."""

import sys
from functools import cache
from pathlib import Path

import pytest

from nanosd3.data import mnist


def observe_less(patch: pytest.MonkeyPatch) -> None:
    """One thread, small plots, and of everything in the log and the report only a little. For all
    tests, so that runs of different tests and processes can be compared."""
    patch.setattr("nanosd3.machine.device.cores", lambda: 1)
    patch.setattr("nanosd3.training.train_flow.VALIDATION_TIMES", 2)
    patch.setattr("nanosd3.training.plot_style.DPI", 60)
    patch.setattr("nanosd3.training.report.EXACT_STEPS", 8)
    patch.setattr("nanosd3.training.report.SOLVER_EVALUATIONS", (3, 5))


def read_once(patch: pytest.MonkeyPatch) -> None:
    """Unpack the package's images once for all tests, which takes a second."""
    original = mnist.load_images

    @cache
    def packaged(folder: Path) -> mnist.ImageSet:
        return original()

    def load(folder: str | Path | None = None) -> mnist.ImageSet:
        return packaged(mnist.MNIST_FOLDER) if folder is None else original(folder)

    for module in list(sys.modules.values()):
        if vars(module).get("load_images") is original:
            patch.setattr(module, "load_images", load)


def observe_nothing(patch: pytest.MonkeyPatch) -> None:
    """No validation, previews and comparison of solvers, and no animation."""
    patch.setattr("nanosd3.training.train_flow.validation_loss", lambda *_: [])
    patch.setattr("nanosd3.training.report.preview", lambda *_: None)
    patch.setattr("nanosd3.training.report.draw_trajectory", lambda *_: None)
    patch.setattr("nanosd3.training.report.solver_errors", lambda *_: {"euler": [(1, 0.5)]})
