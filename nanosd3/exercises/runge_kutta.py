"""An exercise on the classical Runge-Kutta method."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nanosd3 import samplers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal
from nanosd3.exercises.grader.recording import FIELD
from nanosd3.related import solvers

Velocity = Callable[[Tensor, Tensor], Tensor]


def solver_cases(generator: torch.Generator) -> list[Case]:
    times = {
        "4 even steps": torch.linspace(1, 0, 5),
        "3 uneven steps": torch.tensor([1.0, 0.8, 0.3, 0.0]),
        "from data to noise": torch.tensor([0.0, 0.6, 1.0]),
        "one step": torch.tensor([1.0, 0.0]),
    }
    return [Case(label, (FIELD, normal(generator, 2, 3, 4), ts)) for label, ts in times.items()]


def rk4_spec(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    for i in range(len(ts) - 1):
        t, h = ts[i], ts[i + 1] - ts[i]
        v1 = velocity(z, t)
        v2 = velocity(z + h / 2 * v1, t + h / 2)
        v3 = velocity(z + h / 2 * v2, t + h / 2)
        v4 = velocity(z + h * v3, t + h)
        z = z + h * (v1 + 2 * v2 + 2 * v3 + v4) / 6
    return z


def steps_by(
    slope: Callable[[Velocity, Tensor, Tensor, Tensor], Tensor],
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
) -> Tensor:
    """Steps along slope(velocity, z, t, h)."""
    for t, t_next in pairwise(ts):
        z = z + (t_next - t) * slope(velocity, z, t, t_next - t)
    return z


def weighted_by(
    first: float, second: float, third: float, fourth: float
) -> Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]:
    """The four slopes with other weights."""

    def slope(f: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        v1 = f(z, t)
        v2 = f(z + h / 2 * v1, t + h / 2)
        v3 = f(z + h / 2 * v2, t + h / 2)
        v4 = f(z + h * v3, t + h)
        return first * v1 + second * v2 + third * v3 + fourth * v4

    return slope


def plain_average(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return steps_by(weighted_by(1 / 4, 1 / 4, 1 / 4, 1 / 4), velocity, z, ts)


def slopes_summed(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return steps_by(weighted_by(1, 2, 2, 1), velocity, z, ts)


def ends_weighted_most(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return steps_by(weighted_by(1 / 3, 1 / 6, 1 / 6, 1 / 3), velocity, z, ts)


def fourth_alone(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return steps_by(weighted_by(0, 0, 0, 1), velocity, z, ts)


def only_the_midpoint(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return solvers.midpoint(velocity, z, ts)


def eulers_method(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return samplers.euler(velocity, z, ts)


def whole_steps_to_the_middle(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def slope(f: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        v1 = f(z, t)
        v2 = f(z + h * v1, t + h / 2)
        v3 = f(z + h * v2, t + h / 2)
        v4 = f(z + h * v3, t + h)
        return (v1 + 2 * v2 + 2 * v3 + v4) / 6

    return steps_by(slope, velocity, z, ts)


def all_along_the_first(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def slope(f: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        v1 = f(z, t)
        v2 = f(z + h / 2 * v1, t + h / 2)
        v4 = f(z + h * v1, t + h)
        f(z, t)  # as many calls as there are slopes
        return (v1 + 4 * v2 + v4) / 6

    return steps_by(slope, velocity, z, ts)


def time_stands_still(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def slope(f: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return weighted_by(1 / 6, 1 / 3, 1 / 3, 1 / 6)(lambda z, _: f(z, t), z, t, h)

    return steps_by(slope, velocity, z, ts)


def places_stand_still(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def slope(f: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return (f(z, t) + 4 * f(z, t + h / 2) + f(z, t + h)) / 6

    return steps_by(slope, velocity, z, ts)


def fourth_in_the_middle(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def slope(f: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        v1 = f(z, t)
        v2 = f(z + h / 2 * v1, t + h / 2)
        v3 = f(z + h / 2 * v2, t + h / 2)
        v4 = f(z + h / 2 * v3, t + h / 2)
        return (v1 + 2 * v2 + 2 * v3 + v4) / 6

    return steps_by(slope, velocity, z, ts)


def step_taken_backwards(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    def slope(f: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return -weighted_by(1 / 6, 1 / 3, 1 / 3, 1 / 6)(f, z, t, -h)

    return steps_by(slope, velocity, z, ts)


RK4 = Exercise(
    name="rk4",
    topic="solvers",
    points=3,
    difficulty=2,
    signature="def rk4(velocity: Callable, z: Tensor, ts: Tensor) -> Tensor:",
    task="Follow velocity(z, t) from z at ts[0] to ts[-1] by the classical Runge-Kutta method,\n"
    "four calls a step. ts descends or ascends.",
    specification=rk4_spec,
    reference=solvers.rk4,
    cases=solver_cases,
    mutants=(
        Mutant(plain_average, "The four slopes do not all have the same weight."),
        Mutant(slopes_summed, "The weights of the four slopes must add up to 1."),
        Mutant(ends_weighted_most, "It is the two slopes in the middle that count twice."),
        Mutant(fourth_alone, "All four slopes count, not the last one alone."),
        Mutant(only_the_midpoint, "That is the midpoint method, two slopes of four."),
        Mutant(eulers_method, "That is Euler's method, one slope of four."),
        Mutant(whole_steps_to_the_middle, "How far is it to t + h / 2?"),
        Mutant(all_along_the_first, "Each slope is taken where the one before it leads."),
        Mutant(time_stands_still, "The slopes belong to three different times."),
        Mutant(places_stand_still, "The slopes belong to different places, too."),
        Mutant(fourth_in_the_middle, "The fourth slope belongs to the end of the step."),
        Mutant(step_taken_backwards, "h = ts[i+1] - ts[i] already has the right sign."),
    ),
    formulas="for i = 0, 1, ..., n - 1, where ts holds n + 1 times:\n"
    "    h  = ts[i+1] - ts[i]\n"
    "    v1 = velocity(z[i], ts[i])\n"
    "    v2 = velocity(z[i] + h/2 v1, ts[i] + h/2)\n"
    "    v3 = velocity(z[i] + h/2 v2, ts[i] + h/2)\n"
    "    v4 = velocity(z[i] + h v3, ts[i+1])\n"
    "    z[i+1] = z[i] + h (v1 + 2 v2 + 2 v3 + v4) / 6\n"
    "z[0] is z; z[n] is the result.",
    why="Half the step, a sixteenth of the error, where the field is smooth enough.",
    where="nanosd3/related/solvers.py, rk4",
    differentiable=False,
    names=("velocity", "z", "ts"),
)

EXERCISES = (RK4,)
