"""Paths of Flow Matching, against closed forms and against the core's straight line."""

import math
from functools import partial

import pytest
import torch

from nanosd3 import flow
from nanosd3.related.paths import (
    PATHS,
    ProbabilityPath,
    determinant,
    exact_velocity,
    optimal_transport,
    path_loss,
    variance_exploding,
    variance_preserving,
)
from nanosd3.samplers import euler

F64 = torch.float64
T = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.97], dtype=F64)
OFFSET = ProbabilityPath(partial(optimal_transport, sigma_min=0.1))
ALL = {**PATHS, "ot, sigma_min 0.1": OFFSET}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x0, noise = torch.randn(2, 5, 3, 2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    return x0, noise


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "alpha", "sigma"),
    [
        ("ot", 0.7, 0.3),
        ("vp", math.exp(-(19.9 * 0.045 + 0.03) / 2), math.sqrt(1 - math.exp(-(0.8955 + 0.03)))),
        ("cosine", math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)),
        ("ve", 1.0, 0.002 * 40_000**0.3),
    ],
)
def test_coefficients_at_three_tenths(name, alpha, sigma):
    c = PATHS[name].coefficients(torch.tensor(0.3, dtype=F64))
    assert float(c.alpha) == pytest.approx(alpha, rel=1e-12)
    assert float(c.sigma) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_slopes_are_the_derivatives(path):
    t = T.clone().requires_grad_()
    c = path.coefficients(t)
    for value, slope in ((c.alpha, c.alpha_slope), (c.sigma, c.sigma_slope)):
        expected = torch.zeros_like(t)
        if value.requires_grad:
            (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope.detach(), expected)


def test_ends():
    """Data at t = 0, the prior at t = 1."""
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    at = {name: path.coefficients(ends) for name, path in PATHS.items()}
    for name in ("ot", "cosine"):
        torch.testing.assert_close(at[name].alpha, 1 - ends)
        torch.testing.assert_close(at[name].sigma, ends)
    torch.testing.assert_close(at["ve"].sigma, torch.tensor([0.002, 80.0], dtype=F64))
    assert at["vp"].sigma[0] == 0 and float(at["vp"].alpha[1]) == pytest.approx(0.00657, abs=1e-5)
    assert {name: round(path.prior_std, 4) for name, path in PATHS.items()} == {
        "ot": 1.0, "vp": 1.0, "cosine": 1.0, "ve": 80.0}  # fmt: skip
    assert OFFSET.coefficients(ends).sigma.tolist() == [0.1, 1.0]


@pytest.mark.parametrize("name", ["vp", "cosine"])
def test_variance_is_preserved(name):
    c = PATHS[name].coefficients(torch.linspace(0.001, 1, 50, dtype=F64))
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones(50, dtype=F64))


def test_vp_keeps_its_digits_near_the_data():
    """1 - alpha^2 in float32 is off by percents there."""
    t = torch.tensor(1e-6)
    found = variance_preserving(t).sigma.double()
    assert float(found) == pytest.approx(math.sqrt(1e-7), rel=1e-4)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_finite_from_the_first_time_on(path):
    t = torch.tensor([path.first, 1.0])
    assert all(x.isfinite().all() for x in path.coefficients(t))
    assert determinant(path.coefficients(t)).isfinite().all()


def test_parameters_reach_the_path():
    t = torch.tensor(0.5, dtype=F64)
    assert float(variance_exploding(t, 0.01, 1.0).sigma) == pytest.approx(0.1)
    assert float(variance_preserving(t, 0.2, 4.2).alpha) == pytest.approx(math.exp(-0.3))


# --- the core's flow is one of them -------------------------------------------------------------


def test_ot_is_rectified_flow():
    x0, noise = batch()
    ot = PATHS["ot"]
    for t in (T, torch.tensor(0.3, dtype=F64), torch.zeros(5, dtype=F64)):
        assert torch.equal(ot.interpolate(x0, noise, t), flow.interpolate(x0, noise, t))
        assert torch.equal(ot.velocity_target(x0, noise, t), flow.velocity_target(x0, noise))
    v = torch.randn_like(x0)
    torch.testing.assert_close(path_loss(ot, v, x0, noise, T), flow.flow_loss(v, x0, noise))
    z = ot.interpolate(x0, noise, T)
    t = T.view(-1, 1, 1, 1)
    torch.testing.assert_close(ot.velocity_to_x0(v, z, T), z - t * v)
    torch.testing.assert_close(ot.velocity_to_noise(v, z, T), z + (1 - t) * v)


