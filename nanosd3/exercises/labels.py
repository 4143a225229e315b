"""An exercise on dropping labels, which guidance needs."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large
from nanosd3.related import train_dit


def label_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, null: int, keep: list[bool]) -> Case:
        y = torch.randint(null, (len(keep),), generator=generator)
        return Case(label, (y, torch.tensor(keep), null))

    cases = [
        case("7 labels, ten classes", 10, [False, True, True, False, True, True, False]),
        case("5 labels, four classes", 4, [True, True, False, True, False]),
        case("all are kept", 3, [True, True, True]),
    ]
    return [*cases, large("300 labels", *case("", 10, [i % 7 > 0 for i in range(300)]).arguments)]


def drop_labels_spec(y: Tensor, keep: Tensor, null: int) -> Tensor:
    out = torch.empty_like(y)
    for i in range(len(y)):
        out[i] = y[i] if keep[i] else null
    return out


def keep_inverted(y: Tensor, keep: Tensor, null: int) -> Tensor:
    return torch.where(keep, null, y)


def class_zero_instead(y: Tensor, keep: Tensor, null: int) -> Tensor:
    return y * keep


def last_class_instead(y: Tensor, keep: Tensor, null: int) -> Tensor:
    return torch.where(keep, y, null - 1)


def one_too_far(y: Tensor, keep: Tensor, null: int) -> Tensor:
    return torch.where(keep, y, null + 1)


def first_for_all(y: Tensor, keep: Tensor, null: int) -> Tensor:
    return torch.where(keep[0], y, null)


def taken_out(y: Tensor, keep: Tensor, null: int) -> Tensor:
    return y[keep]


def nothing_dropped(y: Tensor, keep: Tensor, null: int) -> Tensor:
    return y.clone()


DROP_LABELS = Exercise(
    name="drop_labels",
    topic="dit",
    points=1,
    difficulty=1,
    signature="def drop_labels(y: Tensor, keep: Tensor, null: int) -> Tensor:",
    task="Leave labels out, for guidance: y (B,) holds classes 0 to null - 1, and keep\n"
    "(B,), bool, says which of them the network is told. The others become `null`, the null class.",
    specification=drop_labels_spec,
    reference=train_dit.drop_labels,
    cases=label_cases,
    mutants=(
        Mutant(keep_inverted, "keep is true where the label stays."),
        Mutant(class_zero_instead, "0 is a class like the others; the null class has its own row."),
        Mutant(last_class_instead, "The last class is null - 1; the null class comes after it."),
        Mutant(one_too_far, "The table has null + 1 rows, and its last one is number null."),
        Mutant(first_for_all, "Each image has its own entry in keep."),
        Mutant(taken_out, "The images stay in the batch, without their labels."),
        Mutant(nothing_dropped, "Nothing is dropped: what does keep say?"),
    ),
    why="With one more table row, the same network also works without a class.",
    where="nanosd3/related/train_dit.py, drop_labels",
    differentiable=False,
    names=("y", "keep", "null"),
)

EXERCISES = (DROP_LABELS,)
