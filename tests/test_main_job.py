"""The main job itself, as the README promises it. Minutes: `pytest -m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_main_job(tmp_path):
    run = tmp_path / "mnist"
    command = [sys.executable, "train_mnist.py", "--out", run]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["samples"] == 1000
    assert metrics["prompt_accuracy"] >= 0.995
    assert metrics["frechet_ratio_to_real"] <= 2.5
    assert metrics["weight"]["accuracy"] > 0.9 and metrics["slant"]["accuracy"] > 0.8
    assert metrics["peak_memory_gb"] is None or metrics["peak_memory_gb"] < 3
