"""Exercises on joint attention, where text and image meet."""

from typing import cast

import torch
from torch import Tensor

from nanosd3 import layers, mmdit
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal


def joint_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, heads: int, M: int, N: int, lines: int | None = None) -> Case:
        text = [normal(generator, B, heads, M, 64) for _ in range(3)]
        image = [normal(generator, B, heads, N, 64) for _ in range(3)]
        return Case(f"{M} text and {N} image tokens", (*text, *image), lines)

    return [case(2, 3, 4, 5), case(1, 2, 6, 3), case(1, 2, 8, 16, lines=200)]


def joint_spec(
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
) -> tuple[Tensor, Tensor]:
    B, heads, N, _ = q_image.shape
    M = q_text.shape[2]
    out = torch.zeros(B, M + N, heads * 64, dtype=q_text.dtype)
    for b in range(B):
        for h in range(heads):
            queries = [*q_text[b, h], *q_image[b, h]]
            keys = [*k_text[b, h], *k_image[b, h]]
            values = [*v_text[b, h], *v_image[b, h]]
            for i, query in enumerate(queries):  # every token attends to all tokens of both
                logits = torch.stack([query @ key / 8 for key in keys])
                weights = logits.exp() / logits.exp().sum()
                mixed = sum(w * value for w, value in zip(weights, values, strict=True))
                out[b, i, 64 * h : 64 * (h + 1)] = mixed
    return out[:, M:], out[:, :M]


def joint_attention(
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `JointBlock.attend` does between the projections."""
    M = q_text.shape[2]
    text, image = (q_text, k_text, v_text), (q_image, k_image, v_image)
    q, k, v = mmdit.join_streams(text, image)
    assert q is not None  # both streams have queries
    joint = layers.attention(q, k, v)
    return joint[:, M:], joint[:, :M]


def each_for_itself(*parts: Tensor) -> tuple[Tensor, Tensor]:
    return layers.attention(*parts[3:]), layers.attention(*parts[:3])


def cross_only(*parts: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, q_image, k_image, v_image = parts
    return layers.attention(q_image, k, v), layers.attention(q, k_image, v_image)


def outputs_exchanged(*parts: Tensor) -> tuple[Tensor, Tensor]:
    return joint_attention(*parts)[::-1]


def split_at_wrong_end(*parts: Tensor) -> tuple[Tensor, Tensor]:
    image, text = joint_attention(*parts)
    joint = torch.cat([text, image], dim=1)
    return joint[:, : image.shape[1]], joint[:, image.shape[1] :]


def text_sees_no_image(*parts: Tensor) -> tuple[Tensor, Tensor]:
    return joint_attention(*parts)[0], layers.attention(*parts[:3])


def image_sees_no_text(*parts: Tensor) -> tuple[Tensor, Tensor]:
    return layers.attention(*parts[3:]), joint_attention(*parts)[1]


def not_split(*parts: Tensor) -> Tensor:
    image, text = joint_attention(*parts)
    return torch.cat([text, image], dim=1)


def in_other_orders(
    parts: tuple[Tensor, ...], keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of text queries, then image queries, over keys and values joined another way."""
    q, _, _, q_image, _, _ = parts
    joint = layers.attention(torch.cat([q, q_image], 2), keys, values)
    return joint[:, q.shape[2] :], joint[:, : q.shape[2]]


def values_in_another_order(*parts: Tensor) -> tuple[Tensor, Tensor]:
    _, k, v, _, k_image, v_image = parts
    return in_other_orders(parts, torch.cat([k, k_image], 2), torch.cat([v_image, v], 2))


def keys_in_another_order(*parts: Tensor) -> tuple[Tensor, Tensor]:
    _, k, v, _, k_image, v_image = parts
    return in_other_orders(parts, torch.cat([k_image, k], 2), torch.cat([v, v_image], 2))


JOINT = Exercise(
    name="joint_attention",
    topic="attention",
    points=3,
    difficulty=2,
    signature="def joint_attention(q_text, k_text, v_text, q_image, k_image, v_image) "
    "-> tuple[Tensor, Tensor]:",
    task="One attention over both streams: text q, k and v (B, heads, M, 64), image q, k and v\n"
    "(B, heads, N, 64). Every token attends to all tokens of both. Return the result for the\n"
    "image, (B, N, heads * 64), then the one for the text, (B, M, heads * 64).",
    specification=joint_spec,
    reference=joint_attention,
    cases=joint_cases,
    mutants=(
        Mutant(each_for_itself, "The streams never meet; there is one attention over both."),
        Mutant(
            cross_only, "That is cross-attention: here each token also attends to its own stream."
        ),
        Mutant(outputs_exchanged, "The result for the image is returned first."),
        Mutant(split_at_wrong_end, "Which tokens came first when you joined them? Split there."),
        Mutant(text_sees_no_image, "The text is updated too: it attends to the image."),
        Mutant(
            image_sees_no_text, "The image attends to the text too: that is how words reach it."
        ),
        Mutant(not_split, "Split the result again: two tensors, the image's first."),
        Mutant(values_in_another_order, "Keys and values must be joined in the same order."),
        Mutant(keys_in_another_order, "Each key must stand where its value stands."),
    ),
    why="This is the whole difference between MMDiT and DiT.",
    where="nanosd3/mmdit.py, JointBlock.attend (paper, figure 2)",
    names=("q_text", "k_text", "v_text", "q_image", "k_image", "v_image"),
)


def last_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, heads: int, M: int, N: int, lines: int | None = None) -> Case:
        text = [normal(generator, B, heads, M, 64) for _ in range(2)]
        image = [normal(generator, B, heads, N, 64) for _ in range(3)]
        return Case(f"{M} text and {N} image tokens", (*text, *image), lines)

    return [case(2, 3, 4, 5), case(1, 2, 6, 3), case(1, 2, 8, 16, lines=200)]


