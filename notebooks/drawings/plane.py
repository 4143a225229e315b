"""Two moons and noise in the plane, and the exact velocity between them: for drawings of the flow.

The data are points on two half circles, as in notebook 01 and without its scatter. For a finite
data set the velocity that a perfect network would learn is known (nanosd3.related.paths), so
nothing is trained here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.flow import schedule
from nanosd3.related.paths import PATHS, exact_velocity
from nanosd3.samplers import euler

POINTS = 128  # of the data


def moons(count: int = POINTS) -> Tensor:
    """Points (count, 2) spread evenly over two interleaved half circles."""
    angle = torch.pi * (torch.arange(count // 2, dtype=torch.float64) + 0.5) / (count // 2)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    return 1.4 * torch.cat([upper, -upper])


def noise(count: int, seed: int = 0) -> Tensor:
    """Points (count, 2) of N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


MOONS = moons()
VELOCITY = exact_velocity(PATHS["ot"], MOONS)  # rectified flow's


def trails(start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times (steps + 1,), where each point (n, 2) is then, and the x0 that its velocity points to,
    each (steps + 1, n, 2): Euler's steps from noise to data."""
    seen = []
    times = schedule(steps).double()
    end = euler(VELOCITY, start, times, lambda _step, _t, z, x0: seen.append((z, x0)))
    zs, x0s = (torch.stack(part) for part in zip(*seen, (end, end), strict=True))
    return times, zs, x0s


@dataclass(frozen=True)
class Plane:
    """Where the plane's origin lies on the page, and how many pixels a unit is."""

    x: float
    y: float
    unit: float

    def place(self, points: Tensor) -> list[tuple[float, float]]:
        """Points (n, 2) on the page, whose y runs down."""
        return [(self.x + self.unit * a, self.y - self.unit * b) for a, b in points.tolist()]
