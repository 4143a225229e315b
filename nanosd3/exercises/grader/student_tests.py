"""The tests of `pytest --student hw.py`, one per exercise. See nanosd3/pytest_plugin.py."""

from pathlib import Path

import pytest

from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES
from nanosd3.exercises.__main__ import check_readable
from nanosd3.exercises.grader.checker import Verdict
from nanosd3.exercises.grader.grading import grade


@pytest.fixture(scope="module")
def verdicts(pytestconfig: pytest.Config) -> dict[str, Verdict]:
    """Verdicts by exercise; the file is graded once."""
    file = Path(pytestconfig.getoption("--student"))
    try:
        check_readable(file)
    except InputError as error:
        pytest.exit(str(error), returncode=2)
    return {v.name: v for v in grade(file, list(EXERCISES.values()))}


@pytest.mark.parametrize("name", EXERCISES)
def test_answer(verdicts: dict[str, Verdict], name: str) -> None:
    verdict = verdicts[name]
    if verdict.status == "not attempted":
        pytest.skip(verdict.message)
    if verdict.status == "wrong":
        pytest.fail(f"{name}: {verdict.message}", pytrace=False)
