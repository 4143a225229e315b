"""How time and memory of a training step grow: with depth, with image tokens, with the batch.

Each grows alone, the two others standing at half of their most. Beside what is measured stands what
the formulas say: FLOPs (costs.py) at one speed for all, memory (footprint.py) with nothing fitted.
Time departs from its line where steps are too small to keep the machine busy. Memory is that of
gradients and activations; weights and moments are known exactly.
"""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from nanosd3 import figures
from nanosd3.config import Config
from nanosd3.costs import training_flops
from nanosd3.footprint import memory
from nanosd3.pairs import (
    forward_of,
    inputs,
    peak_memory,
    randomly_filled,
    text_tokens,
    training_step,
    with_depth,
)
from nanosd3.products import seconds


class Setting(NamedTuple):
    """Of a training step."""

    depth: int
    side: int  # patches along each side of the images
    batch: int

    @property
    def image_tokens(self) -> int:
        return self.side**2


class Cost(NamedTuple):
    """Of a training step."""

    seconds: float
    gigabytes: float  # of gradients and activations


GROWING = {"depth": "depth", "side": "image_tokens", "batch": "batch"}  # and what is shown of it


def half(most: Setting) -> Setting:
    return Setting(*(max(1, number // 2) for number in most))


def sweep(most: Setting, name: str, values: Iterable[int]) -> list[Setting]:
    """Settings of which one number takes these values, and the others are half of their most."""
    return [half(most)._replace(**{name: value}) for value in values]


def points(most: int) -> list[int]:
    """An eighth, a quarter, a half, three quarters, all."""
    return sorted({max(1, most * eighths // 8) for eighths in (1, 2, 4, 6, 8)})


def computed(config: Config, at: Setting) -> tuple[int, float]:
    """FLOPs, and gigabytes as in Cost, by the formulas."""
    network = with_depth(config, at.depth).mmdit
    shape = network, at.batch, at.side, at.side, text_tokens(config)
    said = memory(*shape)
    return training_flops(*shape), (said.gradients + said.activations) / 1e9


def step_of(config: Config, at: Setting, device: torch.device) -> Callable:
    """A training step of this code's transformer, one of which has been made already."""
    config = with_depth(config, at.depth)
    model = randomly_filled(config, "mmdit", device, torch.float32).requires_grad_().train()
    size = at.side * config.mmdit.patch_size * config.vae.factor
    given = inputs(config, "mmdit", size, at.batch, next(model.parameters()))
    step = training_step(model, forward_of(model, "mmdit", given, foreign=False), given[0])
    step()  # the optimizer makes its moments
    return step


def measured(config: Config, at: Setting, repeats: int, device: torch.device) -> Cost:
    step = step_of(config, at, device)
    best = min(seconds(step, device) for _ in range(repeats))
    return Cost(best, peak_memory(step, device) / 1e9)


def grow(config: Config, most: Setting, repeats: int, device: torch.device) -> dict[Setting, Cost]:
    """What steps up to the largest cost, printed one by one."""
    print("| depth | image tokens | batch | seconds | GFLOP/s | GB | of the formula |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    costs = {}
    for name in GROWING:
        for at in sweep(most, name, points(getattr(most, name))):
            if at in costs:  # the middle belongs to all three
                continue
            costs[at] = cost = measured(config, at, repeats, device)
            flops, gigabytes = computed(config, at)
            print(f"| {at.depth} | {at.image_tokens} | {at.batch} | {cost.seconds:.3f} | "
                  f"{flops / cost.seconds / 1e9:.0f} | {cost.gigabytes:.3f} | "
                  f"{cost.gigabytes / gigabytes:.2f} |", flush=True)  # fmt: skip
    return costs


def draw(config: Config, most: Setting, costs: dict[Setting, Cost], path: Path) -> float:
    """The picture of what `grow` found; the FLOPs a second at which its lines of time are drawn."""
    speed = statistics.median(computed(config, at)[0] / costs[at].seconds for at in costs)
    columns = {}
    for name, shown in GROWING.items():
        seen = points(getattr(most, name))
        dots = [(getattr(at, shown), *costs[at]) for at in sweep(most, name, seen)]
        line = []
        for at in sweep(most, name, range(seen[0], seen[-1] + 1)):
            flops, gigabytes = computed(config, at)
            line.append((getattr(at, shown), flops / speed, gigabytes))
        columns[shown.replace("_", " ")] = dots, line
    still = half(most)
    title = (f"A training step of {config.name}, {text_tokens(config)} tokens of text; at rest: "
             f"depth {still.depth}, {still.image_tokens} image tokens, batch {still.batch}"
             )  # fmt: skip
    figures.plot_growth(columns, title, path)
    return speed
