"""Small MMDiTs of any shape, and inputs for them."""

import random

import torch

from nanosd3.config import MMDiTConfig


def small_config(depth, qk_norm=False, dual=(), context=80, pooled=48, channels=4, patch=2):
    return MMDiTConfig(depth, channels, patch, context, pooled, 16, 8, 8, qk_norm, dual)


def random_config(seed):
    draw = random.Random(seed)
    depth = draw.randint(1, 4)
    dual = tuple(i for i in range(depth) if draw.random() < 0.4)
    sizes = {"context": draw.randint(3, 50), "pooled": draw.randint(3, 50)}
    shape = {"channels": draw.randint(1, 5), "patch": draw.choice([1, 2, 4])}
    return small_config(depth, seed % 2 == 0, dual, **sizes, **shape)


def network_inputs(config, batch, rows, columns, text):
    """Latents, time, context and pooled text."""
    height, width = rows * config.patch_size, columns * config.patch_size
    return (
        torch.randn(batch, config.latent_channels, height, width),
        torch.rand(batch),
        torch.randn(batch, text, config.context_dim),
        torch.randn(batch, config.pooled_dim),
    )
