"""Where and how the program runs: device, threads, random numbers, and how it speaks of errors.

Every choice made here is printed with its reason. Two decisions matter later:

*Random numbers* come from `rng(...)`, a CPU generator named by what it is for, such as
`rng(seed, "flow", step)`. A stream depends on its name alone, not on what was drawn before, so
a run that stops after step 700 and goes on later sees the numbers it would have seen, and one
seed gives one image on every device (up to rounding).

*Precision* on CPU is float32, always: processors without native support multiply bfloat16
matrices some forty times slower.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong with
    which file, key or option, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are InputErrors: one line, without the usage above it.
    Options are taken by their whole names only."""

    def __init__(self, name: str, description: str):
        super().__init__(name, description=description, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")


def positive(text: str) -> int:
    """A whole number from 1 up, for the command line."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run_main(main: Callable[[], int | None]) -> int:
    """`status_of` a command line. A process of a team (torchrun's) ends here and now: while Python
    takes everything apart, threads that still listen to the others may abort it."""
    status = status_of(main)
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def status_of(main: Callable[[], int | None]) -> int:
    """Run a command line and return its exit status: 2 with one line for bad input or too little
    memory, 130 for Ctrl-C (unless it says another); no traceback for any. Of the processes that
    torchrun starts the first one speaks, the others only of errors."""
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else "\ninterrupted", file=sys.stderr)
        return getattr(stop, "status", 130)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        advice = "ask for fewer or smaller images at once, or choose a smaller --config"
        advice += " (to train: --accumulate, --checkpointing, --parallel fsdp)"
        print(f"error: out of memory; {advice}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head`: the reader has gone, there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a path that cannot even be looked at
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2


def out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, CUDA's or the CPU allocator's way of saying so."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def rng(*name: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `name` alone."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def cores() -> int:
    """Processors this process may use, by its affinity and its control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups here, or no quota ("max")
        pass
    return count


def set_up(threads: int | None = None) -> torch.device:
    """Choose the device and the number of threads, and say why.

    The default number of threads is fixed (the cores this process may use, at most 8, shared with
    the other processes that torchrun started here) and never measured: the order in which threads
    add floats reaches the last bits of the weights, and the same command must give the same bytes.
    """
    if threads is None:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        threads = max(1, min(cores() // beside, 8))
        reason = f"of {cores()} usable cores" + f", {beside} processes" * (beside > 1)
        if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.7 * cores() + 0.5:
            reason += f"; the machine is busy (load {os.getloadavg()[0]:.1f}), --threads 1 may help"
    else:
        reason = "as asked"
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
        print(f"device: {torch.cuda.get_device_name()}; {threads} CPU threads ({reason})")
    else:
        device = torch.device("cpu")
        print(f"device: CPU, float32; {threads} threads ({reason})")
    return device


def memory_found() -> tuple[float, str]:
    """Memory a model could use, in GB, and whose it is: the GPU's where there is one, else
    what the system says is available."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free / 1e9, f"free on {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return min(found * 1024 / 1e9, group_memory()), "available on this machine"
    except (OSError, StopIteration):  # not Linux
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return float("nan"), "(this system does not tell)"
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return size / 1e9, "in this machine"


def group_memory() -> float:
    """The memory limit of this process's control group in GB, infinite without one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text()) / 1e9
    except (OSError, ValueError):  # no control groups here, or no limit ("max")
        return float("inf")


def peak_memory(device: torch.device) -> float | None:
    """The largest memory so far in GB: of this process on its GPU, or in all; None where the system
    does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
