"""Meters: FLOPs, peak memory, and a training step to measure them on.

Memory is that of all tensors alive at the peak, from PyTorch's profiler on a CPU and from the
allocator's statistics on a GPU. Seconds are measured by machine/matmul.py.
"""

import gc
from collections.abc import Callable
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nanosd3.measure.random_models import Forward


def training_step(model: nn.Module, forward: Forward, target: Tensor) -> Callable[[], Tensor]:
    """A function that runs one training step and returns its loss: forward, mean squared error,
    backward, gradient clipping, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.99), fused=True)

    def step() -> Tensor:
        loss = (forward() - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors alive at the peak of a call, beyond those alive before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # garbage of earlier calls, freed during this one, would count as negative
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)))


def count_flops(function: Callable[[], object]) -> int:
    """Additions and multiplications of a call, including any backward pass in it."""

    def onednn_linear_flops(x: tuple, weight: tuple, *_: object, **__: object) -> int:
        return 2 * prod(x) * weight[0]

    custom = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        custom = {torch.ops.mkldnn._linear_pointwise: onednn_linear_flops}
    # Without gradients CPU attention is an operation that the counter does not know.
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=custom) as counter:
        function()
    return counter.get_total_flops()
