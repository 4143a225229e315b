"""Midpoint, RK4 and Dormand-Prince against closed forms and against scipy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import RK45, solve_ivp

from nanosd3.related import solvers
from nanosd3.related.solvers import dopri5, midpoint, rk4
from nanosd3.samplers import euler

F64 = torch.float64
MEAN, STD = 0.7, 0.5
DOWN = torch.tensor([1.0, 0.0], dtype=F64)


def gaussian_velocity(z, t):
    """The exact velocity for data N(MEAN, STD^2), as in the tests of the core's samplers."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    residual = z - (1 - t) * MEAN
    return t / variance * residual - MEAN - (1 - t) * STD**2 / variance * residual


def turning(z, t):
    """A rotation whose speed rises with time: |z| stays, the angle is t^2 / 2."""
    return t * torch.stack([-z[1], z[0]])


START = torch.tensor([1.0, 0.5], dtype=F64)


def turned(z, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=F64) @ z


def times(steps, up=False):
    ts = torch.linspace(1, 0, steps + 1, dtype=F64)
    return ts.flip(0) if up else ts


def error(solver, steps, up=False):
    out = solver(turning, START, times(steps, up))
    return (out - turned(START, 0.5 if up else -0.5)).norm().item()


class Counted:
    """A velocity that counts its calls and notes the times."""

    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, z, t):
        assert isinstance(t, torch.Tensor) and t.ndim == 0
        self.times.append(float(t))
        return self.velocity(z, t)


# --- orders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (midpoint, 2), (rk4, 4)])
def test_order(solver, order, up):
    for steps in (16, 32, 64):
        ratio = error(solver, steps, up) / error(solver, 2 * steps, up)
        assert math.log2(ratio) == pytest.approx(order, abs=0.2)


def fixed_dopri5(velocity, z, ts):
    """Dormand and Prince's step without a control, z and its estimated errors, summed."""
    total = 0.0
    for t, t_next in pairwise(ts.tolist()):
        slope = lambda z, t: velocity(z, ts.new_tensor(t))  # noqa: E731
        z, _, err = solvers.dormand_prince(slope, z, slope(z, t), t, t_next)
        total += float(err.abs().max())
    return z, total


def test_order_of_a_step_and_of_its_estimate():
    """The step is of fifth order, its estimate is of the fourth and bounds the true error."""
    found = []
    for steps in (4, 8, 16):
        out, estimate = fixed_dopri5(turning, START, times(steps))
        found.append(((out - turned(START, -0.5)).norm().item(), estimate))
    for (e, s), (e2, s2) in pairwise(found):
        assert math.log2(e / e2) == pytest.approx(5, abs=0.5)
        assert math.log2(s / s2) == pytest.approx(4, abs=0.3)
        assert e < s


def test_weights():
    """Slopes of a constant velocity add up to it; the stages stand where their weights say."""
    assert sum(solvers.FIFTH) == pytest.approx(1) and sum(solvers.ERROR) == pytest.approx(0)
    for c, row in zip(solvers.C, solvers.A, strict=True):
        assert sum(row) == pytest.approx(c)


# --- Dormand-Prince against scipy ---------------------------------------------------------------

