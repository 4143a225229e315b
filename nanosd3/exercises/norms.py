"""An exercise on RMSNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import layers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def rms_cases(generator: torch.Generator) -> list[Case]:
    cases = [
        Case(f"shape {shape}", (3 * normal(generator, *shape) + 1, normal(generator, shape[-1])))
        for shape in ((2, 3, 5, 8), (4, 6))
    ]
    small = torch.cat([1e-3 * normal(generator, 2, 8), torch.zeros(1, 8)])
    tokens = large("64 tokens", normal(generator, 64, 16), normal(generator, 16))
    return [*cases, Case("small numbers and zeros", (small, normal(generator, 8))), tokens]


def rms_spec(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for row, result in zip(x.reshape(-1, len(weight)), out.view(-1, len(weight)), strict=True):
        mean_square = sum(value**2 for value in row) / len(row)
        for i in range(len(row)):
            result[i] = row[i] / (mean_square + 1e-6) ** 0.5 * weight[i]
    return out


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`layers.RMSNorm` with this weight."""
    return functional_call(layers.RMSNorm(len(weight)), {"weight": weight}, x)


def layer_norm_instead(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, eps=1e-6) * weight


def divided_by_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True) * weight


def rms_norm_as_it_comes(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight)


def squares_summed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() * weight


def weight_plus_one(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, 1 + weight)


def no_root(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6) * weight


def over_all_axes(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def over_tokens(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-2, keepdim=True) + 1e-6).sqrt() * weight


def weight_forgotten(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, torch.ones_like(weight))


def eps_outside(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6) * weight


def eps_forgotten(x: Tensor, weight: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt() * weight


def mean_magnitude(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + 1e-6) * weight


RMS_NORM = Exercise(
    name="rms_norm",
    topic="attention",
    points=1,
    difficulty=1,
    signature="def rms_norm(x: Tensor, weight: Tensor) -> Tensor:",
    task="Divide x (..., D) by the root of its mean square over the last axis\n"
    "(plus 1e-6 under the root), then multiply by weight (D,).",
    specification=rms_spec,
    reference=rms_norm,
    cases=rms_cases,
    mutants=(
        Mutant(layer_norm_instead, "The mean is not subtracted: that would be LayerNorm."),
        Mutant(
            divided_by_norm,
            "The mean of the squares, not their sum: the two norms differ by sqrt(D).",
        ),
        Mutant(
            rms_norm_as_it_comes, "1e-6 is added under the root; F.rms_norm adds less by default."
        ),
        Mutant(squares_summed, "Divide the sum of the squares by their number, D."),
        Mutant(weight_plus_one, "Multiply by the weight itself; 1 + weight is another convention."),
        Mutant(no_root, "Divide by the root of the mean square: the result has size about 1."),
        Mutant(over_all_axes, "Each vector has its own root mean square, over the last axis only."),
        Mutant(over_tokens, "The mean runs over the last axis, the features, not over the tokens."),
        Mutant(weight_forgotten, "The weight is not used."),
        Mutant(eps_outside, "1e-6 is added under the root, to the mean square."),
        Mutant(eps_forgotten, "Without 1e-6 under the root a vector of zeros gives 0 / 0."),
        Mutant(mean_magnitude, "The root of the mean square, not the mean magnitude."),
    ),
    size_hint="The mean needs keepdim=True, so that it broadcasts over x.",
    why="On queries and keys it bounds the attention logits.",
    where="nanosd3/layers.py, RMSNorm",
    names=("x", "weight"),
)


EXERCISES = (RMS_NORM,)
