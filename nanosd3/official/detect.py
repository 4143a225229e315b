"""Detect which model a set of tensors is, and read every size from their shapes.

Official files carry no config to rely on, but shapes tell almost everything: the width of the patch
embedding is 64 times the depth, the position grid is a square, and QK-norm or dual attention is
present if any of its weights is. What shapes do not tell is taken from the released models: heads
of 64, norms over 32 groups, the latents' shift and scale, activations and sampling. SD3.5 Large and
Large Turbo have the same shapes and are told apart by their names.

A component as wide as a released one is that one: its depth is not read from the tensors found, so
that missing tensors are reported (missing_keys.py) instead of suggesting a smaller model.
"""

import re
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path

from nanosd3.config import CONFIGS, OFFICIAL_TEXT, OFFICIAL_VAE, official_mmdit
from nanosd3.config_types import (
    CLIPConfig,
    Config,
    MMDiTConfig,
    Sampling,
    T5Config,
    TextConfig,
    VAEConfig,
)
from nanosd3.errors import InputError
from nanosd3.layers import HEAD_DIM
from nanosd3.official.folders import model_names
from nanosd3.official.key_names import count
from nanosd3.official.tensors import State

CLIP_HEAD_DIM = 64  # both CLIPs' heads, like the transformer's, are 64 wide

RELEASED = ("sd3-medium", "sd3.5-medium", "sd3.5-large")  # of different shapes
LARGEST_DEPTH = max(config.mmdit.depth for config in CONFIGS.values())

UNET = "a U-Net such as Stable Diffusion 1 or 2 have; Stable Diffusion 3 has none"
FOREIGN = (  # pattern in a key name, model that has such keys; the first match counts
    (r"(^|\.)(control_model|controlnet_\w+|zero_convs)\.", "a ControlNet, not a model by itself"),
    (r"(^|\.)ip_adapter\.", "an IP-Adapter, not a model by itself"),
    (r"(^|\.)(double_layers|joint_transformer_blocks)\.", "AuraFlow, not Stable Diffusion 3"),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.", "Qwen-Image, not Stable Diffusion 3"),
    (r"(^|\.)distilled_guidance_layer\.", "Chroma, not Stable Diffusion 3"),
    (r"\.(individual_)?token_refiner\.", "HunyuanVideo, not Stable Diffusion 3"),
    (r"(^|\.)(double|single)(_transformer)?_blocks\.", "FLUX, not Stable Diffusion 3"),
    (r"(^|\.)patch_embed\.text_proj\.", "CogVideoX or CogView, not Stable Diffusion 3"),
    (
        r"(^|\.)(add_time_condition|visual_transformer_blocks|(encoder_hid_proj|add_embedding)"
        r"\.image_\w+)\.",
        "Kandinsky, not Stable Diffusion 3",
    ),
    (
        r"\.(temporal_\w+|temp_convs|motion_modules|time_stack|time_mixer)\.",
        "a video model, not Stable Diffusion 3",
    ),
    (r"(^|\.)(label_emb|conditioner|add_embedding\.linear_1)\.", "SDXL, not Stable Diffusion 3"),
    (r"(^|\.)cond_stage_model\.", "Stable Diffusion 1 or 2, not 3"),
    (r"(^|\.)(input_blocks|time_embedding)\.", UNET),
    (r"\.lokr_[wt]\d", "a LoKr (LyCORIS: a small change to a model), not a model"),
    (r"\.hada_[wt]\d", "a LoHa (LyCORIS: a small change to a model), not a model"),
    (
        r"(^|\.)oft_(R|blocks|diag)\b|^lycoris_",
        "a LyCORIS (a small change to a model), not a model",
    ),
    (r"^(clip_[lg]|t5xxl|emb_params|string_to_param\..*)$", "a textual inversion, not a model"),
    (r"(lora_(A|B|up|down)|\.alpha$)", "a LoRA (a small change to a model), not a model"),
)

SCALED = r"(^|\.)(scale_weight|weight_scale|scaled_fp8|comfy_quant)$"


def refuse_foreign(names: list[str], path: Path) -> None:
    """Raise InputError if these are the key names of another model."""
    refuse_scaled(names, path)
    for pattern, model in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{path}: this is {model}")


def refuse_scaled(names: list[str], path: Path) -> None:
    """Raise InputError for quantised weights that come with separate scales."""
    if any(re.search(SCALED, name) for name in names):
        raise InputError(
            f"{path}: 8-bit weights with separate scales are not supported; use the fp16 or the "
            "plain fp8 file"
        )


def file_of(state: State) -> Path:
    """The file that a component comes from."""
    return next(iter(state.values())).file


def find_shape(state: State, name: str, ndim: int, component: str) -> tuple[int, ...]:
    """A tensor's shape. Raises InputError if it is missing, empty or not `ndim`-dimensional."""
    if name not in state:
        raise InputError(f"{file_of(state)}: {component} has no tensor {name}")
    tensor = state[name]
    if len(tensor.shape) != ndim or 0 in tensor.shape:
        raise InputError(
            f"{tensor.file}: tensor {tensor.name} has shape {tensor.shape}, expected {ndim} "
            "dimensions, none of them 0"
        )
    return tensor.shape


