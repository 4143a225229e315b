"""MMDiT, the transformer of Stable Diffusion 3: two streams that meet in attention.

Image tokens and text tokens keep weights of their own: own norms, own projections, own MLPs.
In each block the queries, keys and values of both are put side by side for one attention, so
every image token sees all text and every text token sees the image: the text is rewritten as
the picture takes shape. Everything else is as in DiT: adaLN modulation with gates from the
timestep and the pooled text, patches in, patches out.

    z (B, C, H, W) --patchify, positions--> x (B, N, D)        image tokens
    context (B, M, Dc) --linear--> y (B, M, D)                 text tokens
    t, pooled --two small MLPs, added--> c (B, D)              modulates every block
    d blocks, then a modulated linear and unpatchify --> velocity (B, C, H, W)

One number sizes it: depth d gives width 64 d and d heads. Options of the 3.5 models: RMSNorm on
queries and keys (`qk_norm`), and blocks whose image stream has a second attention over itself
alone (`dual_attention`, "MMDiT-X"). The last block's text has keys and values only, since its
output would go nowhere; official files still hold its query weights (and query norm), which are
kept but not used. Modules are named as in the official single-file checkpoints.
Paper: arXiv 2403.03206, section 4 and figure 2.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.config_types import MMDiTConfig
from nanosd3.embeddings import TIMESTEP_FEATURES, Embedder, batch_times, timestep_embedding
from nanosd3.layers import HEAD_DIM, MLP, RMSNorm, attention, modulate, split_heads
from nanosd3.patchify import centre_crop, patchify, sincos_positions, unpatchify


class Modulation(NamedTuple):
    """Shift, scale and gate of one branch of a block, each (B, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor = torch.empty(0)  # the last block's text has no output to gate


QKV = tuple[Tensor, Tensor, Tensor]  # each (B, heads, L, 64)


class Attention(nn.Module):
    """One stream's share of an attention: projections in and out. The attention itself is the
    block's, since it may join two streams."""

    def __init__(self, dim: int, qk_norm: bool, keys_only: bool = False):
        super().__init__()
        self.keys_only = keys_only
        self.qkv = nn.Linear(dim, 3 * dim)
        self.ln_q = RMSNorm(HEAD_DIM) if qk_norm else nn.Identity()
        self.ln_k = RMSNorm(HEAD_DIM) if qk_norm else nn.Identity()
        if keys_only and qk_norm:  # stored in official files, affects nothing
            self.ln_q.weight.requires_grad_(False)
        if not keys_only:
            self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> QKV:
        """Tokens (B, L, D) to queries, keys and values; the queries are None if `keys_only`."""
        if self.keys_only:
            D = x.shape[-1]
            k, v = split_heads(F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:]), 2)
            return None, k, v  # type: ignore[return-value]  # only the last text, see join_streams
        q, k, v = split_heads(self.qkv(x), 3)
        return q, k, v

    def project(self, x: Tensor) -> QKV:
        """The same, with queries and keys normalised."""
        q, k, v = self.heads(x)
        return q if q is None else self.ln_q(q), self.ln_k(k), v


class Stream(nn.Module):
    """One modality's half of a joint block."""

    def __init__(self, dim: int, qk_norm: bool, dual: bool = False, keys_only: bool = False):
        super().__init__()
        self.outputs = 2 if keys_only else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.outputs * dim))
        self.attn = Attention(dim, qk_norm, keys_only)
        if dual:
            self.attn2 = Attention(dim, qk_norm)
        if not keys_only:
            self.mlp = MLP(dim)

    def modulation(self, c: Tensor) -> list[Modulation]:
        """Conditioning (B, D) to a Modulation for each branch: attn, mlp and, if dual, attn2."""
        parts = self.adaLN_modulation(c).chunk(self.outputs, dim=1)
        return [Modulation(*parts[i : i + 3]) for i in range(0, self.outputs, 3)]

    def modulated(self, x: Tensor, mod: Modulation) -> Tensor:
        """Tokens (B, L, D), normalised and modulated for a branch."""
        return modulate(x, mod.shift, mod.scale)


class JointBlock(nn.Module):
    """One attention over both streams, then an MLP for each."""

    def __init__(self, dim: int, qk_norm: bool, dual: bool, last: bool):
        super().__init__()
        self.context_block = Stream(dim, qk_norm, keys_only=last)
        self.x_block = Stream(dim, qk_norm, dual=dual)

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image tokens x (B, N, D), text tokens y (B, M, D), conditioning c (B, D) -> x, y.

        The last block returns None for y.
        """
        image, text = self.x_block, self.context_block
        x_attn_mod, x_mlp_mod, *x_attn2_mod = image.modulation(c)
        y_attn_mod, *y_mlp_mod = text.modulation(c)
        x_attn, y_attn = self.attend(x, y, x_attn_mod, y_attn_mod)
        out = x_attn_mod.gate[:, None] * image.attn.proj(x_attn)  # (B, N, D)
        for mod in x_attn2_mod:  # MMDiT-X: a second attention reads the same x
            x_attn2 = attention(*image.attn2.project(image.modulated(x, mod)))
            out = out + mod.gate[:, None] * image.attn2.proj(x_attn2)
        x = feed_forward(image, x + out, x_mlp_mod)
        if text.attn.keys_only:
            return x, None
        y = y + y_attn_mod.gate[:, None] * text.attn.proj(y_attn)  # (B, M, D)
        return x, feed_forward(text, y, *y_mlp_mod)

    def attend(
        self, x: Tensor, y: Tensor, x_mod: Modulation, y_mod: Modulation
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the joint attention for image (B, N, D) and text tokens (B, M, D); M is 0 in
        the last block. (A function of its own, so that q, k and v are freed at its end.)"""
        q, k, v = join_streams(
            self.context_block.attn.project(self.context_block.modulated(y, y_mod)),
            self.x_block.attn.project(self.x_block.modulated(x, x_mod)),
        )
        joint = attention(q, k, v)  # (B, M+N, D), without text queries (B, N, D)
        M = joint.shape[1] - x.shape[1]
        return joint[:, M:], joint[:, :M]


