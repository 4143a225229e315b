"""An exercise on a solver that remembers: DPM-Solver++ (2M)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nanosd3 import samplers
from nanosd3.exercises.grader.exercise import Exercise, Mutant
from nanosd3.exercises.solvers import Velocity, only_euler, solver_cases


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
    before: tuple[Tensor, Tensor] | None = None,
    keep: bool = False,
) -> Tensor:
    """DPM++ 2M with another rule k = weight(h, h_before), another x0 and h at the start, or with
    these never updated."""
    for t, t_next in pairwise(ts):
        x0 = guess = z - t * velocity(z, t)
        if t_next > 0:
            h = torch.log(t / t_next)
            if before is not None:
                x0_before, h_before = before
                k = weight(h, h_before)
                guess = (1 + k) * x0 - k * x0_before
            before = before if keep and before else (x0, h)
        z = t_next / t * z + (1 - t_next / t) * guess
    return z


def history_from_zero(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    h = torch.log(ts[0] / ts[1])
    return two_step(velocity, z, ts, half_ratio, before=(torch.zeros_like(z), h))


def history_from_noise(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return two_step(velocity, z, ts, half_ratio, before=(z, torch.log(ts[0] / ts[1])))


def history_kept(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return two_step(velocity, z, ts, half_ratio, keep=True)


def interpolated(velocity: Velocity, z: Tensor, ts: Tensor) -> Tensor:
    return two_step(velocity, z, ts, lambda h, h_before: -h / (2 * h_before))


def half_ratio(h: Tensor, h_before: Tensor) -> Tensor:
    return h / (2 * h_before)


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
        Mutant(
            history_from_zero,
            "The first step has no history: it takes guess = x0, not an estimate of zeros.",
        ),
        Mutant(
            history_from_noise, "The first step has no history: the noise is no estimate of x0."
        ),
        Mutant(
            history_kept,
            "The history is the previous step's: update x0_before and h_before at every step.",
        ),
        Mutant(interpolated, "The signs are swapped: extrapolate beyond x0, away from x0_before."),
    ),
    formulas="for i = 0, 1, ..., n - 1, where ts holds n + 1 times and t is ts[i], t' is ts[i+1]:\n"
    "    x0[i] = z[i] - t velocity(z[i], t)        the clean image that the velocity points to\n"
    "    h[i]  = ln(t / t')\n"
    "    k     = h[i] / (2 h[i-1])\n"
    "    guess = (1 + k) x0[i] - k x0[i-1], in the first and last step x0[i]\n"
    "    z[i+1] = (t' / t) z[i] + (1 - t' / t) guess\n"
    "z[0] is z; z[n] is the result.",
    why="Second order at one call per step: the default of SD3.5.",
    where="nanosd3/samplers.py, dpmpp_2m",
    differentiable=False,
    other_devices=False,  # tests whether t_next is 0
    names=("velocity", "z", "ts"),
)

EXERCISES = (DPMPP,)
