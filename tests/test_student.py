"""`pytest --student=hw.py`: a file of answers, each exercise a test; nothing else is run then."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanosd3.exercises import EXERCISES
from nanosd3.exercises.grading import grade

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def verdicts(pytestconfig) -> dict:
    file = Path(pytestconfig.getoption("--student"))
    return {v.name: v for v in grade(file, list(EXERCISES.values()))}


@pytest.mark.student
@pytest.mark.parametrize("name", EXERCISES)
def test_answer(verdicts, name):
    verdict = verdicts[name]
    if verdict.status == "not attempted":
        pytest.skip(verdict.message)
    if verdict.status == "wrong":
        pytest.fail(f"{name}: {verdict.message}", pytrace=False)


def test_the_option(tmp_path):
    (tmp_path / "hw.py").write_text(
        "def velocity_target(x0, noise):\n    return noise - x0\n\n"
        "def shift(t, alpha):\n    return alpha * t\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--student={tmp_path / 'hw.py'}", "-p",
         "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert f"1 failed, 1 passed, {len(EXERCISES) - 2} skipped" in done.stdout
    assert "shift: values: " in done.stdout and "t = 1 should stay at 1" in done.stdout
    missing = subprocess.run(
        [sys.executable, "-m", "pytest", "--student=no.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert missing.returncode == 4 and "no.py: no such file" in missing.stderr
