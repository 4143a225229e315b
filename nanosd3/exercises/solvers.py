"""Exercises on ODE solvers: following a velocity field from noise (t = 1) to data (t = 0)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nanosd3 import flow, samplers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal
from nanosd3.exercises.grader.recording import FIELD

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


def euler_at_once(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return z - velocity(z, ts[0])


def euler_from_the_start(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    start = z
    for t, t_next in pairwise(ts):
        z = z + (t_next - t) * velocity(start, t)
    return z


def euler_times_backwards(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return samplers.euler(velocity, z, ts.flip(0))


def euler_whole_time(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for t in ts[:-1]:
        z = z - t * velocity(z, t)
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
        Mutant(
            euler_at_once,
            "That is a single step: paths bend, so ask for the velocity again at every time.",
        ),
        Mutant(euler_from_the_start, "Ask for the velocity where z is now, not where it began."),
        Mutant(euler_times_backwards, "ts falls from 1 to 0 already; do not reverse it."),
        Mutant(euler_whole_time, "A step goes from t to the next time, not all the way to 0."),
    ),
    formulas="for i = 0, 1, ..., n - 1, where ts holds n + 1 times:\n"
    "    z[i+1] = z[i] + (ts[i+1] - ts[i]) velocity(z[i], ts[i])\n"
    "The time difference is negative. z[0] is z; z[n] is the result.",
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


def heun_by(
    second: Callable[[Velocity, Tensor, Tensor, Tensor, Tensor], Tensor],
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
) -> Tensor:
    """Steps whose last is Euler's; the others follow second(velocity, z, v, t, t_next)."""
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v = velocity(z, t)
        z = z + (t_next - t) * (second(velocity, z, v, t, t_next) if i < len(ts) - 2 else v)
    return z


def positions_averaged(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def second(f: Velocity, z: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return v + f(z + (t_next - t) * v, t_next) / 2  # the mean of one step and of two

    return heun_by(second, velocity, z, ts)


def slope_of_mean_position(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def second(f: Velocity, z: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return (v + f(z + (t_next - t) * v / 2, t_next)) / 2

    return heun_by(second, velocity, z, ts)


def second_slope_at_t_i(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def second(f: Velocity, z: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return (v + f(z + (t_next - t) * v, t)) / 2

    return heun_by(second, velocity, z, ts)


def slopes_added(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def second(f: Velocity, z: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return v + f(z + (t_next - t) * v, t_next)

    return heun_by(second, velocity, z, ts)


def second_slope_only(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def second(f: Velocity, z: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return f(z + (t_next - t) * v, t_next)

    return heun_by(second, velocity, z, ts)


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
        Mutant(
            positions_averaged,
            "Average the two velocities and take one step from z; do not average positions.",
        ),
        Mutant(
            slope_of_mean_position,
            "Take the second velocity at the end of Euler's step, not halfway.",
        ),
        Mutant(second_slope_at_t_i, "The second velocity belongs to the next time, ts[i+1]."),
        Mutant(slopes_added, "The mean of the two velocities, not their sum."),
        Mutant(second_slope_only, "The mean of both velocities, not the second alone."),
    ),
    formulas="for i = 0, 1, ..., n - 1, where ts holds n + 1 times:\n"
    "    h  = ts[i+1] - ts[i]\n"
    "    v  = velocity(z[i], ts[i])\n"
    "    v' = velocity(z[i] + h v, ts[i+1])\n"
    "    z[i+1] = z[i] + h (v + v') / 2, in the last step z[i] + h v\n"
    "z[0] is z; z[n] is the result.",
    why="Twice the calls, and a quarter of the error at half the step size.",
    where="nanosd3/samplers.py, heun",
    differentiable=False,
    names=("velocity", "z", "ts"),
)

EXERCISES = (EULER, HEUN)
