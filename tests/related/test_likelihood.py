"""Likelihoods against closed forms: Gaussian data, and linear fields."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Normal

from nanosd3.related.likelihood import (
    bits_per_dimension,
    dequantise,
    divergence,
    log_likelihood,
    prior_log_density,
    rademacher,
)
from nanosd3.related.paths import PATHS
from nanosd3.related.solvers import dopri5, rk4

F64 = torch.float64
MEAN = torch.tensor([0.7, -0.2, 0.1], dtype=F64)
STD = torch.tensor([0.5, 1.3, 0.2], dtype=F64)
precise = partial(dopri5, rtol=1e-9, atol=1e-9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_field(path):
    """The exact velocity for data N(MEAN, STD^2)."""

    def velocity(z, t):
        c = path.coefficients(t)
        variance = c.alpha**2 * STD**2 + c.sigma**2
        residual = z - c.alpha * MEAN
        return (
            c.alpha_slope * MEAN
            + residual * (c.alpha * c.alpha_slope * STD**2 + c.sigma * c.sigma_slope) / variance
        )

    return velocity


@pytest.mark.parametrize("name", ["ot", "cosine", "vp", "ve"])
def test_gaussian_data(name):
    """Of the data themselves, or of what the path has made of them at its first time; and with
    the prior that the path ends in."""
    path = PATHS[name]
    x0 = MEAN + STD * torch.randn(6, 3, dtype=F64, generator=generator())
    ts = torch.tensor([path.first, 1.0], dtype=F64)
    start, end = (path.coefficients(t) for t in ts)
    std = (start.alpha**2 * STD**2 + start.sigma**2).sqrt()
    exact = Normal(start.alpha * MEAN, std).log_prob(x0).sum(1)
    # VP and VE end near their prior, not in it: the prior's mistake at z_1 is known as well
    z1 = precise(gaussian_field(path), x0, ts)
    end_std = (end.alpha**2 * STD**2 + end.sigma**2).sqrt()
    mistake = prior_log_density(z1, path.prior_std) - Normal(end.alpha * MEAN, end_std).log_prob(
        z1
    ).sum(1)
    found = log_likelihood(gaussian_field(path), x0, ts, prior_std=path.prior_std, solver=precise)
    torch.testing.assert_close(found, exact + mistake, rtol=1e-6, atol=1e-6)
    if name in ("ot", "cosine"):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


MATRIX = torch.randn(4, 4, dtype=F64, generator=generator(1))


def linear_field(z, t):
    return (z.flatten(1) @ MATRIX.T).view_as(z)


def test_linear_field():
    """z_1 = exp(A) x0, and the volume changes by exp(tr A), for samples of any shape."""
    x0 = torch.randn(5, 2, 2, dtype=F64, generator=generator())
    z1 = x0.flatten(1) @ torch.linalg.matrix_exp(MATRIX).T
    expected = Normal(0.0, 2.0).log_prob(z1).sum(1) + MATRIX.trace()
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    found = log_likelihood(linear_field, x0, ts, prior_std=2.0, solver=precise)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    by_rk4 = log_likelihood(
        linear_field, x0, torch.linspace(0, 1, 200, dtype=F64), prior_std=2.0, solver=rk4
    )
    torch.testing.assert_close(by_rk4, expected, rtol=1e-6, atol=1e-6)


def test_hutchinson_with_one_probe():
    """Exactly probe^T A probe, in mean the trace; exact at once where A is diagonal."""
    z = torch.randn(4000, 2, 2, dtype=F64, generator=generator())
    probe = rademacher(z, generator(2))
    v, estimate = divergence(linear_field, z, torch.tensor(0.5), probe)
    torch.testing.assert_close(v, linear_field(z, None))
    flat = probe.flatten(1)
    torch.testing.assert_close(estimate, ((flat @ MATRIX) * flat).sum(1))
    spread = estimate.std() / len(z) ** 0.5
    assert abs(estimate.mean() - MATRIX.trace()) < 4 * spread
    _, exact = divergence(linear_field, z, torch.tensor(0.5))
    torch.testing.assert_close(exact, MATRIX.trace().expand(4000))
    diagonal = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=F64)
    _, estimate = divergence(lambda z, t: z * diagonal, z, torch.tensor(0.5), probe)
    torch.testing.assert_close(estimate, torch.full((4000,), 2.5, dtype=F64))


def test_probe_is_used_and_kept():
    """The same probe at every evaluation, so the estimate is that of its quadratic form."""
    x0 = torch.randn(3, 4, dtype=F64, generator=generator())
    probe, ts = rademacher(x0, generator(3)), torch.tensor([0.0, 1.0], dtype=F64)
    found = log_likelihood(linear_field, x0, ts, probe, solver=precise)
    z1 = x0 @ torch.linalg.matrix_exp(MATRIX).T
    expected = Normal(0.0, 1.0).log_prob(z1).sum(1) + ((probe @ MATRIX) * probe).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(found, log_likelihood(linear_field, x0, ts, solver=precise))


def test_works_without_gradients_and_leaves_none():
    """In evaluation gradients are off; a network's parameters must not be trained by it."""
    layer = torch.nn.Linear(3, 3).double()
    x0, ts = torch.randn(4, 3, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    with torch.no_grad():
        without = log_likelihood(lambda z, t: layer(z).tanh(), x0, ts)
    found = log_likelihood(lambda z, t: layer(z).tanh(), x0, ts)
    torch.testing.assert_close(without, found)
    assert not found.requires_grad and layer.weight.grad is None
    assert x0.grad is None and not x0.requires_grad


def test_samples_are_independent():
    """Each sample's trace is its own, whatever stands beside it."""
    velocity = lambda z, t: z**3 * (1 + t)  # noqa: E731
    x0 = 0.1 * torch.randn(5, 2, dtype=F64, generator=generator())
    ts = torch.linspace(0, 1, 50, dtype=F64)
    together = log_likelihood(velocity, x0, ts, solver=rk4)
    for i in range(5):
        alone = log_likelihood(velocity, x0[i : i + 1], ts, solver=rk4)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_default_solver_is_dopri5():
    x0, ts = torch.randn(4, 4, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    found = log_likelihood(linear_field, x0, ts)
    assert torch.equal(found, log_likelihood(linear_field, x0, ts, solver=dopri5))


@pytest.mark.parametrize("ts", [[1.0, 0.0], [0.5, 0.5]])
def test_refuses_times(ts):
    with pytest.raises(ValueError, match="ascend"):
        log_likelihood(linear_field, torch.zeros(1, 4, dtype=F64), torch.tensor(ts))


# --- pixels -------------------------------------------------------------------------------------


def test_rademacher():
    signs = rademacher(torch.zeros(100, 7, dtype=F64), generator())
    assert signs.dtype == F64 and signs.shape == (100, 7)
    assert signs.unique().tolist() == [-1.0, 1.0] and abs(signs.mean()) < 0.15
    assert torch.equal(signs, rademacher(torch.zeros(100, 7, dtype=F64), generator()))


def test_dequantise():
    images = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    x = dequantise(images, generator())
    assert x.min() >= -1 and x.max() < 1 and x.dtype == torch.float32
    levels = (x.double() + 1) * 128
    assert torch.equal(levels.floor().to(torch.uint8), images)
    rest = levels - levels.floor()
    assert torch.histc(rest, 4, 0, 1).min() > 0.23 * rest.numel()
    assert torch.equal(x, dequantise(images, generator()))


def test_bits_per_dimension():
    """Uniform over [-1, 1): 8 bits a pixel; over one level: none."""
    log_density = torch.tensor([12 * math.log(1 / 2), 12 * math.log(128)])
    torch.testing.assert_close(bits_per_dimension(log_density, 12), torch.tensor([8.0, 0.0]))


def test_prior_log_density():
    z = torch.randn(3, 2, 5, dtype=F64)
    expected = Normal(0.0, 80.0).log_prob(z).sum((1, 2))
    torch.testing.assert_close(prior_log_density(z, 80.0), expected)
