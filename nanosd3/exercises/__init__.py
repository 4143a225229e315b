"""Self-grading exercises.

    from nanosd3.exercises import check, show
    show("patchify")                         # print the task
    check("patchify", patchify)              # check your answer; True if it is right
    guess("It will be blurred.")             # note what you expect to see

Each exercise has a specification in plain loops, the package's own function as reference, test
cases with distinct sizes along all axes, and the wrong answers that students really give, each
with a hint. For the command line, see __main__.py.
"""

from collections.abc import Callable
from textwrap import fill

from nanosd3.exercises import (
    accumulation,
    attention,
    blocks,
    bucketing,
    byte_pairs,
    clip,
    codes,
    conditioning,
    consistency,
    costs,
    diffusion,
    distillation,
    dropping,
    editing,
    final,
    formulations,
    guidance,
    joint_attention,
    labels,
    latents,
    likelihood,
    logits,
    metrics,
    moving,
    multistep,
    neighbourhoods,
    norms,
    patches,
    paths,
    positions,
    qk_norm,
    rectified_flow,
    residual,
    rotary,
    runge_kutta,
    scaling,
    schedule,
    snr_weight,
    solvers,
    spacetime,
    text,
    timesteps,
    tokenizers,
    training,
    unigram,
    unmasking,
    verdicts,
)
from nanosd3.exercises.grader.checker import judge
from nanosd3.exercises.grader.exercise import Exercise
from nanosd3.exercises.grader.predictions import is_written

MODULES = (  # in learning order
    rectified_flow,
    timesteps,
    schedule,
    patches,
    positions,
    norms,
    attention,
    qk_norm,
    joint_attention,
    conditioning,
    blocks,
    final,
    solvers,
    multistep,
    guidance,
    editing,
    latents,
    residual,
    scaling,
    tokenizers,
    byte_pairs,
    unigram,
    clip,
    text,
    dropping,
    training,
    accumulation,
    bucketing,
    metrics,
    labels,
    costs,
    diffusion,
    consistency,
    distillation,
    paths,
    runge_kutta,
    likelihood,
    codes,
    unmasking,
    logits,
    neighbourhoods,
    rotary,
    snr_weight,
    spacetime,
    moving,
    formulations,
    verdicts,
)
EXERCISES: dict[str, Exercise] = {
    entry.name: entry for module in MODULES for entry in module.EXERCISES
}
WIDTH = 90  # of messages: JupyterLab breaks longer lines inside words
MARKS = {"right": "✓", "wrong": "✗", "not attempted": "·", "timed out": "✗", "refused": "✗"}


def task_of(exercise: Exercise) -> str:
    """Signature, task and specification as text."""
    task = exercise.task.replace("\n", "\n    ")
    return f'{exercise.signature}\n    """{task}"""\n\n# {exercise.shown()}'


def find(name: str) -> Exercise:
    """Look up an exercise. Raises KeyError, listing all names, for an unknown one."""
    if name not in EXERCISES:
        raise KeyError(f"no exercise {name!r}; choose from {', '.join(EXERCISES)}")
    return EXERCISES[name]


def show(name: str) -> None:
    """Print the task of an exercise. Raises KeyError for an unknown name."""
    exercise = find(name)
    points = f"{exercise.points} point{'s' * (exercise.points > 1)}"
    print(f"{name}: {points}, difficulty {'*' * exercise.difficulty} of ***\n")
    print(task_of(exercise))


def check(name: str, answer: Callable) -> bool:
    """Check an answer, print the verdict, and return whether it is right. Raises KeyError for an
    unknown name."""
    verdict = judge(find(name), answer)
    text = f"{MARKS[verdict.status]} {name} ({verdict.points}/{verdict.out_of}): {verdict.message}"
    lines = text.split("\n")
    print("\n".join(fill(line, WIDTH, break_long_words=False) for line in lines))
    return verdict.status == "right"


def guess(text: str) -> None:
    """Note what you expect. It stays in the notebook, where grading finds it."""
    print("Noted." if is_written(str(text)) else "No prediction yet.")
