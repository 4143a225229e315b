"""Spacetime patches: the same transformer, for video (Sora, OpenAI's technical report of 2024).

A video is cut in time as well: a token is a box of p_t frames and p x p latents. The transformer is
independent of the number of tokens and their shape, so a network for images works for videos once
its tokens have a position in time:

    z (B, C, T, H, W) --patchify_video--> x (B, N, p*p*p_t*C)    N = (T/p_t)(H/p)(W/p)
    position = code of row and column + code of time, both measured from the middle of the grid

The code of time is zero in the middle, so a video of one frame with p_t = 1 is an image and
`VideoMMDiT` is then the core's MMDiT, number for number. Positions are functions of coordinates,
not a learned table: another size or length needs only noise in a grid of that size ("arranging
randomly-initialized patches in an appropriately-sized grid", as the report says). The x-sora
experiments in claims/ test how the network generalises to positions that it was not trained on. The
report gives no further details of the network.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from nanosd3.config_types import MMDiTConfig
from nanosd3.mmdit import MMDiT
from nanosd3.patchify import centre_crop, patchify, unpatchify


def fold_time(z: Tensor, frames: int) -> Tensor:
    """Frames (B, C, T, H, W) to images of `frames` frames each, (B * T/frames, frames * C, H, W).

    Raises ValueError if T is not divisible.
    """
    B, C, T, H, W = z.shape
    if T % frames:
        raise ValueError(f"{T} frames are not divisible into patches of {frames}")
    z = z.reshape(B, C, T // frames, frames, H, W)
    return z.permute(0, 2, 3, 1, 4, 5).reshape(B * T // frames, frames * C, H, W)


def unfold_time(images: Tensor, frames: int, length: int) -> Tensor:
    """The inverse of `fold_time` for videos of `length` frames: (B, C, length, H, W)."""
    _, features, H, W = images.shape
    z = images.reshape(-1, length // frames, frames, features // frames, H, W)
    return z.permute(0, 3, 1, 2, 4, 5).reshape(len(z), -1, length, H, W)


def patchify_video(z: Tensor, frames: int, patch: int) -> Tensor:
    """Cut (B, C, T, H, W) into tokens (B, N, p*p*p_t*C): time first, then rows, then columns.

    Raises ValueError if T is not divisible by `frames`, or H or W by `patch`.
    """
    return patchify(fold_time(z, frames), patch).reshape(
        len(z), -1, patch * patch * frames * z.shape[1]
    )


def unpatchify_video(tokens: Tensor, frames: int, patch: int, size: tuple[int, int, int]) -> Tensor:
    """Put tokens back together as (B, C, T, H, W), `size` = (T, H, W); inverse of `patchify_video`.

    Raises ValueError if the number of tokens is not that of such a video.
    """
    T, H, W = size
    slots = T // frames
    if T % frames or tokens.shape[1] % max(slots, 1):
        raise ValueError(f"{tokens.shape[1]} tokens of {frames} frames do not make {T} frames")
    images = unpatchify(tokens.reshape(len(tokens) * slots, -1, tokens.shape[2]), patch, H, W)
    return unfold_time(images, frames, T)


def time_code(width: int, slots: int) -> Tensor:
    """A vector for each of `slots` steps in time, (slots, D): sines, and cosines less 1, of the
    distance to the middle. A single step gets zeros."""
    distance = torch.arange(slots, dtype=torch.float64) - (slots - 1) / 2
    k = torch.arange(width // 2, dtype=torch.float64)
    angles = distance[:, None] * 10000 ** (-k / (width // 2))  # (slots, D/2)
    return torch.cat([angles.sin(), angles.cos() - 1], dim=1).float()


def spacetime_positions(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    """Positions (1, slots * rows * columns, D) of a grid, from the position buffer for one frame.

    Raises ValueError if the buffer is smaller than a frame.
    """
    place = centre_crop(pos_embed, rows, columns)  # (1, rows * columns, D)
    when = time_code(place.shape[2], slots).to(place)[:, None]  # (slots, 1, D)
    return (place + when).reshape(1, -1, place.shape[2])


def inflated(state: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """The weights of an MMDiT for images, for patches of `frames` equal frames: input weights are
    divided among the frames, output weights are repeated for each (I3D, arXiv 1705.07750)."""
    embed = state["x_embedder.proj.weight"]  # (D, C, p, p)
    _, C, patch, _ = embed.shape

    def for_each_frame(rows: Tensor) -> Tensor:  # (p*p*C, ...) to (p*p*frames*C, ...)
        rows = rows.reshape(patch * patch, 1, C, *rows.shape[1:])
        return rows.expand(-1, frames, -1, *rows.shape[3:]).flatten(0, 2)

    last = {
        key: for_each_frame(state[key]) for key in state if key.startswith("final_layer.linear")
    }
    return state | last | {"x_embedder.proj.weight": embed.repeat(1, frames, 1, 1) / frames}


class VideoMMDiT(MMDiT):
    """The MMDiT for videos (B, C, T, H, W), with patches of `frames` frames."""

    def __init__(self, config: MMDiTConfig, frames: int):
        super().__init__(replace(config, latent_channels=frames * config.latent_channels))
        self.frames = frames

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        skip: Collection[int] = (),
    ) -> Tensor:
        """Velocity (B, C, T, H, W) of latents z like it at time t (B,) or (), given context
        (B, M, Dc) and pooled text (B, Dp).

        Raises ValueError if z does not divide into patches, or has frames larger than the position
        grid.
        """
        B, _, T, H, W = z.shape
        patch, slots = self.config.patch_size, T // self.frames
        x = self.x_embedder(fold_time(z, self.frames))  # (B * slots, rows * columns, D)
        x = x.reshape(B, -1, x.shape[2])  # (B, N, D)
        positions = spacetime_positions(self.pos_embed, slots, H // patch, W // patch)
        x = self.transform(x + positions.to(z.dtype), t, context, pooled, skip)
        return unpatchify_video(x, self.frames, patch, (T, H, W))
