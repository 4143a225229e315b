"""Exercises on time in sampling: the shift for larger images, the schedule."""

import torch
from torch import Tensor

from nanosd3 import flow
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large
from nanosd3.exercises.timesteps import uniform_numbers


def shift_cases(generator: torch.Generator) -> list[Case]:
    cases = [Case(f"alpha {a}", (uniform_numbers(generator, 9), a)) for a in (3.0, 0.5, 1.0)]
    return [*cases, large("1000 times", uniform_numbers(generator, 1000), 3.0)]


def shift_spec(t: Tensor, alpha: float) -> Tensor:
    """A constant step of log-SNR: the odds of noise, t / (1 - t), are multiplied by alpha."""
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


def shift_of_one_minus_t(t: Tensor, alpha: float) -> Tensor:
    return flow.shift(1 - t, alpha)


def root_of_alpha(t: Tensor, alpha: float) -> Tensor:
    return flow.shift(t, alpha**0.5)


def odds_themselves(t: Tensor, alpha: float) -> Tensor:
    return alpha * t / (1 - t)


def alpha_added(t: Tensor, alpha: float) -> Tensor:
    return torch.sigmoid(t.logit() + alpha)


SHIFT = Exercise(
    name="shift",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def shift(t: Tensor, alpha: float) -> Tensor:",
    task="Move times t in (0, 1), of any shape, towards noise, as larger images need it: multiply\n"
    "the odds t / (1 - t) by alpha.",
    specification=shift_spec,
    reference=flow.shift,
    cases=shift_cases,
    mutants=(
        Mutant(towards_data, "alpha above 1 should move t up, towards noise."),
        Mutant(scaled_only, "t = 1 should stay at 1."),
        Mutant(plus_one_forgotten, "t = 1 should stay at 1; look at the denominator."),
        Mutant(shifted_twice, "The shift is applied twice: shifts multiply."),
        Mutant(shift_of_one_minus_t, "That shifts 1 - t: here t = 0 is data and t = 1 noise."),
        Mutant(root_of_alpha, "alpha itself multiplies the odds, not its root."),
        Mutant(
            odds_themselves, "Those are the odds, from 0 to infinity: turn them back into a time."
        ),
        Mutant(alpha_added, "alpha multiplies the odds; in the logit that adds its logarithm."),
    ),
    why="Neighbouring pixels of a large image are redundant: the same noise hides less.",
    where="nanosd3/flow.py, shift (paper, eq. 23)",
    names=("t", "alpha"),
)


def schedule_cases(generator: torch.Generator) -> list[Case]:
    cases = [Case(f"{n} steps, shift {a}", (n, a)) for n, a in ((4, 3.0), (7, 1.0), (2, 0.5))]
    return [*cases, large("300 steps", 300, 3.0)]


def schedule_spec(steps: int, alpha: float) -> Tensor:
    """Evenly spaced from 1 to the shifted 0.001, each shifted again, then 0."""
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


def ends_at_smallest(steps: int, alpha: float) -> Tensor:
    return flow.shift(torch.linspace(1, 0.001, steps + 1), alpha)


def ends_above_zero(steps: int, alpha: float) -> Tensor:
    return flow.schedule(steps, alpha).clamp(min=1e-7)


def upwards(steps: int, alpha: float) -> Tensor:
    return flow.schedule(steps, alpha).flip(0)


def one_too_few(steps: int, alpha: float) -> Tensor:
    return flow.schedule(steps, alpha)[:-1]


def one_too_many(steps: int, alpha: float) -> Tensor:
    return flow.schedule(steps + 1, alpha)


SCHEDULE = Exercise(
    name="schedule",
    topic="flow",
    points=2,
    difficulty=2,
    signature="def schedule(steps: int, alpha: float) -> Tensor:",
    task="The times (steps + 1,) at which the official models are sampled: evenly spaced from 1\n"
    "down to shift(0.001), all of them shifted (so the last is shifted twice), then 0.",
    specification=schedule_spec,
    reference=flow.schedule,
    cases=schedule_cases,
    mutants=(
        Mutant(
            even_then_shifted,
            "The last time above 0 is too large: the official schedule stops at "
            "shift(0.001), not one even step before 0.",
        ),
        Mutant(without_zero, "The last time is 0: the image should be clean."),
        Mutant(not_shifted, "alpha is not used."),
        Mutant(
            shifted_once,
            "Shift the smallest time, space the others evenly above it, then shift all of them.",
        ),
        Mutant(
            ends_at_smallest, "It stops above 0: after the evenly spaced times comes one more, 0."
        ),
        Mutant(ends_above_zero, "The last time is exactly 0: solvers test for it."),
        Mutant(upwards, "Sampling goes from noise, t = 1, down to data."),
        Mutant(one_too_few, "The last time, 0, is missing: n steps need n + 1 times."),
        Mutant(one_too_many, "n steps need n + 1 times; 0 is one of them."),
    ),
    exact_zeros=True,
    why="diffusers and Stability's code do it this way, and pixels depend on it.",
    where="nanosd3/flow.py, schedule",
    differentiable=False,
    other_devices=False,  # takes no tensors
    names=("steps", "alpha"),
)


EXERCISES = (SHIFT, SCHEDULE)
