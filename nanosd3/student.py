"""A plugin for pytest: `pytest --student hw.py` runs a file of answers as tests, one each.

It is found by pytest wherever the package is installed, so it imports nothing that takes time;
the tests are in exercises/student_tests.py, and nothing else is collected then.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--student", metavar="FILE", help="grade a file of answers, and only that")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--student")
    if not file:
        return
    if not Path(file).is_file():
        raise pytest.UsageError(f"--student {file}: no such file")
    config.args = [str(Path(__file__).parent / "exercises" / "student_tests.py")]
