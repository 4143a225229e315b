"""Device, threads and memory.

On a CPU everything runs in float32: processors without native bfloat16 support multiply bfloat16
matrices some forty times slower.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nanosd3.errors import InputError, shortened, shown

PROC, CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
MAX_ACTIVATIONS = 2**26  # elements in the largest activation of transformer or decoder
BATCH = 250  # images at once, at most
MAX_THREADS = 1024  # systems refuse more, and OpenMP then ends the process


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an out-of-memory error of Python, CUDA or PyTorch's CPU allocator."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups (versions 1 and 2), from the innermost outwards;
    none if the system has no such groups."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS
        innermost = root / path.lstrip("/")
        for folder in (innermost, *innermost.parents):
            yield folder
            if folder == root:
                break


def words_of(path: Path) -> list[str]:
    """The words in a file; none if it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def group_cores() -> float:
    """The control groups' share of CPU time, in cores; infinity if it is not limited."""
    limits = [math.inf]
    for folder in control_groups("cpu"):
        older = [*words_of(folder / "cpu.cfs_quota_us"), *words_of(folder / "cpu.cfs_period_us")]
        match words_of(folder / "cpu.max") or older:
            case [quota, period] if quota.isdecimal():  # not "max", not -1
                limits.append(int(quota) / int(period))
    return min(limits)


def group_memory() -> float:
    """The control groups' memory limit in GB; infinity if there is none."""
    limits = [math.inf]
    for folder in control_groups("memory"):
        match words_of(folder / "memory.max") or words_of(folder / "memory.limit_in_bytes"):
            case [limit] if limit.isdecimal():
                limits.append(int(limit) / 1e9)
    return min(limits)


def cores() -> int:
    """CPU cores this process may use, given its affinity and its control groups' quotas."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.floor(min(count, group_cores())))


def default_threads(name: str = "OMP_NUM_THREADS") -> int:
    """Number of CPU threads to compute with, at least 1: what the environment variable says, else
    the usable cores, at most 8. Raises InputError if it is not a number.

    It is never tuned by measurement: the order in which threads add floats affects the last bits
    of the weights, and the same command must give the same bytes.
    """
    for variable in dict.fromkeys((name, "OMP_NUM_THREADS")):
        if text := os.environ.get(variable, "").strip():
            first = text.split(",")[0]  # OpenMP takes a list, one number per nesting level
            number = int(first) if first.isdecimal() and len(first) < 10 else 0
            if not 1 <= number <= MAX_THREADS:
                raise InputError(
                    f"{variable}={shortened(text)}: expected a number of threads, 1 to "
                    f"{MAX_THREADS}"
                )
            return number
    return min(cores(), 8)


def torchrun_number(name: str) -> int | None:
    """A number that torchrun gave this process, such as RANK; None without torchrun.

    It sets all of its variables at once: one that is alone, or empty, is left over from something
    else and means nothing.
    """
    numbers = {key: os.environ.get(key, "") for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", name)}
    address = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    if not address or not all(n.isdecimal() and len(n) < 10 for n in numbers.values()):
        return None
    return int(numbers[name])


def device_of(device: str | torch.device) -> torch.device:
    """The device of this name. Raises InputError if there is none on this machine."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(
            f"device: expected a name such as cpu or cuda, got {shown(device)}"
        ) from None
    if found.type == "cuda":
        there = (found.index or 0) < torch.cuda.device_count()
    else:
        there = holds_numbers(found)
    if not there:
        raise InputError(f"device: no {found} on this machine")
    return found


def holds_numbers(device: torch.device) -> bool:
    """Whether this PyTorch can compute on a device; not on "meta", where only shapes exist."""
    try:
        return torch.zeros(1, device=device).item() == 0
    except (RuntimeError, AssertionError, ImportError):  # each type of device has its own
        return False


def set_up(threads: int | None = None) -> torch.device:
    """Choose the device, set the number of CPU threads, and print both.

    `threads` None: OMP_NUM_THREADS, else the usable cores, at most 8, divided among the processes
    that torchrun started on this machine. (It sets OMP_NUM_THREADS=1 itself if that is unset.)
    """
    local_processes = torchrun_number("LOCAL_WORLD_SIZE") or 1
    by_torchrun = local_processes > 1 and os.environ.get("OMP_NUM_THREADS") == "1"
    if threads is not None:
        reason = "as requested"
        if threads > MAX_THREADS:
            raise InputError(f"--threads {shown(threads)}: expected at most {MAX_THREADS}")
    elif os.environ.get("OMP_NUM_THREADS") and not by_torchrun:
        threads, reason = default_threads(), "as OMP_NUM_THREADS says"
    else:
        threads = max(1, min(cores() // local_processes, 8))
        reason = f"of {cores()} usable cores"
        if local_processes > 1:
            reason += f", {local_processes} processes"
        if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.7 * cores() + 0.5:
            reason += f"; the machine is busy (load {os.getloadavg()[0]:.1f}), --threads 1 may help"
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device = own_gpu()
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
        print(f"device: {torch.cuda.get_device_name()}; {threads} CPU threads ({reason})")
    else:
        device = torch.device("cpu")
        print(f"device: CPU, float32; {threads} threads ({reason})")
    return device


def own_gpu() -> torch.device:
    """The GPU; under torchrun, this process's own, which becomes the current one. Raises
    InputError if there are more processes than GPUs."""
    number = torchrun_number("LOCAL_RANK")
    if number is None:
        return torch.device("cuda")
    if number >= torch.cuda.device_count():
        raise InputError(
            f"torchrun started process {number + 1} on this machine, which has "
            f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def memory_found() -> tuple[float, str]:
    """Memory available to a model in GB, and where: on the GPU if there is one, otherwise in RAM,
    which the processes that torchrun started on this machine share equally.

    NaN if the system does not report it.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free / 1e9, f"free on {torch.cuda.get_device_name()}"
    processes = torchrun_number("LOCAL_WORLD_SIZE") or 1
    share = f", shared by {processes} processes" if processes > 1 else ""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        gigabytes = min(available * 1024 / 1e9, group_memory()) / processes
        return gigabytes, f"available on this machine{share}"
    except (OSError, StopIteration):  # not Linux
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return float("nan"), "(not reported by this system)"
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return size / 1e9 / processes, f"in this machine{share}"


def peak_memory(device: torch.device) -> float | None:
    """Peak memory of this process in GB, on its GPU or in RAM; None if the system does not report
    it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def at_once(numbers: int) -> int:
    """How many images to compute at once, given the size of the widest activation for one image."""
    return min(BATCH, max(1, MAX_ACTIVATIONS // numbers))