# --- a path of a sample -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_each_sample_has_its_own_time(path):
    x0, noise = batch()
    z, v = path.interpolate(x0, noise, T), path.velocity_target(x0, noise, T)
    for i, t in enumerate(T):
        torch.testing.assert_close(z[i], path.interpolate(x0[i], noise[i], t))
        torch.testing.assert_close(v[i], path.velocity_target(x0[i], noise[i], t))


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_target_is_the_slope(path):
    x0, noise = batch()
    h = 1e-6
    ahead, behind = (path.interpolate(x0, noise, T + s) for s in (h, -h))
    slope = (ahead - behind) / (2 * h)
    torch.testing.assert_close(slope, path.velocity_target(x0, noise, T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_conversions_find_what_was_mixed(path):
    x0, noise = batch()
    z, v = path.interpolate(x0, noise, T), path.velocity_target(x0, noise, T)
    score = -noise / path.at(T, z).sigma
    for found, expected in (
        (path.velocity_to_x0(v, z, T), x0),
        (path.velocity_to_noise(v, z, T), noise),
        (path.velocity_to_score(v, z, T), score),
        (path.x0_to_velocity(x0, z, T), v),
        (path.noise_to_velocity(noise, z, T), v),
        (path.score_to_velocity(score, z, T), v),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_score_of_gaussian_data(path):
    """Data N(m, s^2): p_t is N(alpha m, alpha^2 s^2 + sigma^2), whose score is known, and the
    exact velocity is the mean of the target given z."""
    m, s, z = 0.7, 0.5, torch.linspace(-2, 2, 5, dtype=F64)
    c = path.coefficients(T)
    variance = c.alpha**2 * s**2 + c.sigma**2
    x0 = m + c.alpha * s**2 / variance * (z - c.alpha * m)
    velocity = path.x0_to_velocity(x0, z, T)
    expected = -(z - c.alpha * m) / variance
    torch.testing.assert_close(path.velocity_to_score(velocity, z, T), expected)


def test_loss_is_per_sample():
    x0, noise = batch()
    path, v = PATHS["vp"], torch.zeros_like(x0)
    target = path.velocity_target(x0, noise, T)
    torch.testing.assert_close(path_loss(path, v, x0, noise, T)[3], target[3].square().mean())
    assert path_loss(path, v, x0, noise, T).shape == (5,)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_exact_velocity_is_the_mean_of_the_targets(path):
    """Weighted by how probable each point is, given z: written out in loops."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(4, 3, dtype=F64, generator=generator)
    z = torch.randn(5, 3, dtype=F64, generator=generator)
    expected = torch.zeros_like(z)
    for i, t in enumerate(T):
        c = path.coefficients(t)
        exponents = [-float((z[i] - c.alpha * x).square().sum() / (2 * c.sigma**2)) for x in points]
        weights = [math.exp(e - max(exponents)) for e in exponents]
        for weight, x in zip(weights, points, strict=True):
            noise = (z[i] - c.alpha * x) / c.sigma
            expected[i] += weight / sum(weights) * (c.alpha_slope * x + c.sigma_slope * noise)
    found = exact_velocity(path, points)(z, T)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(exact_velocity(path, points)(z, T[1])[1], expected[1])


@pytest.mark.parametrize("name", ["ot", "vp", "cosine"])
def test_exact_velocity_leads_to_the_points(name):
    path, points = PATHS[name], torch.tensor([[0.5, 1.0], [-1.0, 0.2]], dtype=F64)
    z = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    ts = torch.linspace(1, path.first, 300, dtype=F64)
    out = euler(exact_velocity(path, points), z, ts)
    distance = torch.cdist(out, points)
    assert distance.min(1).values.max() < 0.1
    assert len(distance.argmin(1).unique()) == 2
