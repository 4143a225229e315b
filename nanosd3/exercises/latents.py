"""Exercises on latents: drawing one, the KL term, the residual block."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import vae
from nanosd3.exercises.base import Case, Exercise, Mutant, normal


def posterior_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", (normal(generator, *shape), normal(generator, *shape),
                                normal(generator, *shape)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ]  # fmt: skip


def posterior_spec(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    z = torch.empty(mean.shape, dtype=mean.dtype)
    triples = zip(mean.flatten(), logvar.flatten(), noise.flatten(), strict=True)
    for i, (m, log_variance, n) in enumerate(triples):
        variance = math.exp(log_variance)
        z.view(-1)[i] = m + math.sqrt(variance) * n
    return z


def variance_as_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + logvar.exp() * noise


def log_as_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + logvar * noise


def inverse_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + torch.exp(-0.5 * logvar) * noise


POSTERIOR = Exercise(
    name="sample_posterior",
    topic="latents",
    points=1,
    difficulty=1,
    signature="def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:",
    task="A latent from the encoder's Gaussian: mean and log-variance from the network, noise\n"
    "from N(0, 1), all of one shape. Gradients should reach mean and logvar.",
    specification=posterior_spec,
    reference=vae.sample_posterior,
    cases=posterior_cases,
    mutants=(
        Mutant(variance_as_deviation, "exp(logvar) is the variance; noise is multiplied by its "
               "square root."),
        Mutant(log_as_deviation, "logvar is a logarithm; what is it the logarithm of?"),
        Mutant(inverse_deviation, "A larger logvar should mean more noise; yours means less."),
    ),
    why="The randomness comes from outside, so the encoder can be trained through it.",
    where="nanosd3/vae.py, sample_posterior",
    names=("mean", "logvar", "noise"),
)  # fmt: skip


def kl_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", (normal(generator, *shape), normal(generator, *shape)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ]


def kl_spec(mean: Tensor, logvar: Tensor) -> Tensor:
    totals = []
    for m, log_variance in zip(mean, logvar, strict=True):
        total = 0.0
        for a, b in zip(m.flatten().tolist(), log_variance.flatten().tolist(), strict=True):
            total += 0.5 * (a * a + math.exp(b) - 1 - b)
        totals.append(total)
    return torch.tensor(totals, dtype=mean.dtype)


def kl_averaged(mean: Tensor, logvar: Tensor) -> Tensor:
    return vae.kl_divergence(mean, logvar) / mean[0].numel()


def kl_without_half(mean: Tensor, logvar: Tensor) -> Tensor:
    return 2 * vae.kl_divergence(mean, logvar)


def kl_of_deviation(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + torch.exp(0.5 * logvar) - 1 - logvar).flatten(1).sum(1)


def kl_without_one(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + logvar.exp() - logvar).flatten(1).sum(1)


def kl_negative(mean: Tensor, logvar: Tensor) -> Tensor:
    return -vae.kl_divergence(mean, logvar)


KL = Exercise(
    name="kl_divergence",
    topic="latents",
    points=2,
    difficulty=1,
    signature="def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:",
    task="KL(N(mean, exp(logvar)) || N(0, 1)) of each image, summed over its latents:\n"
    "(B, ...) twice -> (B,). One latent has (mean^2 + variance - 1 - log variance) / 2.",
    specification=kl_spec,
    reference=vae.kl_divergence,
    cases=kl_cases,
    mutants=(
        Mutant(kl_averaged, "Summed over an image's latents, not averaged: the weight of the term "
               "depends on which."),
        Mutant(kl_without_half, "Each latent counts half of the bracket."),
        Mutant(kl_of_deviation, "The bracket has the variance, exp(logvar), not the deviation."),
        Mutant(kl_without_one, "For mean 0 and variance 1 the divergence is 0; yours is not."),
        Mutant(kl_negative, "A divergence is never negative."),
    ),
    why="It keeps latents near each other, so that the flow has something simple to start from.",
    where="nanosd3/vae.py, kl_divergence",
    names=("mean", "logvar"),
)  # fmt: skip


# --- the residual block -------------------------------------------------------------------------


def resblock_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, C: int, H: int, W: int, groups: int) -> Case:
        weights = [normal(generator, C, C, 3, 3) / 3 for _ in range(2)]
        return Case(f"{C} channels in {groups} groups, {H}x{W}",
                    (2 * normal(generator, B, C, H, W) + 1, *weights, groups))  # fmt: skip

    return [case(2, 4, 3, 5, 2), case(1, 6, 4, 2, 3)]


def resblock_spec(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    B, C, H, W = x.shape

    def norm(x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        for b in range(B):
            for g in range(groups):  # neighbouring channels share mean and variance
                part = x[b, g * C // groups : (g + 1) * C // groups]
                mean = part.mean()
                variance = ((part - mean) ** 2).mean()
                out[b, g * C // groups : (g + 1) * C // groups] = (part - mean) / (
                    variance + 1e-6
                ) ** 0.5
        return out

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(H):
            for j in range(W):
                for di in range(3):
                    for dj in range(3):
                        row, column = i + di - 1, j + dj - 1
                        if 0 <= row < H and 0 <= column < W:
                            out[:, :, i, j] += x[:, :, row, column] @ weight[:, :, di, dj].T
        return out

    h = norm(x)
    h = convolve(h / (1 + torch.exp(-h)), weight1)
    h = norm(h)
    return x + convolve(h / (1 + torch.exp(-h)), weight2)


def resblock(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    """`vae.ResBlock` with these convolutions, no biases, and norms without weights."""
    C = x.shape[1]
    one, zero = x.new_ones(C), x.new_zeros(C)
    weights = {"conv1.weight": weight1, "conv2.weight": weight2}
    for i in "12":
        weights |= {f"norm{i}.weight": one, f"norm{i}.bias": zero, f"conv{i}.bias": zero}
    return functional_call(vae.ResBlock(C, C, groups), weights, x)


def without_skip(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    return resblock(x, weight1, weight2, groups) - x


def two_steps(
    x: Tensor, weight1: Tensor, weight2: Tensor, groups1: int, groups2: int, act: bool = True
) -> Tensor:
    activate = F.silu if act else (lambda h: h)
    h = F.conv2d(F.silu(F.group_norm(x, groups1, eps=1e-6)), weight1, padding=1)
    return x + F.conv2d(activate(F.group_norm(h, groups2, eps=1e-6)), weight2, padding=1)


def one_group(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    return two_steps(x, weight1, weight2, 1, 1)


def one_activation(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    return two_steps(x, weight1, weight2, groups, groups, act=False)


def relu(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    h = x
    for weight in (weight1, weight2):
        h = F.conv2d(F.relu(F.group_norm(h, groups, eps=1e-6)), weight, padding=1)
    return x + h


def norm_after(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    h = x
    for weight in (weight1, weight2):
        h = F.silu(F.group_norm(F.conv2d(h, weight, padding=1), groups, eps=1e-6))
    return x + h


def skip_from_normed(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    return resblock(x, weight1, weight2, groups) - x + F.group_norm(x, groups, eps=1e-6)


RESBLOCK = Exercise(
    name="resblock",
    topic="latents",
    points=3,
    difficulty=3,
    signature="def resblock(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:",
    task="What autoencoders are made of: twice (group norm without weights, eps 1e-6; SiLU; 3x3\n"
    "convolution, zero padding, no bias), then x is added. x is (B, C, H, W), the weights\n"
    "(C, C, 3, 3).",
    specification=resblock_spec,
    reference=resblock,
    cases=resblock_cases,
    mutants=(
        Mutant(without_skip, "What came in should be added at the end."),
        Mutant(
            one_group, "Each group of neighbouring channels has a mean and variance of its own."
        ),
        Mutant(one_activation, "SiLU stands before both convolutions."),
        Mutant(relu, "The activation is SiLU, x sigmoid(x)."),
        Mutant(norm_after, "Norm, activation, convolution, in that order."),
        Mutant(skip_from_normed, "The skip carries x itself, not the normed x."),
    ),
    why="Norm first: the skip stays a clean path for signal and gradient.",
    where="nanosd3/vae.py, ResBlock",
    names=("x", "weight1", "weight2", "groups"),
    tolerance=1e-4,
)

EXERCISES = (POSTERIOR, KL, RESBLOCK)
