"""Off-the-shelf ODE solvers for any velocity field: midpoint, RK4, adaptive Dormand-Prince.

A learned velocity defines an ordinary differential equation, so standard solvers apply. These are
functions like the core's samplers, `solver(velocity, z, ts, callback)`, and can stand in for them.
`ts` may also ascend, from data to noise, as likelihoods need.

    midpoint    2 evaluations a step, error of order h^2
    rk4         4 evaluations a step, error of order h^4
    dopri5      6 evaluations a step, error of order h^5, and steps as long as the tolerance allows

Dormand and Prince's pair computes the step twice from the same seven slopes, in fifth and in fourth
order; the difference estimates the error of the worse one. While it is within atol + rtol |z|, on
average over all elements of z, the step is accepted and the next one adapted; otherwise it is
retried, shorter. The last slope of an accepted step is the first of the next. The step control is
scipy's (RK45): steps, evaluations and results agree. One step size serves the whole batch, so an
image's result depends slightly on its neighbours; papers report the evaluations that this takes.

High order pays only where the field is smooth, so compare at equal numbers of evaluations
(`python -m nanosd3.claims x-fm-5-order`).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nanosd3.samplers import Callback, Velocity

# Dormand and Prince (1980): times, slopes to add up, weights of fifth order, minus fourth order.
C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)

SAFETY, SHORTEST, LONGEST = 0.9, 0.2, 10.0  # a step's length relative to the last, at most
EXPONENT = -1 / 5  # an error of order h^5


def check_times(ts: Tensor) -> None:
    """Raise ValueError unless times strictly descend or strictly ascend."""
    steps = ts.diff()
    if ts.ndim != 1 or len(ts) < 2 or not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"ts must be two times or more, descending or ascending, got {ts}")


def midpoint(velocity: Velocity, z: Tensor, ts: Tensor, callback: Callback | None = None) -> Tensor:
    """Steps along the velocity at the midpoint, reached by half an Euler step. 2 evaluations
    each."""
    check_times(ts)
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v = velocity(z, t)
        if callback:
            callback(i, t, z, z - t * v)
        h = t_next - t
        z = z + h * velocity(z + h / 2 * v, t + h / 2)
    return z


def rk4(velocity: Velocity, z: Tensor, ts: Tensor, callback: Callback | None = None) -> Tensor:
    """The classical Runge-Kutta method: four slopes, weighted 1, 2, 2, 1. It also evaluates the
    velocity at the last of `ts`."""
    check_times(ts)
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v1 = velocity(z, t)
        if callback:
            callback(i, t, z, z - t * v1)
        h = t_next - t
        v2 = velocity(z + h / 2 * v1, t + h / 2)
        v3 = velocity(z + h / 2 * v2, t + h / 2)
        v4 = velocity(z + h * v3, t_next)
        z = z + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
    return z


def dopri5(
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
    callback: Callback | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """Dormand-Prince 5(4), adaptive, from the first of `ts` to the last.

    The times in between are visited exactly and otherwise do not matter: the tolerances choose the
    steps. `callback` sees each accepted step. Raises ValueError for tolerances that are not above
    0, and if the steps shrink to nothing, as they do where the velocity is not finite.
    """
    check_times(ts)
    if not (0 < rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"tolerances must be above 0 and finite, got rtol {rtol}, atol {atol}")

    def slope(z: Tensor, t: float) -> Tensor:
        return velocity(z, ts.new_tensor(t))

    t, *goals = ts.tolist()
    v, i = slope(z, t), 0
    h = first_length(slope, z, v, t, goals[-1], rtol, atol)
    for goal in goals:
        while t != goal:
            if callback:
                callback(i, ts.new_tensor(t), z, z - t * v)
            t, z, v, h = accepted_step(slope, z, v, t, goal, h, rtol, atol)
            i += 1
    return z


Slope = Callable[[Tensor, float], Tensor]


def accepted_step(
    slope: Slope, z: Tensor, v: Tensor, t: float, goal: float, h: float, rtol: float, atol: float
) -> tuple[float, Tensor, Tensor, float]:
    """One step from (z, t), where the slope is v, towards `goal`: at first of length h, then as
    short as the error demands. Returns time, z and slope at its end, and the next length to try."""
    direction, longest = math.copysign(1.0, goal - t), LONGEST
    while True:
        if not h >= 10 * abs(math.nextafter(t, goal) - t):
            reason = "the velocity there is not finite, or the tolerances are beyond its precision"
            raise ValueError(f"dopri5: no step is short enough at t = {t}: {reason}")
        wanted, end = h, t + direction * h
        beyond = direction * (end - goal) > 0
        end = goal if beyond else end
        h = abs(end - t)
        ahead, v_ahead, error = dormand_prince(slope, z, v, t, end)
        ratio = rms(error / (atol + rtol * torch.maximum(z.abs(), ahead.abs())))
        factor = SAFETY * ratio**EXPONENT if ratio else LONGEST
        if ratio < 1:
            h *= min(longest, factor)
            return end, ahead, v_ahead, max(h, wanted) if beyond else h
        h *= max(SHORTEST, factor)
        longest = 1.0  # the step after one that failed does not grow


def dormand_prince(
    slope: Slope, z: Tensor, v: Tensor, t: float, end: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of fifth order from t to `end`: z and slope there, and the error of fourth order."""
    h, slopes = end - t, [v]
    for c, weights in zip(C, A, strict=True):
        slopes.append(slope(z + h * weighted(slopes, weights), t + c * h))
    ahead = z + h * weighted(slopes, FIFTH)
    slopes.append(slope(ahead, end))
    return ahead, slopes[-1], h * weighted(slopes, ERROR)


def weighted(slopes: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """The sum of slopes times weights."""
    total = slopes[0] * weights[0]
    for v, weight in zip(slopes[1:], weights[1:], strict=True):
        total = total + weight * v
    return total


def first_length(
    slope: Slope, z: Tensor, v: Tensor, t: float, end: float, rtol: float, atol: float
) -> float:
    """A length to begin with, from the sizes of z, of its slope and, with one more evaluation, of
    the slope's change (Hairer, Norsett and Wanner, Solving ODEs I, section II.4)."""
    scale, whole = atol + rtol * z.abs(), abs(end - t)
    size, speed = rms(z / scale), rms(v / scale)
    h = min(0.01 * size / speed if size >= 1e-5 and speed >= 1e-5 else 1e-6, whole)
    step = math.copysign(h, end - t)
    bend = rms((slope(z + step * v, t + step) - v) / scale) / h
    largest = max(speed, bend)
    second = (0.01 / largest) ** (1 / 5) if largest > 1e-15 else max(1e-6, h * 1e-3)
    return min(100 * h, second, whole)


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return float(x.double().square().mean().sqrt())
