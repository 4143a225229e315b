"""Check that configs and tokenizers from files are consistent and of plausible size.

Every size is bounded before anything is built from it, with some headroom over the largest released
model. Numbers are finite, parts fit together, and what will be printed is printable.
"""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path

from nanosd3.clip import ACTIVATION_FUNCTIONS
from nanosd3.config_types import CLIPConfig, Config, config_from_dict
from nanosd3.errors import InputError, shown
from nanosd3.few_steps import ALL_SAMPLERS
from nanosd3.text import Tokenizers

LIMITS = {  # smallest and largest value of a field, wherever it occurs
    "depth": (1, 64),
    "layers": (1, 64),
    "blocks": (1, 8),
    "heads": (1, 256),
    "head_dim": (1, 512),
    "width": (1, 8192),
    "hidden": (1, 32768),
    "channels": (1, 4096),
    "image_channels": (1, 4),
    "latent_channels": (1, 256),
    "norm_groups": (1, 4096),
    "patch_size": (1, 16),
    "context_dim": (1, 8192),
    "pooled_dim": (1, 8192),
    "grid": (1, 1024),
    "grid_sample": (1, 1024),
    "grid_span": (1, 1024),
    "vocab": (1, 65536),
    "length": (1, 4096),
    "image_size": (1, 8192),
    "steps": (1, 10**9),
    "guidance": (0, 1e6),
    "shift": (-1e6, 1e6),
    "scale": (1e-6, 1e6),
}
LEVELS = 8  # of the autoencoder


def limited_config(content: object, path: Path) -> Config:
    """The config in a file, as `config_from_dict` reads it, with plausible sizes.

    Raises InputError naming the first field that is not.
    """
    config = config_from_dict(content, path)
    check_fields(config, "config", path)
    mmdit, vae, text = config.mmdit, config.vae, config.text
    clips = (text.clip_l, text.clip_g)
    pooled = text.clip_l.width + text.clip_g.width
    for fits, field, problem in (
        (1 <= len(vae.channels) <= LEVELS, "vae.channels", f"should be 1 to {LEVELS} widths"),
        (
            not any(width % vae.norm_groups for width in vae.channels),
            "vae.norm_groups",
            "does not divide the channels",
        ),
        (mmdit.latent_channels == vae.latent_channels, "vae.latent_channels", "is not mmdit's"),
        (
            all(0 <= block < mmdit.depth for block in mmdit.dual_attention),
            "mmdit.dual_attention",
            "names a block beyond the depth",
        ),
        (pooled <= mmdit.pooled_dim, "mmdit.pooled_dim", "is less than the CLIPs are wide"),
        (pooled <= text.t5.width, "text.t5.width", "is less than the CLIPs are wide"),
        (text.t5.width <= mmdit.context_dim, "text.t5.width", "is larger than mmdit.context_dim"),
        (
            all(c.width % c.heads == 0 for c in clips),
            "text",
            "has CLIP heads that do not divide the width",
        ),
        (all(-1 <= c.pad < c.vocab for c in clips), "text", "pads a CLIP with an unknown token"),
        (all(known(c) for c in clips), "text", f"knows {' and '.join(ACTIVATION_FUNCTIONS)} only"),
        (0 <= 2 * config.padding < config.image_size, "padding", "is not within the image"),
        (config.sampling.shift > 0, "sampling.shift", "should be above 0"),
        (
            config.sampling.sampler in ALL_SAMPLERS,
            "sampling.sampler",
            f"is none of {list(ALL_SAMPLERS)}",
        ),
    ):
        if not fits:
            raise InputError(f"{path}: config.{field} {problem}")
    return config


def known(clip: CLIPConfig) -> bool:
    return clip.activation in ACTIVATION_FUNCTIONS


def check_fields(part: object, name: str, path: Path) -> None:
    """Raise InputError for a number that is not finite or outside its limits, or an odd name."""
    if is_dataclass(part):
        for field in fields(part):
            check_fields(getattr(part, field.name), f"{name}.{field.name}", path)
        return
    values = part if isinstance(part, tuple) else (part,)
    low, high = LIMITS.get(name.rpartition(".")[2], (-math.inf, math.inf))
    for value in values:
        if isinstance(value, str) and not (value.isprintable() and len(value) <= 80):
            raise InputError(f"{path}: {name} is not a plain name")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}: {name} should be a finite number, got {value}")
        if isinstance(value, int | float) and not low <= value <= high:
            raise InputError(f"{path}: {name} should be from {low} to {high}, got {shown(value)}")
        if isinstance(part, tuple) and type(value) is not int:
            raise InputError(f"{path}: {name} should hold whole numbers")


def limited_tokenizers(content: object, config: Config, path: Path) -> Tokenizers:
    """The tokenizers in a file, with the vocabularies of the config's encoders."""
    try:
        tokenizers = Tokenizers.from_json(content)  # type: ignore[arg-type]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        raise InputError(f"{path}: damaged tokenizers ({reason!a})") from None
    text, pieces = config.text, tokenizers.unigram.pieces
    vocab, scores = tokenizers.bpe.vocab, (score for _, score in pieces)
    if {vocab} != {text.clip_l.vocab, text.clip_g.vocab} or not 3 < len(pieces) <= text.t5.vocab:
        raise InputError(f"{path}: its tokenizers do not have the vocabularies of its config")
    if not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
        raise InputError(f"{path}: damaged tokenizers (a score is not a number)")
    return tokenizers
