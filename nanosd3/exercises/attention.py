"""Exercises on attention: heads, softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3 import layers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def heads_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"{parts} parts, {heads} heads", (normal(generator, B, L, parts * heads * 64), parts))
        for B, L, heads, parts in ((2, 5, 2, 3), (3, 4, 3, 2))
    ] + [large("38 heads", normal(generator, 1, 3, 3 * 38 * 64), 3)]


def heads_spec(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    B, L, features = x.shape
    heads = features // parts // 64
    results = []
    for p in range(parts):  # all of q, then all of k, then all of v
        out = torch.empty(B, heads, L, 64, dtype=x.dtype)
        for h in range(heads):
            start = (p * heads + h) * 64
            out[:, h] = x[:, :, start : start + 64]
        results.append(out)
    return tuple(results)


def parts_inside_heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    B, L, _ = x.shape
    return x.view(B, L, -1, parts, 64).permute(3, 0, 2, 1, 4).unbind(0)


def heads_strided(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    B, L, features = x.shape
    heads = features // parts // 64
    return x.view(B, L, parts, 64, heads).permute(2, 0, 4, 1, 3).unbind(0)


def tokens_not_moved(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    B, L, _ = x.shape
    return tuple(part.reshape(B, -1, L, 64) for part in x.chunk(parts, dim=2))


def tokens_before_heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(2, (-1, 64)) for part in x.chunk(parts, dim=2))


def one_tensor(x: Tensor, parts: int) -> Tensor:
    return torch.stack(layers.split_heads(x, parts))


def parts_backwards(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    return tuple(layers.split_heads(x, parts)[::-1])


SPLIT_HEADS = Exercise(
    name="split_heads",
    topic="attention",
    points=2,
    difficulty=2,
    signature="def split_heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:",
    task="One projection made queries, keys and values: x (B, L, parts*D) holds all of q, then\n"
    "all of k, then all of v, each with its heads of 64 features side by side. Return `parts`\n"
    "tensors (B, heads, L, 64).",
    specification=heads_spec,
    reference=layers.split_heads,
    cases=heads_cases,
    mutants=(
        Mutant(
            parts_inside_heads,
            "First all of q, then all of k: the part varies slowest, then the head.",
        ),
        Mutant(heads_strided, "A head is 64 adjacent features, not every second or third one."),
        Mutant(tokens_not_moved, "A view cannot swap tokens and heads; a transpose can."),
        Mutant(tokens_before_heads, "Heads come before tokens in the result: (B, heads, L, 64)."),
        Mutant(one_tensor, "Return the parts as separate tensors: unbind the axis of the parts."),
        Mutant(parts_backwards, "The parts come in the order q, k, v."),
    ),
    why="Most checkpoints that 'load fine' but fail go wrong here: the shapes fit in any order.",
    where="nanosd3/layers.py, split_heads",
    names=("x", "parts"),
)


def attention_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, B: int, heads: int, queries: int, keys: int) -> Case:
        sizes = (queries, keys, keys)
        return Case(label, tuple(normal(generator, B, heads, L, 64) for L in sizes))

    return [
        case("as many queries as keys", 2, 3, 5, 5),
        case("fewer queries than keys", 1, 2, 3, 7),
        Case("24 queries in 4 heads", case("", 1, 4, 24, 20).arguments, lines=200),
    ]


def attention_spec(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, heads, L, _ = q.shape
    out = torch.empty(B, L, heads * 64, dtype=q.dtype)
    for b in range(B):
        for h in range(heads):
            for i in range(L):
                logits = torch.stack([q[b, h, i] @ key / 8 for key in k[b, h]])
                weights = logits.exp() / logits.exp().sum()
                mixed = sum(w * value for w, value in zip(weights, v[b, h], strict=True))
                out[b, i, 64 * h : 64 * (h + 1)] = mixed
    return out


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / 8).softmax(dim=2)
    return (weights @ v).transpose(1, 2).flatten(2)


def not_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layers.attention(8 * q, k, v)


def divided_by_64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layers.attention(q / 8, k, v)


def heads_not_joined_in_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v)
    return out.permute(0, 2, 3, 1).flatten(2)


def view_without_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v)
    return out.reshape(out.shape[0], out.shape[2], -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(2)


def divided_by_root_of_width(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layers.attention(q / q.shape[1] ** 0.5, k, v)


def divided_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layers.attention(8 * q, k, v) / 8


def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / 8).softmax(dim=1)
    return (weights @ v).transpose(1, 2).flatten(2)


def without_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 8 @ v).transpose(1, 2).flatten(2)


def heads_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


ATTENTION = Exercise(
    name="attention",
    topic="attention",
    points=4,
    difficulty=2,
    signature="def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:",
    task="softmax(q k^T / 8) v for q (B, heads, L, 64), k and v (B, heads, S, 64), without a\n"
    "mask; then the heads side by side: (B, L, heads * 64).",
    specification=attention_spec,
    reference=layers.attention,
    cases=attention_cases,
    mutants=(
        Mutant(not_divided, "The logits are divided by 8, the square root of the head width."),
        Mutant(divided_by_64, "Divide by the square root of the head width, not by the width."),
        Mutant(heads_not_joined_in_order, "All of head 0 should come first, then all of head 1."),
        Mutant(
            view_without_transpose, "Heads and tokens must swap places before the heads are joined."
        ),
        Mutant(softmax_over_queries, "Each query's weights over the keys should sum to 1."),
        Mutant(causal, "No mask: an image has no before and after."),
        Mutant(
            divided_by_root_of_width,
            "Divide by the root of the width of one head, 64, not of all heads together.",
        ),
        Mutant(divided_after_softmax, "Divide the logits, before the softmax, not its result."),
        Mutant(
            softmax_over_heads, "The softmax runs over the keys, the last axis, not over the heads."
        ),
        Mutant(
            without_softmax,
            "The softmax is missing: weights over the keys are positive and sum to 1.",
        ),
        Mutant(heads_apart, "At the end the heads stand side by side: (B, L, heads * 64)."),
    ),
    why="The only place where tokens exchange information.",
    where="nanosd3/layers.py, attention",
    names=("q", "k", "v"),
)


EXERCISES = (SPLIT_HEADS, ATTENTION)
