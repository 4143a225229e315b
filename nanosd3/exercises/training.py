"""Exercises on the training loop: learning rate, EMA, gradient accumulation."""

import math

import torch
from torch import Tensor, nn

from nanosd3 import flow
from nanosd3.config_types import Recipe
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal
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
    ),
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
    ]


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


def plain_mean(average: Tensor, weights: Tensor, step: int, decay: float) -> Tensor:
    return average + (weights - average) / (step + 1)


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
        Mutant(plain_mean, "A moving average forgets; yours remembers every step equally."),
    ),
    why="Samples from the averaged weights are better than those from any single step's.",
    where="nanosd3/training/ema.py, update_ema",
    names=("average", "weights", "step", "decay"),
    differentiable=False,
)

# --- gradients ----------------------------------------------------------------------------------


def gradient_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            f"{count} samples, {size} at once",
            (
                normal(generator, D, D),
                *(normal(generator, count, D) for _ in range(2)),
                torch.rand(count, generator=generator),
                size,
            ),
        )
        for count, D, size in ((7, 3, 3), (8, 4, 2), (5, 2, 5))
    ]


def gradient_spec(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    total = torch.zeros_like(weight)
    for b in range(len(x0)):  # by hand: d/dW of the mean of (z W - target)^2
        z = (1 - t[b]) * x0[b] + t[b] * noise[b]
        difference = z @ weight - (noise[b] - x0[b])
        total = total + 2 * z[:, None] * difference[None, :] / len(z)
    return total / len(x0)  # the mean over all samples, however they are split


def accumulate_gradient(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    """The whole batch at once: what any way of splitting it must give."""
    return gradient_of(weight, x0, noise, t)


def gradient_of(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    weight = weight.detach().requires_grad_()
    loss = flow.flow_loss(flow.interpolate(x0, noise, t) @ weight, x0, noise).mean()
    return torch.autograd.grad(loss, weight)[0]


def microbatch_gradients(weight: Tensor, size: int, *batch: Tensor) -> list[Tensor]:
    microbatches = zip(*(x.split(size) for x in batch), strict=True)
    return [gradient_of(weight, *microbatch) for microbatch in microbatches]


def mean_of_means(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return torch.stack(microbatch_gradients(weight, size, x0, noise, t)).mean(0)


def sum_of_means(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return torch.stack(microbatch_gradients(weight, size, x0, noise, t)).sum(0)


def last_only(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return microbatch_gradients(weight, size, x0, noise, t)[-1]


def rest_dropped(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    n = len(x0) // size * size
    return gradient_of(weight, x0[:n], noise[:n], t[:n])


ACCUMULATE = Exercise(
    name="accumulate_gradient",
    topic="training",
    points=3,
    difficulty=3,
    signature="def accumulate_gradient(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, "
    "size: int) -> Tensor:",
    task="The gradient (D, D), with respect to weight, of the mean flow loss of a batch, x0 and\n"
    "noise (B, D) and t (B,), for the network velocity = z @ weight. Process at most `size`\n"
    "samples at once, since more do not fit in memory; the last microbatch may be smaller.",
    specification=gradient_spec,
    reference=accumulate_gradient,
    cases=gradient_cases,
    mutants=(
        Mutant(mean_of_means, "Microbatches may differ in size: each counts by its size."),
        Mutant(sum_of_means, "A sum of means grows with the number of microbatches."),
        Mutant(
            last_only, "The gradients of earlier microbatches are lost; are they zeroed too soon?"
        ),
        Mutant(rest_dropped, "The smaller microbatch at the end belongs to the batch too."),
    ),
    why="Accumulation may change memory and time, never the result.",
    where="nanosd3/flow.py, flow_loss (one loss per sample makes accumulation exact)",
    names=("weight", "x0", "noise", "t", "size"),
    differentiable=False,
)

EXERCISES = (RATE, EMA, ACCUMULATE)