def join_streams(text: QKV, image: QKV) -> QKV:
    """Queries, keys and values of both streams, each (B, heads, M+N, 64), text first."""
    pairs = zip(text, image, strict=True)
    q, k, v = (i if t is None else torch.cat([t, i], dim=2) for t, i in pairs)
    return q, k, v


def feed_forward(stream: Stream, x: Tensor, mod: Modulation) -> Tensor:
    """Residual, modulated, gated MLP."""
    return torch.addcmul(x, mod.gate[:, None], stream.mlp(stream.modulated(x, mod)))


class PatchEmbed(nn.Module):
    """Patches to tokens. The weight has a convolution's shape, as official files store it."""

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, z: Tensor) -> Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C), patchify's order
        return F.linear(patchify(z, self.patch), weight, self.proj.bias)  # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens to patches: one modulated linear."""

    def __init__(self, dim: int, features: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))  # (B, N, p*p*C)


class MMDiT(nn.Module):
    """The velocity network. A freshly initialised one predicts exactly zero.

    Training and sampling swap in faster layers (machine/accelerate.py), with the same parameters
    under the same names.
    """

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        D, patch, channels = config.width, config.patch_size, config.latent_channels
        self.x_embedder = PatchEmbed(channels, patch, D)
        self.t_embedder = Embedder(TIMESTEP_FEATURES, D)
        self.y_embedder = Embedder(config.pooled_dim, D)
        self.context_embedder = nn.Linear(config.context_dim, D)
        positions = sincos_positions(D, config.grid, config.grid_sample, config.grid_span)
        self.register_buffer("pos_embed", positions)  # (1, grid*grid, D)
        self.joint_blocks = nn.ModuleList(
            JointBlock(D, config.qk_norm, i in config.dual_attention, i == config.depth - 1)
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(D, patch * patch * channels)
        initialise(self)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        skip: Collection[int] = (),
    ) -> Tensor:
        """Velocity (B, C, H, W) of latents z (B, C, H, W) at time t (B,), or () for all,
        given context (B, M, Dc) and pooled text (B, Dp). Blocks in `skip` are left out.

        Raises ValueError if H or W is not divisible by the patch size or is larger than the
        position grid, or if the batch sizes differ.
        """
        H, W = z.shape[2:]
        patch = self.config.patch_size
        positions = centre_crop(self.pos_embed, H // patch, W // patch)
        x = self.x_embedder(z) + positions.to(z.dtype)  # (B, N, D)
        x = self.transform(x, t, context, pooled, skip)  # (B, N, p*p*C)
        return unpatchify(x, patch, H, W)  # (B, C, H, W)

    def transform(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, skip: Collection[int] = ()
    ) -> Tensor:
        """Image tokens (B, N, D) to patches of the velocity (B, N, p*p*C).

        Raises ValueError if the batch sizes differ.
        """
        B = len(x)
        t = batch_times(t, x)
        if not len(t) == len(context) == len(pooled) == B:
            sizes = f"z {B}, t {len(t)}, context {len(context)}, pooled {len(pooled)}"
            raise ValueError(f"batch sizes differ: {sizes}")
        y = self.context_embedder(context)  # (B, M, D)
        features = timestep_embedding(t).to(x.dtype)  # (B, 256)
        c = self.t_embedder(features) + self.y_embedder(pooled)  # (B, D)
        for i, block in enumerate(self.joint_blocks):
            if i not in skip:
                x, y = block(x, y, c)
        return self.final_layer(x, c)


def initialise(model: MMDiT) -> None:
    """All initial weights, in one place (DiT's, arXiv 2212.09748, section 3.2).

    Zero modulations close every gate, so a fresh block is the identity and each learns from a
    working signal; the zero final layer makes the first prediction 0 and the first loss
    1 + E[x0^2]. Training still starts: the final layer has a gradient at the first step, the
    patch embedding and the modulations from the second, the rest soon after.
    """
    # Every linear: Xavier, zero bias (the patch embedding as the linear layer that it is).
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    # Time and pooled text: variance-preserving. DiT's 0.02 is close to that at its widths; at
    # width 128 it would make the conditioning some twenty times weaker, and slow to learn.
    for embedder in (model.t_embedder, model.y_embedder):
        for layer in (embedder.mlp[0], embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    # Queries, keys and values: random biases. With zeros the queries of image tokens that are
    # still noise have no direction in common, and those of all heads start alike; finding the
    # one text token that names the image was so slow that T5 alone was ignored (LOG.md).
    for module in model.modules():
        if isinstance(module, Attention):
            nn.init.normal_(module.qkv.bias, std=0.5)
    # adaLN-Zero: all modulations and the final layer.
    for module in model.modules():
        if isinstance(module, Stream | FinalLayer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
    nn.init.zeros_(model.final_layer.linear.weight)
