"""The rates in speed.jsonl."""

import json

import pytest
import torch
from torch import nn

from nanosd3.config import CONFIGS
from nanosd3.machine.distributed import ParallelModel
from nanosd3.storage.run import Run
from nanosd3.training import throughput
from nanosd3.training.throughput import Throughput, peak_flops

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA B200", torch.bfloat16),
        ("NVIDIA A1000", torch.bfloat16),
        (None, torch.float32),
    ],
)
def test_peaks(monkeypatch, name, peak):
    """By the whole name; of an unlisted GPU, measured in the type that it trains in."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(throughput, "multiplication_speed", lambda _, dtype: dtype)
    assert peak_flops(GPU if name else CPU) == peak


def test_only_steps_count(tmp_path, monkeypatch):
    """Steps of two seconds in two microbatches, and a long time between them."""
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(throughput, "EVERY", 3)
    monkeypatch.setattr(throughput, "multiplication_speed", lambda *_: 1e9)
    run = Run.open(tmp_path / "run", {"config": {"name": "tiny"}})
    rates = Throughput(run, CONFIGS["tiny"].mmdit, ParallelModel(nn.Linear(1, 1)))
    for step in range(6):
        for _ in range(2):
            rates.start()
            clock[0] += 1
            rates.seen(torch.zeros(3, 4, 8, 8), torch.zeros(3, 5, 48))
        rates.log(step)
        clock[0] += 50
    lines = [json.loads(line) for line in (run.folder / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 5]
    assert [line["seconds_per_step"] for line in lines] == [2, 2]
    assert [line["images_per_second"] for line in lines] == [3, 3]
