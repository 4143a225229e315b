"""Checks, their settings, and what they yield: rows of a table, some of them with an aim."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nanosd3.config import CONFIGS
from nanosd3.config_types import Config
from nanosd3.machine.accelerate import compile_blocks
from nanosd3.measure.random_models import patches_per_side, random_model

CheckState = Literal["passed", "missed", "wrong", "skipped", "failed"]  # of a check that has ended


class Unavailable(Exception):
    """A check cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Row:
    """One measured value. An empty `aim` means that it is only reported."""

    what: str
    value: float
    unit: str = ""
    aim: str = ""
    met: bool = True
    goal: bool = False  # a speed or size goal: missing it does not make the answer wrong


def at_most(what: str, value: float, aim: float, unit: str = "") -> Row:
    """A value that should not exceed `aim`; NaN misses it."""
    return Row(what, value, unit, f"<= {aim:g}", value <= aim)


def at_least(what: str, value: float, aim: float, unit: str = "") -> Row:
    """A value that should reach `aim`; NaN misses it."""
    return Row(what, value, unit, f">= {aim:g}", value >= aim)


@dataclass(frozen=True)
class Setting:
    """The device and the model sizes that checks use."""

    device: torch.device
    folder: Path  # for files next to the results
    config: str | None = None  # a small config in place of every official one
    run: Path | None = None  # a finished run of train_mnist.py

    @property
    def full(self) -> bool:
        """Whether models have their official sizes."""
        return self.config is None

    def model(self, name: str) -> Config:
        """The config of this name, or the small config in its place."""
        return CONFIGS[self.config or name]

    def image_size(self, size: int) -> int:
        """The side of square images in pixels: `size`, or that of the small config."""
        return size if self.config is None else CONFIGS[self.config].image_size

    def patches(self, config: Config, size: int) -> int:
        """Patches along each side of such images."""
        return patches_per_side(config, self.image_size(size))

    def repeats(self, number: int) -> int:
        """How often to repeat something: `number` times, at most twice with a small config."""
        return number if self.full else min(number, 2)

    def goal(self, row: Row) -> Row:
        """Mark the aim of a row as a speed or size goal; small configs have none."""
        return replace(row, goal=True) if self.full else Row(row.what, row.value, row.unit)

    def random_model(self, config: Config, part: str, dtype: torch.dtype) -> nn.Module:
        """A randomly initialised network on the device."""
        return random_model(config, part, self.device, dtype)

    def require_memory(self, gigabytes: float) -> None:
        """Raise Unavailable if less GPU memory is free; small configs always fit."""
        if self.device.type != "cuda" or not self.full:
            return
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0] / 1e9
        if free < gigabytes:
            raise Unavailable(f"needs {gigabytes:.0f} GB of GPU memory, only {free:.0f} GB is free")

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compile(self, blocks: Iterable[nn.Module]) -> str:
        """Compile blocks in place; return the name of the backend. On a CPU this traces without
        generating code, which would take minutes and is not what is checked there."""
        backend = "inductor" if self.device.type == "cuda" else "aot_eager"
        compile_blocks(blocks, backend)
        return backend


@dataclass(frozen=True)
class Check:
    """A named check: its rows, its time limit, and environment variables its process needs."""

    name: str
    rows: Callable[[Setting], Iterator[Row]]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The first line of the docstring of `rows`."""
        return (self.rows.__doc__ or self.name).splitlines()[0].rstrip(".")


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """|x - exact| / |exact|, in float64 on the CPU."""
    x, exact = x.cpu().double(), exact.cpu().double()
    return ((x - exact).norm() / exact.norm()).item()
