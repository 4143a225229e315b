"""Exercises on judging samples."""

import torch
from torch import Tensor

from nanosd3 import metrics
from nanosd3.exercises.base import Case, Exercise, Mutant, normal


def feature_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, n: int, m: int, features: int) -> Case:
        mix = normal(generator, features, features)
        a, b = normal(generator, n, features), normal(generator, m, features) @ mix + 0.5
        return Case(label, (a, b))

    same = normal(generator, 6, 2)
    return [
        case("20 and 30 samples", 20, 30, 3),
        case("two features", 9, 7, 2),
        Case("fewer samples than features", (normal(generator, 4, 8), normal(generator, 5, 8))),
        Case("far from 0", (normal(generator, 9, 3) + 1000, normal(generator, 8, 3) + 1000)),
        Case("moved only", (same, same + 2)),
    ]


def frechet_spec(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    means = [x.mean(0) for x in (a, b)]
    A, B = (
        sum(torch.outer(row - mean, row - mean) for row in x) / (len(x) - 1)
        for x, mean in zip((a, b), means, strict=True)
    )
    roots = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt()  # of (A B)^(1/2)
    distance = sum((means[0] - means[1]) ** 2) + A.trace() + B.trace() - 2 * sum(roots)
    return float(distance)


def means_only(a: Tensor, b: Tensor) -> float:
    return (a.double().mean(0) - b.double().mean(0)).square().sum().item()


def spread_only(a: Tensor, b: Tensor) -> float:
    return metrics.frechet_distance(a - a.mean(0), b - b.mean(0))


def features_apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a.mean(0) - b.mean(0)).square() + (a.std(0) - b.std(0)).square()).sum().item()


def divided_by_n(a: Tensor, b: Tensor) -> float:
    shrunk = [
        x.double().mean(0) + (x.double() - x.double().mean(0)) * ((len(x) - 1) / len(x)) ** 0.5
        for x in (a, b)
    ]
    return metrics.frechet_distance(*shrunk)


def its_root(a: Tensor, b: Tensor) -> float:
    return metrics.frechet_distance(a, b) ** 0.5


def no_cross_term(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return means_only(a, b) + float(torch.cov(a.T).trace() + torch.cov(b.T).trace())


FRECHET = Exercise(
    name="frechet_distance",
    topic="training",
    points=3,
    difficulty=3,
    signature="def frechet_distance(a: Tensor, b: Tensor) -> float:",
    task="How far apart two sets of features (n, F) and (m, F) are, each taken as a Gaussian:\n"
    "|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B their covariances (divided by\n"
    "n - 1 and m - 1). In float64. The trace of a root is the sum of the eigenvalues' roots.",
    specification=frechet_spec,
    reference=metrics.frechet_distance,
    cases=feature_cases,
    mutants=(
        Mutant(means_only, "Two clouds with one centre can still differ in their spread."),
        Mutant(spread_only, "Where the clouds are counts as well: the means."),
        Mutant(features_apart, "Features go together: the covariances have entries off the "
               "diagonal."),
        Mutant(divided_by_n, "The covariances are divided by n - 1 and m - 1."),
        Mutant(its_root, "The distance is given squared; take no root at the end."),
        Mutant(no_cross_term, "Of two equal sets the distance should be 0: what is taken away?"),
    ),
    why="With other features it is the FID that papers report.",
    where="nanosd3/metrics.py, frechet_distance",
    names=("a", "b"),
    differentiable=False,
    other_devices=False,
    tolerance=1e-4,
)  # fmt: skip

EXERCISES = (FRECHET,)
