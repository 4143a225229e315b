"""The exponential moving average (EMA) of the weights, which is used for sampling."""

import copy

import torch
from torch import nn

from nanosd3.machine.distributed import local_shard


def make_ema(module: nn.Module) -> nn.Module:
    """A frozen copy of `module`, to hold the average of its weights."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """ema = d ema + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)).

    Without that warm-up, the average of a short run would still be mostly the initial weights:
    0.9999 ^ 3000 = 0.74.
    """
    d = min(decay, (1 + step) / (10 + step))
    averages, weights = ([local_shard(p) for p in m.parameters()] for m in (ema, module))
    torch._foreach_lerp_(averages, weights, 1 - d)
