"""Exercises on the training loop: learning rate, EMA."""

import math

import torch
from torch import Tensor, nn

from nanosd3.config_types import Recipe
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.training import ema, optimizer

# --- learning rate ------------------------------------------------------------------------------


def rate_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("first step", (0, 100, 10, 2e-3)),
        Case("end of warm-up", (9, 100, 10, 2e-3)),
        Case("first step after warm-up", (10, 100, 10, 2e-3)),
        Case("a third of the way", (40, 100, 10, 2e-3)),
        Case("last step", (99, 100, 10, 1e-2)),
        Case("no warm-up", (7, 20, 0, 1e-3)),
    ]


def rate_spec(step: int, steps: int, warmup: int, lr: float) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)  # 0 after the warm-up, 1 at the end
    half_cosine = 0.5 * (1 + math.cos(math.pi * done))  # from 1 down to 0
    return lr * (0.01 + 0.99 * half_cosine)


def learning_rate(step: int, steps: int, warmup: int, lr: float) -> float:
    return optimizer.learning_rate(step, Recipe(steps, 1, lr, warmup, 0.0))


def starts_at_zero(step: int, steps: int, warmup: int, lr: float) -> float:
    return lr * step / warmup if step < warmup else learning_rate(step, steps, warmup, lr)


def ends_at_zero(step: int, steps: int, warmup: int, lr: float) -> float:
    rate = learning_rate(step, steps, warmup, lr)
    return rate if step < warmup else (rate - 0.01 * lr) / 0.99


def warmup_not_taken_off(step: int, steps: int, warmup: int, lr: float) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def straight_down(step: int, steps: int, warmup: int, lr: float) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (1 - 0.99 * (step - warmup) / (steps - warmup))


def whole_cosine(step: int, steps: int, warmup: int, lr: float) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(2 * math.pi * done)))


def quarter_cosine(step: int, steps: int, warmup: int, lr: float) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.01 + 0.99 * math.cos(math.pi / 2 * (step - warmup) / (steps - warmup)))


def floor_added(step: int, steps: int, warmup: int, lr: float) -> float:
    rate = ends_at_zero(step, steps, warmup, lr)
    return rate if step < warmup else rate + 0.01 * lr


def cut_off_below(step: int, steps: int, warmup: int, lr: float) -> float:
    rate = ends_at_zero(step, steps, warmup, lr)
    return rate if step < warmup else max(rate, lr / 100)


def warmup_a_step_longer(step: int, steps: int, warmup: int, lr: float) -> float:
    if warmup and step <= warmup:
        return lr * (step + 1) / warmup
    return learning_rate(step, steps, warmup, lr)


def warmup_forgotten(step: int, steps: int, warmup: int, lr: float) -> float:
    return learning_rate(max(step, warmup), steps, warmup, lr)


RATE = Exercise(
    name="learning_rate",
    topic="training",
    points=1,
    difficulty=1,
    signature="def learning_rate(step: int, steps: int, warmup: int, lr: float) -> float:",
    task="The learning rate at a step (counted from 0) of `steps`: it rises linearly to lr over\n"
    "the first `warmup` steps (lr / warmup at step 0), then falls along half a cosine to\n"
    "lr / 100.",
    specification=rate_spec,
    reference=learning_rate,
    cases=rate_cases,
    mutants=(
        Mutant(
            starts_at_zero, "At step 0 the rate is lr / warmup: a rate of 0 would waste the step."
        ),
        Mutant(ends_at_zero, "It falls to a hundredth of lr, not to 0."),
        Mutant(warmup_not_taken_off, "The cosine begins where the warm-up ends."),
        Mutant(straight_down, "Half a cosine, not a straight line."),
        Mutant(
            whole_cosine, "Half a cosine, pi, from the top to the bottom; yours comes up again."
        ),
        Mutant(quarter_cosine, "Half a cosine, flat at both ends; yours is a quarter."),
        Mutant(floor_added, "It starts at lr: the cosine falls by 99 hundredths of lr."),
        Mutant(cut_off_below, "The cosine itself ends at lr / 100; it is not cut off there."),
        Mutant(
            warmup_a_step_longer, "Steps 0 to warmup - 1 rise; at step `warmup` it begins to fall."
        ),
        Mutant(warmup_forgotten, "The first `warmup` steps rise linearly."),
    ),
    formulas="For step < warmup:  rate = lr (step + 1) / warmup\n"
    "After it:           rate = lr (0.01 + 0.99 (1 + cos(pi d)) / 2)\n"
    "                    d = (step - warmup) / (steps - warmup)",
    why="AdamW's averages are unreliable in the first steps; small updates do no harm.",
    where="nanosd3/training/optimizer.py, learning_rate",
    names=("step", "steps", "warmup", "lr"),
    differentiable=False,
    other_devices=False,
    tolerance=1e-9,
)

