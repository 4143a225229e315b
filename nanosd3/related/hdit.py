"""HDiT: a transformer that draws pixels, without an autoencoder and without a convolution.

Latents make images small, since attention between N tokens costs N^2. The Hourglass Diffusion
Transformer keeps the pixels and shapes the network like a U-Net instead. Its outer levels have many
narrow tokens, and each attends only to its neighbours (neighbourhood.py); four tokens at a time are
merged into one for the next level, and only the innermost level attends globally. On the way back
each token is split into four again and mixed with what was there before:

    z (B, C, H, W) --patches, linear--> tokens
      level 0     blocks: neighbours -----------------------> lerp, blocks --linear--> velocity
        merge 2x2 |                                         | split 2x2
      level 1     blocks: neighbours ------> lerp, blocks --+
        merge 2x2 |                        | split 2x2
      level 2     blocks: all to all ------+

Each doubling of the image adds one level outside and changes nothing within, so the cost grows with
the number of pixels. A network of one level without a window is flat: a DiT made of these blocks.

A block differs from DiT's by later findings from language models. Its norm is RMSNorm, and time and
text set only its scale, with no shift or gate. Queries and keys are normalised to unit vectors, so
their products are cosines; a learned factor s per head, initially 10, sets the sharpness of the
softmax. Positions are not added; they rotate queries and keys (axial_rope.py). The MLP is gated
(GEGLU). Linear layers have no biases.

The loss weight is `soft_min_snr`. Left out: dropout, and the mapping network's lower learning rate.
Paper: arXiv 2401.11605.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.embeddings import TIMESTEP_FEATURES, batch_times, timestep_embedding
from nanosd3.flow import flow_loss
from nanosd3.layers import RMSNorm
from nanosd3.measure.meters import count_flops
from nanosd3.patchify import patchify, unpatchify
from nanosd3.related.axial_rope import Grid, rotate, rotation
from nanosd3.related.neighbourhood import tiled_attention
from nanosd3.t5 import GatedMLP

FIRST_SHARPNESS = 10.0  # s of a fresh head


@dataclass(frozen=True)
class HDiTLevel:
    """One level of the hourglass."""

    width: int
    depth: int  # blocks on the way in, and as many on the way out; in the innermost, in total
    window: int | None  # neighbours on a side; None: every token attends to all


@dataclass(frozen=True)
class HDiTConfig:
    """Sizes of an HDiT."""

    channels: int
    patch_size: int
    levels: tuple[HDiTLevel, ...]  # outermost first
    head_dim: int
    mapping_width: int
    mapping_depth: int
    pooled_dim: int  # features of the text or other conditioning

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch_size * 2 ** (len(self.levels) - 1)


# --- blocks ---------------------------------------------------------------------------------------


class AdaRMSNorm(nn.Module):
    """RMSNorm with a scale computed from c (B, Dm): 1 + W c, where W is zero at first."""

    def __init__(self, dim: int, condition: int):
        super().__init__()
        self.linear = nn.Linear(condition, dim, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.linear(c)[:, None])


def length(x: Tensor) -> Tensor:
    """The norm of each token and head of x (B, heads, N, d): (B, heads, N, 1)."""
    return torch.linalg.vector_norm(x, dim=3, keepdim=True).clamp(min=1e-6)


class CosineAttention(nn.Module):
    """Attention by the cosine of queries and keys, to neighbours or to all."""

    def __init__(self, dim: int, head_dim: int, window: int | None):
        super().__init__()
        self.heads, self.window = dim // head_dim, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.sharpness = nn.Parameter(torch.full((self.heads,), FIRST_SHARPNESS))
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = rotation(grid, self.heads, q.shape[3], x.dtype, x.device)
        root = self.sharpness.sqrt()[:, None, None]
        q, k = (rotate(a * (root / length(a)), cos, sin) for a in (q, k))
        if self.window is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            out = tiled_attention(q, k, v, grid, self.window, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


class HourglassBlock(nn.Module):
    """Attention, then the gated MLP, each after its norm."""

    def __init__(self, dim: int, head_dim: int, window: int | None, condition: int):
        super().__init__()
        self.norm1 = AdaRMSNorm(dim, condition)
        self.attn = CosineAttention(dim, head_dim, window)
        self.norm2 = AdaRMSNorm(dim, condition)
        self.mlp = GatedMLP(dim, 3 * dim)

    def forward(self, x: Tensor, c: Tensor, grid: Grid) -> Tensor:
        x = x + self.attn(self.norm1(x, c), grid)
        return x + self.mlp(self.norm2(x, c))


class Mapping(nn.Module):
    """Time and text to the vector c (B, Dm) that sets the norms' scales."""

    def __init__(self, config: HDiTConfig):
        super().__init__()
        D = config.mapping_width
        self.time = nn.Linear(TIMESTEP_FEATURES, D, bias=False)
        self.text = nn.Linear(config.pooled_dim, D, bias=False)
        self.norm_in, self.norm_out = RMSNorm(D), RMSNorm(D)
        self.norms = nn.ModuleList(RMSNorm(D) for _ in range(config.mapping_depth))
        self.mlps = nn.ModuleList(GatedMLP(D, 3 * D) for _ in range(config.mapping_depth))

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        c = self.norm_in(self.time(timestep_embedding(t).to(pooled)) + self.text(pooled))
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            c = c + mlp(norm(c))
        return self.norm_out(c)


