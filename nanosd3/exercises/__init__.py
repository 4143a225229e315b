"""Exercises that grade themselves, from one registry.

    from nanosd3.exercises import check, show
    show("patchify")                         # in a notebook or a console: the task
    check("patchify", patchify)              # what came of your answer

Each entry has a specification in plain loops, the package's own function as reference, cases with
all sizes distinct, and the wrong answers students really give, each with a sentence that helps.
"""

import inspect
from collections.abc import Callable

from nanosd3.exercises import (
    attention,
    blocks,
    bucketing,
    clip,
    joint,
    judging,
    latents,
    line,
    patches,
    sampling,
    scaling,
    solvers,
    text,
    times,
    tokenizers,
    training,
)
from nanosd3.exercises.base import Exercise
from nanosd3.exercises.checker import judge

MODULES = (  # in the order in which one learns
    line, times, patches, attention, joint, blocks, solvers, sampling, latents, scaling, tokenizers,
    clip, text, training, bucketing, judging,
)  # fmt: skip
EXERCISES: dict[str, Exercise] = {
    entry.name: entry for module in MODULES for entry in module.EXERCISES
}
MARKS = {"right": "✓", "wrong": "✗", "not attempted": "·"}


def task_of(exercise: Exercise) -> str:
    """Signature, task and the specification in loops, as text."""
    return (
        f'{exercise.signature}\n    """{exercise.task}"""\n\n'
        f"# The specification, in plain loops:\n{inspect.getsource(exercise.specification)}"
    ).rstrip()


def find(name: str) -> Exercise:
    """Raises KeyError, naming the exercises there are, for a name that is none."""
    if name not in EXERCISES:
        raise KeyError(f"no exercise {name!r}; there are {', '.join(EXERCISES)}")
    return EXERCISES[name]


def show(name: str) -> None:
    """Print what an exercise asks for. Raises KeyError for a name that is none."""
    exercise = find(name)
    print(f"{name}: {exercise.points} points, {'*' * exercise.difficulty}\n")
    print(task_of(exercise))


def check(name: str, answer: Callable) -> None:
    """Check an answer and print what came of it. Raises KeyError for a name that is none."""
    verdict = judge(find(name), answer)
    print(f"{MARKS[verdict.status]} {name} ({verdict.points}/{verdict.out_of}): {verdict.message}")
