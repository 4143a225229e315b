"""The log-likelihood of an image under a flow, along the ODE from data to noise.

Sampling maps noise to an image by an ODE, which can be reversed: from the image back to the one
noise that it comes from, whose density is known. On the way the velocity field contracts or expands
volume at the rate of its divergence, the trace of dv/dz. Together (the instantaneous change of
variables, arXiv 1806.07366):

    log p(x0) = log N(z_1; 0, prior_std^2) + integral from t = 0 to 1 of div v(z_t, t) dt

The sign follows from our time, with data at 0: where the path to noise expands volume, the image's
density is higher than that of its noise.

The trace of a D x D matrix known only by its products with vectors takes D products. Hutchinson's
estimate takes one: E[probe^T (dv/dz) probe] is the trace, if the probe's entries are independent
signs. One probe is drawn for each image and kept for the whole solve: then the ODE is smooth, so
adaptive solvers can follow it, and the mean is still right.

Pixels are whole numbers, on which a density is unbounded, so uniform noise of one level is added
(`dequantise`). The mean log-density is then a lower bound on the pixels' own log-probability, and
`bits_per_dimension` says how many bits per pixel it would take to store them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanosd3.related.solvers import dopri5
from nanosd3.samplers import Velocity

PIXEL_LEVELS = 256  # of a pixel
Solver = Callable[[Velocity, Tensor, Tensor], Tensor]


def log_likelihood(
    velocity: Velocity,
    x0: Tensor,
    ts: Tensor,
    probe: Tensor | None = None,
    prior_std: float = 1.0,
    solver: Solver = dopri5,
) -> Tensor:
    """log p(x0) in nats, (B,), for x0 (B, ...) and times `ts` from data to noise.

    The trace is exact, at one backward pass per element of a sample, or, with a `probe` like x0,
    Hutchinson's estimate, at one in all. `velocity` must be independent across the batch. Raises
    ValueError for times that descend.
    """
    if not ts[0] < ts[-1]:
        raise ValueError(f"ts must ascend, from data to noise, got {ts}")

    def slope(state: Tensor, t: Tensor) -> Tensor:
        v, trace = divergence(velocity, state[:, :-1].view_as(x0), t, probe)
        return torch.cat([v.flatten(1), trace[:, None]], dim=1)

    state = torch.cat([x0.flatten(1), x0.new_zeros(len(x0), 1)], dim=1)  # (B, D + 1)
    state = solver(slope, state, ts)
    return prior_log_density(state[:, :-1], prior_std) + state[:, -1]


@torch.enable_grad()
def divergence(
    velocity: Velocity, z: Tensor, t: Tensor, probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The velocity at z (B, ...), and the trace of its derivative, (B,): exact, or estimated."""
    z = z.detach().requires_grad_()
    v = velocity(z, t)
    if probe is not None:
        (product,) = torch.autograd.grad((v * probe).sum(), z)  # (dv/dz)^T probe
        return v.detach(), (product * probe).flatten(1).sum(1)
    trace = z.new_zeros(len(z))
    for i, each in enumerate(v.flatten(1).sum(0)):
        (row,) = torch.autograd.grad(each, z, retain_graph=True)
        trace = trace + row.flatten(1)[:, i]
    return v.detach(), trace


def prior_log_density(z: Tensor, std: float) -> Tensor:
    """log N(z; 0, std^2) of each sample of z (B, ...), summed over its elements."""
    log_density = -(z / std).square() / 2 - math.log(std) - math.log(2 * math.pi) / 2
    return log_density.flatten(1).sum(1)


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """A probe: random signs, as many as in `like`."""
    signs = torch.randint(2, like.shape, generator=generator) * 2 - 1
    return signs.to(like)


def dequantise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels uint8 plus noise uniform over one level, scaled to [-1, 1)."""
    noise = torch.rand(images.shape, generator=generator)
    return (images + noise) * (2 / PIXEL_LEVELS) - 1


def bits_per_dimension(log_density: Tensor, dimensions: int) -> Tensor:
    """Bits per pixel, from log densities in nats of images scaled to [-1, 1): a level there is
    2/256 wide, which is 7 bits."""
    return -log_density / (dimensions * math.log(2)) + math.log2(PIXEL_LEVELS / 2)
