"""DiT: a plain vision transformer in place of the U-Net, the step from Stable Diffusion to SD3.

Patches become tokens, ordinary transformer blocks work on them, and they become patches again. How
does such a block learn the time and class? The paper has four ways, chosen by a config field:

    in_context       two more tokens, one for the time and one for the class, cut off at the end
    cross_attention  after its self-attention each block attends to those two vectors
    adaln            their sum c gives scale and shift of the LayerNorms (adaptive LayerNorm)
    adaln_zero       c also gives a gate on each branch, and every modulation starts at zero:
                     a fresh block adds nothing, it is the identity

and the last is by far the best, so SD3 took it: an adaLN-Zero block *is* one of MMDiT's streams
(mmdit.py), attending to itself. `adaln_gates`, not in the paper: the gates without the zeros.

    z (B, C, H, W) --patchify, positions--> x (B, N, D)
    t --cosines, MLP--> (B, D)   y --row of a table--> (B, D)   their sum is c (B, D)
    blocks, then LayerNorm, linear, unpatchify --> (B, C or 2 C, H, W)

The published networks were trained as diffusion models (ddpm.py) and return twice as many channels
as they read: the noise, and the variance of a step. The class table has one more row than there are
classes: the null class, for dropped labels, which guidance needs. Modules are named as in the
published checkpoints. Paper: arXiv 2212.09748, section 3.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from nanosd3.embeddings import TIMESTEP_FEATURES, Embedder, batch_times, timestep_embedding
from nanosd3.layers import MLP, attention, modulate
from nanosd3.measure.meters import count_flops
from nanosd3.mmdit import FinalLayer, PatchEmbed
from nanosd3.patchify import sincos_positions, unpatchify

BLOCKS = ("in_context", "cross_attention", "adaln", "adaln_gates", "adaln_zero")


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT."""

    depth: int
    width: int
    heads: int
    patch_size: int
    latent_size: int  # side of the latents; positions are for this size alone
    latent_channels: int
    classes: int
    learned_variance: bool  # twice as many channels out as in (ddpm.py)
    block: str  # one of BLOCKS
    embedding_std: float | None  # of the initial class table and time MLP, see initialise_dit

    @property
    def null(self) -> int:
        """The label for no class."""
        return self.classes


def published(depth: int, width: int, heads: int, patch: int) -> DiTConfig:
    """A size from the paper, for ImageNet at 256 x 256 pixels: latents 32 x 32."""
    return DiTConfig(depth, width, heads, patch, 32, 4, 1000, True, "adaln_zero", 0.02)


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_CONFIGS = {
    f"DiT-{size}/{patch}": published(*SIZES[size], patch) for size in SIZES for patch in (2, 4, 8)
} | {
    # For the latents of the main job, 16 tokens, and as wide and deep as the main model.
    "mnist": DiTConfig(2, 128, 2, 2, 8, 4, 10, True, "adaln_zero", embedding_std=None),
    "tiny": DiTConfig(2, 16, 2, 2, 8, 4, 10, True, "adaln_zero", embedding_std=None),
}


def separate_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, L, parts*D), all of q, then of k, then of v, to `parts` of (B, heads, L, D/heads)."""
    B, L, _ = x.shape
    return x.view(B, L, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class SelfAttention(nn.Module):
    """Every token attends to every token."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = separate_heads(self.qkv(x), 3, self.heads)
        return self.proj(attention(q, k, v))


