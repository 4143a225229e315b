"""AdamW and the learning rate schedule."""

import math

import torch
from torch import nn

from nanosd3.config_types import Recipe

CLIP_NORM = 1.0  # gradients of a larger norm are scaled down to it


DECAYS = ("cosine", "constant")


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant, or half a cosine down to a hundredth of the peak."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.decay == "constant":
        return recipe.lr
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weight decay for matrices, none for biases, norms and other vectors."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with its moments allocated up front, so that a checkpoint has every tensor to load into
    before the first step."""
    groups = decay_groups(module, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
