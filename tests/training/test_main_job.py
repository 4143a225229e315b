"""The main job meets the numbers in the README. Takes minutes: `pytest -m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_main_job(tmp_path):
    run = tmp_path / "mnist"
    command = [sys.executable, "train_mnist.py", "--out", run]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["samples"] == 1000
    # Two standard errors below the measured accuracy, two spreads of draws above the distance.
    assert metrics["prompt_accuracy"] >= 0.989
    assert metrics["frechet_ratio_to_real"] <= 2.9
    turbo = metrics["turbo"]  # one evaluation; two draws differ by 0.3
    assert turbo["evaluations"] == 1 and turbo["prompt_accuracy"] >= 0.985
    assert turbo["frechet_ratio_to_real"] <= 3.3
    assert metrics["weight"]["accuracy"] > 0.9 and metrics["slant"]["accuracy"] > 0.8
    assert metrics["peak_memory_gb"] is None or metrics["peak_memory_gb"] < 3
    held_out = [e for e in read(run / "log.jsonl") if "validation" in e]
    assert [len(held_out), held_out[-1]["validation_ema"]] == [5, metrics["validation_ema"]]
    raw, averaged = (
        np.array([np.mean(e[key]) for e in held_out]) for key in ("validation", "validation_ema")
    )
    assert raw[-1] == np.mean(metrics["validation"]) and averaged[-1] < 0.95 * averaged[0]
    # The average leads while the rate is high; as that falls to a hundredth the weights catch up.
    assert (averaged[:3] < 0.98 * raw[:3]).all() and averaged[-1] < 1.005 * raw[-1]
    losses = [e["loss"] for e in read(run / "log.jsonl") if e["stage"] == "flow" and "loss" in e]
    medians = [np.median(losses[i - 50 : i]) for i in range(50, len(losses))]
    assert max(np.array(losses[50:]) / medians) < 1.15  # no spikes
    speed = read(run / "speed.jsonl")
    assert len(speed) == 38 and all(0 < e["flops_utilisation"] < 1.2 for e in speed)
    assert len(list(run.glob("preview-*.png"))) == 10
    assert not list(run.glob("state*")) and not (run / "cache").exists()