def mmdit_config(state: State) -> MMDiTConfig:
    """The transformer's sizes. Raises InputError if they are impossible for SD3."""
    shape = partial(find_shape, state, component="the transformer")
    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    if width % HEAD_DIM:
        raise InputError(
            f"{file_of(state)}: the transformer is {width} wide, expected a multiple of {HEAD_DIM}"
        )
    depth, positions = width // HEAD_DIM, shape("pos_embed", 3)[1]
    if isqrt(positions) ** 2 != positions:
        raise InputError(f"{file_of(state)}: {positions} positions are not a square grid")
    if depth > max(LARGEST_DEPTH, blocks := count(state, "joint_blocks")):
        raise InputError(
            f"{file_of(state)}: the transformer is {width} wide, so {depth} blocks deep, but holds "
            f"{blocks}; the largest released one has {LARGEST_DEPTH}"
        )
    dual = tuple(i for i in range(depth) if has_dual_attention(state, i, width))
    found = replace(
        official_mmdit(depth, any(".ln_" in name for name in state), isqrt(positions), dual),
        latent_channels=channels,
        patch_size=patch,
        context_dim=shape("context_embedder.weight", 2)[1],
        pooled_dim=shape("y_embedder.mlp.0.weight", 2)[1],
    )
    return next((c for name in RELEASED if alike(c := CONFIGS[name].mmdit, found)), found)


def has_dual_attention(state: State, block: int, width: int) -> bool:
    """Whether anything shows that a block has a second attention: one of its weights, or a
    modulation for it."""
    stream = f"joint_blocks.{block}.x_block."
    modulation = state.get(f"{stream}adaLN_modulation.1.weight")
    if modulation is not None and modulation.shape[:1] == (9 * width,):
        return True
    return any(name.startswith(f"{stream}attn2.") for name in state)


def alike(released: MMDiTConfig, found: MMDiTConfig) -> bool:
    """Whether a transformer has a released one's sizes and QK-norm. The position grid and
    individual blocks may differ; missing_keys.py reports how."""
    norms = found.qk_norm or bool(found.dual_attention)
    return released == replace(
        found, grid=released.grid, qk_norm=norms, dual_attention=released.dual_attention
    )


def vae_config(state: State) -> VAEConfig:
    """The autoencoder's sizes. Raises InputError if it is not SD3's kind."""
    shape = partial(find_shape, state, ndim=4, component="the autoencoder")
    channels = shape("decoder.conv_in.weight")[1]
    if channels == 4:
        raise InputError(
            f"{file_of(state)}: the autoencoder has 4 latent channels, as in Stable Diffusion 1.5 "
            "and SDXL; SD3's has 16"
        )
    if any("quant_conv." in name for name in state):
        raise InputError(
            f"{file_of(state)}: the autoencoder has quant_conv layers around its latents; SD3's "
            "has none"
        )
    innermost = shape("decoder.conv_in.weight")[0]
    outermost, image_channels = shape("encoder.conv_in.weight")[:2]
    if (outermost, innermost) == (OFFICIAL_VAE.channels[0], OFFICIAL_VAE.channels[-1]):
        return replace(OFFICIAL_VAE, latent_channels=channels)
    levels = max(count(state, "down"), count(state, "up"))
    widths = tuple(shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels))
    if any(width % OFFICIAL_VAE.norm_groups for width in widths):
        raise InputError(
            f"{file_of(state)}: the autoencoder's widths are {widths}, expected multiples of "
            f"{OFFICIAL_VAE.norm_groups}"
        )
    numbered = {  # the blocks of each level, of which the decoder has one more
        level: count({n: t for n, t in state.items() if n.startswith(level)}, "block")
        for i in range(levels)
        for level in (f"encoder.down.{i}.", f"decoder.up.{i}.")
    }
    return replace(
        OFFICIAL_VAE,
        image_channels=image_channels,
        channels=widths,
        blocks=max(n - level.startswith("decoder") for level, n in numbered.items()),
        latent_channels=channels,
    )


def clip_config(state: State, reference: CLIPConfig) -> CLIPConfig:
    """A CLIP's sizes; what shapes do not tell is taken from `reference`."""
    shape = partial(find_shape, state, ndim=2, component="CLIP")
    vocab, width = shape("text_model.embeddings.token_embedding.weight")
    length = shape("text_model.embeddings.position_embedding.weight")[0]
    expected = (reference.vocab, reference.length)
    if (vocab, length) != expected or width % CLIP_HEAD_DIM:
        raise InputError(
            f"{file_of(state)}: a CLIP with {vocab} tokens, length {length}, width {width}; "
            f"expected {expected[0]}, {expected[1]}, a multiple of {CLIP_HEAD_DIM}"
        )
    if width == reference.width:
        return reference
    heads = width // CLIP_HEAD_DIM
    return replace(reference, width=width, layers=count(state, "layers"), heads=heads)