def last_spec(
    k_text: Tensor, v_text: Tensor, q_image: Tensor, k_image: Tensor, v_image: Tensor
) -> Tensor:
    B, heads, N, _ = q_image.shape
    out = torch.zeros(B, N, heads * 64, dtype=q_image.dtype)
    for b in range(B):
        for h in range(heads):
            keys, values = [*k_text[b, h], *k_image[b, h]], [*v_text[b, h], *v_image[b, h]]
            for i, query in enumerate(q_image[b, h]):
                logits = torch.stack([query @ key / 8 for key in keys])
                weights = logits.exp() / logits.exp().sum()
                mixed = sum(w * value for w, value in zip(weights, values, strict=True))
                out[b, i, 64 * h : 64 * (h + 1)] = mixed
    return out


def last_joint_attention(
    k_text: Tensor, v_text: Tensor, q_image: Tensor, k_image: Tensor, v_image: Tensor
) -> Tensor:
    """What the last block does, whose text stream has no queries."""
    text = (cast(Tensor, None), k_text, v_text)  # as `Attention.heads` gives it
    q, k, v = mmdit.join_streams(text, (q_image, k_image, v_image))
    return layers.attention(q, k, v)


def image_alone(*parts: Tensor) -> Tensor:
    return layers.attention(*parts[2:])


def text_alone(*parts: Tensor) -> Tensor:
    return layers.attention(parts[2], *parts[:2])


def keys_as_queries(*parts: Tensor) -> Tensor:
    k_text, v_text, *image = parts
    return joint_attention(k_text, k_text, v_text, *image)[1]


def keys_and_values_apart(*parts: Tensor) -> Tensor:
    k_text, v_text, q, k, v = parts
    return layers.attention(q, torch.cat([k_text, k], 2), torch.cat([v, v_text], 2))


def streams_added(*parts: Tensor) -> Tensor:
    return image_alone(*parts) + text_alone(*parts)


LAST_JOINT = Exercise(
    name="last_joint_attention",
    topic="attention",
    points=2,
    difficulty=2,
    signature="def last_joint_attention(k_text, v_text, q_image, k_image, v_image) -> Tensor:",
    task="The last block: its text output would not be used, so the text has keys and values,\n"
    "(B, heads, M, 64), but no queries. Return what the image (B, heads, N, 64) gets from\n"
    "attending to both: (B, N, heads * 64).",
    specification=last_spec,
    reference=last_joint_attention,
    cases=last_cases,
    mutants=(
        Mutant(image_alone, "The image still attends to the text."),
        Mutant(text_alone, "The image attends to itself as well as to the text."),
        Mutant(keys_as_queries, "The text has no queries: only image tokens have an output here."),
        Mutant(keys_and_values_apart, "Keys and values must be joined in the same order."),
        Mutant(
            streams_added,
            "One softmax runs over both; adding two attentions does not give the same.",
        ),
    ),
    why="Official files still hold the unused query weights, which loaders stumble over.",
    where="nanosd3/mmdit.py, JointBlock.attend",
    names=("k_text", "v_text", "q_image", "k_image", "v_image"),
)


EXERCISES = (JOINT, LAST_JOINT)
