"""Backbones that MMDiT was compared with (arXiv 2403.03206, section 5.2.3).

A backbone is the network between noisy latents and velocity. All get the time and the pooled text
as MMDiT does, through modulation. They differ in how image tokens attend to text tokens:

    dit      one sequence [text; image] with one set of weights: DiT, with text in the sequence
    cross    image tokens attend to each other and then to the text, which stays as it was: CrossDiT
    uvit     the same blocks at low resolution between convolutions at high resolution: UViT, after
             simple diffusion (Hoogeboom et al., arXiv 2301.11093)
    mmdit    the same attention as dit's, with weights of its own for each of text and image
    mmdit3   and for each of CLIP's tokens and T5's: three sets of weights

Weights of a block of width D, in D^2, without biases: a stream's modulation 6, attention 4, MLP 8.

    dit 18     cross 18 + 4     mmdit 36     mmdit3 54     of the last block 18, 22, 23, 28

(In the last block the text keeps shift, scale and qkv: 5.) What a token costs does not depend on
whose weights it meets: mmdit has twice dit's weights and exactly its multiply-adds. That is the
whole argument for and against it: at equal width it is more network for the same time, and at equal
size it is half as deep. cross saves the text's MLPs, but its text tokens are never updated.

All sit between the core's embedders and head, so each block is one class: (x, y, c) -> (x, y),
image tokens (B, N, D), text tokens (B, M, D), conditioning c (B, D). A fresh block is the identity,
and a fresh network outputs zero. The paper gives no details of its CrossDiT and UViT: these are the
simplest versions. (U-ViT with a hyphen, arXiv 2209.12152, is another network: DiT with long skips.)
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.config_types import MMDiTConfig
from nanosd3.embeddings import batch_times, timestep_embedding
from nanosd3.layers import HEAD_DIM, RMSNorm, attention
from nanosd3.mmdit import MMDiT, Modulation, Stream, feed_forward, initialise, join_streams
from nanosd3.related.dit import CrossAttention, separate_heads
from nanosd3.vae import conv3, norm

Tokens = tuple[Tensor, Tensor | None]  # image (B, N, D), text (B, M, D): none after the last block


@dataclass(frozen=True)
class BackboneConfig(MMDiTConfig):
    """An MMDiT's sizes, with a width that does not follow from its depth."""

    heads: int  # of 64
    clip_tokens: int  # how many of the text tokens are the CLIPs'; they come first

    @property
    def width(self) -> int:
        return HEAD_DIM * self.heads


# --- blocks ---------------------------------------------------------------------------------------


def after_attention(
    stream: Stream, x: Tensor, gathered: Tensor, attn_mod: Modulation, mlp_mod: Modulation
) -> Tensor:
    """Tokens (B, L, D) after adding the output of attention and the MLP."""
    x = x + attn_mod.gate[:, None] * stream.attn.proj(gathered)
    return feed_forward(stream, x, mlp_mod)


class SharedBlock(nn.Module):
    """dit: all tokens in one sequence, through one stream. The last block computes only the image
    tokens, since nothing would use its text."""

    def __init__(self, config: BackboneConfig, last: bool):
        super().__init__()
        self.last = last
        self.stream = Stream(config.width, config.qk_norm)

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> Tokens:
        stream, N = self.stream, x.shape[1]
        attn_mod, mlp_mod = stream.modulation(c)
        s = torch.cat([y, x], dim=1)  # (B, M+N, D)
        q, k, v = stream.attn.project(stream.modulated(s, attn_mod))
        if self.last:
            s, q = x, q[:, :, -N:]
        s = after_attention(stream, s, attention(q, k, v), attn_mod, mlp_mod)
        return s[:, -N:], None if self.last else s[:, :-N]


