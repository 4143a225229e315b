"""Exercises on evaluating samples."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.training import metrics


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
        Case("large mean", (normal(generator, 9, 3) + 1000, normal(generator, 8, 3) + 1000)),
        Case("different mean only", (same, same + 2)),
        large("300 samples", *case("", 300, 250, 4).arguments),
    ]


def frechet_spec(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()

    def covariance(x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
        for row in x:
            total = total + torch.outer(row - x.mean(0), row - x.mean(0))
        return total / (len(x) - 1)

    A, B = covariance(a), covariance(b)
    roots = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt()  # eigenvalues of (A B)^(1/2)
    difference = a.mean(0) - b.mean(0)
    return float(sum(difference**2) + A.trace() + B.trace() - 2 * sum(roots))


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


def root_of_trace(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    return means_only(a, b) + float(A.trace() + B.trace() - 2 * (A @ B).trace().sqrt())


def root_of_each_entry(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    cross = (A @ B).diagonal().clamp(min=0).sqrt().sum()
    return means_only(a, b) + float(A.trace() + B.trace() - 2 * cross)


def cross_term_once(a: Tensor, b: Tensor) -> float:
    return (metrics.frechet_distance(a, b) + no_cross_term(a, b)) / 2


def distance_not_squared(a: Tensor, b: Tensor) -> float:
    return metrics.frechet_distance(a, b) - means_only(a, b) + means_only(a, b) ** 0.5


FRECHET = Exercise(
    name="frechet_distance",
    topic="training",
    points=3,
    difficulty=3,
    signature="def frechet_distance(a: Tensor, b: Tensor) -> float:",
    task="The Frechet distance of two sets of features (n, F) and (m, F), each taken as a\n"
    "Gaussian: |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B their covariances\n"
    "(divided by n - 1 and m - 1), in float64. The trace of a matrix square root is the sum of\n"
    "the square roots of the eigenvalues; what is negative or imaginary in these is rounding, so\n"
    "take it as 0.",
    specification=frechet_spec,
    reference=metrics.frechet_distance,
    cases=feature_cases,
    mutants=(
        Mutant(means_only, "Two clouds with the same centre can still differ in their spread."),
        Mutant(spread_only, "The positions of the clouds count too: compare the means."),
        Mutant(
            features_apart,
            "Features are correlated: the covariances have entries off the diagonal.",
        ),
        Mutant(divided_by_n, "The covariances are divided by n - 1 and m - 1."),
        Mutant(its_root, "The result is the squared distance; take no root at the end."),
        Mutant(no_cross_term, "The distance of two equal sets should be 0: what is subtracted?"),
        Mutant(
            root_of_trace,
            "The trace of the root, not the root of the trace: roots of the eigenvalues, summed.",
        ),
        Mutant(
            root_of_each_entry,
            "The root of a matrix is not that of its entries: use the eigenvalues.",
        ),
        Mutant(cross_term_once, "The cross term counts twice."),
        Mutant(distance_not_squared, "The distance of the means is squared."),
    ),
    why="With the features of an Inception network it is the FID that papers report.",
    where="nanosd3/training/metrics.py, frechet_distance",
    names=("a", "b"),
    differentiable=False,
    other_devices=False,
    tolerance=1e-4,
)


EXERCISES = (FRECHET,)
