"""Exercises on latents: sampling one, the KL term, the residual block."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import vae
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal


def posterior_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            f"shape {shape}",
            (normal(generator, *shape), normal(generator, *shape), normal(generator, *shape)),
        )
        for shape in ((2, 3, 4, 5), (7, 2))
    ]


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
    task="Sample a latent from the encoder's Gaussian: mean and log-variance come from the\n"
    "network, noise from N(0, 1), all of one shape. Gradients should reach mean and logvar.",
    specification=posterior_spec,
    reference=vae.sample_posterior,
    cases=posterior_cases,
    mutants=(
        Mutant(
            variance_as_deviation,
            "exp(logvar) is the variance; multiply the noise by its square root.",
        ),
        Mutant(log_as_deviation, "logvar is a logarithm; the logarithm of what?"),
        Mutant(inverse_deviation, "A larger logvar should mean more noise; yours means less."),
    ),
    why="The randomness comes from outside, so the encoder can be trained through the sample.",
    where="nanosd3/vae.py, sample_posterior",
    names=("mean", "logvar", "noise"),
)


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
    "(B, ...) twice -> (B,). A latent contributes (mean^2 + variance - 1 - log variance) / 2.",
    specification=kl_spec,
    reference=vae.kl_divergence,
    cases=kl_cases,
    mutants=(
        Mutant(
            kl_averaged,
            "Sum over an image's latents, do not average: the weight of the term assumes it.",
        ),
        Mutant(kl_without_half, "Each latent contributes half of the bracket."),
        Mutant(
            kl_of_deviation,
            "The bracket holds the variance, exp(logvar), not the standard deviation.",
        ),
        Mutant(kl_without_one, "For mean 0 and variance 1 the divergence is 0; yours is not."),
        Mutant(kl_negative, "A divergence is never negative."),
    ),
    why="It keeps latents close together, so that the flow has a simple distribution to learn.",
    where="nanosd3/vae.py, kl_divergence",
    names=("mean", "logvar"),
)


# --- the residual block -------------------------------------------------------------------------


def resblock_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, C: int, H: int, W: int, groups: int) -> Case:
        weights = [normal(generator, C, C, 3, 3) / 3 for _ in range(2)]
        return Case(
            f"{C} channels in {groups} groups, {H}x{W}",
            (2 * normal(generator, B, C, H, W) + 1, *weights, groups),
        )

    return [case(2, 4, 3, 5, 2), case(1, 6, 4, 2, 3)]


def resblock_spec(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    B, C, H, W = x.shape

    def norm(x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        for b in range(B):
            for g in range(groups):  # adjacent channels share mean and variance
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
    """`vae.ResBlock` with these convolutions, without biases and norm weights."""
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
    h = F.conv2d(F.silu(F.group_norm(x, groups1, eps=1e-6)), weight1, padding=1)
    h = F.group_norm(h, groups2, eps=1e-6)
    return x + F.conv2d(F.silu(h) if act else h, weight2, padding=1)


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
    task="The building block of autoencoders: twice (group norm without weights, eps 1e-6; SiLU;\n"
    "3x3 convolution, zero padding, no bias), then x is added. x is (B, C, H, W), the weights are\n"
    "(C, C, 3, 3).",
    specification=resblock_spec,
    reference=resblock,
    cases=resblock_cases,
    mutants=(
        Mutant(without_skip, "The input should be added at the end."),
        Mutant(one_group, "Each group of adjacent channels has its own mean and variance."),
        Mutant(one_activation, "SiLU comes before both convolutions."),
        Mutant(relu, "The activation is SiLU, x sigmoid(x)."),
        Mutant(norm_after, "Norm, activation, convolution, in that order."),
        Mutant(skip_from_normed, "The skip connection carries x itself, not the normalised x."),
    ),
    why="With the norm first, the skip connection stays a clean path for signal and gradient.",
    where="nanosd3/vae.py, ResBlock",
    names=("x", "weight1", "weight2", "groups"),
    tolerance=1e-4,
)

EXERCISES = (POSTERIOR, KL, RESBLOCK)
