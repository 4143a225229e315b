"""Cores and memory of this machine."""

from nanosd3.machine.device import cores, memory_found


def test_cores_and_memory():
    assert cores() >= 1 and memory_found()[0] > 0
