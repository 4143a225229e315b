"""Exercises on the parts of a transformer: the gated MLP and the final layer."""

import math
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import layers, mmdit
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal


def mlp_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, L: int, D: int, size: float = 2.0, label: str = "") -> Case:
        tokens = size * normal(generator, B, L, D) + 1
        conditioning = [normal(generator, B, D) for _ in range(3)]
        weights = [
            normal(generator, *shape) / D**0.5 for shape in ((4 * D, D), (4 * D,), (D, 4 * D), (D,))
        ]
        return Case(f"(B, L, D) = ({B}, {L}, {D}){label}", (tokens, *conditioning, *weights))

    return [case(2, 3, 4), case(1, 5, 6), case(1, 2, 8, 1e-3, ", small differences")]


def mlp_spec(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    out = torch.empty_like(x)
    B, L, _ = x.shape
    for b in range(B):
        for n in range(L):
            mean = x[b, n].mean()
            variance = ((x[b, n] - mean) ** 2).mean()
            h = (x[b, n] - mean) / (variance + 1e-6) ** 0.5 * (1 + scale[b]) + shift[b]
            h = w1 @ h + b1
            h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
            out[b, n] = x[b, n] + gate[b] * (w2 @ h + b2)
    return out


def gated_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    """`mmdit.feed_forward` with a stream whose MLP has these weights."""
    network = layers.MLP(x.shape[-1])
    weights = {"fc1.weight": w1, "fc1.bias": b1, "fc2.weight": w2, "fc2.bias": b2}
    stream = SimpleNamespace(
        mlp=lambda h: functional_call(network, weights, h),
        modulated=lambda x, mod: layers.modulate(x, mod.shift, mod.scale),
    )
    modulation = mmdit.Modulation(shift, scale, gate)
    return mmdit.feed_forward(cast(mmdit.Stream, stream), x, modulation)


def no_residual(x: Tensor, *rest: Tensor) -> Tensor:
    return gated_mlp(x, *rest) - x


def gate_plus_one(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *mlp: Tensor) -> Tensor:
    return gated_mlp(x, shift, scale, 1 + gate, *mlp)


def whole_gated(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *mlp: Tensor) -> Tensor:
    return gate[:, None] * gated_mlp(x, shift, scale, torch.ones_like(gate), *mlp)


def residual_from_modulated(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *mlp: Tensor
) -> Tensor:
    return gated_mlp(x, shift, scale, gate, *mlp) - x + layers.modulate(x, shift, scale)


def in_another_order(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *mlp: Tensor) -> Tensor:
    return gated_mlp(x, gate, scale, shift, *mlp)


def relu_instead(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    h = F.relu(layers.modulate(x, shift, scale) @ w1.T + b1) @ w2.T + b2
    return x + gate[:, None] * h


GATED_MLP = Exercise(
    name="gated_mlp",
    topic="blocks",
    points=3,
    difficulty=2,
    signature="def gated_mlp(x, shift, scale, gate, w1, b1, w2, b2) -> Tensor:",
    task="Half of an adaLN-Zero block: x (B, L, D) is modulated (as in `modulate`), goes through\n"
    "a linear layer (w1 (4D, D), b1), GELU in its tanh approximation and a linear layer (w2\n"
    "(D, 4D), b2), is multiplied by the gate and added to x. shift, scale and gate are (B, D).",
    specification=mlp_spec,
    reference=gated_mlp,
    cases=mlp_cases,
    mutants=(
        Mutant(no_residual, "With all gates 0 a block should pass x on; yours passes nothing."),
        Mutant(gate_plus_one, "Scales count from 1, gates from 0: that is the Zero in adaLN-Zero."),
        Mutant(whole_gated, "Only the branch is gated, not the x that it is added to."),
        Mutant(residual_from_modulated, "The branch is added to x itself, not to the modulated x."),
        Mutant(in_another_order, "The order is shift, scale, gate."),
        Mutant(relu_instead, "The activation is GELU."),
    ),
    why="Gates that start at 0 make a new block the identity, however deep the model.",
    where="nanosd3/mmdit.py, feed_forward (DiT, arXiv 2212.09748, section 3.2)",
    names=("x", "shift", "scale", "gate", "w1", "b1", "w2", "b2"),
    tolerance=1e-4,
)


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

    return [case(2, 3, 4, 5), case(1, 5, 6, 8)]


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
    ),
    why="Its weights start at zero, so a new model predicts exactly 0.",
    where="nanosd3/mmdit.py, FinalLayer",
    names=("x", "c", "w_on", "b_on", "w", "b"),
    tolerance=1e-4,
)


EXERCISES = (GATED_MLP, FINAL_LAYER)
