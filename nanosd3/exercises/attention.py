"""Exercises on attention: RMSNorm, heads, softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nanosd3 import layers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal


def rms_cases(generator: torch.Generator) -> list[Case]:
    cases = [
        Case(f"shape {shape}", (3 * normal(generator, *shape) + 1, normal(generator, shape[-1])))
        for shape in ((2, 3, 5, 8), (4, 6))
    ]
    small = torch.cat([1e-3 * normal(generator, 2, 8), torch.zeros(1, 8)])
    return [*cases, Case("small numbers and zeros", (small, normal(generator, 8)))]


def rms_spec(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for row, result in zip(x.reshape(-1, len(weight)), out.view(-1, len(weight)), strict=True):
        mean_square = sum(value**2 for value in row) / len(row)
        for i in range(len(row)):
            result[i] = row[i] / (mean_square + 1e-6) ** 0.5 * weight[i]
    return out


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`layers.RMSNorm` with this weight."""
    return functional_call(layers.RMSNorm(len(weight)), {"weight": weight}, x)


def layer_norm_instead(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, eps=1e-6) * weight


def divided_by_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True) * weight


def weight_plus_one(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, 1 + weight)


def no_root(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6) * weight


RMS_NORM = Exercise(
    name="rms_norm",
    topic="attention",
    points=1,
    difficulty=1,
    signature="def rms_norm(x: Tensor, weight: Tensor) -> Tensor:",
    task="Divide x (..., D) by the root of its mean square over the last axis\n"
    "(plus 1e-6 under the root), then multiply by weight (D,).",
    specification=rms_spec,
    reference=rms_norm,
    cases=rms_cases,
    mutants=(
        Mutant(layer_norm_instead, "The mean is not subtracted: that would be LayerNorm."),
        Mutant(
            divided_by_norm,
            "The mean of the squares, not their sum: the two norms differ by sqrt(D).",
        ),
        Mutant(weight_plus_one, "Multiply by the weight itself; 1 + weight is another convention."),
        Mutant(no_root, "Divide by the root of the mean square: the result has size about 1."),
    ),
    why="On queries and keys it bounds the attention logits.",
    where="nanosd3/layers.py, RMSNorm",
    names=("x", "weight"),
)


def heads_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"{parts} parts, {heads} heads", (normal(generator, B, L, parts * heads * 64), parts))
        for B, L, heads, parts in ((2, 5, 2, 3), (3, 4, 3, 2))
    ]


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
    ),
    why="The only place where tokens exchange information.",
    where="nanosd3/layers.py, attention",
    names=("q", "k", "v"),
)


EXERCISES = (RMS_NORM, SPLIT_HEADS, ATTENTION)