def t5_config(state: State) -> T5Config:
    """T5's sizes."""
    shape = partial(find_shape, state, ndim=2, component="T5")
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab, width = shape("encoder.embed_tokens.weight")
    official = OFFICIAL_TEXT.t5
    if not official.vocab - 28 <= vocab <= official.vocab:  # 32,100 pieces, padded to 32,128
        raise InputError(f"{file_of(state)}: a T5 with {vocab} tokens, expected {official.vocab}")
    if width == official.width:
        return replace(official, vocab=vocab)
    heads = shape(f"{attention}.relative_attention_bias.weight")[1]
    inner = shape(f"{attention}.q.weight")[0]
    if inner % heads:
        raise InputError(f"{file_of(state)}: a T5 with {heads} heads, but queries of {inner}")
    return T5Config(
        width,
        layers=count(state, "block"),
        heads=heads,
        head_dim=inner // heads,
        hidden=shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        vocab=vocab,
        length=official.length,
    )


def text_config(parts: dict[str, State], mmdit: MMDiTConfig) -> TextConfig:
    """The text encoders' sizes; absent ones are given the widths that the transformer expects."""
    official = {"clip_l": OFFICIAL_TEXT.clip_l, "clip_g": OFFICIAL_TEXT.clip_g}
    clips = {
        name: clip_config(parts[name], reference)
        for name, reference in official.items()
        if name in parts
    }
    if not clips:
        width = mmdit.pooled_dim * 3 // 8  # 768 of 2048
        clips["clip_l"] = replace(official["clip_l"], width=width)
    rest = mmdit.pooled_dim - sum(clip.width for clip in clips.values())
    for name, reference in official.items():
        clips.setdefault(name, replace(reference, width=rest))
    if (clips["clip_l"].width, clips["clip_g"].width) == (1280, 768):
        file = file_of(parts.get("clip_l") or parts["clip_g"])
        raise InputError(f"{file}: CLIP-L and CLIP-G are swapped (1280 and 768 wide)")
    t5 = replace(OFFICIAL_TEXT.t5, width=mmdit.context_dim)
    if "t5" in parts:
        t5 = t5_config(parts["t5"])
    return replace(OFFICIAL_TEXT, clip_l=clips["clip_l"], clip_g=clips["clip_g"], t5=t5)


def known_as(mmdit: MMDiTConfig, path: Path) -> tuple[str, Sampling, str]:
    """The released model with these sizes: its name, its sampling, and how it was detected."""
    detected_by = f"depth {mmdit.depth}, {'with' if mmdit.qk_norm else 'without'} QK-norm"
    if mmdit.dual_attention:
        detected_by += f", dual attention in {len(mmdit.dual_attention)} blocks"
    turbo = any("turbo" in name.lower() for name in model_names(path))
    for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large-turbo" if turbo else "sd3.5-large"):
        config = CONFIGS[name]
        if config.mmdit == mmdit:
            if name == "sd3.5-large-turbo":
                detected_by += ', "turbo" in its name; sd3.5-large has the same shapes'
            return name, config.sampling, detected_by
    name = "sd3.5-large" if mmdit.qk_norm else "sd3-medium"
    name = "sd3.5-medium" if mmdit.dual_attention else name
    return "unreleased size", CONFIGS[name].sampling, f"{detected_by}; sampled like {name}"


def config_of(parts: dict[str, State], path: Path) -> tuple[Config, str]:
    """The config of a model, from the tensors of its components, and how it was detected.

    Raises InputError if the components do not fit together.
    """
    mmdit, vae = mmdit_config(parts["mmdit"]), vae_config(parts["vae"])
    text = text_config(parts, mmdit)
    pooled = text.clip_l.width + text.clip_g.width
    for component, quantity, got, expected in (
        ("vae", "latent channels of the autoencoder", vae.latent_channels, mmdit.latent_channels),
        ("t5", "features of T5", text.t5.width, mmdit.context_dim),
        ("clip_g", "pooled features of both CLIPs", pooled, mmdit.pooled_dim),
    ):
        if got != expected:
            file = file_of(parts.get(component) or parts["mmdit"])
            raise InputError(f"{file}: {quantity}: {got}, but the transformer takes {expected}")
    if min(text.clip_l.width, text.clip_g.width) < 1 or pooled > text.t5.width:
        raise InputError(
            f"{path}: CLIPs {text.clip_l.width} and {text.clip_g.width} wide do not fit, side by "
            f"side, into the {text.t5.width} of T5"
        )
    name, sampling, detected_by = known_as(mmdit, path)
    size = CONFIGS[name].image_size if name in CONFIGS else 1024
    return Config(name, size, 0, mmdit, vae, text, sampling, training=None), detected_by
