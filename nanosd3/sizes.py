"""Which model a set of tensors is: every size, read from shapes.

Official files carry no config that could be trusted, but shapes tell all that matters: the width
of the patch embedding is 64 times the depth, the position buffer is a square, QK-norm and dual
attention are there if their weights are. What shapes cannot tell is taken from the released
models: heads of 64, norms over 32 groups, the latents' shift and scale, which activation, and
how it is sampled. SD3.5-large and its turbo have the same shapes; the file's name decides.
"""

import re
from dataclasses import replace
from math import isqrt
from pathlib import Path

from nanosd3.config import (
    CONFIGS,
    OFFICIAL_TEXT,
    OFFICIAL_VAE,
    CLIPConfig,
    Config,
    MMDiTConfig,
    Sampling,
    T5Config,
    TextConfig,
    VAEConfig,
    official_mmdit,
)
from nanosd3.layers import HEAD_DIM
from nanosd3.layouts import count
from nanosd3.parts import State
from nanosd3.runtime import InputError

FOREIGN = (  # a pattern in a tensor's name, and what has it
    (r"(^|\.)(double|single)(_transformer)?_blocks\.", "FLUX, not Stable Diffusion 3"),
    (r"(^|\.)(label_emb|conditioner|add_embedding)\.", "SDXL, not Stable Diffusion 3"),
    (r"(^|\.)input_blocks\.", "Stable Diffusion 1 or 2, not 3"),
    (r"(^|\.)time_embedding\.linear_1\.", "Stable Diffusion 1 or 2, not 3"),
    (r"(lora_(A|B|up|down)|\.alpha$)", "a LoRA (a small change to a model), not a model"),
)
SCALED = r"(^|\.)(scale_weight|weight_scale|scaled_fp8|comfy_quant)$"


def refuse_foreign(names: list[str], path: Path) -> None:
    """Raises InputError if tensors of these names are those of another model."""
    refuse_scaled(names, path)
    for pattern, what in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{path}: this is {what}")


def refuse_scaled(names: list[str], path: Path) -> None:
    """Raises InputError for weights that mean something only when multiplied by scales."""
    if any(re.search(SCALED, name) for name in names):
        raise InputError(f"{path}: 8-bit weights with scales of their own, which are not "
                         "supported; take the fp16 or the plain fp8 file")  # fmt: skip


def file_of(state: State) -> Path:
    return next(iter(state.values())).file


def shape(state: State, name: str, ranks: int, part: str) -> tuple[int, ...]:
    """The shape of a tensor from which sizes are read. Raises InputError if it is missing, has
    another number of dimensions, or is empty."""
    if name not in state:
        raise InputError(f"{file_of(state)}: {part} has no tensor {name}")
    found = state[name].shape
    if len(found) != ranks or 0 in found:
        raise InputError(f"{state[name].file}: tensor {state[name].name} has shape {found}, "
                         f"expected {ranks} dimensions")  # fmt: skip
    return found


def mmdit_config(state: State) -> MMDiTConfig:
    """Sizes of the transformer. Raises InputError if this is none of SD3's kind."""
    look = lambda name, ranks: shape(state, name, ranks, "the transformer")  # noqa: E731
    width, channels, patch, _ = look("x_embedder.proj.weight", 4)
    if width % HEAD_DIM:
        raise InputError(f"{file_of(state)}: a transformer {width} wide; SD3's are a multiple of "
                         f"{HEAD_DIM}")  # fmt: skip
    depth, positions = width // HEAD_DIM, look("pos_embed", 3)[1]
    if isqrt(positions) ** 2 != positions:
        raise InputError(f"{file_of(state)}: {positions} positions are no square grid")
    has = lambda i, name: f"joint_blocks.{i}.{name}" in state  # noqa: E731
    dual = tuple(i for i in range(depth) if has(i, "x_block.attn2.qkv.weight"))
    qk_norm = has(0, "context_block.attn.ln_k.weight")
    return replace(
        official_mmdit(depth, qk_norm, isqrt(positions), dual),
        latent_channels=channels,
        patch_size=patch,
        context_dim=look("context_embedder.weight", 2)[1],
        pooled_dim=look("y_embedder.mlp.0.weight", 2)[1],
    )


