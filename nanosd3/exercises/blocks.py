"""An exercise on the gated MLP of a block."""

import math
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import layers, mmdit
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def mlp_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, L: int, D: int, size: float = 2.0, label: str = "") -> Case:
        tokens = size * normal(generator, B, L, D) + 1
        conditioning = [normal(generator, B, D) for _ in range(3)]
        weights = [
            normal(generator, *shape) / D**0.5 for shape in ((4 * D, D), (4 * D,), (D, 4 * D), (D,))
        ]
        return Case(f"(B, L, D) = ({B}, {L}, {D}){label}", (tokens, *conditioning, *weights))

    cases = [case(2, 3, 4), case(1, 5, 6), case(1, 2, 8, 1e-3, ", small differences")]
    return [*cases, large("4 times 16 tokens", *case(4, 16, 8).arguments)]


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


def gate_before_mlp(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *mlp: Tensor) -> Tensor:
    gated_scale = gate * (1 + scale) - 1
    return gated_mlp(x, gate * shift, gated_scale, torch.ones_like(gate), *mlp)


def bias_not_gated(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    h = gated_mlp(x, shift, scale, gate, w1, b1, w2, torch.zeros_like(b2))
    return h + b2


def shift_and_scale_exchanged(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *mlp: Tensor
) -> Tensor:
    return gated_mlp(x, scale, shift, gate, *mlp)


def scale_alone(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *mlp: Tensor) -> Tensor:
    return gated_mlp(x, shift, scale - 1, gate, *mlp)


def exact_gelu(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    h = F.gelu(layers.modulate(x, shift, scale) @ w1.T + b1) @ w2.T + b2
    return x + gate[:, None] * h


def no_activation(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    h = (layers.modulate(x, shift, scale) @ w1.T + b1) @ w2.T + b2
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
        Mutant(
            no_residual, "With all gates 0 a block should pass x on unchanged; yours returns zeros."
        ),
        Mutant(gate_plus_one, "Scales count from 1, gates from 0: that is the Zero in adaLN-Zero."),
        Mutant(whole_gated, "Only the branch is gated, not the x that it is added to."),
        Mutant(residual_from_modulated, "The branch is added to x itself, not to the modulated x."),
        Mutant(in_another_order, "The order is shift, scale, gate."),
        Mutant(relu_instead, "The activation is GELU."),
        Mutant(gate_before_mlp, "The gate multiplies what comes out of the MLP, not what goes in."),
        Mutant(
            bias_not_gated,
            "The gate multiplies the whole output of the MLP, its last bias included.",
        ),
        Mutant(shift_and_scale_exchanged, "Shift and scale are swapped."),
        Mutant(scale_alone, "The factor is 1 + scale: a scale of 0 changes nothing."),
        Mutant(exact_gelu, "That is the exact GELU; the task asks for its tanh approximation."),
        Mutant(no_activation, "The GELU between the two linear layers is missing."),
    ),
    size_hint="shift, scale and gate are (B, D): give them an axis for the tokens, (B, 1, D).",
    why="Gates that start at 0 make a new block the identity, however deep the model.",
    where="nanosd3/mmdit.py, feed_forward (DiT, arXiv 2212.09748, section 3.2)",
    names=("x", "shift", "scale", "gate", "w1", "b1", "w2", "b2"),
    tolerance=1e-4,
)


EXERCISES = (GATED_MLP,)
