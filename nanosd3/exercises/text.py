"""Exercises on text: relative positions in T5, joining three encoders, dropping some."""

from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3 import t5, text
from nanosd3.config import TextConfig
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal


def bucket_cases(generator: torch.Generator) -> list[Case]:
    return [Case(f"{length} tokens", (length,)) for length in (5, 20, 140)]


def buckets_spec(length: int) -> Tensor:
    """16 buckets for keys before or at the query, 16 for keys after it."""
    starts = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
    table = torch.zeros(length, length, dtype=torch.long)
    for query in range(length):
        for key in range(length):
            for start in starts:
                if abs(key - query) >= start:
                    table[query, key] += 1
            if key > query:
                table[query, key] += 16
    return table


def buckets_transposed(length: int) -> Tensor:
    return t5.distance_buckets(length).T


def no_direction(length: int) -> Tensor:
    return t5.distance_buckets(length) % 16


def not_logarithmic(length: int) -> Tensor:
    i = torch.arange(length)
    distance = i[None, :] - i[:, None]
    return distance.abs().clamp(max=15) + 16 * (distance > 0)


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

    return [case(2, 3, 4, 5, 6, 12), case(1, 4, 2, 3, 2, 5)]


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
    ),
    why="Dropping an encoder then only means setting its part to zero.",
    where="nanosd3/text.py, join_context (paper, section 4)",
    names=("clip_l", "clip_g", "t5"),
)


def drop_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, widths: tuple[int, int, int], lengths: tuple[int, int], keep: list) -> Case:
        dl, dg, Dc = widths
        context, pooled = normal(generator, B, sum(lengths), Dc), normal(generator, B, dl + dg)
        label = f"{B} samples, {lengths[0]} and {lengths[1]} tokens"
        return Case(label, (context, pooled, torch.tensor(keep), dl, lengths[0]))

    T, N = True, False
    return [
        case(4, (2, 3, 7), (3, 4), [[T, N, T], [N, T, T], [T, T, N], [N, N, N]]),
        case(3, (3, 2, 5), (2, 3), [[T, T, T], [N, T, N], [T, N, N]]),
    ]


def drop_spec(
    context: Tensor, pooled: Tensor, keep: Tensor, dl: int, length: int
) -> tuple[Tensor, Tensor]:
    context, pooled = context.clone(), pooled.clone()
    for b in range(len(keep)):
        keep_l, keep_g, keep_t5 = keep[b].tolist()
        if not keep_l:
            context[b, :length, :dl] = 0
            pooled[b, :dl] = 0
        if not keep_g:
            context[b, :length, dl:] = 0
            pooled[b, dl:] = 0
        if not keep_t5:
            context[b, length:] = 0
    return context, pooled


def drop_encoders(
    context: Tensor, pooled: Tensor, keep: Tensor, dl: int, length: int
) -> tuple[Tensor, Tensor]:
    """`text.drop_encoders` with a config of these sizes."""
    sizes = SimpleNamespace(
        clip_l=SimpleNamespace(width=dl, length=length),
        clip_g=SimpleNamespace(width=pooled.shape[1] - dl),
    )
    return text.drop_encoders(context, pooled, keep, cast(TextConfig, sizes))


def pooled_kept(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    return drop_encoders(context, pooled, keep, *sizes)[0], pooled


def keep_means_drop(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    return drop_encoders(context, pooled, ~keep, *sizes)


def all_or_none(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    return drop_encoders(context, pooled, keep.all(1, keepdim=True).expand(-1, 3), *sizes)


def first_decides(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    return drop_encoders(context, pooled, keep[:1].expand_as(keep), *sizes)


def clips_exchanged(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    return drop_encoders(context, pooled, keep[:, [1, 0, 2]], *sizes)


DROP = Exercise(
    name="drop_encoders",
    topic="text",
    points=3,
    difficulty=2,
    signature="def drop_encoders(context, pooled, keep, dl, length) -> tuple[Tensor, Tensor]:",
    task="Drop encoders: keep (B, 3), bool, says for each sample which of CLIP-L, CLIP-G and T5\n"
    "to keep; the others are set to zero. In context (B, M, Dc) the first `length` tokens are the\n"
    "CLIPs' (features below dl are L's, the others G's), the rest T5's; in pooled (B, dl + dg)\n"
    "the first dl features are L's, the others G's. Return both.",
    specification=drop_spec,
    reference=drop_encoders,
    cases=drop_cases,
    mutants=(
        Mutant(pooled_kept, "A dropped CLIP is zero in the pooled vector too."),
        Mutant(keep_means_drop, "True means keep."),
        Mutant(all_or_none, "Each encoder is dropped independently."),
        Mutant(first_decides, "Each sample of the batch has its own row in keep."),
        Mutant(clips_exchanged, "keep lists CLIP-L first, then CLIP-G."),
    ),
    why="Dropping encoders in training makes guidance possible, and running without T5.",
    where="nanosd3/text.py, drop_encoders (paper, appendix B.3)",
    names=("context", "pooled", "keep", "dl", "length"),
)

EXERCISES = (BUCKETS, CONTEXT, DROP)
