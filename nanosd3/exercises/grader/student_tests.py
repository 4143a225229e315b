"""The tests of `pytest --student hw.py`, one per exercise. See nanosd3/pytest_plugin.py."""

from pathlib import Path

import pytest

from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES
from nanosd3.exercises.__main__ import asked
from nanosd3.exercises.grader.checker import Verdict
from nanosd3.exercises.grader.grading import grade
from nanosd3.exercises.grader.hand_ins import read_hand_in


@pytest.fixture(scope="module")
def verdicts(pytestconfig: pytest.Config) -> dict[str, Verdict]:
    """Verdicts by exercise; the file is graded once."""
    file = Path(pytestconfig.getoption("--student"))
    try:
        exercises = asked(file, read_hand_in(file, list(EXERCISES)), [])
        return {v.name: v for v in grade(file, exercises)}
    except InputError as error:
        pytest.exit(str(error), returncode=2)


@pytest.mark.parametrize("name", EXERCISES)
def test_answer(verdicts: dict[str, Verdict], name: str) -> None:
    if name not in verdicts:
        pytest.skip("not one of the exercises that this file is for")
    verdict = verdicts[name]
    if verdict.status == "not attempted":
        pytest.skip(verdict.message)
    if verdict.status != "right":
        pytest.fail(f"{name}: {verdict.message}", pytrace=False)
