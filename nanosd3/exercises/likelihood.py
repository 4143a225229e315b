"""An exercise on the likelihood of data under a flow."""

import math

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related import likelihood
from nanosd3.samplers import euler


def linear_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, B: int, D: int, ts: Tensor) -> Case:
        return Case(label, (normal(generator, D, D), normal(generator, B, D), ts))

    return [
        case("5 points in the plane, 4 steps", 5, 2, torch.linspace(0, 1, 5)),
        case("uneven steps", 4, 3, torch.tensor([0.0, 0.5, 0.8, 1.0])),
        case("from t = 0.2 on", 2, 5, torch.tensor([0.2, 0.4, 1.0])),
        large(
            "64 points, 10 steps", *case("", 64, 4, torch.linspace(0, 1, 11)).arguments, lines=1000
        ),
    ]


def log_likelihood_spec(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    D, found = len(A), []
    for z in x0:
        spread = A.new_zeros(())  # the integral of the divergence
        for k in range(len(ts) - 1):
            t, h = ts[k], ts[k + 1] - ts[k]
            spread = spread + h * sum(t * A[i, i] for i in range(D))
            z = torch.stack([z[i] + h * t * sum(A[i] * z) for i in range(D)])
        prior = sum(-(z[i] ** 2) / 2 - math.log(2 * math.pi) / 2 for i in range(D))
        found.append(prior + spread)
    return torch.stack(found)


def log_likelihood(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return likelihood.log_likelihood(lambda z, t: t * z @ A.T, x0, ts, solver=euler)


def end_of(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    """Where x0 comes from."""
    return euler(lambda z, t: t * z @ A.T, x0, ts)


def spread_of(A: Tensor, ts: Tensor) -> Tensor:
    """The integral of the divergence."""
    return (ts.diff() * ts[:-1]).sum() * A.trace()


def prior(z: Tensor) -> Tensor:
    return likelihood.prior_log_density(z, 1.0)


def divergence_subtracted(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(end_of(A, x0, ts)) - spread_of(A, ts)


def divergence_forgotten(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(end_of(A, x0, ts))


def prior_of_the_data(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(x0) + spread_of(A, ts)


def all_entries(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(end_of(A, x0, ts)) + (ts.diff() * ts[:-1]).sum() * A.sum()


def determinant(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(end_of(A, x0, ts)) + (ts.diff() * ts[:-1]).sum() * torch.linalg.det(A)


def time_not_in_trace(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(end_of(A, x0, ts)) + (ts[-1] - ts[0]) * A.trace()


def steps_not_in_trace(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(end_of(A, x0, ts)) + ts[:-1].sum() * A.trace()


def trace_at_the_ends(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return prior(end_of(A, x0, ts)) + (ts.diff() * ts[1:]).sum() * A.trace()


def two_pi_forgotten(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return log_likelihood(A, x0, ts) + len(A) * math.log(2 * math.pi) / 2


def two_pi_once(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return log_likelihood(A, x0, ts) + (len(A) - 1) * math.log(2 * math.pi) / 2


def matrix_transposed(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return log_likelihood(A.T, x0, ts)


def probability(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:
    return log_likelihood(A, x0, ts).exp()


LOG_LIKELIHOOD = Exercise(
    name="log_likelihood",
    topic="paths",
    points=3,
    difficulty=2,
    signature="def log_likelihood(A: Tensor, x0: Tensor, ts: Tensor) -> Tensor:",
    task="log p(x0) of points x0 (B, D), as (B,), under the flow of the velocity v(z, t) = t A z,\n"
    "with A (D, D), from data to noise N(0, 1): follow it by Euler's method from x0 along the\n"
    "ascending times ts, add up the divergence on the way, and add the log density of the noise\n"
    "where it ends. (A loop over the steps is fine.)",
    specification=log_likelihood_spec,
    reference=log_likelihood,
    cases=linear_cases,
    mutants=(
        Mutant(
            divergence_subtracted,
            "If the path to noise expands volume, is the density of the data higher than that "
            "of the noise, or lower?",
        ),
        Mutant(divergence_forgotten, "The flow changes volumes on the way: what measures that?"),
        Mutant(prior_of_the_data, "N(0, 1) is the density of the noise: at which end is that?"),
        Mutant(all_entries, "A divergence is the sum of dv_i / dz_i, for the same i."),
        Mutant(determinant, "The rate at which volume grows is a sum, not a determinant."),
        Mutant(time_not_in_trace, "The derivative of t A z is t A: the divergence depends on t."),
        Mutant(
            steps_not_in_trace, "This is an integral: each step counts in proportion to its length."
        ),
        Mutant(trace_at_the_ends, "Euler's method evaluates everything at the start of a step."),
        Mutant(
            two_pi_forgotten,
            "The density of N(0, 1) has a constant factor: what would its integral be without it?",
        ),
        Mutant(two_pi_once, "The constant of N(0, 1) counts once for each of the D numbers."),
        Mutant(matrix_transposed, "Points are the rows of x0: how is A z written for rows?"),
        Mutant(probability, "Return the logarithm of the density, not the density."),
    ),
    why="The one score of a flow that needs no samples; papers give it in bits per dimension.",
    where="nanosd3/related/likelihood.py, log_likelihood (arXiv 2210.02747, appendix C)",
    differentiable=False,
    tolerance=1e-4,
    slow_hint="Replace the loops over points and their numbers by operations on whole tensors.",
    names=("A", "x0", "ts"),
)

EXERCISES = (LOG_LIKELIHOOD,)
