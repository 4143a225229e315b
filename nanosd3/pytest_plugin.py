"""Pytest plugin: `pytest --student hw.py` grades a file of answers, one test per exercise.

Pytest loads it wherever the package is installed, so it imports nothing slow; all that happens
then is the package's one OpenMP setting. With the option, only
exercises/grader/student_tests.py is collected.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--student", metavar="FILE", help="grade a file of answers and run no other tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--student")
    if not file:
        return
    if not Path(file).is_file():
        raise pytest.UsageError(f"--student {file}: no such file; name a file of answers")
    config.args = [str(Path(__file__).parent / "exercises" / "grader" / "student_tests.py")]