PROBLEMS = {
    "gaussian": (gaussian_velocity, torch.linspace(-2, 2, 21, dtype=F64)),
    "turning": (turning, START),
    "stiff at first": (lambda z, t: -80 * (z - torch.cos(t)), torch.tensor([3.0], dtype=F64)),
    "constant": (lambda z, t: 0 * z, torch.tensor([1.0, 2.0], dtype=F64)),
    "from zero": (lambda z, t: torch.cos(3 * t) + 0 * z, torch.zeros(2, dtype=F64)),
}


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-6), (1e-5, 1e-5), (1e-8, 1e-3), (1e-9, 1e-9)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_dopri5_is_scipys(name, rtol, atol, up):
    velocity, z = PROBLEMS[name]
    ts = DOWN.flip(0) if up else DOWN
    calls, steps = Counted(velocity), []
    out = dopri5(calls, z, ts, lambda i, t, z, x0: steps.append(float(t)), rtol=rtol, atol=atol)

    def numpy_velocity(t, y):
        return velocity(torch.from_numpy(y), torch.tensor(t, dtype=F64)).numpy()

    theirs = solve_ivp(numpy_velocity, ts.tolist(), z.numpy(), "RK45", rtol=rtol, atol=atol)
    assert theirs.success and len(calls.times) == theirs.nfev
    np.testing.assert_allclose([*steps, ts[-1]], theirs.t, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(out.numpy(), theirs.y[:, -1], rtol=1e-8, atol=1e-10)


def test_there_are_rejected_steps_among_them():
    velocity, z = PROBLEMS["stiff at first"]
    calls, steps = Counted(velocity), []
    dopri5(calls, z, DOWN.flip(0), lambda *seen: steps.append(seen), rtol=1e-3, atol=1e-6)
    assert len(calls.times) > 2 + 6 * len(steps)


def test_tableau_is_scipys():
    np.testing.assert_allclose(solvers.FIFTH, RK45.B)
    np.testing.assert_allclose(np.abs(solvers.ERROR), np.abs(RK45.E))
    for row, theirs in zip(solvers.A, RK45.A[1:], strict=False):
        np.testing.assert_allclose(row, theirs[: len(row)])


def evaluations(z, **tolerances):
    calls = Counted(turning)
    dopri5(calls, z, DOWN, **tolerances)
    return len(calls.times)


def test_both_tolerances_count():
    """rtol is relative to |z|, atol is not."""
    relative, absolute = {"rtol": 1e-5, "atol": 1e-12}, {"rtol": 1e-12, "atol": 1e-5}
    strict = {"rtol": 1e-12, "atol": 1e-12}
    assert evaluations(START, **relative) < evaluations(START, **strict)
    assert evaluations(START, **absolute) < evaluations(START, **strict)
    assert evaluations(START, **relative) == evaluations(1000 * START, **relative)
    assert evaluations(START, **absolute) < evaluations(1000 * START, **absolute)
    assert evaluations(START) == evaluations(START, rtol=1e-5, atol=1e-5)


# --- the signature of the core's samplers -------------------------------------------------------


@pytest.mark.parametrize(("solver", "cost"), [(midpoint, 2), (rk4, 4)])
def test_evaluations_and_callback(solver, cost):
    ts, calls, seen = torch.linspace(1, 0, 8, dtype=F64), Counted(gaussian_velocity), []
    z = torch.linspace(-1, 1, 5, dtype=F64)
    out = solver(calls, z, ts, lambda i, t, z, x0: seen.append((i, float(t), z, x0)))
    assert len(calls.times) == 7 * cost
    assert [(i, t) for i, t, _, _ in seen] == list(enumerate(ts[:-1].tolist()))
    assert torch.equal(seen[0][2], z)
    _, t, z3, x0 = seen[3]
    torch.testing.assert_close(x0, z3 - t * gaussian_velocity(z3, torch.tensor(t, dtype=F64)))
    torch.testing.assert_close(solver(gaussian_velocity, z3, ts[3:]), out)


def test_dopri5_visits_the_times_between():
    """Exactly, with each accepted step reported once, and the steps after them as long as before:
    visiting costs a step, not a new start."""
    ts = torch.tensor([1.0, 0.83, 0.4123, 0.0], dtype=F64)
    z, seen = torch.linspace(-2, 2, 5, dtype=F64), []
    out = dopri5(
        gaussian_velocity, z, ts, lambda i, t, z, x0: seen.append((i, float(t), z, x0)),
        rtol=1e-8, atol=1e-8,
    )  # fmt: skip
    numbers, seen_at, zs, x0s = zip(*seen, strict=True)
    assert list(numbers) == list(range(len(seen)))
    assert list(seen_at) == sorted(seen_at, reverse=True)
    assert set(ts[:-1].tolist()) < set(seen_at)
    torch.testing.assert_close(out, MEAN + STD * z, rtol=0, atol=1e-7)
    k = seen_at.index(0.4123)
    expected = dopri5(gaussian_velocity, z, ts[:1].new_tensor([1.0, 0.4123]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(zs[k], expected, rtol=0, atol=1e-7)
    v = gaussian_velocity(zs[k], torch.tensor(0.4123, dtype=F64))
    torch.testing.assert_close(x0s[k], zs[k] - 0.4123 * v)
    one, many = Counted(turning), Counted(turning)
    dopri5(one, START, DOWN)
    dopri5(many, START, torch.tensor([1.0, 0.500001, 0.5, 0.0], dtype=F64))
    assert len(many.times) <= len(one.times) + 3 * 6


def test_straight_paths_need_one_step():
    point = torch.tensor([0.3, -1.0], dtype=F64)
    velocity = lambda z, t: (z - point) / t  # noqa: E731
    out = midpoint(velocity, torch.randn(2, dtype=F64), DOWN)
    torch.testing.assert_close(out, point)


@pytest.mark.parametrize("solver", [midpoint, rk4, dopri5])
def test_precision_and_batch_shape_stay(solver):
    z = torch.randn(2, 3, 4, 4)
    out = solver(gaussian_velocity, z, torch.linspace(1, 0, 9))
    assert out.dtype == torch.float32 and out.shape == z.shape
    torch.testing.assert_close(out, MEAN + STD * z, rtol=0, atol=0.02)


@pytest.mark.parametrize("solver", [midpoint, rk4, dopri5])
@pytest.mark.parametrize(
    "ts", [[1.0], [], [1.0, 1.0], [1.0, 0.4, 0.6], [1.0, math.nan], [[1.0, 0.0]]]
)
def test_refuses_times(solver, ts):
    with pytest.raises(ValueError, match="ts must be"):
        solver(gaussian_velocity, torch.zeros(2), torch.tensor(ts))


@pytest.mark.parametrize("bad", [0.0, -1e-3, math.nan, math.inf])
def test_refuses_tolerances(bad):
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match="tolerances"):
            dopri5(gaussian_velocity, torch.zeros(2), DOWN, **{name: bad})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_velocity_that_breaks_ends_the_steps(value):
    velocity = lambda z, t: z * (1.0 if t > 0.5 else value)  # noqa: E731
    with pytest.raises(ValueError, match="not finite"):
        dopri5(velocity, torch.ones(2, dtype=F64), DOWN)
