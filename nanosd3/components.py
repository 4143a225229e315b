"""The model's five networks by name, and how to build each."""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import nn

from nanosd3.clip import CLIPText
from nanosd3.config_types import Config
from nanosd3.mmdit import MMDiT
from nanosd3.t5 import T5Encoder
from nanosd3.vae import AutoencoderKL

COMPONENTS = ("mmdit", "vae", "clip_l", "clip_g", "t5")


def makers(config: Config) -> dict[str, Callable[[], nn.Module]]:
    """A constructor for each component."""
    return {
        "mmdit": lambda: MMDiT(config.mmdit),
        "vae": lambda: AutoencoderKL(config.vae),
        "clip_l": lambda: CLIPText(config.text.clip_l),
        "clip_g": lambda: CLIPText(config.text.clip_g),
        "t5": lambda: T5Encoder(config.text.t5),
    }


def on_meta(config: Config, name: str) -> nn.Module:
    """Build a component on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return makers(config)[name]()


@cache
def shapes(config: Config, name: str) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor in a component's state dict."""
    found = {key: tuple(t.shape) for key, t in on_meta(config, name).state_dict().items()}
    return MappingProxyType(found)  # shared by all callers
