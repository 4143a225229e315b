"""Exercises on text: relative positions in T5, joining three encoders."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3 import t5, text
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def bucket_cases(generator: torch.Generator) -> list[Case]:
    return [*(Case(f"{n} tokens", (n,)) for n in (5, 20)), large("140 tokens", 140)]


def buckets_spec(length: int) -> Tensor:
    """16 buckets for keys before or at the query, 16 for keys after it."""
    starts = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
    table = []
    for query in range(length):
        row = []
        for key in range(length):
            bucket = 16 if key > query else 0
            for start in starts:
                if abs(key - query) >= start:
                    bucket += 1
            row.append(bucket)
        table.append(row)
    return torch.tensor(table)


def buckets_transposed(length: int) -> Tensor:
    return t5.distance_buckets(length).T


def no_direction(length: int) -> Tensor:
    return t5.distance_buckets(length) % 16


def not_logarithmic(length: int) -> Tensor:
    i = torch.arange(length)
    distance = i[None, :] - i[:, None]
    return distance.abs().clamp(max=15) + 16 * (distance > 0)


def own_place_counts_as_after(length: int) -> Tensor:
    return t5.distance_buckets(length) + 16 * torch.eye(length, dtype=torch.long)


def one_further(length: int) -> Tensor:
    table = t5.distance_buckets(length + 1)
    i = torch.arange(length)
    distance = (i[None, :] - i[:, None]).abs()
    return table[torch.clamp(distance - 1, min=0), 0] + 16 * (i[None, :] > i[:, None])


BUCKETS = Exercise(
    name="distance_buckets",
    topic="text",
    points=3,
    difficulty=3,
    signature="def distance_buckets(length: int) -> Tensor:",
    task="T5's relative positions: a bucket number (length, length), dtype long, for the distance\n"
    "from each query (row) to each key (column). Buckets 0 to 7 are single distances; 8 to 15\n"
    "begin at 8, 12, 16, 23, 32, 46, 64 and 91. Add 16 for keys after the query.",
    specification=buckets_spec,
    reference=t5.distance_buckets,
    cases=bucket_cases,
    mutants=(
        Mutant(buckets_transposed, "Rows are queries, columns are keys; which one comes later?"),
        Mutant(no_direction, "Before and after are told apart: add 16 for keys after the query."),
        Mutant(
            not_logarithmic,
            "From 8 on a bucket covers many distances, more the further away it is.",
        ),
        Mutant(
            own_place_counts_as_after,
            "A token does not come after itself: at distance 0 nothing is added.",
        ),
        Mutant(one_further, "A bucket includes the distance that it begins at: >=, not >."),
    ),
    why="Nearby words are told apart one by one, distant ones only roughly.",
    where="nanosd3/t5.py, distance_buckets",
    differentiable=False,
    other_devices=False,  # takes no tensors
    names=("length",),
)


def context_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, Lc: int, dl: int, dg: int, Lt: int, Dc: int) -> Case:
        states = (
            normal(generator, B, Lc, dl),
            normal(generator, B, Lc, dg),
            normal(generator, B, Lt, Dc),
        )
        return Case(f"{Lc} and {Lt} tokens", states)

    many = large("77 and 77 tokens", *case(2, 77, 2, 3, 77, 6).arguments)
    return [case(2, 3, 4, 5, 6, 12), case(1, 4, 2, 3, 2, 5), many]


def context_spec(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    B, Lc, dl = clip_l.shape
    dg, Lt, Dc = clip_g.shape[2], t5.shape[1], t5.shape[2]
    context = torch.zeros(B, Lc + Lt, Dc, dtype=t5.dtype)
    for b in range(B):
        for n in range(Lc):
            context[b, n, :dl] = clip_l[b, n]
            context[b, n, dl : dl + dg] = clip_g[b, n]
        for n in range(Lt):
            context[b, Lc + n] = t5[b, n]
    return context


def g_before_l(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    return text.join_context(clip_g, clip_l, t5)


def t5_first(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    return text.join_context(clip_l, clip_g, t5).roll(t5.shape[1], dims=1)


def padded_on_the_left(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    clip = torch.cat([clip_l, clip_g], dim=2)
    return torch.cat([F.pad(clip, (t5.shape[2] - clip.shape[2], 0)), t5], dim=1)


def encoders_as_tokens(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    wide = [F.pad(c, (0, t5.shape[2] - c.shape[2])) for c in (clip_l, clip_g)]
    return torch.cat([*wide, t5], dim=1)


def padded_with_ones(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    both = torch.cat([clip_l, clip_g], dim=2)
    return torch.cat([F.pad(both, (0, t5.shape[2] - both.shape[2]), value=1.0), t5], dim=1)


def t5_cut(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    both = torch.cat([clip_l, clip_g], dim=2)
    return torch.cat([both, t5[:, :, : both.shape[2]]], dim=1)


CONTEXT = Exercise(
    name="join_context",
    topic="text",
    points=2,
    difficulty=2,
    signature="def join_context(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:",
    task="One context from three encoders: the CLIPs' states, (B, Lc, dl) and (B, Lc, dg), side\n"
    "by side and zero-padded on the right to T5's width Dc >= dl + dg; after them, as further\n"
    "tokens, T5's states (B, Lt, Dc). Result: (B, Lc + Lt, Dc).",
    specification=context_spec,
    reference=text.join_context,
    cases=context_cases,
    mutants=(
        Mutant(g_before_l, "CLIP-L comes first, then CLIP-G."),
        Mutant(t5_first, "T5's tokens come after the CLIPs'."),
        Mutant(padded_on_the_left, "The zeros go to the right of the CLIPs' features."),
        Mutant(
            encoders_as_tokens,
            "The CLIPs describe the same tokens: their features stand side by side, not "
            "their tokens one after the other.",
        ),
        Mutant(padded_with_ones, "The CLIPs are padded with zeros."),
        Mutant(t5_cut, "Widen the CLIPs to T5's width; T5 is not cut."),
    ),
    exact_zeros=True,
    size_hint="The CLIPs are narrower than T5: pad their features with zeros to its width.",
    why="Dropping an encoder then only means setting its part to zero.",
    where="nanosd3/text.py, join_context (paper, section 4)",
    names=("clip_l", "clip_g", "t5"),
)

EXERCISES = (BUCKETS, CONTEXT)
