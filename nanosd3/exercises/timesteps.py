"""Exercises on the densities from which training timesteps are drawn."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from nanosd3 import flow
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large


def uniform_numbers(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64).float() * 0.98 + 0.01


def logit_normal_cases(generator: torch.Generator) -> list[Case]:
    u = torch.cat([uniform_numbers(generator, 7), torch.tensor([0.001, 0.998])])
    pairs = ((0.0, 1.0), (0.8, 1.0), (-0.5, 0.6))
    many = large("1000 numbers", uniform_numbers(generator, 1000), 0.2, 0.9)
    return [*(Case(f"mean {m}, std {s}", (u, m, s)) for m, s in pairs), many]


def logit_normal_spec(u: Tensor, mean: float, std: float) -> Tensor:
    """A normal variable, from the inverse of its distribution, squeezed into (0, 1)."""
    numbers = []
    for probability in u.tolist():
        n = NormalDist(mean, std).inv_cdf(probability)
        numbers.append(1 / (1 + math.exp(-n)))
    return torch.tensor(numbers, dtype=u.dtype)


def mean_forgotten(u: Tensor, mean: float, std: float) -> Tensor:
    return flow.logit_normal(u, 0.0, std)


def std_forgotten(u: Tensor, mean: float, std: float) -> Tensor:
    return flow.logit_normal(u, mean, 1.0)


def variance_for_std(u: Tensor, mean: float, std: float) -> Tensor:
    return flow.logit_normal(u, mean, std**2)


def mirrored(u: Tensor, mean: float, std: float) -> Tensor:
    return flow.logit_normal(u, -mean, std)


def tanh_instead(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.tanh(mean + std * torch.special.ndtri(u))


def no_sigmoid(u: Tensor, mean: float, std: float) -> Tensor:
    return mean + std * torch.special.ndtri(u)


def normal_density(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid((u - mean) / std)


def uniform_for_normal(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * u)


def normal_for_sigmoid(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.special.ndtr(mean + std * torch.special.ndtri(u))


def mean_times_std(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid((mean + torch.special.ndtri(u)) * std)


LOGIT_NORMAL = Exercise(
    name="logit_normal",
    topic="flow",
    points=2,
    difficulty=2,
    signature="def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:",
    task="Map u, uniform in (0, 1) and of any shape, to timesteps: t = sigmoid(n), where n is\n"
    "normal with the given mean and standard deviation (torch.special.ndtri inverts the\n"
    "distribution function of the standard normal).",
    specification=logit_normal_spec,
    reference=flow.logit_normal,
    cases=logit_normal_cases,
    mutants=(
        Mutant(mean_forgotten, "The mean is not used."),
        Mutant(std_forgotten, "The standard deviation is not used."),
        Mutant(variance_for_std, "std is a standard deviation, not a variance."),
        Mutant(mirrored, "A positive mean should favour noise, t near 1."),
        Mutant(tanh_instead, "tanh reaches from -1 to 1; t lies between 0 and 1."),
        Mutant(no_sigmoid, "A normal variable can take any value; what squeezes it into (0, 1)?"),
        Mutant(normal_density, "u is uniform; turn it into a normal variable first."),
        Mutant(uniform_for_normal, "u is uniform; ndtri turns it into a normal variable."),
        Mutant(
            normal_for_sigmoid,
            "The last step is a sigmoid: the normal distribution function undoes ndtri.",
        ),
        Mutant(mean_times_std, "Scale by std first, then add the mean."),
    ),
    why="SD3's choice: the middle of the path decides what the image shows, so train there most.",
    where="nanosd3/flow.py, logit_normal (paper, eq. 19)",
    differentiable=False,
    tolerance=1e-4,
    names=("u", "mean", "std"),
)


def mode_cases(generator: torch.Generator) -> list[Case]:
    cases = [Case(f"scale {s}", (uniform_numbers(generator, 9), s)) for s in (1.29, -0.5, 0.4)]
    return [*cases, large("1000 numbers", uniform_numbers(generator, 1000), 0.8)]


def mode_spec(u: Tensor, scale: float) -> Tensor:
    return torch.tensor(
        [1 - x - scale * (math.cos(math.pi / 2 * x) ** 2 - 1 + x) for x in u.tolist()],
        dtype=u.dtype,
    )


def plus_scale(u: Tensor, scale: float) -> Tensor:
    return 1 - u + scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def no_square(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) - 1 + u)


def whole_pi(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi * u) ** 2 - 1 + u)


def mode_of_one_minus_u(u: Tensor, scale: float) -> Tensor:
    return flow.mode(1 - u, scale)


def sine_for_cosine(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.sin(math.pi / 2 * u) ** 2 - 1 + u)


def scale_on_all(u: Tensor, scale: float) -> Tensor:
    return 1 - scale * flow.mode(u, 1.0)


MODE = Exercise(
    name="mode",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def mode(u: Tensor, scale: float) -> Tensor:",
    task="The paper's mode density, as a map from uniform u, of any shape, to t (eq. 20):\n"
    "t = 1 - u - s (cos^2(pi u / 2) - 1 + u).",
    specification=mode_spec,
    reference=flow.mode,
    cases=mode_cases,
    mutants=(
        Mutant(plus_scale, "A positive scale should concentrate t in the middle; is a sign wrong?"),
        Mutant(no_square, "The cosine is squared."),
        Mutant(whole_pi, "A quarter turn, pi / 2, as u goes from 0 to 1."),
        Mutant(mode_of_one_minus_u, "That is the mode of 1 - u: at u = 0 the result is 1."),
        Mutant(sine_for_cosine, "The cosine, not the sine: at u = 0 the bracket is 0."),
        Mutant(scale_on_all, "Only the bracket is multiplied by the scale."),
    ),
    why="Unlike the logit-normal, it never neglects the ends.",
    where="nanosd3/flow.py, mode (paper, eq. 20)",
    names=("u", "scale"),
)


def cosmap_cases(generator: torch.Generator) -> list[Case]:
    cases = [Case(f"{n} numbers", (uniform_numbers(generator, n),)) for n in (9, 4)]
    return [*cases, large("1000 numbers", uniform_numbers(generator, 1000))]


def cosmap_spec(u: Tensor) -> Tensor:
    return torch.tensor(
        [1 - 1 / (math.tan(math.pi / 2 * x) + 1) for x in u.tolist()], dtype=u.dtype
    )


def cosmap_mirrored(u: Tensor) -> Tensor:
    return 1 / (torch.tan(math.pi / 2 * u) + 1)


def cosmap_whole_pi(u: Tensor) -> Tensor:
    return 1 - 1 / (torch.tan(math.pi * u) + 1)


def cosine_itself(u: Tensor) -> Tensor:
    return 1 - torch.cos(math.pi / 2 * u)


def cosmap_without_pi(u: Tensor) -> Tensor:
    return 1 - 1 / (torch.tan(u) + 1)


def one_minus_forgotten(u: Tensor) -> Tensor:
    return torch.tan(math.pi / 2 * u)


COSMAP = Exercise(
    name="cosmap",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def cosmap(u: Tensor) -> Tensor:",
    task="Map uniform u, of any shape, to t such that the log-SNR is that of the cosine schedule\n"
    "(eq. 21): t = 1 - 1 / (tan(pi u / 2) + 1).",
    specification=cosmap_spec,
    reference=flow.cosmap,
    cases=cosmap_cases,
    mutants=(
        Mutant(cosmap_mirrored, "u = 0 should give t = 0; yours runs the other way."),
        Mutant(
            cosmap_whole_pi,
            "Only a quarter turn, pi / 2: that is where the tangent becomes infinite.",
        ),
        Mutant(
            cosine_itself,
            "The line's noise levels differ from the cosine path's: what is kept is the "
            "ratio of noise to data, tan(pi u / 2).",
        ),
        Mutant(cosmap_without_pi, "The angle is pi u / 2: at u = 1 it is a quarter turn."),
        Mutant(
            one_minus_forgotten,
            "The tangent is noise over data; turn that ratio into a time in (0, 1).",
        ),
    ),
    why="Matching the log-SNR carries a density that worked for another path over to this one.",
    where="nanosd3/flow.py, cosmap (paper, eq. 21)",
    names=("u",),
)


EXERCISES = (LOGIT_NORMAL, MODE, COSMAP)
