"""Exercises on ODE solvers: following a velocity field from noise (t = 1) to data (t = 0)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nanosd3 import flow, samplers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal
from nanosd3.exercises.grader.sandbox import FIELD

Velocity = Callable[[Tensor, Tensor], Tensor]


def solver_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            f"{steps} steps, shift {alpha}",
            (FIELD, normal(generator, 2, 3, 4), flow.schedule(steps, alpha)),
        )
        for steps, alpha in ((5, 3.0), (3, 1.0), (2, 1.0))
    ]


def euler_spec(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for i in range(len(ts) - 1):
        v = velocity(z, ts[i])
        z = z + (ts[i + 1] - ts[i]) * v  # a step back in time: the difference is negative
    return z


def euler_uphill(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for t, t_next in pairwise(ts):
        z = z + (t - t_next) * velocity(z, t)
    return z


def euler_at_the_end(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for t, t_next in pairwise(ts):
        z = z + (t_next - t) * velocity(z, t_next)
    return z


def euler_too_short(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return samplers.euler(velocity, z, ts[:-1])


def euler_even_steps(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for t in ts[:-1]:
        z = z - velocity(z, t) / (len(ts) - 1)
    return z


EULER = Exercise(
    name="euler",
    topic="solvers",
    points=2,
    difficulty=1,
    signature="def euler(velocity: Callable, z: Tensor, ts: Tensor) -> Tensor:",
    task="Follow velocity(z, t) from noise z at ts[0] = 1 to ts[-1] = 0 in straight steps, each\n"
    "along the velocity at its start; ts is descending. Call velocity once per step.",
    specification=euler_spec,
    reference=samplers.euler,
    cases=solver_cases,
    mutants=(
        Mutant(euler_uphill, "t falls from 1 to 0, so a step in time is negative."),
        Mutant(euler_at_the_end, "Evaluate the velocity at the start of the step, not at its end."),
        Mutant(euler_too_short, "The last step, to t = 0, is missing."),
        Mutant(euler_even_steps, "Steps differ in length: ts says where each one ends."),
    ),
    why="Doubling the steps halves its error; straight paths would need only one.",
    where="nanosd3/samplers.py, euler",
    differentiable=False,
    names=("velocity", "z", "ts"),
)


def heun_spec(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for i in range(len(ts) - 1):
        dt = ts[i + 1] - ts[i]
        v = velocity(z, ts[i])
        ahead = z + dt * v  # where Euler's step would end
        if i == len(ts) - 2:
            z = ahead  # the last step is Euler's
        else:
            z = z + dt * (v + velocity(ahead, ts[i + 1])) / 2
    return z


def heun_to_the_end(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for t, t_next in pairwise(ts):
        v = velocity(z, t)
        z = z + (t_next - t) * (v + velocity(z + (t_next - t) * v, t_next)) / 2
    return z


def midpoint(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v = velocity(z, t)
        if i < len(ts) - 2:
            v = velocity(z + (t_next - t) / 2 * v, (t + t_next) / 2)
        z = z + (t_next - t) * v
    return z


def heun_from_here(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v = velocity(z, t)
        if i < len(ts) - 2:
            v = (v + velocity(z, t_next)) / 2
        z = z + (t_next - t) * v
    return z


def only_euler(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return samplers.euler(velocity, z, ts)


HEUN = Exercise(
    name="heun",
    topic="solvers",
    points=3,
    difficulty=2,
    signature="def heun(velocity: Callable, z: Tensor, ts: Tensor) -> Tensor:",
    task="As euler, but each step follows the mean of the velocities at its start and where\n"
    "Euler's step would end; the last step, to t = 0, is Euler's.",
    specification=heun_spec,
    reference=samplers.heun,
    cases=solver_cases,
    mutants=(
        Mutant(heun_to_the_end, "The last step is Euler's: the network has hardly seen t = 0."),
        Mutant(midpoint, "That is the midpoint method; Heun takes the mean over both ends."),
        Mutant(heun_from_here, "Evaluate the second velocity where Euler's step ends."),
        Mutant(only_euler, "You use one velocity per step; Heun uses two."),
    ),
    why="Twice the calls, and a quarter of the error at half the step size.",
    where="nanosd3/samplers.py, heun",
    differentiable=False,
    names=("velocity", "z", "ts"),
)


def dpmpp_spec(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    before: tuple[Tensor, Tensor] | None = None  # x0 and h of the previous step
    for i in range(len(ts) - 1):
        t, t_next = ts[i], ts[i + 1]
        x0 = z - t * velocity(z, t)  # the clean image the velocity points to
        guess = x0
        if t_next > 0:
            h = torch.log(t / t_next)
            if before is not None:
                x0_before, h_before = before
                k = h / (2 * h_before)
                guess = (1 + k) * x0 - k * x0_before  # extrapolate the line through both
            before = x0, h
        z = t_next / t * z + (1 - t_next / t) * guess
    return z


def without_half(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return two_step(velocity, z, ts, lambda h, h_before: h / h_before)


def upside_down(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return two_step(velocity, z, ts, lambda h, h_before: h_before / (2 * h))


def equal_steps(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return two_step(velocity, z, ts, lambda h, h_before: 0.5)


def two_step(
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
    weight: Callable[[Tensor, Tensor], Tensor | float],
) -> Tensor:
    """DPM++ 2M with another rule k = weight(h, h_before)."""
    before: tuple[Tensor, Tensor] | None = None
    for t, t_next in pairwise(ts):
        x0 = guess = z - t * velocity(z, t)
        if t_next > 0:
            h = torch.log(t / t_next)
            if before is not None:
                x0_before, h_before = before
                k = weight(h, h_before)
                guess = (1 + k) * x0 - k * x0_before
            before = x0, h
        z = t_next / t * z + (1 - t_next / t) * guess
    return z


DPMPP = Exercise(
    name="dpmpp_2m",
    topic="solvers",
    points=4,
    difficulty=3,
    signature="def dpmpp_2m(velocity: Callable, z: Tensor, ts: Tensor) -> Tensor:",
    task="DPM-Solver++ (2M), which remembers one step. At each step x0 = z - t v,\n"
    "h = log(t / t_next), k = h / (2 h_before), guess = (1 + k) x0 - k x0_before; then\n"
    "z = r z + (1 - r) guess, r = t_next / t. The first step and the one to t = 0 take guess = x0.",
    specification=dpmpp_spec,
    reference=samplers.dpmpp_2m,
    cases=solver_cases,
    mutants=(
        Mutant(without_half, "k is half the ratio of the two steps."),
        Mutant(upside_down, "k grows with this step and shrinks with the previous one."),
        Mutant(equal_steps, "Steps differ in length: k depends on both."),
        Mutant(
            only_euler,
            "Without memory this is exactly Euler's method; use the previous estimate too.",
        ),
    ),
    why="Second order at one call per step: the default of SD3.5.",
    where="nanosd3/samplers.py, dpmpp_2m",
    differentiable=False,
    other_devices=False,  # tests whether t_next is 0
    names=("velocity", "z", "ts"),
)

EXERCISES = (EULER, HEUN, DPMPP)
