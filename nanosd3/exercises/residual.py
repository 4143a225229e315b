"""An exercise on the residual block of autoencoders."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import vae
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def resblock_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, C: int, H: int, W: int, groups: int) -> Case:
        weights = [normal(generator, C, C, 3, 3) / 3 for _ in range(2)]
        return Case(
            f"{C} channels in {groups} groups, {H}x{W}",
            (2 * normal(generator, B, C, H, W) + 1, *weights, groups),
        )

    many = large("12x12", *case(1, 4, 12, 12, 2).arguments)
    return [case(2, 4, 3, 5, 2), case(1, 6, 4, 2, 3), many]


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
    """`vae.ResBlock` with these convolutions and without biases or norm weights."""
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


def group_per_channel(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    return two_steps(x, weight1, weight2, x.shape[1], x.shape[1])


def channels_interleaved(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    def norm(h: Tensor) -> Tensor:
        apart = h.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        apart = F.group_norm(apart, groups, eps=1e-6)
        return apart.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    h = x
    for weight in (weight1, weight2):
        h = F.conv2d(F.silu(norm(h)), weight, padding=1)
    return x + h


def no_padding(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    h = F.conv2d(F.silu(F.group_norm(F.pad(x, [1] * 4), groups, eps=1e-6)), weight1)
    return x + F.conv2d(F.silu(F.group_norm(F.pad(h, [1] * 4), groups, eps=1e-6)), weight2)


def activation_first(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    h = x
    for weight in (weight1, weight2):
        h = F.conv2d(F.group_norm(F.silu(h), groups, eps=1e-6), weight, padding=1)
    return x + h


def weights_exchanged(x: Tensor, weight1: Tensor, weight2: Tensor, groups: int) -> Tensor:
    return resblock(x, weight2, weight1, groups)


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
        Mutant(
            group_per_channel,
            "`groups` is the number of groups: each of them has several channels.",
        ),
        Mutant(
            channels_interleaved,
            "Channels of a group are adjacent: the first C / groups, then the next.",
        ),
        Mutant(
            no_padding, "Pad for the convolution, after the norm: the zeros do not enter its mean."
        ),
        Mutant(activation_first, "Norm first, then SiLU."),
        Mutant(weights_exchanged, "weight1 comes first, then weight2."),
    ),
    why="With the norm first, the skip connection stays a clean path for signal and gradient.",
    where="nanosd3/vae.py, ResBlock",
    names=("x", "weight1", "weight2", "groups"),
    tolerance=1e-4,
)

EXERCISES = (RESBLOCK,)
