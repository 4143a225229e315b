"""Time, densities, schedule and solvers, against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanosd3.flow import (
    cosmap,
    flow_loss,
    interpolate,
    logit_normal,
    mode,
    schedule,
    shift,
    stratified,
    uniform,
    velocity_target,
)
from nanosd3.samplers import SAMPLERS, SkipLayerGuidance, dpmpp_2m, euler, guided, heun, inpainting

F64 = torch.float64


def test_interpolation_ends_and_slope():
    x0, noise = torch.randn(2, 3, 4, 5, 6, dtype=F64)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3, dtype=F64)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3, dtype=F64)), noise)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    z = interpolate(x0, noise, t)
    for i in range(3):  # each sample has its own time
        torch.testing.assert_close(z[i], (1 - t[i]) * x0[i] + t[i] * noise[i])
    slope = (interpolate(x0, noise, t + 1e-3) - z) / 1e-3
    torch.testing.assert_close(slope, velocity_target(x0, noise))
    v, times = velocity_target(x0, noise), t.view(3, 1, 1, 1)
    torch.testing.assert_close(z - times * v, x0)
    torch.testing.assert_close(z + (1 - times) * v, noise)


def test_loss_is_per_sample():
    x0, noise, v = torch.randn(3, 2, 4, 8, 8)
    loss = flow_loss(v, x0, noise)
    assert loss.shape == (2,)
    torch.testing.assert_close(loss[1], ((v[1] - (noise[1] - x0[1])) ** 2).mean())


# --- densities: histogram of the transform against the density's formula ------------------------


def density_logit_normal(t, mean, std):
    logit = torch.log(t / (1 - t))
    normal = torch.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    return normal / (t * (1 - t))


def density_cosmap(t):
    return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


@pytest.mark.parametrize(
    ("transform", "density"),
    [
        (uniform, torch.ones_like),
        (logit_normal, lambda t: density_logit_normal(t, 0.0, 1.0)),
        (lambda u: logit_normal(u, -0.5, 0.6), lambda t: density_logit_normal(t, -0.5, 0.6)),
        (lambda u: logit_normal(u, 1.0, 1.0), lambda t: density_logit_normal(t, 1.0, 1.0)),
        (cosmap, density_cosmap),
    ],
    ids=["uniform", "logit-normal", "to data", "to noise", "cosmap"],
)
def test_density(transform, density):
    n, bins = 2_000_000, 50
    u = (torch.arange(n, dtype=F64) + 0.5) / n
    t = transform(u)
    assert t.min() >= 0 and t.max() <= 1
    found = torch.histc(t, bins, 0, 1) / n * bins
    fine = ((torch.arange(bins * 200, dtype=F64) + 0.5) / (bins * 200)).clamp(1e-9, 1 - 1e-9)
    expected = density(fine).view(bins, 200).mean(1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(t.mean(), (fine * density(fine)).mean(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [-0.9, 0.0, 1.29, 1.7])
def test_mode_histogram(scale):
    """The density at t(u) is 1 / |dt/du|, the derivative written out; its mean is 1/2."""
    u = (torch.arange(2_000_000, dtype=F64) + 0.5) / 2_000_000
    t = mode(u, scale)
    slope = 1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * u))  # of -t
    found = torch.histc(t, 20, 0, 1) / len(u) * 20
    which = (t * 20).long().clamp(max=19)
    # a bin's share of u is its width over the mean slope in it, the mean taken over u
    mean_slope = torch.zeros(20, dtype=F64).index_add_(0, which, slope) / torch.bincount(which)
    torch.testing.assert_close(found, 1 / mean_slope, rtol=1e-3, atol=0)
    assert t.mean() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_density(scale):
    """The mode density has no closed form in t, but t falls with u and dt/du is known."""
    u = torch.linspace(0, 1, 100_001, dtype=F64)
    t = mode(u, scale)
    assert t[0] == 1 and abs(t[-1]) < 1e-12 and (t.diff() < 1e-12).all()
    near_half = (t - 0.5).abs().argmin()
    slope = (t[near_half + 1] - t[near_half - 1]) / (u[near_half + 1] - u[near_half - 1])
    expected = 1 / abs(1 + scale * (1 - math.pi / 2))
    torch.testing.assert_close(-1 / slope, torch.tensor(expected, dtype=F64), rtol=1e-3, atol=0)
    if scale > -1:
        end = -(t[1] - t[0]) / (u[1] - u[0])
        torch.testing.assert_close(
            1 / end, torch.tensor(1 / (1 + scale), dtype=F64), rtol=1e-3, atol=0
        )


def test_mode_refuses_scales_that_fold():
    for scale in (-1.01, 1.7520):
        with pytest.raises(ValueError, match="scale"):
            mode(torch.rand(3), scale)


def test_stratified_covers_time_evenly():
    generator = torch.Generator().manual_seed(0)
    u = stratified(64, generator)
    assert torch.equal((u * 64).long().sort().values, torch.arange(64))
    assert not torch.equal(u.sort().values, u)
    assert torch.isfinite(logit_normal(u)).all()


# --- shift and schedule -------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0.1, 10), st.floats(0.1, 10))
def test_shifts_multiply(t, a, b):
    t = torch.tensor(t, dtype=F64)
    torch.testing.assert_close(shift(shift(t, b), a), shift(t, a * b))
    torch.testing.assert_close(shift(shift(t, a), 1 / a), t)


def test_shift_lowers_log_snr_by_a_constant():
    t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    log_snr = lambda s: 2 * torch.log((1 - s) / s)  # noqa: E731
    fall = log_snr(t) - log_snr(shift(t, 3.0))
    torch.testing.assert_close(fall, torch.full_like(t, 2 * math.log(3)))


@given(st.integers(1, 60), st.floats(0.2, 8))
def test_schedule_descends_from_one_to_zero(steps, alpha):
    ts = schedule(steps, alpha)
    assert ts.shape == (steps + 1,) and ts[0] == 1 and ts[-1] == 0
    assert (ts.diff() < 0).all()


@pytest.mark.parametrize(
    ("steps", "alpha"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, math.nan)]
)
def test_schedule_refuses(steps, alpha):
    with pytest.raises(ValueError, match="must be"):
        schedule(steps, alpha)


# --- solvers: for Gaussian data N(m, s^2) the exact velocity and flow are known ------------------

MEAN, STD = 0.7, 0.5


def gaussian_velocity(z, t):
    """E[noise - x0 | z_t = z], from the joint Gaussian of (x0, noise, z)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    residual = z - (1 - t) * MEAN
    x0 = MEAN + (1 - t) * STD**2 / variance * residual
    return t / variance * residual - x0


