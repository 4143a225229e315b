"""How fast training goes, and in how much memory: lines of speed.jsonl.

These numbers differ from run to run, so they stand apart from log.jsonl, which does not. FLOPs
utilisation is the arithmetic that the network's formula asks for (costs.py; recomputed activations
do not count) over what the processor could do in the time: a GPU's published bfloat16 peak, or on
CPU the speed of one large matrix product, measured when training begins.
"""

import time

import torch
from torch import Tensor

from nanosd3.checkpoint import Run
from nanosd3.config import MMDiTConfig
from nanosd3.costs import forward_flops
from nanosd3.parallel import Placed
from nanosd3.products import multiplication_speed
from nanosd3.runtime import peak_memory

EVERY = 50  # steps
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float:
    """What a device can do in a second, as published for bfloat16, or measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [peak for part, peak in PEAKS.items() if part in name]
    return known[0] if known else multiplication_speed(device, torch.float32)


class Speed:
    """Counts the tokens of each step, and says every so often how fast they went."""

    def __init__(self, run: Run, config: MMDiTConfig, network: Placed):
        self.run, self.config, self.team = run, config, network.team
        self.peak = 0.0  # not known yet
        self.begin_again()

    def begin_again(self) -> None:
        self.begin, self.steps = time.perf_counter(), 0
        self.images, self.tokens, self.flops = 0, 0, 0

    def seen(self, z: Tensor, context: Tensor) -> None:
        """One pass over latents (B, C, h, w) with context (B, M, Dc)."""
        patch = self.config.patch_size
        rows, columns = z.shape[2] // patch, z.shape[3] // patch
        flops = forward_flops(self.config, len(z), rows, columns, context.shape[1])
        self.images += len(z)
        self.tokens += len(z) * (rows * columns + context.shape[1])
        self.flops += 3 * flops  # the gradient takes twice as many

    def log(self, step: int) -> None:
        """After every step: each so many, a line for what all processes did in them."""
        self.steps += 1
        if self.steps < EVERY:
            return
        seconds = time.perf_counter() - self.begin
        size, device = self.team.size, self.team.device
        self.peak = self.peak or peak_flops(device)
        memory = peak_memory(device)
        if self.team.leads:
            self.run.log(
                "speed.jsonl",
                stage="flow",
                step=step,
                seconds_per_step=round(seconds / self.steps, 5),
                images_per_second=round(size * self.images / seconds, 2),
                tokens_per_second=round(size * self.tokens / seconds, 1),
                flops_utilisation=round(self.flops / seconds / self.peak, 4),
                memory_gb=memory and round(memory, 3),
            )
        self.begin_again()
