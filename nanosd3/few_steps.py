"""Sampling in a few steps, with models distilled for it.

A consistency model maps any point of a path directly to its end, so one step from noise gives an
image. Further steps add noise to that image and map it again. Nothing else in the pipeline changes:
a consistency model is a velocity network, and its step is Euler's.
"""

import math
import zlib
from itertools import pairwise

import torch
from torch import Tensor

from nanosd3.flow import shift
from nanosd3.random_streams import rng
from nanosd3.samplers import SAMPLERS, Callback, Velocity

FRESH = 0.5  # see `consistency`


def even_schedule(steps: int, alpha: float = 1.0) -> Tensor:
    """Times (steps + 1,) from 1 to 0 in equal steps, then shifted.

    The official times (`flow.schedule`) begin their last step at 0.001, so that two of their steps
    do little more than one; here each step counts.
    """
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha).float()


def consistency(
    velocity: Velocity,
    z: Tensor,
    ts: Tensor,
    callback: Callback | None = None,
    noise: Tensor | None = None,
    fresh: float = FRESH,
) -> Tensor:
    """Jump to the clean image, add noise, jump again. len(ts) - 1 evaluations.

    Multistep consistency sampling (arXiv 2303.01469, algorithm 1) adds fresh noise only. Every step
    then pushes further towards what the distilled guidance favours and reduces diversity, so more
    steps are worse (related/README.md). Here part of the noise is estimated from z, as in DDIM;
    `fresh` = 1 is the published algorithm, 0 draws nothing (like gamma in arXiv 2310.02279). An
    image's fresh noise comes from a stream named after its starting noise, so it depends on nothing
    else in the batch. That is z (B, ...), or `noise` if z is already on its way to the image.
    """
    rows = z if noise is None else noise
    streams = [rng("fresh noise", zlib.crc32(x.float().cpu().numpy().tobytes())) for x in rows]
    for i, (t, t_next) in enumerate(pairwise(ts)):
        x0 = z - t * velocity(z, t)
        if callback:
            callback(i, t, z, x0)
        if t_next == 0:
            return x0
        drawn = torch.stack([torch.randn(z.shape[1:], generator=stream) for stream in streams])
        z = renoised(x0, z, t, t_next, drawn.to(z), fresh)
    return z


def renoised(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    """The image x0 that z at time t jumped to, noised to t_next: `fresh` of the noise is drawn,
    and as much of that found in z is kept as preserves its variance."""
    found = (z - (1 - t) * x0) / t
    kept = math.sqrt(1 - fresh**2)
    return (1 - t_next) * x0 + t_next * (fresh * drawn + kept * found)


def inpainting_afresh(velocity: Velocity, mask: Tensor, x0: Tensor) -> Velocity:
    """`samplers.inpainting` for `consistency`: with fresh noise in a step, the straight line to the
    known image restarts there, so its velocity is computed from the current z."""

    def known_outside(z: Tensor, t: Tensor) -> Tensor:
        return torch.lerp((z - x0) / t, velocity(z, t), mask)

    return known_outside


ALL_SAMPLERS = SAMPLERS | {"consistency": consistency}
