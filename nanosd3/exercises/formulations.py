"""Exercises on what a network predicts, and at which times: formulations of one flow."""

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from nanosd3.claims import sd3_middle
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related.formulations import FORMULATIONS, deviation

# --- from v to the velocity -----------------------------------------------------------------------


def answer_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, *shape: int) -> Case:
        t = torch.rand(shape[0], generator=generator) * 0.8 + 0.1
        return Case(label, (normal(generator, *shape), normal(generator, *shape), t))

    single = (normal(generator, 3, 2), normal(generator, 3, 2), torch.tensor(0.7))
    return [
        case("latents (2, 3, 4, 5)", 2, 3, 4, 5),
        case("points (7, 2)", 7, 2),
        Case("one time for all", single),
        large("256 points", *case("", 256, 2).arguments),
    ]


def v_to_velocity_spec(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    velocity = torch.empty(z.shape, dtype=z.dtype)
    for i in range(len(z)):
        s = float(t[i] if t.ndim else t)
        n = math.sqrt((1 - s) ** 2 + s**2)
        equations = [[1 - s, s], [-s / n, (1 - s) / n]]  # of x0 and noise: those of z, and of v
        for k in range(z[i].numel()):
            known = [float(z[i].flatten()[k]), float(v[i].flatten()[k])]
            x0, noise = torch.linalg.solve(*map(torch.tensor, (equations, known))).tolist()
            velocity[i].view(-1)[k] = noise - x0
    return velocity


def v_to_velocity(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return FORMULATIONS["v/cos"].to_velocity(v, z, t)


def with_time(
    formula: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], v: Tensor, z: Tensor, t: Tensor
) -> Tensor:
    """formula(v, z, t, n), t and n shaped to fit."""
    t = t.view(-1, *[1] * (z.ndim - 1)) if t.ndim else t
    return formula(v, z, t, deviation(t))


def v_itself(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return v


def scale_forgotten(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return with_time(lambda v, z, t, n: (v - (1 - 2 * t) * z) / n**2, v, z, t)


def not_divided_by_squares(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return with_time(lambda v, z, t, n: n * v - (1 - 2 * t) * z, v, z, t)


def divided_by_n(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return with_time(lambda v, z, t, n: (n * v - (1 - 2 * t) * z) / n, v, z, t)


def clean_image(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return with_time(lambda v, z, t, n: z - t * v, v_to_velocity(v, z, t), z, t)


def noise_alone(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return with_time(lambda v, z, t, n: z + (1 - t) * v, v_to_velocity(v, z, t), z, t)


def image_minus_noise(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return -v_to_velocity(v, z, t)


def time_the_other_way(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return v_to_velocity(v, z, 1 - t)


def z_not_used(v: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return with_time(lambda v, z, t, n: v / n, v, z, t)


V_TO_VELOCITY = Exercise(
    name="v_to_velocity",
    topic="paths",
    points=2,
    difficulty=2,
    signature="def v_to_velocity(v: Tensor, z: Tensor, t: Tensor) -> Tensor:",
    task="A network was asked for v = ((1 - t) noise - t x0) / n, n = sqrt((1 - t)^2 + t^2), at\n"
    "z = (1 - t) x0 + t noise. Make rectified flow's velocity, noise - x0, of its answer: two\n"
    "equations, two unknowns. v and z are (B, ...); t is (B,), or () for one time shared by all.",
    specification=v_to_velocity_spec,
    reference=v_to_velocity,
    cases=answer_cases,
    mutants=(
        Mutant(v_itself, "v turns with t: only at t = 1/2 is it the velocity, up to a factor."),
        Mutant(scale_forgotten, "v was divided by n: multiply it by n first."),
        Mutant(
            not_divided_by_squares, "Combine the two equations once more: a factor is left over."
        ),
        Mutant(divided_by_n, "The factor that is left over is n squared, not n."),
        Mutant(clean_image, "That is x0; the velocity is the difference of noise and x0."),
        Mutant(noise_alone, "That is the noise; the velocity is the difference of noise and x0."),
        Mutant(image_minus_noise, "t grows towards noise; which way does yours point?"),
        Mutant(time_the_other_way, "Here t = 1 is noise: is 1 - t where t should be?"),
        Mutant(z_not_used, "One equation is not enough for two unknowns: z gives the other."),
    ),
    size_hint="t is (B,), z is (B, ...): give t trailing axes, as many as z has after the first.",
    why="So one sampler serves all formulations: only the network's target differs.",
    where="nanosd3/related/formulations.py, Formulation.to_velocity",
    tolerance=1e-4,
    names=("v", "z", "t"),
)

# --- how often a time is drawn --------------------------------------------------------------------


def edge_cases(generator: torch.Generator) -> list[Case]:
    def inside(count: int) -> Tensor:
        return torch.rand(count, generator=generator).sort().values

    return [
        Case("eighths", (torch.linspace(0, 1, 9),)),
        Case("uneven, inside", (torch.tensor([0.02, 0.1, 0.15, 0.6, 0.97]),)),
        Case("the middle", (torch.tensor([0.45, 0.55]),)),
        large("300 times", inside(300), lines=1500),
    ]


def share_of_draws_spec(edges: Tensor) -> Tensor:
    shares = []
    for low, high in pairwise(edges.tolist()):
        below = []  # the probability of a draw below each of the two
        for t in (low, high):
            normal_number = math.log(t / (1 - t)) if 0 < t < 1 else math.inf if t else -math.inf
            below.append(NormalDist().cdf(normal_number))
        shares.append(below[1] - below[0])
    return torch.tensor(shares, dtype=edges.dtype)


def share_of_draws(edges: Tensor) -> Tensor:
    shares = [sd3_middle.share_of_draws(a, b) for a, b in pairwise(edges.tolist())]
    return torch.tensor(shares, dtype=edges.dtype)


def below(edges: Tensor, std: float = 1.0) -> Tensor:
    """The probability of a draw below each edge."""
    return torch.special.ndtr(torch.logit(edges) / std)


def even_times(edges: Tensor) -> Tensor:
    return edges.diff()


def not_differences(edges: Tensor) -> Tensor:
    return below(edges)[1:]


def density_times_width(edges: Tensor) -> Tensor:
    t = (edges[1:] + edges[:-1]) / 2
    density = torch.exp(-torch.logit(t).square() / 2) / math.sqrt(2 * math.pi)
    return density / (t * (1 - t)) * edges.diff()


def normal_of_t(edges: Tensor) -> Tensor:
    return torch.special.ndtr(edges).diff()


def sigmoid_of_t(edges: Tensor) -> Tensor:
    return torch.special.ndtr(torch.sigmoid(edges)).diff()


def logistic(edges: Tensor) -> Tensor:
    return torch.sigmoid(torch.logit(edges) * 1.702).diff()  # a well-known approximation


def larger_deviation(edges: Tensor) -> Tensor:
    return below(edges, 1.7).diff()


def from_the_top(edges: Tensor) -> Tensor:
    return -below(edges).diff()


def logarithm_of_t(edges: Tensor) -> Tensor:
    return torch.special.ndtr(torch.log(edges)).diff()


SHARES = Exercise(
    name="share_of_draws",
    topic="claims",
    points=1,
    difficulty=2,
    signature="def share_of_draws(edges: Tensor) -> Tensor:",
    task="How often SD3's logit-normal(0, 1) draws a t between each two neighbours among the\n"
    "ascending times edges (k + 1,): shares (k,). t = sigmoid(n), n standard normal, and\n"
    "torch.special.ndtr is the distribution function of n. 0 and 1 may be among the edges.",
    specification=share_of_draws_spec,
    reference=share_of_draws,
    cases=edge_cases,
    mutants=(
        Mutant(even_times, "That is how often uniform times fall there."),
        Mutant(
            not_differences,
            "That is the share of all draws below a time; what lies between two of them?",
        ),
        Mutant(density_times_width, "Close: the density changes between two times, so integrate."),
        Mutant(normal_of_t, "n is normal, not t: go back from t to n first."),
        Mutant(sigmoid_of_t, "The sigmoid leads from n to t; here you need the way back."),
        Mutant(logistic, "Nearly: the logistic distribution is not the normal one."),
        Mutant(larger_deviation, "The deviation of n is 1."),
        Mutant(from_the_top, "Shares are not negative: larger minus smaller."),
        Mutant(logarithm_of_t, "The inverse of the sigmoid is log(t / (1 - t))."),
    ),
    why="The density is the only weight in SD3's loss, so this is where its training time goes.",
    where="nanosd3/claims/sd3_middle.py, share_of_draws (arXiv 2403.03206, eq. 19)",
    differentiable=False,
    other_devices=False,
    tolerance=1e-5,
    names=("edges",),
)

EXERCISES = (V_TO_VELOCITY, SHARES)
