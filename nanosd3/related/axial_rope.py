"""Rotary positions for images: rows and columns as angles.

Instead of adding a vector to each token, queries and keys are rotated: each pair of features, as a
point in the plane, by an angle proportional to the token's position. The product of a query and a
key then depends only on their distance. Here a pair turns with either the row or the column, at one
of several frequencies, and half of each head's features are not turned at all, so that they are
independent of position (arXiv 2104.09864; as in HDiT, arXiv 2401.11605).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from nanosd3.torch_settings import usual_settings

Grid = tuple[int, int]  # rows, columns


def cell_centres(grid: Grid) -> Tensor:
    """Row and column of the middle of each cell, (N, 2): the longer side of the image runs from -1
    to 1. (So four merged cells have the mean of their positions.)"""
    longest = max(grid)
    rows, columns = ((2 * torch.arange(n, dtype=torch.float64) + 1 - n) / longest for n in grid)
    return torch.cartesian_prod(rows, columns)


def axial_frequencies(heads: int, head_dim: int) -> Tensor:
    """Frequencies (heads, head_dim / 8) for each axis, evenly spaced in their logarithm from pi up
    to, but excluding, 10 pi, and assigned to heads in turn."""
    count = heads * head_dim // 8
    exponents = torch.arange(count, dtype=torch.float64) / count
    return (math.pi * 10**exponents).view(-1, heads).T


@lru_cache(maxsize=32)
@usual_settings()  # cached: later calls may train
def rotation(
    grid: Grid, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (heads, N, head_dim / 4) of the angles by which tokens are turned, the
    row's first."""
    frequencies = axial_frequencies(heads, head_dim)[:, None, None]  # (heads, 1, 1, head_dim / 8)
    angles = (cell_centres(grid)[None, :, :, None] * frequencies).flatten(2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features of x (B, heads, N, d): number i and i + d / 4, for i below d / 4. The
    other half of the features stays as it is."""
    a, b, rest = x.split([cos.shape[2], cos.shape[2], x.shape[3] - 2 * cos.shape[2]], dim=3)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=3)
