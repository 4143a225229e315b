"""`pytest --student hw.py`: one test per exercise, and no other tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanosd3.exercises import EXERCISES

ROOT = Path(__file__).parents[2]
ANSWERS = (
    "def velocity_target(x0, noise):\n    return noise - x0\n\n"
    "def shift(t, alpha):\n    return alpha * t\n"
)


PLUGINS = ("-p", "nanosd3.pytest_plugin", "-p", "no:cacheprovider")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run pytest with this plugin alone, whether or not the package is installed."""
    command = [sys.executable, "-m", "pytest", *PLUGINS, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # fmt: skip
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("here", [True, False], ids=["in the repository", "elsewhere"])
def test_the_option(tmp_path, here):
    (tmp_path / "hw.py").write_text(ANSWERS)
    cells = [{"cell_type": "code", "source": ANSWERS}, {"cell_type": "code", "source": "1 / 0"}]
    (tmp_path / "hw.ipynb").write_text(json.dumps({"cells": cells}))
    option = ["--student", str(tmp_path / "hw.py")] if here else ["--student=hw.ipynb"]
    done = run(ROOT if here else tmp_path, *option)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"1 failed, 1 passed, {len(EXERCISES) - 2} skipped" in done.stdout
    assert "shift: values: " in done.stdout and "t = 1 should stay at 1" in done.stdout


def test_bad_files(tmp_path, monkeypatch, capsys):
    """In this process, without starting another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert pytest.main([*PLUGINS, "--student", "no.py"]) == 4
    assert "no.py: no such file" in capsys.readouterr().err
    (tmp_path / "hw.py").write_text("def (:\n")
    assert pytest.main([*PLUGINS, "--student", "hw.py"]) == 2
    assert "hw.py: line 1: " in capsys.readouterr().out


def test_the_package_brings_the_plugin():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\nnanosd3 = "nanosd3.pytest_plugin"' in text
