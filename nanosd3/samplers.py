"""ODE solvers: follow a velocity field from noise (t = 1) to data (t = 0).

A sampler is a function of a callable `velocity(z, t)` and knows nothing of the model behind it.
`ts` are the times to visit, descending, for example `flow.schedule(28, 3.0)`; t reaches the
callable as a 0-dimensional tensor. `callback(step, t, z, x0)`, if given, sees every step: z at
time t, before the step, and the clean image x0 = z - t v that the velocity there points to.

Euler evaluates the velocity once a step and has an error of order h; Heun evaluates it twice (once
in the last step) and has order h^2; DPM++ 2M evaluates it once and remembers the previous result.
Compare them at equal numbers of evaluations, not of steps.

Solvers know nothing of guidance and inpainting, which change the velocity: guidance combines two
(`guided`), inpainting replaces it where the image is known.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


def euler(velocity: Velocity, z: Tensor, ts: Tensor, callback: Callback | None = None) -> Tensor:
    """Straight steps along the velocity at their start. len(ts) - 1 evaluations."""
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v = velocity(z, t)
        if callback:
            callback(i, t, z, z - t * v)
        z = z + (t_next - t) * v
    return z


def heun(velocity: Velocity, z: Tensor, ts: Tensor, callback: Callback | None = None) -> Tensor:
    """Steps along the mean of the velocities at both ends: 2 len(ts) - 3 evaluations.

    The last step is Euler's (as in Karras et al., arXiv 2206.00364, algorithm 1): the network
    has hardly been trained at t = 0 itself.
    """
    last = len(ts) - 2
    for i, (t, t_next) in enumerate(pairwise(ts)):
        v = velocity(z, t)
        if callback:
            callback(i, t, z, z - t * v)
        ahead = z + (t_next - t) * v
        z = ahead if i == last else z + (t_next - t) * (v + velocity(ahead, t_next)) / 2
    return z


def dpmpp_2m(velocity: Velocity, z: Tensor, ts: Tensor, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++ (2M): extrapolate the clean image from its last two estimates.

    As in SD3.5's reference code, distances are measured in h = ln(t / t_next), k-diffusion's
    log-sigma, not in the flow's own log-SNR ln((1 - t) / t). The first step and the one into
    t = 0 are of first order, which is exactly Euler. len(ts) - 1 evaluations.
    """
    previous, h_last = None, None
    for i, (t, t_next) in enumerate(pairwise(ts)):
        x0 = z - t * velocity(z, t)
        if callback:
            callback(i, t, z, x0)
        estimate = x0
        h = torch.log(t / t_next) if t_next > 0 else None
        if previous is not None and h is not None:
            k = h / (2 * h_last)
            estimate = (1 + k) * x0 - k * previous
        ratio = t_next / t
        z = ratio * z + (1 - ratio) * estimate
        previous, h_last = x0, h
    return z


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


class SkipLayerGuidance(NamedTuple):
    """Skip-layer guidance: `layers` are left out, for t between `first` and `last`."""

    layers: tuple[int, ...]
    scale: float
    first: float
    last: float


def guided(
    model: Callable[..., Tensor],
    prompt: tuple[Tensor, ...],
    negative: tuple[Tensor, ...],
    scale: float,
    skip: SkipLayerGuidance | None = None,
) -> Velocity:
    """Classifier-free guidance: v = v_negative + scale (v_prompt - v_negative).

    `model(z, t, context, pooled)` is a network; `prompt` and `negative` are its (context, pooled)
    for each image of the batch. Both velocities come from one call on a doubled batch; at scale 1
    the result is the prompt's velocity, and the other is not computed.

    With `skip`, the result also moves away from the velocity without some layers, which helps
    SD3.5 Medium early in sampling: v + scale (v_prompt - v_prompt without the layers).
    """
    both = ()
    if scale != 1:
        both = tuple(torch.cat(pair) for pair in zip(prompt, negative, strict=True))

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            v = with_prompt = model(z, t, *prompt)
        else:
            with_prompt, without = model(torch.cat([z, z]), t, *both).chunk(2)
            v = without + scale * (with_prompt - without)
        if skip and skip.first >= t >= skip.last:
            v = v + skip.scale * (with_prompt - model(z, t, *prompt, skip=skip.layers))
        return v

    return velocity


def inpainting(velocity: Velocity, mask: Tensor, x0: Tensor, noise: Tensor) -> Velocity:
    """Repaint where `mask` (..., h, w) is 1; elsewhere the clean latents x0 are known.

    There the path is known too: a straight line from noise to x0, which any solver integrates
    exactly, so outside the mask z_t is the noised known image at every t.
    """

    def known_outside(z: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(noise - x0, velocity(z, t), mask)

    return known_outside
