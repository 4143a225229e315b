"""Settings in a diffusers folder's JSON files that cannot be inferred from shapes.

A setting that changes the result is followed if our models have it; otherwise it must be as in the
released models. The rest of these files follows from shapes, and is not read.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from nanosd3.clip import ACTIVATION_FUNCTIONS
from nanosd3.config_types import CLIPConfig, Config
from nanosd3.errors import InputError, shown
from nanosd3.layers import HEAD_DIM
from nanosd3.official.detect import file_of
from nanosd3.official.key_names import FOLDERS
from nanosd3.official.tensors import State
from nanosd3.storage.files import read_json

SILU = ("silu", "swish")
FIXED: dict[str, dict[str, tuple]] = {  # by file: settings and the values that our models can take
    "transformer/config.json": {"qk_norm": ("rms_norm",)},
    "vae/config.json": {
        "act_fn": SILU,
        "use_quant_conv": (False,),
        "use_post_quant_conv": (False,),
        "mid_block_add_attention": (True,),
    },
    "text_encoder_3/config.json": {
        "feed_forward_proj": ("gated-gelu",),
        "dense_act_fn": ("gelu_new",),
        "relative_attention_max_distance": (128,),
        "layer_norm_epsilon": (1e-6,),
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": (1000,),
        "use_dynamic_shifting": (False,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "invert_sigmas": (False,),
        "stochastic_sampling": (False,),
    },
}
FIXED_IN_CLIP = {"layer_norm_eps": (1e-5,), "hidden_act": tuple(ACTIVATION_FUNCTIONS)}

Number = TypeVar("Number", int, float)


def is_number(value: object, above: float) -> bool:
    """Whether this is a finite number above `above` that a float can hold."""
    if type(value) is int:
        return above < value < 2**53
    return isinstance(value, float) and above < value < math.inf


def read_setting(file: Path, key: str, default: Number) -> Number:
    """A positive number in a JSON file, of the default's type; the default if it is not there."""
    value = read_json(file).get(key, default) if file.exists() else default
    kind = type(default)
    if type(value) not in (int, kind) or not is_number(value, above=0):
        raise InputError(f"{file}: {key} should be a number above 0, got {shown(value)}")
    return kind(value)


def check_fixed(file: Path, accepted: dict[str, tuple]) -> dict:
    """The content of a JSON file, empty if there is none. Raises InputError for a setting that is
    present but has none of the accepted values."""
    content = read_json(file) if file.exists() else {}
    for key, values in accepted.items():
        if content.get(key) not in (*values, None):  # null is the default
            raise InputError(
                f"{file}: {key} is {shown(content[key])}, which is not supported; "
                f"expected {' or '.join(map(str, values))}"
            )
    return content


def clip_settings(file: Path, clip: CLIPConfig) -> CLIPConfig:
    """A CLIP with the activation and the number of heads given in its folder."""
    activation = check_fixed(file, FIXED_IN_CLIP).get("hidden_act", clip.activation)
    heads = read_setting(file, "num_attention_heads", clip.heads)
    if clip.width % heads:
        raise InputError(f"{file}: num_attention_heads {heads} does not divide {clip.width}")
    return replace(clip, activation=activation, heads=heads)


def with_folder_settings(config: Config, folder: Path, parts: dict[str, State]) -> Config:
    """The config with a diffusers folder's own settings in place of the released models'.

    SD3 uses CLIP-L's pooled vector unprojected. Single files may still hold OpenAI's matrix, which
    is ignored; diffusers always multiplies by the folder's matrix, which is normally the identity.
    Raises InputError for settings that our models do not have.
    """
    transformer, vae = folder / "transformer/config.json", folder / "vae/config.json"
    heads = read_setting(transformer, "attention_head_dim", HEAD_DIM)
    if heads != HEAD_DIM:
        raise InputError(f"{transformer}: attention_head_dim is {heads}, expected {HEAD_DIM}")
    inside = {FOLDERS[name][0] for name in parts if file_of(parts[name]).is_relative_to(folder)}
    for name, accepted in FIXED.items():
        if name.split("/")[0] in (*inside, "scheduler"):
            check_fixed(folder / name, accepted)
    groups = read_setting(vae, "norm_num_groups", config.vae.norm_groups)
    if any(width % groups for width in config.vae.channels):
        widths = config.vae.channels
        raise InputError(f"{vae}: norm_num_groups {groups} does not divide the widths {widths}")
    clip_l, clip_g = (
        clip_settings(folder / subfolder / "config.json", clip) if subfolder in inside else clip
        for subfolder, clip in (
            (FOLDERS["clip_l"][0], config.text.clip_l),
            (FOLDERS["clip_g"][0], config.text.clip_g),
        )
    )
    projection = False
    if "text_projection.weight" in parts.get("clip_l", {}):
        matrix = parts["clip_l"]["text_projection.weight"].read().float()
        projection = matrix.shape[0] != matrix.shape[1] or not matrix.equal(torch.eye(len(matrix)))
    scheduler = folder / "scheduler/scheduler_config.json"
    return replace(
        config,
        text=replace(config.text, clip_l=replace(clip_l, projection=projection), clip_g=clip_g),
        vae=replace(
            config.vae,
            norm_groups=groups,
            shift=read_setting(vae, "shift_factor", config.vae.shift),
            scale=read_setting(vae, "scaling_factor", config.vae.scale),
        ),
        sampling=replace(
            config.sampling, shift=read_setting(scheduler, "shift", config.sampling.shift)
        ),
    )
