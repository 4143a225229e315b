"""Consistency models: the papers' numbers, closed forms, and both ways to write time."""

import math

import pytest
import torch

from nanosd3.flow import interpolate
from nanosd3.related.consistency import (
    clean_image,
    doubling_count,
    draw_levels,
    edm_form,
    even_levels,
    gap_weight,
    growing_count,
    huber_constant,
    inconsistency,
    karras_levels,
    lognormal_weights,
    pseudo_huber,
    target_decay,
    teacher_step,
    time_of,
)
from nanosd3.samplers import euler, heun

F64 = torch.float64
GEN = torch.Generator().manual_seed(0)
T = torch.tensor([0.05, 0.3, 0.9], dtype=F64)
S = torch.tensor([0.0, 0.25, 0.4], dtype=F64)


def sigma_of(t):
    return t / (1 - t)


def gaussian(z, t):
    """The exact velocity of Gaussian data of deviation 0.5 around 1, z (B, ...), t (B,) or ()."""
    t = t.view(-1, *[1] * (z.ndim - 1)) if t.ndim else t
    variance = (1 - t) ** 2 * 0.25 + t**2
    x0 = 1 + (1 - t) * 0.25 / variance * (z - (1 - t))
    noise = t / variance * (z - (1 - t))
    return noise - x0


# --- f ------------------------------------------------------------------------------------------


def test_one_euler_step_is_the_clean_image():
    z = torch.randn(3, 2, 2, dtype=F64, generator=GEN)
    velocity = lambda z, t: torch.sin(z) + t  # noqa: E731
    for i, t in enumerate(T):
        stepped = euler(velocity, z[i : i + 1], torch.tensor([t, 0], dtype=F64))
        v = velocity(z[i : i + 1], t)
        torch.testing.assert_close(clean_image(v, z[i : i + 1], t[None]), stepped)
    at_zero = clean_image(torch.full_like(z, 7.0), z, torch.zeros(3, dtype=F64))
    assert at_zero.equal(z)


@pytest.mark.parametrize("std", [0.5, 1.3])
def test_edm_form_is_the_papers_in_sigma(std):
    """c_skip, c_out, c_in of arXiv 2206.00364, table 1, act on x_sigma = z / (1 - t)."""
    sigma = sigma_of(T)
    c_skip = std**2 / (sigma**2 + std**2)
    c_out = sigma * std / (sigma**2 + std**2).sqrt()
    c_in = 1 / (sigma**2 + std**2).sqrt()
    skip, out, inside = edm_form(T, std)
    torch.testing.assert_close(skip * (1 - T), c_skip)  # z (c_skip / (1 - t)) is x_sigma c_skip
    torch.testing.assert_close(out, c_out)
    torch.testing.assert_close(inside * (1 - T), c_in)


def test_edm_form_is_the_best_guess_for_gaussian_data():
    """With F = 0 the answer c_skip z is the mean of x0 given z, for data N(0, std^2)."""
    z = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    covariance = (1 - T) * 0.25 / ((1 - T) ** 2 * 0.25 + T**2)
    torch.testing.assert_close(edm_form(T, 0.5)[0] * z, covariance * z)


# --- the teacher --------------------------------------------------------------------------------


def test_teacher_step_is_heuns():
    z = torch.randn(3, 4, dtype=F64, generator=GEN)
    s = torch.tensor([0.01, 0.25, 0.4], dtype=F64)
    stepped = teacher_step(gaussian, z, T, s)
    for i in range(3):  # Heun's last step is Euler's, so one more is visited
        ts = torch.tensor([T[i], s[i], 0.0], dtype=F64)
        seen = []
        heun(gaussian, z[i : i + 1], ts, lambda k, t, z, x0, seen=seen: seen.append(z))
        torch.testing.assert_close(stepped[i : i + 1], seen[1])


def test_teacher_step_to_the_data_is_finite_and_keeps_to_the_path():
    """The path of Gaussian data: z keeps its distance from the mean in deviations."""
    t, s = torch.full((64,), 0.05, dtype=F64), torch.zeros(64, dtype=F64)
    deviation = math.sqrt(0.95**2 * 0.25 + 0.05**2)
    z = 0.95 + deviation * torch.randn(64, 1, dtype=F64, generator=GEN)
    exact = 1 + 0.5 * (z - 0.95) / deviation
    asked = []
    velocity = lambda z, t: asked.append(t) or gaussian(z, t)  # noqa: E731
    error = (teacher_step(velocity, z, t, s) - exact).abs().max()
    assert error < 0.1 * (z - 0.05 * gaussian(z, t) - exact).abs().max()  # Euler's
    assert asked[1].min() == 0.001


# --- distances and weights ----------------------------------------------------------------------


