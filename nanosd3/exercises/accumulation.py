"""An exercise on gradient accumulation."""

import torch
from torch import Tensor

from nanosd3 import flow
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal


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
            200 if count == 256 else None,
        )
        for count, D, size in ((7, 3, 3), (8, 4, 2), (5, 2, 5), (256, 6, 64))
    ]


def gradient_spec(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    total = torch.zeros_like(weight)
    for b in range(len(x0)):  # by hand: d/dW of the mean of (z W - target)^2
        z = (1 - t[b]) * x0[b] + t[b] * noise[b]
        difference = z @ weight - (noise[b] - x0[b])
        total = total + 2 * z[:, None] * difference[None, :] / len(z)
    return total / len(x0)  # the mean over all samples, however they are split


def accumulate_gradient(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    """The whole batch at once: the result that any way of splitting it must give."""
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


def last_only_of_all(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    rest = len(x0) % size or size
    return last_only(weight, x0, noise, t, size) * rest / len(x0)


def rest_dropped_of_all(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    n = len(x0) // size * size
    return rest_dropped(weight, x0, noise, t, size) * n / len(x0)


def noise_to_data(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return -gradient_of(-weight, x0, noise, t)


def weighted_by_size(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return sum_of_means(weight, x0, noise, t, size) * size / len(x0)


def summed_over_batch(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return gradient_of(weight, x0, noise, t) * len(x0)


def summed_over_features(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return gradient_of(weight, x0, noise, t) * x0.shape[1]


def one_time(weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, size: int) -> Tensor:
    return gradient_of(weight, x0, noise, t.mean())


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
        Mutant(
            mean_of_means, "Microbatches may differ in size: each counts in proportion to its size."
        ),
        Mutant(sum_of_means, "A sum of means grows with the number of microbatches."),
        Mutant(
            last_only, "The gradients of earlier microbatches are lost; are they zeroed too soon?"
        ),
        Mutant(rest_dropped, "The smaller microbatch at the end belongs to the batch too."),
        Mutant(
            last_only_of_all,
            "Add up the gradients of all microbatches; yours is that of the last one.",
        ),
        Mutant(rest_dropped_of_all, "The samples left over at the end are a microbatch, too."),
        Mutant(noise_to_data, "The velocity points from data to noise: noise - x0."),
        Mutant(weighted_by_size, "The last microbatch may be smaller: weight it by its own size."),
        Mutant(summed_over_batch, "The loss is the mean over the batch, not the sum."),
        Mutant(
            summed_over_features, "The loss of a sample is the mean over its features, not the sum."
        ),
        Mutant(one_time, "Each sample has its own time."),
    ),
    size_hint="t is (B,), x0 is (B, D): give t a trailing axis, t[:, None].",
    why="Accumulation may change memory and time, never the result.",
    where="nanosd3/flow.py, flow_loss (one loss per sample makes accumulation exact)",
    names=("weight", "x0", "noise", "t", "size"),
    differentiable=False,
)

EXERCISES = (ACCUMULATE,)
