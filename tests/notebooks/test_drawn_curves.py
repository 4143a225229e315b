"""The curves and vectors of the drawings, read back from the page, are those of the formulas."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from nanosd3.config import CONFIGS
from nanosd3.flow import interpolate

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import draw
from drawings import flow, plane

NUMBER = r"(-?[\d.]+) (-?[\d.]+)"


def curves(name: str, look: str) -> list[torch.Tensor]:
    """The points (n, 2) of all curves of one look, in pixels."""
    found = re.findall(rf'class="line {look}" d="([^"HVQ]*)"', draw.DRAWINGS[name]())
    return [torch.tensor([[float(x) for x in p] for p in re.findall(NUMBER, c)]) for c in found]


def dots(name: str, look: str) -> list[torch.Tensor]:
    found = re.findall(rf'class="dots {look}"[^>]* d="([^"]*)"', draw.DRAWINGS[name]())
    return [torch.tensor([[float(x) for x in p] for p in re.findall(NUMBER, c)]) for c in found]


def on_axes(points: torch.Tensor, place: tuple[int, ...]) -> torch.Tensor:
    """Pixels to values, for axes at x, y of a width and a height that stand for 1."""
    x, y, width, height = place
    return torch.stack([(points[:, 0] - x) / width, (y - points[:, 1]) / height], dim=1).double()


def logit_normal(t: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
    """Its density (paper, eq. 19)."""
    z = torch.log(t / (1 - t)) - mean
    return torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / (t * (1 - t))


DENSITIES = {  # look, and a formula
    "cond thick": logit_normal,
    "text dotted thick": lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2)),  # eq. 21
    "noise": torch.ones_like,
}


@pytest.mark.parametrize("look", DENSITIES)
def test_densities(look):
    """Within a pixel, which the steep parts leave little of."""
    _, _, density, *_ = curves("timesteps.svg", look)  # the legend's, the map, the density
    t, p = on_axes(density, (272, 280, 180, 37.5)).T
    middle = (t > 0.03) & (t < 0.97)
    assert middle.sum() > 100
    assert (DENSITIES[look](t[middle]) - p[middle]).abs().max() < 0.06


def test_mode_is_a_density_with_its_peak_in_the_middle():
    _, _, density = curves("timesteps.svg", "both dashed")
    t, p = on_axes(density, (272, 280, 180, 37.5)).T
    assert torch.trapezoid(p, t) == pytest.approx(1, abs=0.02)
    assert t[p.argmax()] == pytest.approx(0.5, abs=0.02)
    assert p.max() == pytest.approx(1 / (1 - 1.29 * (math.pi / 2 - 1)), abs=0.05)


def test_the_densities_of_the_two_models():
    place = (40, 534, 180, 130 / 2.4)
    (small,), (large,) = (
        [c for c in curves("timesteps.svg", look) if len(c) == 200 and c[0, 1] > 400]
        for look in ("cond thick", "noise thick")
    )
    for curve, mean in ((small, CONFIGS["mnist"].training.time_mean), (large, 0.0)):
        t, p = on_axes(curve, place).T
        middle = (t > 0.05) & (t < 0.95)
        assert (logit_normal(t[middle], mean) - p[middle]).abs().max() < 0.05


@pytest.mark.parametrize(("look", "name"), [("cond", "mnist"), ("noise", "sd3.5-large")])
def test_shift_and_steps(look, name):
    sampling = CONFIGS[name].sampling
    a = sampling.shift
    (curve,) = (c for c in curves("timesteps.svg", f"{look} thick") if len(c) == 100
                and c[0, 1] > 400)  # fmt: skip
    t, moved = on_axes(curve, (272, 534, 180, 130)).T
    torch.testing.assert_close(moved, a * t / (1 + (a - 1) * t), atol=0.01, rtol=0)
    (ticks,) = dots("timesteps.svg", look)
    visited = (ticks[:, 0] - 40) / 412
    assert len(visited) == sampling.steps + 1
    assert visited[0] == 1 and visited[-1] == 0
    even = visited / (a - (a - 1) * visited)  # the shift undone: even steps, but for the last
    gaps = even[:-2] - even[1:-1]
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), atol=0.003, rtol=0)


def test_guided_velocities_lie_on_the_line_through_both():
    """Of each model as far from the negative's as its scale says."""
    scales = [CONFIGS[name].sampling.guidance for name in ("mnist", "sd3.5-large")]
    ((start, end),) = curves("guidance.svg", "guess dashed")
    assert start[1] > end[1]  # the negative's is the lower one on the page, AWAY
    assert flow.AWAY[1] < flow.TOWARDS[1]
    tip = rf'class="(noise|text|guess) solid" d="M{NUMBER}L[\d. ]+L[\d. ]+Z"'
    tips = re.findall(tip, draw.DRAWINGS["guidance.svg"]())[-4:]
    along = [(torch.tensor([float(x), float(y)]) - start) / (end - start) for _, x, y in tips]
    for share, scale in zip(along, (0, 1, *scales), strict=True):
        torch.testing.assert_close(share, torch.full((2,), scale / scales[1]), atol=0.01, rtol=0)


def test_the_pair_lies_on_its_line():
    (line,) = curves("rectified_flow.svg", "noise dashed")
    x0, noise = line.double()
    places = [d.double() for d in dots("rectified_flow.svg", "noise") if len(d) == 1]
    assert len(places) == 3
    for (place,), t in zip(places, (0.2, 0.4, 0.8), strict=True):
        expected = interpolate(x0, noise, torch.tensor(t))
        torch.testing.assert_close(place, expected, atol=0.11, rtol=0)
    head = re.search(rf'class="guess solid" d="M{NUMBER}', draw.DRAWINGS["rectified_flow.svg"]())
    tip = torch.tensor([float(x) for x in head.groups()]).double()
    ahead = x0 + (0.6 + 0.25) * (noise - x0)  # from z at t = 0.6 towards the noise
    torch.testing.assert_close(tip, ahead, atol=0.11, rtol=0)


def test_the_exact_velocity_is_the_mean_over_pairs():
    """Of noise - x0, over all data that z may come from, each weighted by its noise's density."""
    z, t = torch.tensor([[0.4, -0.7]], dtype=torch.float64), torch.tensor(0.55).double()
    noise = (z - (1 - t) * plane.MOONS) / t
    weights = torch.exp(-noise.square().sum(1) / 2)
    mean = (weights[:, None] * (noise - plane.MOONS)).sum(0) / weights.sum()
    torch.testing.assert_close(plane.VELOCITY(z, t)[0], mean)


def test_trails_end_on_the_data():
    start = plane.noise(20)
    times, zs, x0s = plane.trails(start, 50)
    assert times[0] == 1 and times[-1] == 0 and torch.equal(zs[0], start)
    assert torch.cdist(zs[-1], plane.MOONS).min(1).values.max() < 0.02
    torch.testing.assert_close(x0s[0], plane.MOONS.mean(0).expand(20, 2))  # noise says nothing