def vae_config(state: State) -> VAEConfig:
    """Sizes of the autoencoder. Raises InputError if it is not SD3's."""
    look = lambda name, ranks=4: shape(state, name, ranks, "the autoencoder")  # noqa: E731
    channels = look("decoder.conv_in.weight")[1]
    if channels == 4:
        raise InputError(f"{file_of(state)}: an autoencoder with 4 latent channels, that of Stable "
                         "Diffusion 1.5 or SDXL; SD3's has 16")  # fmt: skip
    if any("quant_conv." in name for name in state):
        raise InputError(f"{file_of(state)}: an autoencoder with convolutions around its latents "
                         "(quant_conv); SD3's has none")  # fmt: skip
    widths = tuple(
        look(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(count(state, "down"))
    )
    if any(width % OFFICIAL_VAE.norm_groups for width in widths):
        raise InputError(f"{file_of(state)}: an autoencoder of widths {widths}; SD3's are "
                         f"multiples of {OFFICIAL_VAE.norm_groups}")  # fmt: skip
    first_level = {n: t for n, t in state.items() if n.startswith("encoder.down.0.")}
    return replace(
        OFFICIAL_VAE,
        image_channels=look("encoder.conv_in.weight")[1],
        channels=widths,
        blocks=count(first_level, "block"),
        latent_channels=channels,
    )


def clip_config(state: State, like: CLIPConfig) -> CLIPConfig:
    """Sizes of a CLIP, `like` the official one in what shapes cannot tell."""
    look = lambda name, ranks: shape(state, name, ranks, "the CLIP")  # noqa: E731
    vocab, width = look("text_model.embeddings.token_embedding.weight", 2)
    length = look("text_model.embeddings.position_embedding.weight", 2)[0]
    if (vocab, length) != (like.vocab, like.length) or width % 64:
        raise InputError(f"{file_of(state)}: a CLIP of {vocab} tokens, length {length}, width "
                         f"{width}; SD3's have {like.vocab}, {like.length}, a multiple of "
                         "64")  # fmt: skip
    return replace(like, width=width, layers=count(state, "layers"), heads=width // 64)


def t5_config(state: State) -> T5Config:
    look = lambda name: shape(state, name, 2, "the T5")  # noqa: E731
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab, width = look("encoder.embed_tokens.weight")
    if vocab < OFFICIAL_TEXT.t5.vocab - 28:  # 32,100 pieces, padded to 32,128
        raise InputError(f"{file_of(state)}: a T5 of {vocab} tokens; SD3's has "
                         f"{OFFICIAL_TEXT.t5.vocab}")  # fmt: skip
    heads = look(f"{attention}.relative_attention_bias.weight")[1]
    return T5Config(
        width,
        layers=count(state, "block"),
        heads=heads,
        head_dim=look(f"{attention}.q.weight")[0] // heads,
        hidden=look("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        vocab=vocab,
        length=OFFICIAL_TEXT.t5.length,
    )


def text_config(parts: dict[str, State], mmdit: MMDiTConfig) -> TextConfig:
    """Sizes of the encoders that are there; of the others, what the transformer takes."""
    names = ("clip_l", "clip_g")
    like = {name: getattr(OFFICIAL_TEXT, name) for name in names}
    clips = {name: clip_config(parts[name], like[name]) for name in names if name in parts}
    if not clips:
        clips["clip_l"] = replace(like["clip_l"], width=mmdit.pooled_dim * 3 // 8)  # 768 of 2048
    rest = mmdit.pooled_dim - sum(clip.width for clip in clips.values())
    for name in names:
        clips.setdefault(name, replace(like[name], width=rest))
    if (clips["clip_l"].width, clips["clip_g"].width) == (1280, 768):
        raise InputError(f"{file_of(parts['clip_l'])}: this CLIP-L is 1280 wide and the CLIP-G "
                         "768; they are exchanged")  # fmt: skip
    t5 = replace(OFFICIAL_TEXT.t5, width=mmdit.context_dim)
    if "t5" in parts:
        t5 = t5_config(parts["t5"])
    return replace(OFFICIAL_TEXT, t5=t5, **clips)


def known_as(mmdit: MMDiTConfig, path: Path) -> tuple[str, Sampling, str]:
    """The released model with these sizes, how it is sampled, and what that was told by."""
    told = f"depth {mmdit.depth}, {'with' if mmdit.qk_norm else 'without'} QK-norm"
    if mmdit.dual_attention:
        told += f", dual attention in {len(mmdit.dual_attention)} blocks"
    turbo = "turbo" in f"{path.absolute()} {path.resolve()}".lower()
    for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large-turbo" if turbo else "sd3.5-large"):
        config = CONFIGS[name]
        if config.mmdit == mmdit:
            if name == "sd3.5-large-turbo":
                told += ', and "turbo" in its path, which alone tells it from sd3.5-large'
            return name, config.sampling, told
    name = "sd3.5-large" if mmdit.qk_norm else "sd3-medium"
    name = "sd3.5-medium" if mmdit.dual_attention else name
    return "unreleased size", CONFIGS[name].sampling, f"{told}; sampled as {name}"


def config_of(parts: dict[str, State], path: Path) -> tuple[Config, str]:
    """The config of these tensors (our names), and a line that says how it was recognised.

    Raises InputError if they do not belong together.
    """
    mmdit, vae = mmdit_config(parts["mmdit"]), vae_config(parts["vae"])
    text = text_config(parts, mmdit)
    pooled = text.clip_l.width + text.clip_g.width
    for name, what, size, needed in (
        (
            "vae",
            "channels of the autoencoder's latents",
            vae.latent_channels,
            mmdit.latent_channels,
        ),
        ("t5", "features of T5", text.t5.width, mmdit.context_dim),
        ("clip_g", "pooled features of both CLIPs", pooled, mmdit.pooled_dim),
    ):
        if size != needed:
            file = file_of(parts.get(name) or parts["mmdit"])
            raise InputError(f"{file}: {what}: {size}, but the transformer takes {needed}")
    name, sampling, told = known_as(mmdit, path)
    size = CONFIGS[name].image_size if name in CONFIGS else 1024
    return Config(name, size, 0, mmdit, vae, text, sampling, training=None), told
