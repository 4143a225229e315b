"""A tiny model like the official ones: colour, official vocabularies, sizes only in the shapes."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanosd3.components import COMPONENTS, makers
from nanosd3.config import CONFIGS, Config, MMDiTConfig
from nanosd3.official.key_names import PREFIXES

BASE = CONFIGS["sd3.5-medium"]
CONFIG = replace(
    BASE,
    name="unreleased size",
    image_size=1024,  # not in the shapes; the tests generate small images
    mmdit=MMDiTConfig(2, 16, 2, 256, 192, 12, 64, 16, qk_norm=True, dual_attention=(0,)),
    vae=replace(BASE.vae, channels=(32, 32, 64, 64), blocks=1),
    text=replace(
        BASE.text,
        clip_l=replace(BASE.text.clip_l, width=64, layers=2, heads=1),
        clip_g=replace(BASE.text.clip_g, width=128, layers=2, heads=2),
        t5=replace(BASE.text.t5, width=256, layers=2, heads=4, head_dim=16, hidden=96),
    ),
)


def parts(config: Config = CONFIG, dtype: torch.dtype = torch.float32) -> dict[str, dict]:
    """Random weights of each component, scaled to preserve variance; none is zero."""
    torch.manual_seed(0)
    states = {}
    for part in COMPONENTS:
        module = makers(config)[part]()
        state = module.state_dict()
        for key, tensor in state.items():
            if key != "pos_embed":
                fan_in = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
                centre = 1.0 if tensor.ndim == 1 and key.endswith("weight") else 0.0
                tensor.normal_(std=fan_in).add_(centre)
        states[part] = {key: t.to(dtype).contiguous() for key, t in state.items()}
    return states


def write_single(states: dict[str, dict], path: Path, without: tuple[str, ...] = ()) -> Path:
    """Write a single file with official prefixes."""
    state = {
        PREFIXES[part] + key: tensor
        for part, tensors in states.items()
        if part not in without
        for key, tensor in tensors.items()
    }
    save_file(state, path)
    return path
