"""Device, threads and memory.

On a CPU everything runs in float32: processors without native bfloat16 support multiply bfloat16
matrices some forty times slower.
"""

import os
import sys
from pathlib import Path

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an out-of-memory error of Python, CUDA or PyTorch's CPU allocator."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def cores() -> int:
    """Number of CPU cores this process may use, by its affinity and its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroups, or no quota ("max")
        pass
    return count


def set_up(threads: int | None = None) -> torch.device:
    """Choose the device, set the number of CPU threads, and print both.

    The default number of threads is the number of usable cores, at most 8, divided among the
    processes torchrun started on this machine. It is never tuned by measurement: the order in which
    threads add floats affects the last bits of the weights, and the same command must give the same
    bytes.
    """
    if threads is None:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        threads = max(1, min(cores() // local_processes, 8))
        reason = f"of {cores()} usable cores"
        if local_processes > 1:
            reason += f", {local_processes} processes"
        if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.7 * cores() + 0.5:
            reason += f"; the machine is busy (load {os.getloadavg()[0]:.1f}), --threads 1 may help"
    else:
        reason = "as requested"
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
    """Memory available to a model in GB, and where: on the GPU if there is one, otherwise in RAM.

    NaN if the system does not report it.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free / 1e9, f"free on {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return min(available * 1024 / 1e9, group_memory()), "available on this machine"
    except (OSError, StopIteration):  # not Linux
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return float("nan"), "(not reported by this system)"
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return size / 1e9, "in this machine"


def group_memory() -> float:
    """Memory limit of this process's cgroup in GB; infinity if there is none."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text()) / 1e9
    except (OSError, ValueError):  # no cgroups, or no limit ("max")
        return float("inf")


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
