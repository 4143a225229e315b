"""The optimizers, which parameters they train, and the learning rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from nanosd3.config_types import Recipe
from nanosd3.errors import InputError
from nanosd3.training.muon import Muon

CLIP_NORM = 1.0  # gradients of a larger norm are scaled down to it
DECAYS = ("cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
FUSED = {"qkv": 3, "kv": 2}  # matrices in a layer of this name
REST = 0.5  # AdamW's rate for what Muon leaves to it, relative to Muon's


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant, or half a cosine down to a hundredth of the peak."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.decay == "constant":
        return recipe.lr
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups: weight decay for matrices, none for biases, norms and other vectors."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def matrices_of(module: nn.Module) -> dict[nn.Parameter, int]:
    """What Muon trains: the weight matrices that tokens are multiplied by in the blocks of a
    transformer, each with the number of matrices fused in it. Raises InputError if there are none.
    """
    found = {}
    for name, p in module.named_parameters():
        if "blocks." in name and p.ndim == 2 and p.requires_grad and "adaLN" not in name:
            found[p] = FUSED.get(name.split(".")[-2], 1)
    if not found:
        raise InputError("optimizer muon is for the transformer; use adamw")
    return found


def make_optimizers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices of the blocks, and AdamW for the rest at half the rate.

    A group's learning rate is `lr_scale` times that of the schedule. Moments are allocated up
    front, so that a checkpoint has every tensor to load into before the first step.
    """
    matrices = matrices_of(module) if recipe.optimizer == "muon" else {}
    rest = [p for p in module.parameters() if p not in matrices]
    groups = decay_groups(rest, recipe.weight_decay)
    groups = [group | {"lr_scale": REST if matrices else 1.0} for group in groups]
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        adamw.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if not matrices:
        return [adamw]
    groups = [
        {
            "params": [p for p, n in matrices.items() if n == parts],
            "parts": parts,
            "weight_decay": recipe.weight_decay,
            "lr_scale": 1.0,
        }
        for parts in sorted(set(matrices.values()))
    ]
    return [Muon(groups, recipe.lr), adamw]
