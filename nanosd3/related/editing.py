"""Zero-shot editing with a consistency model: known parts stay, the rest is generated to match.

Each call of the model gives a whole clean image. Put the known parts back, add noise again, call
again: the rest becomes consistent with them (arXiv 2303.01469, algorithm 4). What is "known" need
not be pixels; any coordinates of the image in an orthogonal basis will do:

    inpainting         the basis is the pixels; some of them are known
    colouring          of each pixel's three colour coordinates, brightness is known
    super-resolution   of each block's p x p coordinates, the mean is known
    denoising          nothing is known; sampling starts at the time of the noise that is there

An orthogonal basis keeps Gaussian noise Gaussian, which is all that the method needs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanosd3.patchify import patchify, unpatchify
from nanosd3.samplers import Velocity

LUMA = (0.2989, 0.5870, 0.1140)  # brightness of red, green and blue
Basis = Callable[[Tensor], Tensor]  # images (B, C, H, W) to coordinates, or back


def edit(
    velocity: Velocity,
    y: Tensor,
    known: Tensor,
    ts: Tensor,
    generator: torch.Generator,
    to: Basis = lambda x: x,
    back: Basis = lambda x: x,
) -> Tensor:
    """Images (B, C, H, W) whose coordinates are those of `y` where `known` (broadcast over them)
    is True, and the model's elsewhere. len(ts) - 1 evaluations, at times that descend to 0.

    `to` gives an image's coordinates in an orthogonal basis, `back` the image. The unknown
    coordinates of `y` are ignored.
    """

    def with_known(x: Tensor) -> Tensor:
        return back(torch.where(known, to(y), to(x)))

    x0 = with_known(torch.zeros_like(y))
    for t in ts[:-1]:
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        z = (1 - t) * x0 + t * noise.to(y)
        x0 = with_known(z - t * velocity(z, t))
    return x0


def denoise(velocity: Velocity, z: Tensor, t: Tensor) -> Tensor:
    """Images z (B, ...) with noise of time t, denoised in one evaluation.

    An image y' with noise of deviation sigma is z = (1 - t) y' at t = sigma / (1 + sigma).
    """
    return z - t * velocity(z, t)


def reflection(first: Tensor) -> Tensor:
    """An orthogonal, symmetric matrix (n, n) whose first row is `first` (n,), scaled to length 1:
    the reflection that exchanges it with the first axis."""
    unit = first / first.norm()
    mirror = torch.eye(len(first), dtype=first.dtype)[0] - unit
    if float(mirror.norm()) < 1e-6:
        return torch.eye(len(first), dtype=first.dtype)
    mirror = mirror / mirror.norm()
    return torch.eye(len(first), dtype=first.dtype) - 2 * torch.outer(mirror, mirror)


def brightness_basis(x: Tensor) -> Tensor:
    """Colours (B, 3, H, W) to brightness and two more coordinates; its own inverse."""
    matrix = reflection(torch.tensor(LUMA, dtype=x.dtype, device=x.device))
    return torch.einsum("ij,bjhw->bihw", matrix, x)


def block_basis(patch: int) -> tuple[Basis, Basis]:
    """To the coordinates (B, N, p*p, C) of p x p blocks, of which the first is p times their mean,
    and back to square images (B, C, H, W)."""

    def to(x: Tensor) -> Tensor:
        blocks = patchify(x, patch).unflatten(2, (patch * patch, -1))  # (B, N, p*p, C)
        return torch.einsum("ij,bnjc->bnic", matrix.to(x), blocks)

    def back(coordinates: Tensor) -> Tensor:
        blocks = torch.einsum("ij,bnjc->bnic", matrix.to(coordinates), coordinates)
        side = round(blocks.shape[1] ** 0.5) * patch
        return unpatchify(blocks.flatten(2), patch, side, side)

    matrix = reflection(torch.ones(patch * patch, dtype=torch.float64))
    return to, back


def block_means_known(patch: int) -> Tensor:
    """Which coordinates of `block_basis` super-resolution knows: (p*p, 1)."""
    return (torch.arange(patch * patch) == 0)[:, None]
