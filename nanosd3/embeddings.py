"""Time and the pooled text as vectors of the model's width: what modulates every block."""

import math

import torch
from torch import Tensor, nn

TIMESTEP_SCALE = 1000  # t in [0, 1] becomes 0..1000 here and nowhere else
TIMESTEP_FEATURES = 256


def batch_times(t: Tensor, x: Tensor) -> Tensor:
    """Times t (B,) of a batch x (B, ...) unchanged; one time () for the whole batch, as samplers
    pass it, expanded. The latter may be on the CPU while x is on a GPU."""
    return t.to(x.device).expand(len(x)) if t.ndim == 0 else t


def timestep_embedding(t: Tensor) -> Tensor:
    """Cosines, then sines, of 1000 t at 128 frequencies from 1 down to 1/10000; (B, 256).

    The slowest turns by 0.1 radian over all of time, the fastest 160 times. Without the factor
    1000, all but a few would stand still: the most common mistake in reimplementations.
    """
    half = TIMESTEP_FEATURES // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
    angle = (t.float() * TIMESTEP_SCALE)[:, None] * frequency  # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: brings time features or the pooled text to the model's width."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)
