"""Peak memory of a whole run of `generate`, measured in a separate process (Linux).

The pipeline is meant to hold one network at a time, so the peak should be the program and its
largest part, not the sum of all parts.
"""

import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanosd3.components import COMPONENTS
from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.measure.random_models import random_model
from nanosd3.official.key_names import PREFIXES

Returned = TypeVar("Returned")

CHILD = """
import sys
from nanosd3 import generate
from nanosd3.measure.generate_memory import process_memory
before = process_memory("VmHWM")
generate.main(sys.argv[1:])
print(before, process_memory("VmHWM"))
"""


@dataclass(frozen=True)
class RunMemory:
    """The memory of a run, in bytes."""

    weights: dict[str, int]  # of each part, in float32
    before: int  # of the process before any weights are loaded
    peak: int

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.weights, key=lambda part: self.weights[part])


def process_memory(field: str) -> int:
    """A field of this process's /proc status, in bytes; VmHWM is the peak resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_subprocess(function: Callable[..., Returned], *arguments: object) -> Returned:
    """Call a function in a new process, so that its memory is returned to the system."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write_random(config: Config, path: Path, without: Collection[str]) -> dict[str, int]:
    """Write a random model as a single float16 file; return the number of values in each part."""
    state: dict[str, Tensor] = {}
    counts = {}
    for part in COMPONENTS:
        if part in without:
            continue
        tensors = random_model(config, part, torch.device("cpu"), torch.float16).state_dict()
        counts[part] = sum(tensor.numel() for tensor in tensors.values())
        state |= {PREFIXES[part] + key: tensor for key, tensor in tensors.items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return counts


def measure_run(
    config: Config, size: int, without: Collection[str], folder: Path | None
) -> RunMemory:
    """Run `generate` for two steps on random weights, which are written below `folder` and then
    removed, with some text encoders left out. Raises InputError if it fails."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / f"{config.name}.safetensors"
        counts = in_subprocess(write_random, config, path, without)
        options = ["a photo of a cat", "--weights", path, "--out", Path(name) / "cat.png"]
        options += ["--height", size, "--width", size, "--steps", 2]
        options += [word for part in without for word in ("--drop", part)]
        command = [sys.executable, "-c", CHILD, *map(str, options)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"memory: generate failed with exit status {done.returncode}")
    before, peak = map(int, done.stdout.split()[-2:])
    return RunMemory({part: 4 * count for part, count in counts.items()}, before, peak)
