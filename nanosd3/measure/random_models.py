"""Randomly initialised networks of any config, random inputs for them, and a forward pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from nanosd3.components import on_meta
from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.machine.accelerate import accelerate
from nanosd3.pipeline import images_at_once
from nanosd3.text import ENCODERS
from nanosd3.vae import AutoencoderKL

Forward = Callable[[], Tensor]


def random_model(config: Config, part: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A part, accelerated, with random weights scaled so that activations keep their size.

    T5 does not divide its logits by sqrt(head_dim), so its queries are drawn that much smaller:
    otherwise its attention would be a hard maximum, which bfloat16 decides differently.
    """
    module = accelerate(on_meta(config, part)).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            std = tensor[0].numel() ** -0.5
            if part == "t5" and name.endswith(".q.weight"):
                std *= config.text.t5.head_dim**-0.5
            tensor.normal_(std=std, generator=generator)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.01)
    return module.requires_grad_(False).eval()


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers in the module's state dictionary."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def with_depth(config: Config, depth: int) -> Config:
    """The config with a transformer of another depth, and therefore another width."""
    dual = tuple(i for i in config.mmdit.dual_attention if i < depth)
    return replace(config, mmdit=replace(config.mmdit, depth=depth, dual_attention=dual))


def with_layers(config: Config, layers: int) -> Config:
    """The config with text encoders of at most this many layers."""
    encoders = {name: getattr(config.text, name) for name in ENCODERS}
    short = {n: replace(e, layers=min(layers, e.layers)) for n, e in encoders.items()}
    return replace(config, text=replace(config.text, **short))


def patches_per_side(config: Config, size: int) -> int:
    """Patches along a side of `size` pixels, padding included. Raises InputError if the
    transformer does not support that size."""
    step = config.vae.factor * config.mmdit.patch_size
    largest = config.mmdit.grid * step
    if size % step or size > largest:
        raise InputError(
            f"--size {size}: {config.name} expects a multiple of {step}, at most {largest}"
        )
    return size // step


def text_tokens(config: Config) -> int:
    """Text tokens the transformer reads."""
    return config.text.clip_l.length + config.text.t5.length


def random_inputs(
    config: Config, part: str, size: int, batch: int, like: Tensor
) -> tuple[Tensor, ...]:
    """Random inputs of a part, with the device and dtype of `like`.

    mmdit: latents, time, context and pooled text for images of `size` pixels; vae: as many latents
    of the batch as the pipeline decodes at once; text encoders: token ids.
    """
    text, mmdit = config.text, config.mmdit
    side = patches_per_side(config, size) * mmdit.patch_size
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(like)

    latents = random(mmdit.latent_channels, side, side)
    if part == "mmdit":
        context, pooled = random(text_tokens(config), mmdit.context_dim), random(mmdit.pooled_dim)
        return latents, torch.full((batch,), 0.5, device=like.device), context, pooled
    if part == "vae":
        return (latents[: images_at_once(config.vae, (side * config.vae.factor) ** 2)],)
    encoder = getattr(text, part)
    ids = torch.randint(encoder.vocab - 1, (batch, encoder.length), generator=generator)
    if part != "t5":
        ids[:, -1] = encoder.vocab - 1  # end of text
    return (ids.to(like.device),)


def forward_pass(module: nn.Module, part: str, inputs: tuple[Tensor, ...]) -> Forward:
    """A function that runs one of our parts on these inputs: the decoder of the autoencoder, the
    token states of a text encoder, the velocity of the transformer."""
    if part == "vae":
        vae = cast(AutoencoderKL, module)
        return lambda: vae.decode(*inputs)
    if part.startswith("clip"):
        return lambda: module(*inputs)[0]
    return lambda: module(*inputs)