def gaussian_flow(z):
    """Where the exact ODE carries noise z: to the same quantile of the data."""
    return MEAN + STD * z


def error(sampler, steps, ts=None):
    z = torch.linspace(-2, 2, 21, dtype=F64)
    ts = torch.linspace(1, 0, steps + 1, dtype=F64) if ts is None else ts
    return (sampler(gaussian_velocity, z, ts) - gaussian_flow(z)).abs().max().item()


def test_euler_error_halves():
    for steps in (32, 64, 128):
        assert error(euler, steps) / error(euler, 2 * steps) == pytest.approx(2, rel=0.1)


def test_heun_error_quarters():
    for steps in (32, 64, 128):
        assert error(heun, steps) / error(heun, 2 * steps) == pytest.approx(4, rel=0.15)


def test_dpmpp_2m_beats_euler_with_many_steps():
    assert error(dpmpp_2m, 200) < 0.5 * error(euler, 200)
    assert error(dpmpp_2m, 400) < 0.5 * error(dpmpp_2m, 200)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_samplers_converge_on_the_official_schedule(name, alpha):
    ts = schedule(400, alpha).double()
    assert error(SAMPLERS[name], 400, ts) < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_straight_paths_need_one_step(name):
    """One data point: the velocity is constant along each path, so every solver is exact."""
    point = torch.tensor([0.3, -1.0], dtype=F64)
    velocity = lambda z, t: (z - point) / t  # noqa: E731
    for steps in (1, 2, 5):
        out = SAMPLERS[name](velocity, torch.randn(2, dtype=F64), schedule(steps, 1.0).double())
        torch.testing.assert_close(out, point)