def merge(x: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, N, D), 2 x 2 of them side by side: (B, N/4, 4 D)."""
    return patchify(x.unflatten(1, grid).movedim(3, 1), 2)


def split(x: Tensor, grid: Grid) -> Tensor:
    """The inverse of `merge`: tokens (B, N/4, 4 D) to those of a grid, (B, N, D)."""
    return unpatchify(x, 2, *grid).movedim(1, 3).flatten(1, 2)


class HDiT(nn.Module):
    """The velocity network. A freshly initialised one outputs exactly zero."""

    def __init__(self, config: HDiTConfig):
        super().__init__()
        self.config = config
        features, levels = config.patch_size**2 * config.channels, config.levels

        def blocks(level: HDiTLevel) -> nn.ModuleList:
            sizes = level.width, config.head_dim, level.window, config.mapping_width
            return nn.ModuleList(HourglassBlock(*sizes) for _ in range(level.depth))

        widths = [level.width for level in levels]
        pairs = list(pairwise(widths))
        self.mapping = Mapping(config)
        self.patch_in = nn.Linear(features, widths[0], bias=False)
        self.inward = nn.ModuleList(blocks(level) for level in levels)
        self.merges = nn.ModuleList(nn.Linear(4 * a, b, bias=False) for a, b in pairs)
        self.splits = nn.ModuleList(nn.Linear(b, 4 * a, bias=False) for a, b in pairs)
        self.mix = nn.Parameter(torch.full((len(pairs),), 0.5))  # of skips and what comes back
        self.outward = nn.ModuleList(blocks(level) for level in levels[:-1])
        self.norm_out = RMSNorm(widths[0])
        self.patch_out = nn.Linear(widths[0], features, bias=False)
        # Linear layers start with PyTorch's defaults. Zero-initialised: output projections, so that
        # every block is the identity and the network's output 0 at first, and modulations.
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "wo.weight", "linear.weight", "patch_out.weight")):
                nn.init.zeros_(parameter)

    def forward(self, z: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
        """Velocity (B, C, H, W) of pixels z (B, C, H, W) at time t (B,), or () if all share it,
        given the pooled text (B, Dp).

        Raises ValueError if H or W does not fit the levels, or the batch sizes differ.
        """
        (B, _, H, W), patch = z.shape, self.config.patch_size
        t = batch_times(t, z)
        if not len(t) == len(pooled) == B:
            raise ValueError(f"batch sizes differ: z {B}, t {len(t)}, pooled {len(pooled)}")
        if H % self.config.multiple or W % self.config.multiple:
            raise ValueError(f"size {H}x{W} is no multiple of {self.config.multiple}")
        c, grid, skips = self.mapping(t, pooled), (H // patch, W // patch), []
        x = self.patch_in(patchify(z, patch))  # (B, N, D) of level 0
        for i, blocks in enumerate(self.inward):
            if i > 0:
                skips.append((x, grid))
                x, grid = self.merges[i - 1](merge(x, grid)), (grid[0] // 2, grid[1] // 2)
            for block in blocks:
                x = block(x, c, grid)
        for i in reversed(range(len(skips))):
            skip, grid = skips[i]
            x = torch.lerp(skip, split(self.splits[i](x), grid), self.mix[i])
            for block in self.outward[i]:
                x = block(x, c, grid)
        return unpatchify(self.patch_out(self.norm_out(x)), patch, H, W)  # (B, C, H, W)


# --- loss and cost --------------------------------------------------------------------------------


def soft_min_snr(t: Tensor, data_std: float = 1.0) -> Tensor:
    """The weight of the velocity's squared error, t^2 (1-t)^2 / (t^2 + data_std^2 (1-t)^2).

    z / (1-t) is the image with noise of deviation sigma = t / (1-t), so SNR = 1 / sigma^2. An error
    of the velocity is one of x0 divided by t, so this weighs x0's squared error by

        (1-t)^2 / (t^2 + data_std^2 (1-t)^2) = 1 / (sigma^2 + data_std^2) = g SNR / (SNR + g)

    with g = 1 / data_std^2: half their harmonic mean, a smooth form of min(SNR, g). At low noise
    the weight is at most g.
    """
    return (t * (1 - t)) ** 2 / (t**2 + (data_std * (1 - t)) ** 2)


def hdit_loss(
    velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, data_std: float = 1.0
) -> Tensor:
    """The weighted loss of each sample, (B,): as the noise vanishes, the squared error of x0."""
    return data_std**2 * soft_min_snr(t, data_std) * flow_loss(velocity, x0, noise)


def hdit_multiply_adds(config: HDiTConfig, height: int, width: int) -> int:
    """Multiply-adds of one forward pass on one image; nothing is computed."""
    with torch.device("meta"):
        model = HDiT(config)
        z = torch.empty(1, config.channels, height, width)
        pooled = torch.empty(1, config.pooled_dim)
        return count_flops(lambda: model(z, torch.zeros(1), pooled)) // 2