def test_pseudo_huber():
    a, b = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    a[1] = 1.5  # norm 3
    a[2, 0, 0] = 0.01
    found = pseudo_huber(a, b, 4.0)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 1e-4 / 8]), atol=1e-6, rtol=1e-3)


def test_huber_constant():
    assert huber_constant(3 * 32 * 32) == pytest.approx(0.030, abs=2e-4)  # CIFAR-10
    assert huber_constant(784) == pytest.approx(0.0151, abs=1e-4)
    assert huber_constant(256) == pytest.approx(0.00864)


def test_gap_weight():
    torch.testing.assert_close(gap_weight(T, S), 1 / (sigma_of(T) - sigma_of(S)))


# --- levels -------------------------------------------------------------------------------------


def test_karras_levels():
    t = karras_levels(18).double()
    assert len(t) == 18 and (t.diff() > 0).all()
    torch.testing.assert_close(sigma_of(t[[0, -1]]), torch.tensor([0.002, 80.0], dtype=F64),
                               rtol=1e-4, atol=0)  # fmt: skip
    assert float(t[-1]) == pytest.approx(0.9877, abs=1e-4)
    grids = karras_levels(40).double(), karras_levels(201).double()  # of the released two steps
    assert [round(float(sigma_of(g[i])), 2) for g, i in zip(grids, (-23, -107), strict=True)] == [
        1.38, 1.91]  # fmt: skip
    torch.testing.assert_close(time_of(sigma_of(T)), T)


def test_even_levels():
    torch.testing.assert_close(even_levels(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]))


def test_growing_count():
    """From 2 to 150 levels, as the root of a line, and one more."""
    K = 1000
    assert growing_count(0, K) == 2 and growing_count(K, K) == 151
    assert growing_count(250, K) == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1 == 76


def test_doubling_count():
    """Eight stages from 10 to 1,280, each one more (2310.14189)."""
    K = 8000
    counts = [doubling_count(k, K) for k in range(0, K, 1000)]
    assert counts == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert doubling_count(999, K) == 11 and doubling_count(K - 1, K) == 1281
    assert [doubling_count(k, 90, 2, 8) for k in (0, 29, 30, 60, 89)] == [3, 3, 5, 9, 9]
    assert doubling_count(1, 2, 2, 16) == 5  # fewer steps than stages


def test_target_decay():
    assert target_decay(2) == pytest.approx(0.9)
    assert target_decay(151) == pytest.approx(math.exp(2 * math.log(0.9) / 151))


def test_lognormal_is_logit_normal():
    """Drawn by weight, the levels' logits have the mean and deviation of ln(sigma)."""
    times = karras_levels(1281)
    weights = lognormal_weights(times, std=1.0)  # so that the grid holds all of it
    assert float(weights.sum()) == pytest.approx(1)
    middle = torch.logit((times[1:] + times[:-1]) / 2)
    mean = float((weights * middle).sum())
    std = float((weights * (middle - mean) ** 2).sum().sqrt())
    assert (mean, std) == (pytest.approx(-1.1, abs=0.01), pytest.approx(1.0, abs=0.01))
    within_one = (middle + 1.1).abs() < 2  # of the default: one deviation is two
    assert float(lognormal_weights(times)[within_one].sum()) == pytest.approx(0.683, abs=0.01)
    other = lognormal_weights(times, mean=0.5, std=1.0)
    assert float((other * middle).sum()) == pytest.approx(0.5, abs=0.03)


def test_draw_levels():
    times, gen = torch.tensor([0.0, 0.1, 0.5, 1.0]), torch.Generator().manual_seed(0)
    t, s = draw_levels(times, 3000, gen)
    pairs = {(0.1, 0.0), (0.5, 0.1), (1.0, 0.5)}
    counts = dict.fromkeys(pairs, 0)
    for pair in zip(t.tolist(), s.tolist(), strict=True):
        counts[tuple(round(x, 4) for x in pair)] += 1
    assert all(900 < count < 1100 for count in counts.values())
    t, s = draw_levels(times, 50, gen, torch.tensor([0.0, 1.0, 0.0]))
    assert (t == 0.5).all() and (s == times[1]).all()


# --- is it consistent? --------------------------------------------------------------------------


def test_straightness():
    """Zero for the exact answer on straight paths, one where the answers have nothing in common."""
    x0, noise = torch.randn(2, 50, 3, generator=GEN).unbind(0)
    path = [(t, interpolate(x0, noise, t)) for t in torch.linspace(1, 0.1, 5)]
    v = noise - x0
    assert inconsistency(lambda z, t: clean_image(v, z, t), path) < 1e-10
    found = inconsistency(lambda z, t: z, path)
    assert found > 0.1
    scaled = [(t, 3 * z) for t, z in path]  # relative to the images' variance
    assert inconsistency(lambda z, t: z, scaled) == pytest.approx(found, rel=1e-4)