@pytest.mark.parametrize(("name", "cost"), [("euler", 7), ("heun", 13), ("dpmpp_2m", 7)])
def test_evaluations_and_callback(name, cost):
    asked, seen = [], []

    def velocity(z, t):
        assert t.ndim == 0
        asked.append(float(t))
        return gaussian_velocity(z, t)

    ts = schedule(7, 2.0)
    SAMPLERS[name](
        velocity, torch.randn(5), ts, lambda i, t, z, x0: seen.append((i, float(t), z, x0))
    )
    assert len(asked) == cost and 0.0 not in asked
    assert [(i, t) for i, t, _, _ in seen] == list(enumerate(ts[:-1].tolist()))
    _, t, z, x0 = seen[3]
    torch.testing.assert_close(x0, z - t * gaussian_velocity(z, torch.tensor(t)))


def test_dpmpp_2m_first_step_is_euler():
    z, ts = torch.randn(5), torch.tensor([1.0, 0.6])
    torch.testing.assert_close(dpmpp_2m(gaussian_velocity, z, ts), euler(gaussian_velocity, z, ts))
    ts = torch.tensor([1.0, 0.6, 0.3])
    assert not torch.allclose(dpmpp_2m(gaussian_velocity, z, ts), euler(gaussian_velocity, z, ts))


# --- guidance -----------------------------------------------------------------------------------


def linear_model(z, t, context, pooled):
    return z * t + context.mean((1, 2)).view(-1, 1) + pooled.sum(1, keepdim=True)


def test_guidance():
    z, t = torch.randn(3, 4), torch.tensor(0.4)
    with_prompt = (torch.randn(3, 5, 6), torch.randn(3, 2))
    without = (torch.randn(3, 5, 6), torch.randn(3, 2))
    v_c, v_u = linear_model(z, t, *with_prompt), linear_model(z, t, *without)
    for scale in (0.0, 1.0, 1.5, 7.0):
        v = guided(linear_model, with_prompt, without, scale)(z, t)
        torch.testing.assert_close(v, v_u + scale * (v_c - v_u))


def test_guidance_of_one_asks_once():
    calls = []
    model = lambda z, *_: calls.append(len(z)) or z  # noqa: E731
    text = (torch.zeros(2, 1, 1), torch.zeros(2, 1))
    guided(model, text, text, 1)(torch.zeros(2, 1), torch.tensor(0.5))
    guided(model, text, text, 2)(torch.zeros(2, 1), torch.tensor(0.5))
    assert calls == [2, 4]


def test_defaults():
    u = torch.linspace(0.01, 0.99, 9)
    assert torch.equal(uniform(u), u)
    assert torch.equal(logit_normal(u), logit_normal(u, 0.0, 1.0))
    assert torch.equal(mode(u), mode(u, 1.29))
    assert torch.equal(schedule(5), schedule(5, 1.0))


def test_stratified_is_uniform_in_its_intervals():
    u = stratified(10_000, torch.Generator().manual_seed(0))
    within = (u.double() * 10_000) % 1
    assert torch.histc(within, 10, 0, 1).min() > 800


def test_stratified_draws_from_its_generator_alone():
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws.append(stratified(64, torch.Generator().manual_seed(0)))
    assert torch.equal(*draws)


def test_stratified_comes_near_the_ends_and_never_there(monkeypatch):
    u = stratified(10_000, torch.Generator().manual_seed(0))
    assert u.min() < 1e-3 and u.max() > 1 - 1e-3
    for extreme in (0.0, 1 - 2**-24):  # the least and the most that torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda n, generator, x=extreme: torch.full((n,), x))
        u = stratified(64, torch.Generator())
        assert u.min() > 0 and u.max() < 1
        assert torch.isfinite(logit_normal(u)).all()


def test_skip_layers_acts_at_both_ends_of_its_part():
    model = lambda z, t, context, pooled, skip=(): z + len(skip)  # noqa: E731
    text = (torch.zeros(1, 1, 1), torch.zeros(1, 1))
    velocity = guided(model, text, text, 1.0, SkipLayerGuidance((7,), 2.0, first=0.75, last=0.5))
    acts = [bool(velocity(torch.zeros(1), torch.tensor(t))) for t in (0.76, 0.75, 0.5, 0.49)]
    assert acts == [False, True, True, False]


def test_half_repainted_is_half_of_each():
    x0, noise = torch.randn(2, 1, 4, 2, 2)
    velocity = inpainting(lambda z, t: z * t, torch.full((1, 1, 2, 2), 0.25), x0, noise)
    z, t = torch.randn(1, 4, 2, 2), torch.tensor(0.4)
    torch.testing.assert_close(velocity(z, t), 0.75 * (noise - x0) + 0.25 * z * t)
