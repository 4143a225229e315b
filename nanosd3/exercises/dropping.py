"""An exercise on dropping text encoders."""

from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from nanosd3 import text
from nanosd3.config import TextConfig
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


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
        large("64 samples", *case(64, (2, 3, 6), (3, 4), [[T, N, N], [N, N, T]] * 32).arguments),
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


def one_coin_for_all(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    return drop_encoders(context, pooled, keep[:, :1].expand(-1, 3), *sizes)


def survivors_rescaled(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    factor = 3 / keep.sum(1).clamp(min=1).to(context.dtype)
    context, pooled = drop_encoders(context, pooled, keep, *sizes)
    return context * factor[:, None, None], pooled * factor[:, None]


def rescaled_by_rate(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    rate = keep.to(context.dtype).mean()
    context, pooled = drop_encoders(context, pooled, keep, *sizes)
    return context / rate, pooled / rate


def context_kept(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    return context, drop_encoders(context, pooled, keep, *sizes)[1]


def nearly_dropped(
    context: Tensor, pooled: Tensor, keep: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    dropped = drop_encoders(context, pooled, keep, *sizes)
    return tuple(torch.where(x == 0, 1e-7, x) for x in dropped)  # type: ignore[return-value]


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
        Mutant(one_coin_for_all, "Each encoder has its own column in keep; yours share the first."),
        Mutant(
            survivors_rescaled,
            "What is kept stays as it is: nothing is rescaled, unlike in dropout.",
        ),
        Mutant(
            rescaled_by_rate, "What is kept stays as it is: it is not divided by the share kept."
        ),
        Mutant(context_kept, "A dropped encoder is zero in the context too."),
        Mutant(
            nearly_dropped,
            "Set it to exactly zero, or the network learns to tell small from absent.",
        ),
    ),
    exact_zeros=True,
    size_hint="keep is (B, 3): give each of its columns an axis for tokens and one for features.",
    why="Dropping encoders in training makes guidance possible, and running without T5.",
    where="nanosd3/text.py, drop_encoders (paper, appendix B.3)",
    names=("context", "pooled", "keep", "dl", "length"),
)

EXERCISES = (DROP,)
