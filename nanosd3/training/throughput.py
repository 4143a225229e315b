"""Training speed and memory: the lines of speed.jsonl.

These numbers differ from run to run, so they are kept out of log.jsonl, which is reproducible.
FLOPs utilisation is the model FLOPs of a step (measure/costs.py; recomputed activations do not
count) over what the processor could have done in that time: a GPU's published bfloat16 peak or, for
other GPUs, the speed of one large matrix product; on CPU, that speed in float32. It is measured
when the first line is written. Only steps count, not the validation, previews and saved states
between them.
"""

import re
import time

import torch
from torch import Tensor

from nanosd3.config_types import MMDiTConfig
from nanosd3.machine.device import peak_memory
from nanosd3.machine.distributed import ParallelModel
from nanosd3.machine.matmul import multiplication_speed
from nanosd3.measure.costs import forward_flops
from nanosd3.storage.run import Run

EVERY = 50  # steps between lines


PEAKS = {  # published dense bfloat16 peaks, FLOPs per second; the longer names first
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12},
    **{"H100": 989e12, "H200": 989e12, "A100": 312e12},
    **{"L40": 181e12, "L40S": 362e12, "RTX 4090": 165e12},
}


def peak_flops(device: torch.device) -> float:
    """FLOPs per second a device can do: published for known GPUs, measured otherwise."""
    if device.type != "cuda":
        return multiplication_speed(device, torch.float32)
    name = torch.cuda.get_device_name(device)
    known = [peak for model, peak in PEAKS.items() if re.search(rf"\b{model}\b", name)]
    return known[0] if known else multiplication_speed(device, torch.bfloat16)


class Throughput:
    """Counts the images, tokens and FLOPs of each step and logs their rates every EVERY steps."""

    def __init__(self, run: Run, config: MMDiTConfig, network: ParallelModel):
        self.run, self.config, self.group = run, config, network.group
        self.peak = 0.0  # not measured yet
        self.begin: float | None = None  # of the current step
        self.reset()

    def reset(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self.images, self.tokens, self.flops = 0, 0, 0

    def start(self) -> None:
        """Call when a step, or one of its microbatches, begins."""
        if self.begin is None:
            self.begin = time.perf_counter()

    def seen(self, z: Tensor, context: Tensor) -> None:
        """Count one training pass over latents (B, C, h, w) with context (B, M, Dc)."""
        patch = self.config.patch_size
        rows, columns = z.shape[2] // patch, z.shape[3] // patch
        flops = forward_flops(self.config, len(z), rows, columns, context.shape[1])
        self.images += len(z)
        self.tokens += len(z) * (rows * columns + context.shape[1])
        self.flops += 3 * flops  # the backward pass takes twice the forward pass

    def log(self, step: int) -> None:
        """Call after every step. Every EVERY steps, write a line with the rates of all ranks."""
        now, self.steps = time.perf_counter(), self.steps + 1
        self.seconds += now - (self.begin or now)
        self.begin = None
        if self.steps < EVERY:
            return
        seconds = self.seconds
        size, device = self.group.size, self.group.device
        self.peak = self.peak or peak_flops(device)
        memory = peak_memory(device)
        if self.group.is_main:
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
        self.reset()