class CrossAttention(nn.Module):
    """Every token attends to the tokens of another sequence, (B, M, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        (q,) = separate_heads(self.q(x), 1, self.heads)
        k, v = separate_heads(self.kv(others), 2, self.heads)
        return self.proj(attention(q, k, v))


class AdaptiveBlock(nn.Module):
    """adaLN: c (B, D) gives shift and scale of both norms, and the gates if there are any."""

    def __init__(self, dim: int, heads: int, gated: bool):
        super().__init__()
        self.attn = SelfAttention(dim, heads)
        self.mlp = MLP(dim)
        self.outputs = 6 if gated else 4
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.outputs * dim))

    def forward(self, x: Tensor, c: Tensor, pair: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).chunk(self.outputs, dim=1)
        if self.outputs == 4:
            shift, scale, mlp_shift, mlp_scale = modulation
            x = x + self.attn(modulate(x, shift, scale))
            return x + self.mlp(modulate(x, mlp_shift, mlp_scale))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = x + gate[:, None] * self.attn(modulate(x, shift, scale))
        return x + mlp_gate[:, None] * self.mlp(modulate(x, mlp_shift, mlp_scale))


class PlainBlock(nn.Module):
    """A ViT's block; with `cross` it also attends to the pair of time and class (B, 2, D)."""

    def __init__(self, dim: int, heads: int, cross: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        if cross:
            self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
            self.cross_attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, c: Tensor, pair: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        if hasattr(self, "cross_attn"):
            x = x + self.cross_attn(self.norm_cross(x), pair)
        return x + self.mlp(self.norm2(x))


class PlainFinalLayer(nn.Module):
    """Tokens to patches, by a learned norm and a linear layer."""

    def __init__(self, dim: int, features: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class DiT(nn.Module):
    """The network. A freshly initialised one outputs exactly zero."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig):
        super().__init__()
        if config.block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {config.block!r}")
        self.config = config
        D, patch, grid = config.width, config.patch_size, config.latent_size // config.patch_size
        features = patch**2 * config.latent_channels * (1 + config.learned_variance)
        adaptive = config.block.startswith("adaln")
        self.x_embedder = PatchEmbed(config.latent_channels, patch, D)
        self.t_embedder = Embedder(TIMESTEP_FEATURES, D)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.null + 1, D)})
        self.register_buffer("pos_embed", sincos_positions(D, grid, grid, grid))  # (1, N, D)
        self.blocks = nn.ModuleList(
            AdaptiveBlock(D, config.heads, gated=config.block != "adaln")
            if adaptive
            else PlainBlock(D, config.heads, cross=config.block == "cross_attention")
            for _ in range(config.depth)
        )
        self.final_layer = (FinalLayer if adaptive else PlainFinalLayer)(D, features)
        initialise_dit(self)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The output (B, C, H, W), or (B, 2 C, H, W) with a learned variance, for latents z (B, C,
        H, W) at time t in [0, 1], (B,) or () if all share it, given labels y (B,).

        Raises ValueError for latents of another size, unknown labels and batch sizes that differ.
        """
        (B, _, H, W), size = z.shape, self.config.latent_size
        if not H == W == size:
            raise ValueError(f"this network is for latents {size}x{size}, got {H}x{W}")
        t = batch_times(t, z)
        if not len(t) == len(y) == B:
            raise ValueError(f"batch sizes differ: z {B}, t {len(t)}, y {len(y)}")
        if not y.is_meta and not 0 <= int(y.min()) <= int(y.max()) <= self.config.null:
            raise ValueError(f"labels must be from 0 to {self.config.null}, got {y.tolist()}")
        x = self.x_embedder(z) + self.pos_embed.to(z.dtype)  # (B, N, D)
        time = self.t_embedder(timestep_embedding(t).to(z.dtype))  # (B, D)
        pair = torch.stack([time, self.y_embedder["embedding_table"](y)], dim=1)  # (B, 2, D)
        c = pair.sum(1)  # (B, D)
        if self.config.block == "in_context":
            x = torch.cat([pair, x], dim=1)  # (B, 2+N, D)
        for block in self.blocks:
            x = block(x, c, pair)
        x = self.final_layer(x[:, -self.pos_embed.shape[1] :], c)  # (B, N, p*p*C)
        return unpatchify(x, self.config.patch_size, H, W)  # (B, C, H, W)


def initialise_dit(model: DiT) -> None:
    """All initial weights, in one place (paper, section 3.2, and the released code)."""
    # Every linear layer (also that of the patches): Xavier, zero bias.
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    # Time and class. DiT has 0.02; at widths like 128 that is too weak to be learned soon, so None
    # preserves the variance, as in mmdit.py.
    mlp, std = model.t_embedder.mlp, model.config.embedding_std
    for layer in (model.y_embedder["embedding_table"], mlp[0], mlp[2]):
        inputs = getattr(layer, "in_features", 1)
        nn.init.normal_(layer.weight, std=std or inputs**-0.5)
    # adaLN-Zero: closed gates. Without gates, zeros leave the norms as they are.
    for module in model.modules():
        is_block = isinstance(module, AdaptiveBlock) and model.config.block != "adaln_gates"
        if is_block or isinstance(module, FinalLayer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
    nn.init.zeros_(model.final_layer.linear.weight)  # the first output is 0


@cache  # the largest takes seconds
def multiply_adds(config: DiTConfig) -> int:
    """Multiply-adds of a forward pass on one image (the paper's flops); nothing is computed."""
    with torch.device("meta"):
        model = DiT(config)
        z = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        y = torch.zeros(1, dtype=torch.long)
        return count_flops(lambda: model(z, torch.zeros(1), y)) // 2
