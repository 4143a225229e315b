"""An exercise on the final layer."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import layers, mmdit
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def final_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, L: int, D: int, features: int) -> Case:
        x, c = 2 * normal(generator, B, L, D) + 1, normal(generator, B, D)
        weights = (
            normal(generator, 2 * D, D),
            normal(generator, 2 * D),
            normal(generator, features, D),
            normal(generator, features),
        )
        return Case(f"{L} tokens of {D} to {features} features", (x, c, *weights))

    cases = [case(2, 3, 4, 5), case(1, 5, 6, 8)]
    return [*cases, large("4 times 16 tokens", *case(4, 16, 8, 4).arguments)]


def final_spec(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    B, L, D = x.shape
    out = torch.empty(B, L, len(b), dtype=x.dtype)
    for i in range(B):
        modulation = w_on @ (c[i] / (1 + torch.exp(-c[i]))) + b_on  # SiLU, then linear
        shift, scale = modulation[:D], modulation[D:]
        for n in range(L):
            mean = x[i, n].mean()
            variance = ((x[i, n] - mean) ** 2).mean()
            h = (x[i, n] - mean) / (variance + 1e-6) ** 0.5 * (1 + scale) + shift
            out[i, n] = w @ h + b
    return out


def final_layer(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`mmdit.FinalLayer` with these weights."""
    weights = {
        "adaLN_modulation.1.weight": w_on,
        "adaLN_modulation.1.bias": b_on,
        "linear.weight": w,
        "linear.bias": b,
    }
    return functional_call(mmdit.FinalLayer(x.shape[-1], len(b)), weights, (x, c))


def scale_first(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    halves = torch.cat(w_on.chunk(2)[::-1]), torch.cat(b_on.chunk(2)[::-1])
    return final_layer(x, c, *halves, w, b)


def without_silu(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    shift, scale = (c @ w_on.T + b_on).chunk(2, dim=1)
    return layers.modulate(x, shift, scale) @ w.T + b


def scale_without_one(
    x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor
) -> Tensor:
    shift, scale = (F.silu(c) @ w_on.T + b_on).chunk(2, dim=1)
    return layers.modulate(x, shift, scale - 1) @ w.T + b


def silu_last(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    shift, scale = F.silu(c @ w_on.T + b_on).chunk(2, dim=1)
    return layers.modulate(x, shift, scale) @ w.T + b


def norm_missing(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    shift, scale = (F.silu(c) @ w_on.T + b_on).chunk(2, dim=1)
    return (x * (1 + scale[:, None]) + shift[:, None]) @ w.T + b


def modulated_last(
    x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor
) -> Tensor:
    shift, scale = (F.silu(c) @ w_on.T + b_on).chunk(2, dim=1)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (h + shift[:, None]) * (1 + scale[:, None]) @ w.T + b


FINAL_LAYER = Exercise(
    name="final_layer",
    topic="blocks",
    points=2,
    difficulty=2,
    signature="def final_layer(x, c, w_on, b_on, w, b) -> Tensor:",
    task="The last layer: conditioning c (B, D), through SiLU and a linear layer (w_on (2D, D),\n"
    "b_on), gives shift, then scale; x (B, N, D), modulated by them, goes through a linear layer\n"
    "(w (features, D), b): (B, N, features).",
    specification=final_spec,
    reference=final_layer,
    cases=final_cases,
    mutants=(
        Mutant(
            scale_first,
            "The first half is the shift; diffusers' files have it the other way round.",
        ),
        Mutant(without_silu, "The conditioning goes through SiLU first."),
        Mutant(scale_without_one, "A scale of 0 should change nothing; does yours count from 1?"),
        Mutant(silu_last, "SiLU comes before the linear layer, not after it."),
        Mutant(norm_missing, "x is normalised before it is modulated."),
        Mutant(modulated_last, "Scale first, then shift."),
    ),
    size_hint="shift and scale are (B, D): give them an axis for the tokens, (B, 1, D).",
    why="Its weights start at zero, so a new model predicts exactly 0.",
    where="nanosd3/mmdit.py, FinalLayer",
    names=("x", "c", "w_on", "b_on", "w", "b"),
    tolerance=1e-4,
)


EXERCISES = (FINAL_LAYER,)
