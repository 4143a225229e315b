"""The tests of `pytest --student hw.py`: one for each exercise. See nanosd3/student.py."""

from pathlib import Path

import pytest

from nanosd3.exercises import EXERCISES
from nanosd3.exercises.__main__ import read_answers
from nanosd3.exercises.checker import Verdict
from nanosd3.exercises.grading import grade
from nanosd3.runtime import InputError


@pytest.fixture(scope="module")
def verdicts(pytestconfig: pytest.Config) -> dict[str, Verdict]:
    """What came of each answer; the file is graded once, in a process of its own."""
    file = Path(pytestconfig.getoption("--student"))
    try:
        read_answers(file)
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
