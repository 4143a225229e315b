"""Exercises that grade themselves, from one registry.

    from nanosd3.exercises import check
    check("patchify", patchify)              # in a notebook or a console

Each entry has a specification in plain loops, the package's own function as reference, cases with
all sizes distinct, and the wrong answers students really give, each with a sentence that helps.
"""

from collections.abc import Callable

from nanosd3.exercises import flow, sampling, solvers, tokens
from nanosd3.exercises.base import Exercise
from nanosd3.exercises.checker import judge

TOPICS = (flow, tokens, solvers, sampling)
EXERCISES: dict[str, Exercise] = {
    entry.name: entry for topic in TOPICS for entry in topic.EXERCISES
}
MARKS = {"right": "✓", "wrong": "✗", "not attempted": "·"}


def check(name: str, answer: Callable) -> bool:
    """Check an answer, print what came of it, and say whether it is right.

    Raises KeyError, naming the exercises there are, for a name that is none.
    """
    if name not in EXERCISES:
        raise KeyError(f"no exercise {name!r}; there are {', '.join(EXERCISES)}")
    verdict = judge(EXERCISES[name], answer)
    print(f"{MARKS[verdict.status]} {name} ({verdict.points}/{verdict.out_of}): {verdict.message}")
    return verdict.status == "right"
