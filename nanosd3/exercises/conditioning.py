"""Exercises on conditioning: modulation and the timestep embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3 import embeddings, layers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


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
    cases = [case(2, 3, 8), case(1, 5, 4), Case("constant tokens", (flat, shift, scale)), small]
    return [*cases, large("32 tokens of 16", *case(2, 32, 16).arguments)]


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


def normed_over_tokens(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x.mT, x.shape[1:2], eps=1e-6).mT
    return normed * (1 + scale[:, None]) + shift[:, None]


def divided_by_d_minus_one(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def larger_eps(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def divided_by_deviation(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    deviation = x.var(-1, keepdim=True, correction=0).sqrt() + 1e-6
    return (x - x.mean(-1, keepdim=True)) / deviation * (1 + scale[:, None]) + shift[:, None]


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
        Mutant(one_forgotten, "With scale 0 the normalised x should pass unchanged, not vanish."),
        Mutant(not_normed, "x should be normalised first."),
        Mutant(
            exchanged_halves,
            "Shift and scale are swapped, a common mistake when reading diffusers' files.",
        ),
        Mutant(shifted_first, "Scale first, then shift."),
        Mutant(rms_instead, "LayerNorm also subtracts the mean."),
        Mutant(normed_over_tokens, "Each token is normalised over its features, the last axis."),
        Mutant(
            divided_by_d_minus_one,
            "LayerNorm's variance is divided by D, not by D - 1 (correction=0).",
        ),
        Mutant(larger_eps, "eps is 1e-6; PyTorch's default is 1e-5."),
        Mutant(divided_by_deviation, "eps is added to the variance, under the root."),
    ),
    size_hint="shift and scale are (B, D): give them an axis for the tokens, (B, 1, D).",
    why="This is how the timestep and the pooled text reach every layer.",
    where="nanosd3/layers.py, modulate",
    names=("x", "shift", "scale"),
)


def time_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("five times", (torch.rand(5, generator=generator),)),
        Case("the ends", (torch.tensor([0.0, 1.0]),)),
        large("64 times", torch.rand(64, generator=generator)),
    ]


def time_spec(t: Tensor) -> Tensor:
    rows = []
    for time in t.tolist():
        angles = [1000 * time * math.exp(-math.log(10000) * k / 128) for k in range(128)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    return torch.tensor(rows)


def not_times_1000(t: Tensor) -> Tensor:
    return embeddings.timestep_embedding(t / 1000)


def sines_first(t: Tensor) -> Tensor:
    return embeddings.timestep_embedding(t).roll(128, dims=1)


def interleaved(t: Tensor) -> Tensor:
    cosines, sines = embeddings.timestep_embedding(t).chunk(2, dim=1)
    return torch.stack([cosines, sines], dim=2).flatten(1)


def divided_by_127(t: Tensor) -> Tensor:
    k = torch.arange(128, device=t.device)
    angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) * k / 127)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def half_precision(t: Tensor) -> Tensor:
    return embeddings.timestep_embedding(t.half().float())


def bfloat16_precision(t: Tensor) -> Tensor:
    return embeddings.timestep_embedding(t.bfloat16().float())


def angles_in_half_precision(t: Tensor) -> Tensor:
    frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angle = (1000 * t[:, None] * frequency).half().float()
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def whole_turns(t: Tensor) -> Tensor:
    return embeddings.timestep_embedding(2 * math.pi * t)


def exponent_over_256(t: Tensor) -> Tensor:
    frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 256)
    angle = 1000 * t.float()[:, None] * frequency
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
    reference=embeddings.timestep_embedding,
    cases=time_cases,
    mutants=(
        Mutant(
            not_times_1000,
            "t in [0, 1] hardly turns the slow frequencies: multiply it by 1000 first.",
        ),
        Mutant(sines_first, "Cosines first, then sines."),
        Mutant(interleaved, "All cosines first, then all sines; not interleaved."),
        Mutant(divided_by_127, "The exponent is k / 128; the last frequency is not quite 1/10000."),
        Mutant(
            half_precision, "With t in float16, 1000 t is off by up to 0.25: compute in float32."
        ),
        Mutant(
            bfloat16_precision,
            "bfloat16 keeps three digits of t, too few for angles of 1000: compute in float32.",
        ),
        Mutant(
            angles_in_half_precision,
            "Angles up to 1000 need float32; float16 is off by up to 0.25 there.",
        ),
        Mutant(whole_turns, "The angle is 1000 t times the frequency, without 2 pi."),
        Mutant(exponent_over_256, "The exponent is k / 128: there are 128 frequencies, not 256."),
    ),
    size_hint="t is (B,): give it a trailing axis, t[:, None], and it meets 128 frequencies.",
    why="Without the factor 1000 the network can hardly tell one time from another.",
    where="nanosd3/embeddings.py, timestep_embedding",
    tolerance=1e-3,  # float32 angles of up to 1000 radians
    differentiable=False,
    names=("t",),
)


EXERCISES = (MODULATE, TIME)
