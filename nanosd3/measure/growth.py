"""How the time and memory of a training step grow with depth, image tokens and batch.

One of the three varies at a time while the other two stay at half their largest value. Measurements
are compared with the formulas: FLOPs (costs.py) at a single speed for all steps, and memory
(training_memory.py) with no free parameter. Times lie above the line where steps are too small to
keep the machine busy. Memory is that of gradients and activations; the size of weights and moments
is known exactly.
"""

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nanosd3.config_types import Config
from nanosd3.machine.matmul import seconds
from nanosd3.measure.costs import training_flops
from nanosd3.measure.meters import peak_bytes, training_step
from nanosd3.measure.random_models import (
    forward_pass,
    random_inputs,
    random_model,
    text_tokens,
    with_depth,
)
from nanosd3.measure.training_memory import memory


class StepShape(NamedTuple):
    """The size of a training step."""

    depth: int
    side: int  # patches along each side of the images
    batch: int

    @property
    def image_tokens(self) -> int:
        return self.side**2


class Cost(NamedTuple):
    """The measured cost of a training step."""

    seconds: float
    gigabytes: float  # of gradients and activations


Points = list[tuple[int, float, float]]  # what varies, seconds, gigabytes

VARIED = {"depth": "depth", "side": "image_tokens", "batch": "batch"}  # and the label on the plot


def half(largest: StepShape) -> StepShape:
    """Half of each number, at least 1."""
    return StepShape(*(max(1, number // 2) for number in largest))


def sweep(largest: StepShape, name: str, values: Iterable[int]) -> list[StepShape]:
    """Shapes in which `name` takes these values and the others are at half their largest."""
    return [half(largest)._replace(**{name: value}) for value in values]


def fractions(largest: int) -> list[int]:
    """An eighth, a quarter, a half, three quarters and all of a number, at least 1 each."""
    return sorted({max(1, largest * eighths // 8) for eighths in (1, 2, 4, 6, 8)})


def predict(config: Config, shape: StepShape) -> tuple[int, float]:
    """FLOPs, and gigabytes of gradients and activations, by the formulas."""
    mmdit = with_depth(config, shape.depth).mmdit
    sizes = mmdit, shape.batch, shape.side, shape.side, text_tokens(config)
    predicted = memory(*sizes)
    return training_flops(*sizes), (predicted.gradients + predicted.activations) / 1e9


def warm_step(config: Config, shape: StepShape, device: torch.device) -> Callable[[], Tensor]:
    """A training step of the transformer that has run once, so that AdamW's moments exist."""
    config = with_depth(config, shape.depth)
    model = random_model(config, "mmdit", device, torch.float32).requires_grad_().train()
    size = shape.side * config.mmdit.patch_size * config.vae.factor
    inputs = random_inputs(config, "mmdit", size, shape.batch, like=next(model.parameters()))
    step = training_step(model, forward_pass(model, "mmdit", inputs), target=inputs[0])
    step()
    return step


def measure(config: Config, shape: StepShape, repeats: int, device: torch.device) -> Cost:
    """The fastest of some steps, and the memory of one more."""
    step = warm_step(config, shape, device)
    best = min(seconds(step, device) for _ in range(repeats))
    return Cost(best, peak_bytes(step, device) / 1e9)


def grow(
    config: Config, largest: StepShape, repeats: int, device: torch.device
) -> dict[StepShape, Cost]:
    """Measure steps of all shapes up to the largest, and print each as a row of a table."""
    print(
        "| depth | image tokens | batch | seconds | GFLOP/s | GB | of the formula |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    costs: dict[StepShape, Cost] = {}
    for name in VARIED:
        for shape in sweep(largest, name, fractions(getattr(largest, name))):
            if shape in costs:  # the three sweeps have the middle in common
                continue
            costs[shape] = cost = measure(config, shape, repeats, device)
            flops, gigabytes = predict(config, shape)
            print(
                f"| {shape.depth} | {shape.image_tokens} | {shape.batch} | {cost.seconds:.3f} | "
                f"{flops / cost.seconds / 1e9:.0f} | {cost.gigabytes:.3f} | "
                f"{cost.gigabytes / gigabytes:.2f} |",
                flush=True,
            )
    return costs


def plot_data(
    config: Config, largest: StepShape, costs: dict[StepShape, Cost]
) -> tuple[dict[str, tuple[Points, Points]], str, float]:
    """Arrange the results of `grow` for a plot: measured and predicted points by what varies, a
    title, and the FLOP per second at which times are predicted (the median of all steps)."""
    speed = statistics.median(predict(config, shape)[0] / costs[shape].seconds for shape in costs)
    columns = {}
    for name, label in VARIED.items():
        values = fractions(getattr(largest, name))
        measured = [
            (getattr(shape, label), *costs[shape]) for shape in sweep(largest, name, values)
        ]
        predicted = []
        for shape in sweep(largest, name, range(values[0], values[-1] + 1)):
            flops, gigabytes = predict(config, shape)
            predicted.append((getattr(shape, label), flops / speed, gigabytes))
        columns[label.replace("_", " ")] = measured, predicted
    middle = half(largest)
    title = (
        f"A training step of {config.name}, {text_tokens(config)} text tokens; unless varied: "
        f"depth {middle.depth}, {middle.image_tokens} image tokens, batch {middle.batch}"
    )
    return columns, title, speed
