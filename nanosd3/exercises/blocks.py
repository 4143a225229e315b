"""Exercises on the parts of a block: modulation, time, the gated MLP, the last layer."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import layers, mmdit
from nanosd3.exercises.base import Case, Exercise, Mutant, normal


def modulate_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, L: int, D: int) -> Case:
        x, shift, scale = (
            normal(generator, B, L, D),
            normal(generator, B, D),
            normal(generator, B, D),
        )
        return Case(f"(B, L, D) = ({B}, {L}, {D})", (2 * x + 1, shift, scale))

    shift, scale = (normal(generator, 1, 4) for _ in range(2))
    flat = torch.ones(1, 3, 4) * torch.tensor([0.0, 2.0, -1.0]).view(1, 3, 1)
    small = Case("small differences", (1e-3 * normal(generator, 1, 3, 4), shift, scale))
    return [case(2, 3, 8), case(1, 5, 4), Case("all alike", (flat, shift, scale)), small]


def modulate_spec(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty_like(x)
    B, L, D = x.shape
    for b in range(B):
        for n in range(L):
            mean = sum(x[b, n]) / D
            variance = sum((value - mean) ** 2 for value in x[b, n]) / D
            for d in range(D):
                normed = (x[b, n, d] - mean) / (variance + 1e-6) ** 0.5
                out[b, n, d] = normed * (1 + scale[b, d]) + shift[b, d]
    return out


def one_forgotten(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layers.modulate(x, shift, scale - 1)


def not_normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def exchanged_halves(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layers.modulate(x, scale, shift)


def shifted_first(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift[:, None]) * (1 + scale[:, None])


def rms_instead(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


MODULATE = Exercise(
    name="modulate",
    topic="blocks",
    points=2,
    difficulty=1,
    signature="def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:",
    task="adaLN: a LayerNorm without weights (eps 1e-6) over the last axis of x (B, L, D), times\n"
    "(1 + scale), plus shift; shift and scale are (B, D).",
    specification=modulate_spec,
    reference=layers.modulate,
    cases=modulate_cases,
    mutants=(
        Mutant(one_forgotten, "With scale 0 the normed x should pass unchanged, not vanish."),
        Mutant(not_normed, "x is to be normalised first."),
        Mutant(exchanged_halves, "Shift and scale are exchanged: the mistake when reading "
               "diffusers' files."),
        Mutant(shifted_first, "Scale first, then shift."),
        Mutant(rms_instead, "LayerNorm also takes the mean away."),
    ),
    why="It is how the timestep and the pooled text reach every layer.",
    where="nanosd3/layers.py, modulate",
    names=("x", "shift", "scale"),
)  # fmt: skip


def time_cases(generator: torch.Generator) -> list[Case]:
    return [Case("five times", (torch.rand(5, generator=generator),)),
            Case("the ends", (torch.tensor([0.0, 1.0]),))]  # fmt: skip


def time_spec(t: Tensor) -> Tensor:
    rows = []
    for time in t.tolist():
        angles = [1000 * time * math.exp(-math.log(10000) * k / 128) for k in range(128)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    return torch.tensor(rows)


def not_times_1000(t: Tensor) -> Tensor:
    return layers.timestep_embedding(t / 1000)


def sines_first(t: Tensor) -> Tensor:
    return layers.timestep_embedding(t).roll(128, dims=1)


def interleaved(t: Tensor) -> Tensor:
    cosines, sines = layers.timestep_embedding(t).chunk(2, dim=1)
    return torch.stack([cosines, sines], dim=2).flatten(1)


def divided_by_127(t: Tensor) -> Tensor:
    k = torch.arange(128, device=t.device)
    angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) * k / 127)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


TIME = Exercise(
    name="timestep_embedding",
    topic="blocks",
    points=2,
    difficulty=2,
    signature="def timestep_embedding(t: Tensor) -> Tensor:",
    task="t (B,) in [0, 1] -> (B, 256) in float32: 128 cosines, then 128 sines, of\n"
    "1000 t 10000^(-k / 128), k = 0 .. 127.",
    specification=time_spec,
    reference=layers.timestep_embedding,
    cases=time_cases,
    mutants=(
        Mutant(not_times_1000, "t in [0, 1] hardly turns the slow frequencies: it is multiplied by "
               "1000 first."),
        Mutant(sines_first, "Cosines first, then sines."),
        Mutant(interleaved, "All cosines first, then all sines; not by turns."),
        Mutant(divided_by_127, "The exponent is k / 128; the last frequency is not quite 1/10000."),
    ),
    why="Without the factor 1000 the network can hardly tell one time from another.",
    where="nanosd3/layers.py, timestep_embedding",
    tolerance=1e-3,  # float32 angles of up to 1000 radians
    differentiable=False,
    names=("t",),
)  # fmt: skip


def mlp_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, L: int, D: int, size: float = 2.0, label: str = "") -> Case:
        tokens = size * normal(generator, B, L, D) + 1
        conditioning = [normal(generator, B, D) for _ in range(3)]
        weights = [normal(generator, *shape) / D**0.5 for shape in ((4 * D, D), (4 * D,),
                                                                   (D, 4 * D), (D,))]  # fmt: skip
        return Case(f"(B, L, D) = ({B}, {L}, {D}){label}", (tokens, *conditioning, *weights))

    return [case(2, 3, 4), case(1, 5, 6), case(1, 2, 8, 1e-3, ", small differences")]


def mlp_spec(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    b2: Tensor,
) -> Tensor:  # fmt: skip
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
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    b2: Tensor,
) -> Tensor:  # fmt: skip
    """`mmdit.feed_forward` of a stream whose MLP has these weights."""
    network = layers.MLP(x.shape[-1])
    weights = {"fc1.weight": w1, "fc1.bias": b1, "fc2.weight": w2, "fc2.bias": b2}
    stream = SimpleNamespace(
        mlp=lambda h: functional_call(network, weights, h),
        modulated=lambda x, mod: layers.modulate(x, mod.shift, mod.scale),
    )
    return mmdit.feed_forward(stream, x, mmdit.Modulation(shift, scale, gate))


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
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    b2: Tensor,
) -> Tensor:  # fmt: skip
    h = F.relu(layers.modulate(x, shift, scale) @ w1.T + b1) @ w2.T + b2
    return x + gate[:, None] * h


GATED_MLP = Exercise(
    name="gated_mlp",
    topic="blocks",
    points=3,
    difficulty=2,
    signature="def gated_mlp(x, shift, scale, gate, w1, b1, w2, b2) -> Tensor:",
    task="Half of an adaLN-Zero block: x (B, L, D) is modulated (as in `modulate`), goes through\n"
    "linear (w1 (4D, D), b1), GELU by its tanh approximation, linear (w2 (D, 4D), b2), is\n"
    "multiplied by the gate and added to x. shift, scale and gate are (B, D).",
    specification=mlp_spec,
    reference=gated_mlp,
    cases=mlp_cases,
    mutants=(
        Mutant(no_residual, "With all gates 0 a block should pass x on; yours passes nothing."),
        Mutant(gate_plus_one, "Scales count from 1, gates from 0: that is the Zero in adaLN-Zero."),
        Mutant(whole_gated, "Only the branch is gated, not the x it is added to."),
        Mutant(residual_from_modulated, "What is added to is x itself, not the modulated x."),
        Mutant(in_another_order, "The order is shift, scale, gate."),
        Mutant(relu_instead, "The activation is GELU."),
    ),
    why="Gates that start at 0 make a fresh block the identity, whatever its depth.",
    where="nanosd3/mmdit.py, feed_forward (DiT, arXiv 2212.09748, section 3.2)",
    names=("x", "shift", "scale", "gate", "w1", "b1", "w2", "b2"),
    tolerance=1e-4,
)


def final_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, L: int, D: int, features: int) -> Case:
        x, c = 2 * normal(generator, B, L, D) + 1, normal(generator, B, D)
        weights = (normal(generator, 2 * D, D), normal(generator, 2 * D),
                   normal(generator, features, D), normal(generator, features))  # fmt: skip
        return Case(f"{L} tokens of {D} to {features} features", (x, c, *weights))

    return [case(2, 3, 4, 5), case(1, 5, 6, 8)]


def final_spec(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    B, L, D = x.shape
    out = torch.empty(B, L, len(b), dtype=x.dtype)
    for i in range(B):
        on = w_on @ (c[i] / (1 + torch.exp(-c[i]))) + b_on  # SiLU, then linear
        shift, scale = on[:D], on[D:]
        for n in range(L):
            mean = x[i, n].mean()
            variance = ((x[i, n] - mean) ** 2).mean()
            h = (x[i, n] - mean) / (variance + 1e-6) ** 0.5 * (1 + scale) + shift
            out[i, n] = w @ h + b
    return out


def final_layer(x: Tensor, c: Tensor, w_on: Tensor, b_on: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`mmdit.FinalLayer` with these weights."""
    weights = {"adaLN_modulation.1.weight": w_on, "adaLN_modulation.1.bias": b_on,
               "linear.weight": w, "linear.bias": b}  # fmt: skip
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
    task="The last layer: conditioning c (B, D) through SiLU and a linear (w_on (2D, D), b_on)\n"
    "gives shift, then scale; x (B, N, D), modulated by them, goes through a linear\n"
    "(w (features, D), b): (B, N, features).",
    specification=final_spec,
    reference=final_layer,
    cases=final_cases,
    mutants=(
        Mutant(scale_first, "The first half is the shift. diffusers' files have it the other way "
               "round."),
        Mutant(without_silu, "The conditioning goes through SiLU first."),
        Mutant(scale_without_one, "A scale of 0 should change nothing; does yours count from 1?"),
    ),
    why="Its weights start at zero, so a fresh model predicts exactly 0.",
    where="nanosd3/mmdit.py, FinalLayer",
    names=("x", "c", "w_on", "b_on", "w", "b"),
    tolerance=1e-4,
)  # fmt: skip

EXERCISES = (MODULATE, TIME, GATED_MLP, FINAL_LAYER)
