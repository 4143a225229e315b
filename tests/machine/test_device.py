"""Cores, threads and memory of this machine."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanosd3.errors import InputError
from nanosd3.machine import device
from nanosd3.machine.device import cores, default_threads, memory_found, set_up


def test_cores_and_memory():
    assert cores() >= 1 and memory_found()[0] > 0


ROOT = Path(__file__).parents[2]
GROUPS = {  # files, the process's line, cores, GB
    "version 2, a container": (
        {"cpu.max": "250000 100000\n", "memory.max": "3000000000\n"}, "0::/", 2.5, 3),
    "version 2, nested": (
        {"user.slice/a/cpu.max": "max 100000", "user.slice/cpu.max": "100000 100000",
         "user.slice/a/memory.max": "max", "user.slice/memory.max": "2000000000"},
        "0::/user.slice/a", 1, 2),
    "version 1": (
        {"cpu/jobs/cpu.cfs_quota_us": "150000", "cpu/jobs/cpu.cfs_period_us": "50000",
         "memory/memory.limit_in_bytes": "1000000000"},
        "4:memory:/seen/from/outside\n3:cpu,cpuacct:/jobs\n0::/", 3, 1),
    "version 1, no limit": (
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        "2:cpu:/\n1:name=systemd:/", math.inf, math.inf),
    "half a core": ({"cpu.max": "50000 100000"}, "0::/", 0.5, math.inf),
    "no control groups": ({}, "", math.inf, math.inf),
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "PROC", tmp_path / "proc")
    monkeypatch.setattr(device, "CONTROL_GROUPS", tmp_path / "groups")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.filterwarnings("ignore::UserWarning")  # about devices of the past
def test_devices_that_are_not_there():
    """Each fails in a way of its own; on meta there are shapes but no numbers."""
    assert device.device_of("cpu") == device.device_of(torch.device("cpu")) == torch.device("cpu")
    for name in ("meta", "hpu", "privateuseone", "ipu", "vulkan", "mkldnn", "cuda:99"):
        with pytest.raises(InputError, match=f"^device: no {name} on this machine$"):
            device.device_of(name)


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_control_groups(files, name):
    there, lines, share, gigabytes = GROUPS[name]
    for file, text in there.items():
        write(files / "groups" / file, text)
    write(files / "proc/self/cgroup", lines)
    assert device.group_cores() == share and device.group_memory() == gigabytes


def test_a_system_without_control_groups(files):
    assert device.group_cores() == device.group_memory() == math.inf


def test_a_quota_limits_the_cores(monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: range(64), raising=False)
    for share, expected in ((math.inf, 64), (2.5, 2), (0.5, 1)):
        monkeypatch.setattr(device, "group_cores", lambda share=share: share)
        assert cores() == expected


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip


@pytest.fixture
def threads(monkeypatch):
    """Eight cores; no threads are really set."""
    chosen: list[int] = []
    monkeypatch.setattr(device, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for name in ("OMP_NUM_THREADS", "NANOSD3_THREADS", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    return chosen


@pytest.mark.parametrize(
    ("environment", "option", "expected"),
    [
        ({}, None, 8),
        ({}, 3, 3),
        ({"OMP_NUM_THREADS": "2"}, None, 2),
        ({"OMP_NUM_THREADS": "2,1"}, None, 2),
        ({"OMP_NUM_THREADS": ""}, None, 8),
        ({"OMP_NUM_THREADS": "2"}, 3, 3),
        (TORCHRUN, None, 2),
        (TORCHRUN | {"OMP_NUM_THREADS": "1"}, None, 2),  # set by torchrun
        (TORCHRUN | {"OMP_NUM_THREADS": "3"}, None, 3),
        ({"LOCAL_WORLD_SIZE": "4"}, None, 8),  # left over: torchrun sets all its variables
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, None, 1),
        ({"LOCAL_WORLD_SIZE": "", "OMP_NUM_THREADS": "1"}, None, 1),
        (TORCHRUN | {"RANK": "9" * 5000}, None, 8),
    ],
)
def test_number_of_threads(threads, monkeypatch, environment, option, expected, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_up(option)
    assert threads == [expected] and f"{expected} " in capsys.readouterr().out


def test_the_memory_is_shared(files, monkeypatch):
    write(files / "proc/meminfo", "MemAvailable: 8000000 kB\n")
    assert memory_found() == (pytest.approx(8.192), "available on this machine")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    expected = "available on this machine, shared by 4 processes"
    assert memory_found() == (pytest.approx(2.048), expected)


def test_every_process_has_its_gpu(threads, monkeypatch, capsys):
    """It is the current one before its memory is asked for."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    assert set_up() == torch.device("cuda") and not current
    for name, value in (TORCHRUN | {"LOCAL_RANK": "2"}).items():
        monkeypatch.setenv(name, value)
    assert set_up() == torch.device("cuda", 2) and current == [torch.device("cuda", 2)]
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InputError, match="process 4 on this machine, which has 3 GPUs; lower --np"):
        set_up()


def test_notebooks_have_a_variable_of_their_own(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert default_threads("NANOSD3_THREADS") == 2
    monkeypatch.setenv("NANOSD3_THREADS", "5")
    assert default_threads("NANOSD3_THREADS") == 5 and default_threads() == 2


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1025", "\u00b2", "9" * 5000])
def test_a_number_of_threads_that_is_none(threads, monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(InputError, match=r"^OMP_NUM_THREADS=.+: expected a number of thr") as error:
        set_up()
    assert value[:70] in str(error.value) and len(str(error.value)) < 200
    assert not threads


def test_more_threads_than_a_system_gives(threads, monkeypatch):
    for value in (1025, 10**12, 10**400):
        with pytest.raises(InputError, match=r"^--threads 10.+: expected at most 1024$"):
            set_up(value)
    set_up(1024)
    assert threads == [1024]


@pytest.mark.parametrize(
    ("before", "environment", "expected"),
    [
        ("", {}, "10000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ("sys.modules['torch'] = None; ", {}, None),  # too late
    ],
)
def test_waiting_threads_sleep(before, environment, expected):
    """OpenMP is told before it is loaded, unless the user has told it something else."""
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import os, sys; {before}import nanosd3; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True,
                          text=True, cwd=ROOT, check=True)  # fmt: skip
    assert done.stdout.strip() == str(expected)
