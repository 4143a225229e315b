"""Exercises on time and the flow: the line from data to noise, densities of t, shift, schedule."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from nanosd3 import flow
from nanosd3.exercises.base import Case, Exercise, Mutant, normal

# --- the line -----------------------------------------------------------------------------------


def line_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, *shape: int) -> Case:
        t = torch.rand(shape[0], generator=generator) * 0.8 + 0.1
        return Case(label, (normal(generator, *shape), normal(generator, *shape), t))

    single = Case("one time for all", (normal(generator, 3, 2), normal(generator, 3, 2),
                                       torch.tensor(0.3)))  # fmt: skip
    return [case("images (2, 3, 4, 5)", 2, 3, 4, 5), case("points (7, 2)", 7, 2), single]


def interpolate_spec(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    z = torch.empty_like(x0)
    for b in range(len(x0)):
        share = t[b] if t.ndim else t
        z[b] = (1 - share) * x0[b] + share * noise[b]
    return z


def other_direction(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return flow.interpolate(noise, x0, t)


def variance_preserving(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    return torch.cos(math.pi / 2 * t) * x0 + torch.sin(math.pi / 2 * t) * noise


def first_time_for_all(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return flow.interpolate(x0, noise, t.reshape(-1)[0])


def noise_added(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    return x0 + t * noise


INTERPOLATE = Exercise(
    name="interpolate",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:",
    task="The noisy latents z_t on the straight line from data x0 (t = 0) to noise (t = 1).\n"
    "x0 and noise are (B, ...), t is (B,), or () for one time for all.",
    specification=interpolate_spec,
    reference=flow.interpolate,
    cases=line_cases,
    mutants=(
        Mutant(other_direction, "At t = 0 the result should be the data; where is it now?"),
        Mutant(variance_preserving, "A straight line has no sines in it; rectified flow's "
               "path is the simplest one there is."),
        Mutant(first_time_for_all, "Every sample has a time of its own; is only one used?"),
        Mutant(noise_added, "At t = 1 nothing of the data should be left."),
    ),
    why="Straight lines are what makes few solver steps enough.",
    where="nanosd3/flow.py, interpolate",
    names=("x0", "noise", "t"),
)  # fmt: skip


def pair_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", (normal(generator, *shape), normal(generator, *shape)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ]


def velocity_spec(x0: Tensor, noise: Tensor) -> Tensor:
    """How far z_t moves, number by number, as t goes from 0 (data) to 1 (noise)."""
    v = torch.empty_like(x0)
    for i, (start, end) in enumerate(zip(x0.flatten(), noise.flatten(), strict=True)):
        v.view(-1)[i] = end - start
    return v


def from_noise_to_data(x0: Tensor, noise: Tensor) -> Tensor:
    return x0 - noise


def the_noise(x0: Tensor, noise: Tensor) -> Tensor:
    return noise + 0 * x0


def the_sum(x0: Tensor, noise: Tensor) -> Tensor:
    return noise + x0


VELOCITY = Exercise(
    name="velocity_target",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:",
    task="dz/dt along the line z_t = (1 - t) x0 + t noise, which the network learns. All (B, ...).",
    specification=velocity_spec,
    reference=flow.velocity_target,
    cases=pair_cases,
    mutants=(
        Mutant(from_noise_to_data, "t grows towards noise here; which way does yours point?"),
        Mutant(the_noise, "That is what DDPM predicts; the slope of a line needs both its ends."),
        Mutant(the_sum, "The slope is a difference of the ends."),
    ),
    why="Sign errors here are the commonest of all: half of the papers let time run the other way.",
    where="nanosd3/flow.py, velocity_target",
    names=("x0", "noise"),
)


def loss_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", tuple(normal(generator, *shape) for _ in range(3)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ]


def loss_spec(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    losses = []
    for v, a, b in zip(velocity, x0, noise, strict=True):
        total = 0.0
        for got, data, eps in zip(v.flatten(), a.flatten(), b.flatten(), strict=True):
            total = total + (got - (eps - data)) ** 2
        losses.append(total / v.numel())
    return torch.stack(losses)


def one_number(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, x0, noise).mean().expand(len(x0))


def summed(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, x0, noise) * x0[0].numel()


def absolute(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return (velocity - (noise - x0)).abs().flatten(1).mean(1)


def wrong_sign(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, noise, x0)


LOSS = Exercise(
    name="flow_loss",
    topic="flow",
    points=2,
    difficulty=1,
    signature="def flow_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:",
    task="Mean square error between the predicted velocity and the target, one number for each\n"
    "sample: (B, ...) three times -> (B,).",
    specification=loss_spec,
    reference=flow.flow_loss,
    cases=loss_cases,
    mutants=(
        Mutant(one_number, "Each sample has its own loss; yours is averaged over the batch."),
        Mutant(summed, "A mean, not a sum: else the loss grows with the size of the image."),
        Mutant(absolute, "Squares, not absolute values: the best answer should be the mean."),
        Mutant(wrong_sign, "The target is the velocity towards noise; is its sign right?"),
    ),
    why="One loss a sample lets you see at which t the model is weak.",
    where="nanosd3/flow.py, flow_loss",
    names=("velocity", "x0", "noise"),
)

# --- densities of t -----------------------------------------------------------------------------


def uniform_numbers(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64).float() * 0.98 + 0.01


def logit_normal_cases(generator: torch.Generator) -> list[Case]:
    u = uniform_numbers(generator, 9)
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

EXERCISES = (INTERPOLATE, VELOCITY, LOSS, LOGIT_NORMAL, MODE, SHIFT, SCHEDULE)
