"""An exercise on attention with normalised queries and keys."""

import torch
from torch import Tensor

from nanosd3 import layers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal
from nanosd3.exercises.norms import rms_norm, rms_spec


def qk_cases(generator: torch.Generator) -> list[Case]:
    def case(
        B: int, heads: int, L: int, size: float = 3.0, label: str = "", lines: int | None = None
    ) -> Case:
        q, k, v = (size * normal(generator, B, heads, L, 64) for _ in range(3))
        weights = [1 + 0.3 * normal(generator, 64) for _ in range(2)]
        return Case(f"{heads} heads, {L} tokens{label}", (q, k, v / size, *weights), lines)

    small = case(1, 1, 3, 1e-3, " of small numbers")
    return [case(2, 3, 5, lines=200), case(1, 2, 4), small]


def qk_spec(q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor) -> Tensor:
    B, heads, L, _ = q.shape
    out = torch.empty(B, L, heads * 64, dtype=q.dtype)
    for b in range(B):
        for h in range(heads):
            queries = rms_spec(q[b, h], weight_q)  # each normalised over its 64 features
            keys = rms_spec(k[b, h], weight_k)
            for i in range(L):
                logits = torch.stack([queries[i] @ key / 8 for key in keys])
                weights = logits.exp() / logits.exp().sum()
                mixed = sum(w * value for w, value in zip(weights, v[b, h], strict=True))
                out[b, i, 64 * h : 64 * (h + 1)] = mixed
    return out


def qk_norm_attention(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    """What a block with `qk_norm` does."""
    return layers.attention(rms_norm(q, weight_q), rms_norm(k, weight_k), v)


def not_normed_at_all(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    return layers.attention(q * weight_q, k * weight_k, v)


def queries_only(q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor) -> Tensor:
    return layers.attention(rms_norm(q, weight_q), k * weight_k, v)


def values_normed_too(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    ones = torch.ones_like(weight_q)
    return qk_norm_attention(q, k, rms_norm(v, ones), weight_q, weight_k)


def normed_over_heads(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean((1, 3), keepdim=True) + 1e-6).sqrt() * weight

    return layers.attention(norm(q, weight_q), norm(k, weight_k), v)


def not_divided_after_norm(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    return qk_norm_attention(q, k, v, 8 * weight_q, weight_k)


def values_for_keys(q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor) -> Tensor:
    return layers.attention(rms_norm(q, weight_q), k, rms_norm(v, weight_k))


def one_weight_for_both(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    return qk_norm_attention(q, k, v, weight_q, weight_q)


def weights_forgotten(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    ones = torch.ones_like(weight_q)
    return qk_norm_attention(q, k, v, ones, ones)


def normed_after_softmax(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor
) -> Tensor:
    weights = (q @ k.mT / 8).softmax(-1)
    weights = weights / (weights.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (weights @ v).transpose(1, 2).flatten(2)


def result_normed(q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor) -> Tensor:
    mixed = layers.attention(q, k, v).unflatten(2, (-1, 64))
    return rms_norm(mixed, weight_q).flatten(2)


def unit_length(q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor) -> Tensor:
    return qk_norm_attention(q, k, v, weight_q / 8, weight_k / 8)


QK_NORM = Exercise(
    name="qk_norm_attention",
    topic="attention",
    points=2,
    difficulty=2,
    signature="def qk_norm_attention(q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, "
    "weight_k: Tensor) -> Tensor:",
    task="Attention as in `attention`, after an RMSNorm of each query and each key over its 64\n"
    "features, with weights (64,). q, k and v are (B, heads, L, 64); the result is\n"
    "(B, L, heads * 64).",
    specification=qk_spec,
    reference=qk_norm_attention,
    cases=qk_cases,
    mutants=(
        Mutant(
            not_normed_at_all,
            "The learned weights alone bound nothing: divide by the root mean square first.",
        ),
        Mutant(queries_only, "Keys are normalised as well as queries."),
        Mutant(values_normed_too, "Values are not normalised: only what enters the softmax is."),
        Mutant(normed_over_heads, "Each head is normalised on its own, over its own 64 features."),
        Mutant(not_divided_after_norm, "The logits are still divided by 8 after the norm."),
        Mutant(values_for_keys, "Queries and keys are normalised, not values."),
        Mutant(one_weight_for_both, "Queries and keys each have a weight of their own."),
        Mutant(weights_forgotten, "The weights are not used."),
        Mutant(
            normed_after_softmax, "Normalise queries and keys, before the softmax, not its weights."
        ),
        Mutant(result_normed, "Normalise queries and keys, before the softmax, not the result."),
        Mutant(
            unit_length,
            "Divide by the root of the *mean* square: a vector of 64 then has length 8, not 1.",
        ),
    ),
    why="Without it logits grow in long bfloat16 runs until every softmax picks a single token.",
    where="nanosd3/mmdit.py, Attention.project (paper, section 5.3.2)",
    names=("q", "k", "v", "weight_q", "weight_k"),
)


EXERCISES = (QK_NORM,)