class Reading(CrossAttention):
    """Cross-attention, with the core's norms on queries and keys."""

    def __init__(self, dim: int, qk_norm: bool):
        super().__init__(dim, dim // HEAD_DIM)
        self.ln_q = RMSNorm(HEAD_DIM) if qk_norm else nn.Identity()
        self.ln_k = RMSNorm(HEAD_DIM) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        (q,) = separate_heads(self.q(x), 1, self.heads)
        k, v = separate_heads(self.kv(others), 2, self.heads)
        return self.proj(attention(self.ln_q(q), self.ln_k(k), v))


class CrossBlock(nn.Module):
    """cross: self-attention, cross-attention to the text, which is not updated, then an MLP."""

    def __init__(self, config: BackboneConfig, last: bool):
        super().__init__()
        self.stream = Stream(config.width, config.qk_norm)
        self.norm_cross = nn.LayerNorm(config.width, eps=1e-6)
        self.cross_attn = Reading(config.width, config.qk_norm)

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> Tokens:
        stream = self.stream
        attn_mod, mlp_mod = stream.modulation(c)
        own = attention(*stream.attn.project(stream.modulated(x, attn_mod)))
        x = x + attn_mod.gate[:, None] * stream.attn.proj(own)
        x = x + self.cross_attn(self.norm_cross(x), y)
        return feed_forward(stream, x, mlp_mod), y


class ThreeSetBlock(nn.Module):
    """mmdit3: a joint block whose text is two streams, CLIP's tokens and T5's."""

    def __init__(self, config: BackboneConfig, last: bool):
        super().__init__()
        self.clip_tokens, self.last = config.clip_tokens, last
        self.clip_block = Stream(config.width, config.qk_norm, keys_only=last)
        self.t5_block = Stream(config.width, config.qk_norm, keys_only=last)
        self.x_block = Stream(config.width, config.qk_norm)

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> Tokens:
        streams = (self.clip_block, self.t5_block, self.x_block)
        sizes = [self.clip_tokens, y.shape[1] - self.clip_tokens, x.shape[1]]
        parts = [*y.split(sizes[:2], dim=1), x]
        mods = [stream.modulation(c) for stream in streams]
        projected = [
            stream.attn.project(stream.modulated(part, attn_mod))
            for stream, part, (attn_mod, *_) in zip(streams, parts, mods, strict=True)
        ]
        joint = attention(*reduce(join_streams, projected))  # (B, M+N, D), last (B, N, D)
        if self.last:
            return after_attention(self.x_block, x, joint, *mods[2]), None
        clip, t5, image = (
            after_attention(stream, part, gathered, *mod)
            for stream, part, gathered, mod in zip(
                streams, parts, joint.split(sizes, dim=1), mods, strict=True
            )
        )
        return image, torch.cat([clip, t5], dim=1)


class ConvBlock(nn.Module):
    """uvit: the autoencoder's residual block, with its second norm modulated by c (B, D)."""

    def __init__(self, channels: int, dim: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels, groups), conv3(channels, channels)
        self.norm2, self.conv2 = norm(channels, groups), conv3(channels, channels)
        self.adaLN_modulation = nn.Linear(dim, 2 * channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(F.silu(c))[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return x + self.conv2(F.silu(h))  # (B, channels, H, W)


# --- networks -------------------------------------------------------------------------------------


class Backbone(MMDiT):
    """The MMDiT's embedders and final layer, around other blocks."""

    def __init__(self, config: BackboneConfig, block: type[nn.Module]):
        super().__init__(config)
        self.joint_blocks = nn.ModuleList(
            block(config, last=i == config.depth - 1) for i in range(config.depth)
        )
        initialise_backbone(self)


class UViT(Backbone):
    """Convolutions at full resolution before and after a transformer on patches.

    The transformer maps feature maps to feature maps: its patch embedding downsamples, its head
    upsamples, and its output is added to its input (the skip).
    """

    channels = 32  # of the feature maps
    conv_blocks = 1  # on each side

    def __init__(self, config: BackboneConfig):
        super().__init__(replace(config, latent_channels=self.channels), CrossBlock)
        self.conv_in = conv3(config.latent_channels, self.channels)
        make = partial(ConvBlock, self.channels, config.width, 8)
        self.down_blocks, self.up_blocks = (
            nn.ModuleList(make() for _ in range(self.conv_blocks)) for _ in range(2)
        )
        self.norm_out = norm(self.channels, 8)
        self.conv_out = conv3(self.channels, config.latent_channels)
        initialise_backbone(self)
        nn.init.zeros_(self.conv_out.weight)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        skip: Collection[int] = (),
    ) -> Tensor:
        features = timestep_embedding(batch_times(t, z)).to(z.dtype)
        c = self.t_embedder(features) + self.y_embedder(pooled)  # (B, D)
        h = self.conv_in(z)  # (B, channels, H, W)
        for block in self.down_blocks:
            h = block(h, c)
        h = h + super().forward(h, t, context, pooled, skip)
        for block in self.up_blocks:
            h = block(h, c)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, C, H, W)


def initialise_backbone(model: Backbone) -> None:
    """All initial weights: the core's, and those of the other layers by the same principles."""
    initialise(model)
    for module in model.modules():
        if isinstance(module, Reading):  # closed, with queries and keys that are not all alike
            nn.init.zeros_(module.proj.weight)
            for projection in (module.q, module.kv):
                nn.init.normal_(projection.bias, std=0.5)
        elif isinstance(module, ConvBlock):
            nn.init.zeros_(module.adaLN_modulation.weight)
            nn.init.zeros_(module.conv2.weight)


BACKBONES: dict[str, Callable[[BackboneConfig], MMDiT]] = {
    "dit": lambda config: Backbone(config, SharedBlock),
    "cross": lambda config: Backbone(config, CrossBlock),
    "uvit": UViT,
    "mmdit": MMDiT,
    "mmdit3": lambda config: Backbone(config, ThreeSetBlock),
}
