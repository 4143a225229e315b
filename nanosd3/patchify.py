"""Images to tokens and back, and where each token is.

A transformer sees a set; two things make it see an image. `patchify` cuts the latents into p x p
patches, one token each, row by row. `sincos_positions` writes each token's row and column into a
vector that is added to it: without it the network could not tell a 6 from a 9.

Patches are flattened as (row in patch, column in patch, channel) in both directions, so that the
two functions are inverses. Official checkpoints store the embedding as a convolution, whose
weight is ordered (channel, row, column); mmdit.py permutes that weight, not the tokens.
"""

import torch
from torch import Tensor


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut (B, C, H, W) into tokens (B, N, p*p*C), N = (H/p)(W/p), rows first.

    Raises ValueError if H or W is not divisible by the patch size.
    """
    B, C, H, W = x.shape
    if H % patch or W % patch:
        raise ValueError(f"size {H}x{W} is not divisible by the patch size {patch}")
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Put tokens (B, N, p*p*C) back together as (B, C, height, width); inverse of `patchify`.

    Raises ValueError if the number of tokens is not that of a height x width image.
    """
    B, N, features = tokens.shape
    rows, columns = height // patch, width // patch
    if height % patch or width % patch or rows * columns != N:
        raise ValueError(f"{N} tokens of patch size {patch} do not make a {height}x{width} image")
    x = tokens.reshape(B, rows, columns, patch, patch, features // patch**2)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, H/p, p, W/p, p)
    return x.reshape(B, -1, height, width)


def sincos_positions(width: int, grid: int, sample: int, span: int) -> Tensor:
    """The fixed position buffer (1, grid*grid, D) of SD3: sines and cosines of column and row.

    The buffer covers `grid` x `grid` patches. Its middle `sample` x `sample`, the training
    size, has coordinates from 0 up to `span`; images of other sizes and shapes are cropped from
    the middle (`centre_crop`) and run beyond that range instead of stretching it (paper,
    section 5.3.2). The official models have span 16: patch i of 192 at sample 64 is at
    (i - 64) / 4. The column's code fills the first half of the vector.
    """
    coordinate = (torch.arange(grid, dtype=torch.float64) - (grid - sample) / 2) * (span / sample)
    k = torch.arange(width // 4, dtype=torch.float64)
    angles = coordinate[:, None] * 10000 ** (-k / (width // 4))  # (grid, D/4)
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    columns = code[None, :, :].expand(grid, grid, -1)
    rows = code[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, width).float()


def centre_crop(positions: Tensor, rows: int, columns: int) -> Tensor:
    """The middle `rows` x `columns` of a position buffer (1, grid*grid, D), as (1, N, D).

    Raises ValueError if the buffer is smaller than that.
    """
    _, area, D = positions.shape
    grid = round(area**0.5)
    if rows > grid or columns > grid:
        raise ValueError(f"{rows}x{columns} patches do not fit into positions for {grid}x{grid}")
    top, left = (grid - rows) // 2, (grid - columns) // 2
    square = positions.view(1, grid, grid, D)
    return square[:, top : top + rows, left : left + columns].reshape(1, rows * columns, D)