# --- EMA ----------------------------------------------------------------------------------------


def ema_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"step {step}", (normal(generator, 3, 4), normal(generator, 3, 4), step, 0.99))
        for step in (0, 50, 5000)
    ] + [large("512 weights", normal(generator, 16, 32), normal(generator, 16, 32), 70, 0.9)]


def ema_spec(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    d = min(decay, (1 + step) / (10 + step))  # a short memory at first
    out = torch.empty(average.shape, dtype=average.dtype)
    for i, (old, new) in enumerate(zip(average.flatten(), weights.flatten(), strict=True)):
        out.view(-1)[i] = d * old + (1 - d) * new
    return out


def ema_update(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    """`ema.update_ema` of a module with a single parameter."""
    result = average.clone()
    averages, module = (nn.ParameterList([nn.Parameter(p)]) for p in (result, weights))
    ema.update_ema(averages, module, step, decay)  # in place: the parameter shares its memory
    return result


def no_warmup(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    return decay * average + (1 - decay) * weights


def ema_exchanged(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    return ema_update(weights, average, step, decay)


def larger_decay(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    d = max(decay, (1 + step) / (10 + step))
    return d * average + (1 - d) * weights


def counted_from_one(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    return ema_update(average, weights, step + 1, decay)


def plain_mean(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    return average + (weights - average) / (step + 1)


def decay_grows_from_zero(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    d = decay * (1 + step) / (10 + step)
    return d * average + (1 - d) * weights


def not_an_average(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    return min(decay, (1 + step) / (10 + step)) * average + weights


EMA = Exercise(
    name="ema_update",
    topic="training",
    points=2,
    difficulty=1,
    signature="def ema_update(average: Tensor, weights: Tensor, step: int, decay: float) "
    "-> Tensor:",
    task="The exponential moving average after a step: d average + (1 - d) weights with\n"
    "d = min(decay, (1 + step) / (10 + step)). Return a new tensor.",
    specification=ema_spec,
    reference=ema_update,
    cases=ema_cases,
    mutants=(
        Mutant(
            no_warmup,
            "Early on d is smaller: otherwise a short run's average is mostly initial weights.",
        ),
        Mutant(ema_exchanged, "Most of the result is the old average, not the new weights."),
        Mutant(larger_decay, "The smaller of the two: the average's memory grows up to decay."),
        Mutant(counted_from_one, "Steps count from 0: at step 0 d is 1 / 10."),
        Mutant(plain_mean, "A moving average forgets; yours remembers every step equally."),
        Mutant(decay_grows_from_zero, "The smaller of the two numbers, not their product."),
        Mutant(not_an_average, "The new weights get the share 1 - d: both shares add up to 1."),
    ),
    why="Samples from the averaged weights are better than those from any single step's.",
    where="nanosd3/training/ema.py, update_ema",
    names=("average", "weights", "step", "decay"),
    differentiable=False,
)

EXERCISES = (RATE, EMA)
