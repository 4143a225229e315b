"""What a check is given, and what it yields: rows of a table, some with an aim."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from nanosd3.config import CONFIGS, Config
from nanosd3.pairs import randomly_filled, side_of


class Unavailable(Exception):
    """The check cannot be made here; the message says what is missing."""


@dataclass(frozen=True)
class Row:
    """One number. `aim` is empty for what is only noted."""

    what: str
    value: float
    unit: str = ""
    aim: str = ""
    met: bool = True
    goal: bool = False  # the aim is one of speed or size; to miss it is not to be wrong


def at_most(what: str, value: float, aim: float, unit: str = "") -> Row:
    """A number that should not exceed `aim`; NaN does."""
    return Row(what, value, unit, f"<= {aim:g}", value <= aim)


def at_least(what: str, value: float, aim: float, unit: str = "") -> Row:
    """A number that should reach `aim`; NaN does not."""
    return Row(what, value, unit, f">= {aim:g}", value >= aim)


@dataclass(frozen=True)
class Setting:
    """Where and at what size checks are made."""

    device: torch.device
    folder: Path  # for files beside the results
    config: str | None = None  # a small config in place of every official one
    run: Path | None = None  # a finished run of train_mnist.py

    @property
    def full(self) -> bool:
        return self.config is None

    def model(self, name: str) -> Config:
        """The config of this name, or its small replacement."""
        return CONFIGS[self.config or name]

    def pixels(self, size: int) -> int:
        """The side of a square image, or what the small config was made for."""
        return size if self.config is None else CONFIGS[self.config].image_size

    def patches(self, config: Config, size: int) -> int:
        """Patches along the side of such an image."""
        return side_of(config, self.pixels(size))

    def count(self, number: int) -> int:
        """How often something is repeated: twice where all is small."""
        return number if self.full else min(number, 2)

    def goal(self, row: Row) -> Row:
        """A row whose aim is one of speed or size, which small configs do not have."""
        return replace(row, goal=True) if self.full else Row(row.what, row.value, row.unit)

    def filled(self, config: Config, part: str, dtype: torch.dtype) -> nn.Module:
        """A randomly filled network on the device."""
        return randomly_filled(config, part, self.device, dtype)

    def needs(self, gigabytes: float) -> None:
        """Raises Unavailable if the GPU has less memory free; small configs always fit."""
        if self.device.type != "cuda" or not self.full:
            return
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0] / 1e9
        if free < gigabytes:
            raise Unavailable(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} GB are free")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compile(self, blocks: nn.ModuleList) -> str:
        """Compile blocks in place and name the backend. On a CPU that is the tracer without code
        generation, which would take minutes there and is not what is checked."""
        backend = "inductor" if self.device.type == "cuda" else "aot_eager"
        for block in blocks:
            block.compile(backend=backend)
        return backend


@dataclass(frozen=True)
class Check:
    """A check by name: its rows, the seconds it may take, and variables that its process needs."""

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
