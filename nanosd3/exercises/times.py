"""Exercises on time: the densities to train at, the shift for larger images, the schedule."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from nanosd3 import flow
from nanosd3.exercises.base import Case, Exercise, Mutant

# --- densities of t -----------------------------------------------------------------------------


def uniform_numbers(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64).float() * 0.98 + 0.01


def logit_normal_cases(generator: torch.Generator) -> list[Case]:
    u = torch.cat([uniform_numbers(generator, 7), torch.tensor([0.001, 0.998])])
    return [Case(f"mean {m}, std {s}", (u, m, s)) for m, s in ((0.0, 1.0), (0.8, 1.0), (-0.5, 0.6))]


def logit_normal_spec(u: Tensor, mean: float, std: float) -> Tensor:
    """A normal number by the inverse of its distribution, squeezed into (0, 1)."""
    numbers = []
    for share in u.tolist():
        n = NormalDist(mean, std).inv_cdf(share)
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


def no_sigmoid(u: Tensor, mean: float, std: float) -> Tensor:
    return mean + std * torch.special.ndtri(u)


def normal_density(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid((u - mean) / std)


LOGIT_NORMAL = Exercise(
    name="logit_normal",
    topic="flow",
    points=2,
    difficulty=2,
    signature="def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:",
    task="Timesteps from numbers u, uniform in (0, 1), of any shape: t = sigmoid(n), where n is\n"
    "normal with this mean and standard deviation (torch.special.ndtri inverts the standard\n"
    "normal distribution).",
    specification=logit_normal_spec,
    reference=flow.logit_normal,
    cases=logit_normal_cases,
    mutants=(
        Mutant(mean_forgotten, "The mean is not used."),
        Mutant(std_forgotten, "The standard deviation is not used."),
        Mutant(variance_for_std, "std is a standard deviation, not a variance."),
        Mutant(mirrored, "A positive mean should favour noise, t near 1."),
        Mutant(no_sigmoid, "A normal number can lie anywhere; what squeezes it into (0, 1)?"),
        Mutant(normal_density, "u is uniform; first make a normal number of it."),
    ),
    why="SD3's choice: the middle of the way decides what the image shows, so train there.",
    where="nanosd3/flow.py, logit_normal (paper, eq. 19)",
    differentiable=False,
    tolerance=1e-4,
    names=("u", "mean", "std"),
)


def mode_cases(generator: torch.Generator) -> list[Case]:
    return [Case(f"scale {s}", (uniform_numbers(generator, 9), s)) for s in (1.29, -0.5, 0.4)]


def mode_spec(u: Tensor, scale: float) -> Tensor:
    return torch.tensor([
        1 - x - scale * (math.cos(math.pi / 2 * x) ** 2 - 1 + x) for x in u.tolist()
    ], dtype=u.dtype)  # fmt: skip


def plus_scale(u: Tensor, scale: float) -> Tensor:
    return 1 - u + scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def no_square(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) - 1 + u)


def whole_pi(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi * u) ** 2 - 1 + u)


MODE = Exercise(
    name="mode",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def mode(u: Tensor, scale: float) -> Tensor:",
    task="The paper's mode density, as a map of uniform u to t (eq. 20):\n"
    "t = 1 - u - s (cos^2(pi u / 2) - 1 + u), for u of any shape.",
    specification=mode_spec,
    reference=flow.mode,
    cases=mode_cases,
    mutants=(
        Mutant(plus_scale, "A positive scale should gather t in the middle; is a sign wrong?"),
        Mutant(no_square, "The cosine is squared."),
        Mutant(whole_pi, "A quarter turn, pi / 2, from u = 0 to u = 1."),
    ),
    why="Unlike the logit-normal it never forgets the ends.",
    where="nanosd3/flow.py, mode (paper, eq. 20)",
    names=("u", "scale"),
)


def cosmap_cases(generator: torch.Generator) -> list[Case]:
    return [Case(f"{n} numbers", (uniform_numbers(generator, n),)) for n in (9, 4)]


def cosmap_spec(u: Tensor) -> Tensor:
    return torch.tensor([
        1 - 1 / (math.tan(math.pi / 2 * x) + 1) for x in u.tolist()
    ], dtype=u.dtype)  # fmt: skip


def cosmap_mirrored(u: Tensor) -> Tensor:
    return 1 / (torch.tan(math.pi / 2 * u) + 1)


def cosmap_whole_pi(u: Tensor) -> Tensor:
    return 1 - 1 / (torch.tan(math.pi * u) + 1)


def cosine_itself(u: Tensor) -> Tensor:
    return 1 - torch.cos(math.pi / 2 * u)


COSMAP = Exercise(
    name="cosmap",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def cosmap(u: Tensor) -> Tensor:",
    task="A map of uniform u, of any shape, to t: the log-SNR is the cosine schedule's (eq. 21):\n"
    "t = 1 - 1 / (tan(pi u / 2) + 1).",
    specification=cosmap_spec,
    reference=flow.cosmap,
    cases=cosmap_cases,
    mutants=(
        Mutant(cosmap_mirrored, "u = 0 should give t = 0; yours runs the other way."),
        Mutant(cosmap_whole_pi, "Only a quarter turn, pi / 2: there the tangent is infinite."),
        Mutant(cosine_itself, "The line has other noise levels than the cosine path: what is kept "
               "is the ratio of noise to data, tan(pi u / 2)."),
    ),
    why="A density that worked for another path can be carried over by its log-SNR.",
    where="nanosd3/flow.py, cosmap (paper, eq. 21)",
    names=("u",),
)  # fmt: skip

# --- shift and schedule -------------------------------------------------------------------------


def shift_cases(generator: torch.Generator) -> list[Case]:
    return [Case(f"alpha {a}", (uniform_numbers(generator, 9), a)) for a in (3.0, 0.5, 1.0)]


def shift_spec(t: Tensor, alpha: float) -> Tensor:
    """Equal steps of log-SNR: the odds of noise, t / (1 - t), are multiplied by alpha."""
    shifted = []
    for time in t.tolist():
        odds = alpha * time / (1 - time)
        shifted.append(odds / (1 + odds))
    return torch.tensor(shifted, dtype=t.dtype)


def towards_data(t: Tensor, alpha: float) -> Tensor:
    return flow.shift(t, 1 / alpha)


def scaled_only(t: Tensor, alpha: float) -> Tensor:
    return alpha * t


def plus_one_forgotten(t: Tensor, alpha: float) -> Tensor:
    return alpha * t / (1 + alpha * t)


def shifted_twice(t: Tensor, alpha: float) -> Tensor:
    return flow.shift(t, alpha**2)


SHIFT = Exercise(
    name="shift",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def shift(t: Tensor, alpha: float) -> Tensor:",
    task="Move times t in (0, 1), of any shape, towards noise for larger images:\n"
    "the odds t / (1 - t) are multiplied by alpha.",
    specification=shift_spec,
    reference=flow.shift,
    cases=shift_cases,
    mutants=(
        Mutant(towards_data, "alpha above 1 should move t up, towards noise."),
        Mutant(scaled_only, "t = 1 should stay at 1."),
        Mutant(plus_one_forgotten, "t = 1 should stay at 1; look at the denominator."),
        Mutant(shifted_twice, "The shift is applied twice: shifts multiply."),
    ),
    why="Neighbouring pixels of a large image repeat each other: the same noise hides less.",
    where="nanosd3/flow.py, shift (paper, eq. 23)",
    names=("t", "alpha"),
)


def schedule_cases(generator: torch.Generator) -> list[Case]:
    return [Case(f"{n} steps, shift {a}", (n, a)) for n, a in ((4, 3.0), (7, 1.0), (2, 0.5))]


def schedule_spec(steps: int, alpha: float) -> Tensor:
    """Evenly from 1 to the shifted 0.001, each shifted, then 0."""
    last = alpha * 0.001 / (1 + (alpha - 1) * 0.001)
    times = []
    for i in range(steps):
        u = 1 - (1 - last) * i / (steps - 1)
        times.append(alpha * u / (1 + (alpha - 1) * u))
    return torch.tensor([*times, 0.0])


def even_then_shifted(steps: int, alpha: float) -> Tensor:
    return flow.shift(torch.linspace(1, 0, steps + 1), alpha)


def without_zero(steps: int, alpha: float) -> Tensor:
    return torch.cat([flow.schedule(steps, alpha)[:-1], torch.tensor([0.001])])


def not_shifted(steps: int, alpha: float) -> Tensor:
    return flow.schedule(steps, 1.0)


def shifted_once(steps: int, alpha: float) -> Tensor:
    return torch.cat([flow.shift(torch.linspace(1, 0.001, steps), alpha), torch.zeros(1)])


SCHEDULE = Exercise(
    name="schedule",
    topic="flow",
    points=2,
    difficulty=2,
    signature="def schedule(steps: int, alpha: float) -> Tensor:",
    task="The times (steps + 1,) at which the official models are sampled: evenly from 1 down to\n"
    "shift(0.001), all of them shifted (so the last is shifted twice), then 0.",
    specification=schedule_spec,
    reference=flow.schedule,
    cases=schedule_cases,
    mutants=(
        Mutant(even_then_shifted, "The last time above zero is too large: the official schedule "
               "stops at shift(0.001), not one even step before 0."),
        Mutant(without_zero, "The last time is 0: the picture should be clean."),
        Mutant(not_shifted, "alpha is not used."),
        Mutant(shifted_once, "The smallest time is shifted before the others are spread, and "
               "then once more with them."),
    ),
    why="It is how diffusers and Stability's code do it, and pixels depend on it.",
    where="nanosd3/flow.py, schedule",
    differentiable=False,
    other_devices=False,  # nothing comes in
    names=("steps", "alpha"),
)  # fmt: skip

EXERCISES = (LOGIT_NORMAL, MODE, COSMAP, SHIFT, SCHEDULE)
