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
    (r"(^|\.)(scale_weight|scaled_fp8)$", "8-bit weights with scales of their own, which are "
     "not supported; take the fp16 or the plain fp8 file"),
)  # fmt: skip


def refuse_foreign(names: list[str], path: Path) -> None:
    """Raises InputError if tensors of these names are those of another model."""
    for pattern, what in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{path}: this is {what}")


def shape(state: State, name: str, path: Path, part: str) -> tuple[int, ...]:
    if name not in state:
        raise InputError(f"{path}: {part} has no tensor {name}")
    return state[name].shape


def mmdit_config(state: State, path: Path) -> MMDiTConfig:
    """Sizes of the transformer. Raises InputError if this is none of SD3's kind."""
    look = lambda name: shape(state, name, path, "the transformer")  # noqa: E731
    patches = look("x_embedder.proj.weight")
    if len(patches) != 4 or patches[0] % HEAD_DIM or patches[2] != patches[3]:
        raise InputError(f"{path}: patch embedding of shape {patches}; expected (64 x depth, "
                         "channels, patch, patch)")  # fmt: skip
    depth, positions = patches[0] // HEAD_DIM, look("pos_embed")[-2]
    if isqrt(positions) ** 2 != positions:
        raise InputError(f"{path}: {positions} positions are no square grid")
    has = lambda i, name: f"joint_blocks.{i}.{name}" in state  # noqa: E731
    dual = tuple(i for i in range(depth) if has(i, "x_block.attn2.qkv.weight"))
    qk_norm = has(0, "context_block.attn.ln_k.weight")
    return replace(
        official_mmdit(depth, qk_norm, isqrt(positions), dual),
        latent_channels=patches[1],
        patch_size=patches[2],
        context_dim=look("context_embedder.weight")[1],
        pooled_dim=look("y_embedder.mlp.0.weight")[1],
    )


def vae_config(state: State, path: Path) -> VAEConfig:
    """Sizes of the autoencoder. Raises InputError if it is not SD3's."""
    look = lambda name: shape(state, name, path, "the autoencoder")  # noqa: E731
    channels = look("decoder.conv_in.weight")[1]
    if channels == 4:
        raise InputError(f"{path}: an autoencoder with 4 latent channels, that of Stable Diffusion "
                         "1.5 or SDXL; SD3's has 16")  # fmt: skip
    widths = tuple(
        look(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(count(state, "down"))
    )
    first_level = {n: t for n, t in state.items() if n.startswith("encoder.down.0.")}
    return replace(
        OFFICIAL_VAE,
        image_channels=look("encoder.conv_in.weight")[1],
        channels=widths,
        blocks=count(first_level, "block"),
        latent_channels=channels,
    )


def clip_config(state: State, path: Path, like: CLIPConfig) -> CLIPConfig:
    """Sizes of a CLIP, `like` the official one in what shapes cannot tell."""
    look = lambda name: shape(state, name, path, "the CLIP")  # noqa: E731
    vocab, width = look("text_model.embeddings.token_embedding.weight")
    return replace(
        like,
        width=width,
        layers=count(state, "layers"),
        heads=width // 64,
        vocab=vocab,
        length=look("text_model.embeddings.position_embedding.weight")[0],
    )


def t5_config(state: State, path: Path) -> T5Config:
    look = lambda name: shape(state, name, path, "the T5")  # noqa: E731
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab, width = look("encoder.embed_tokens.weight")
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


def text_config(parts: dict[str, State], path: Path, mmdit: MMDiTConfig) -> TextConfig:
    """Sizes of the encoders that are there; of the others, what the transformer takes."""
    names = ("clip_l", "clip_g")
    like = {name: getattr(OFFICIAL_TEXT, name) for name in names}
    clips = {name: clip_config(parts[name], path, like[name]) for name in names if name in parts}
    if not clips:
        clips["clip_l"] = replace(like["clip_l"], width=mmdit.pooled_dim * 3 // 8)  # 768 of 2048
    rest = mmdit.pooled_dim - sum(clip.width for clip in clips.values())
    for name in names:
        clips.setdefault(name, replace(like[name], width=rest))
    if (clips["clip_l"].width, clips["clip_g"].width) == (1280, 768):
        raise InputError(f"{path}: CLIP-L is 1280 wide and CLIP-G 768; they are exchanged")
    t5 = replace(OFFICIAL_TEXT.t5, width=mmdit.context_dim)
    if "t5" in parts:
        t5 = t5_config(parts["t5"], path)
    return replace(OFFICIAL_TEXT, t5=t5, **clips)


def known_as(mmdit: MMDiTConfig, path: Path) -> tuple[str, Sampling, str]:
    """The released model with these sizes, how it is sampled, and what that was told by."""
    told = f"depth {mmdit.depth}, {'with' if mmdit.qk_norm else 'without'} QK-norm"
    if mmdit.dual_attention:
        told += f", dual attention in {len(mmdit.dual_attention)} blocks"
    turbo = "turbo" in path.name.lower()
    for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large-turbo" if turbo else "sd3.5-large"):
        config = CONFIGS[name]
        if config.mmdit == mmdit:
            if name == "sd3.5-large-turbo":
                told += ', and "turbo" in its name, which alone tells it from sd3.5-large'
            return name, config.sampling, told
    name = "sd3.5-large" if mmdit.qk_norm else "sd3-medium"
    name = "sd3.5-medium" if mmdit.dual_attention else name
    return "unreleased size", CONFIGS[name].sampling, f"{told}; sampled as {name}"


def config_of(parts: dict[str, State], path: Path) -> tuple[Config, str]:
    """The config of these tensors (our names), and a line that says how it was recognised.

    Raises InputError if they do not belong together.
    """
    mmdit, vae = mmdit_config(parts["mmdit"], path), vae_config(parts["vae"], path)
    text = text_config(parts, path, mmdit)
    pooled = text.clip_l.width + text.clip_g.width
    for what, part, needed in (
        ("channels of the autoencoder's latents", vae.latent_channels, mmdit.latent_channels),
        ("features of T5", text.t5.width, mmdit.context_dim),
        ("pooled features of both CLIPs", pooled, mmdit.pooled_dim),
    ):
        if part != needed:
            raise InputError(f"{path}: {what}: {part}, but the transformer takes {needed}")
    name, sampling, told = known_as(mmdit, path)
    size = CONFIGS[name].image_size if name in CONFIGS else 1024
    return Config(name, size, 0, mmdit, vae, text, sampling, training=None), told
