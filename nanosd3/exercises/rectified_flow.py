"""Exercises on the line from data to noise: a point on it, its velocity, the loss."""

import math

import torch
from torch import Tensor

from nanosd3 import flow
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def line_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, *shape: int) -> Case:
        t = torch.rand(shape[0], generator=generator) * 0.8 + 0.1
        return Case(label, (normal(generator, *shape), normal(generator, *shape), t))

    single = Case(
        "one time for all", (normal(generator, 3, 2), normal(generator, 3, 2), torch.tensor(0.3))
    )
    points = large("256 points", *case("", 256, 2).arguments)
    return [case("images (2, 3, 4, 5)", 2, 3, 4, 5), case("points (7, 2)", 7, 2), single, points]


def interpolate_spec(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    z = torch.empty(x0.shape, dtype=x0.dtype)
    for b in range(len(x0)):
        t_b = t[b] if t.ndim else t
        z[b] = (1 - t_b) * x0[b] + t_b * noise[b]
    return z


def other_direction(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return flow.interpolate(noise, x0, t)


def variance_preserving(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    return torch.cos(math.pi / 2 * t) * x0 + torch.sin(math.pi / 2 * t) * noise


def first_time_for_all(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return flow.interpolate(x0, noise, t.reshape(-1)[0])


def noise_added(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    return x0 + t * noise


def root_weights(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    return (1 - t).sqrt() * x0 + t.sqrt() * noise


def mean_time_for_all(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return flow.interpolate(x0, noise, t.mean())


def noise_twice(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return flow.interpolate(x0, 2 * noise, t)


def for_images_only(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


INTERPOLATE = Exercise(
    name="interpolate",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:",
    task="The noisy latents z_t on the straight line from data x0 (t = 0) to noise (t = 1).\n"
    "x0 and noise are (B, ...); t is (B,), or () for one time shared by all samples.",
    specification=interpolate_spec,
    reference=flow.interpolate,
    cases=line_cases,
    mutants=(
        Mutant(other_direction, "At t = 0 the result should be the data; what does yours give?"),
        Mutant(
            variance_preserving,
            "A straight line has no sines in it; rectified flow takes the simplest path.",
        ),
        Mutant(first_time_for_all, "Every sample has its own time; do you use only one?"),
        Mutant(noise_added, "At t = 1 none of the data should be left."),
        Mutant(root_weights, "The weights are 1 - t and t themselves, not their square roots."),
        Mutant(mean_time_for_all, "Every sample has its own time; yours all have the mean."),
        Mutant(noise_twice, "The noise is added twice: its weight is t."),
        Mutant(
            for_images_only,
            "(B, 1, 1, 1) fits images only: give t as many trailing axes as x0 has.",
        ),
    ),
    size_hint="t is (B,), x0 is (B, ...): give t trailing axes, as many as x0 has after the first.",
    why="Straight paths are why a few solver steps suffice.",
    where="nanosd3/flow.py, interpolate",
    names=("x0", "noise", "t"),
)


def pair_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", (normal(generator, *shape), normal(generator, *shape)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ] + [large("8 latents", normal(generator, 8, 4, 4, 4), normal(generator, 8, 4, 4, 4))]


def velocity_spec(x0: Tensor, noise: Tensor) -> Tensor:
    """How far each number of z_t moves as t goes from 0 (data) to 1 (noise)."""
    v = torch.empty(x0.shape, dtype=x0.dtype)
    for i, (start, end) in enumerate(zip(x0.flatten(), noise.flatten(), strict=True)):
        v.view(-1)[i] = end - start
    return v


def from_noise_to_data(x0: Tensor, noise: Tensor) -> Tensor:
    return x0 - noise


def the_noise(x0: Tensor, noise: Tensor) -> Tensor:
    return noise + 0 * x0


def the_sum(x0: Tensor, noise: Tensor) -> Tensor:
    return noise + x0


def the_data(x0: Tensor, noise: Tensor) -> Tensor:
    return x0 + 0 * noise


VELOCITY = Exercise(
    name="velocity_target",
    topic="flow",
    points=1,
    difficulty=1,
    signature="def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:",
    task="dz/dt along the line z_t = (1 - t) x0 + t noise, which is what the network learns. All\n"
    "tensors are (B, ...).",
    specification=velocity_spec,
    reference=flow.velocity_target,
    cases=pair_cases,
    mutants=(
        Mutant(from_noise_to_data, "t grows towards noise here; which way does yours point?"),
        Mutant(the_noise, "That is what DDPM predicts; the slope of a line depends on both ends."),
        Mutant(the_sum, "The slope is the difference of the ends."),
        Mutant(the_data, "That is the clean image; the slope of a line depends on both ends."),
    ),
    why="Sign errors here are the most common of all: half of the papers run time the other way.",
    where="nanosd3/flow.py, velocity_target",
    names=("x0", "noise"),
)


def loss_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", tuple(normal(generator, *shape) for _ in range(3)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ] + [large("8 latents", *(normal(generator, 8, 4, 4, 4) for _ in range(3)))]


def loss_spec(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    losses = []
    for v, a, b in zip(velocity, x0, noise, strict=True):
        total = 0.0
        for predicted, data, eps in zip(v.flatten(), a.flatten(), b.flatten(), strict=True):
            total = total + (predicted - (eps - data)) ** 2
        losses.append(total / v.numel())
    return torch.stack(losses)


def one_number(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, x0, noise).mean().expand(len(x0))


def summed(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, x0, noise) * x0[0].numel()


def absolute(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return (velocity - (noise - x0)).abs().flatten(1).mean(1)


def wrong_sign(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, noise, x0)


def batch_mean(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, x0, noise).mean()


def mean_over_samples(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return (velocity - (noise - x0)).square().mean(0)


def its_square_root(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, x0, noise).sqrt()


def noise_as_target(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return flow.flow_loss(velocity, 0 * x0, noise)


LOSS = Exercise(
    name="flow_loss",
    topic="flow",
    points=2,
    difficulty=1,
    signature="def flow_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:",
    task="Mean squared error between the predicted velocity and the target, one value per sample:\n"
    "(B, ...) three times -> (B,).",
    specification=loss_spec,
    reference=flow.flow_loss,
    cases=loss_cases,
    mutants=(
        Mutant(one_number, "Each sample has its own loss; yours is averaged over the batch."),
        Mutant(summed, "A mean, not a sum: otherwise the loss grows with the size of the image."),
        Mutant(
            absolute, "Squared errors, not absolute ones: the best prediction should be the mean."
        ),
        Mutant(wrong_sign, "The target is the velocity towards noise; is its sign right?"),
        Mutant(
            batch_mean, "Each sample has its own loss, (B,): do not average over the first axis."
        ),
        Mutant(mean_over_samples, "Average over all axes except the first, not over the samples."),
        Mutant(its_square_root, "The mean of the squares is the loss; take no root."),
        Mutant(noise_as_target, "The target is noise - x0, not the noise alone."),
    ),
    why="A loss per sample shows at which t the model is weak.",
    where="nanosd3/flow.py, flow_loss",
    names=("velocity", "x0", "noise"),
)


EXERCISES = (INTERPOLATE, VELOCITY, LOSS)
