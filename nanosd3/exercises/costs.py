"""An exercise on what a transformer block costs."""

from dataclasses import replace
from functools import cache

import torch

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large
from nanosd3.related import dit


def cost_cases(generator: torch.Generator) -> list[Case]:
    block_cost(8, 2, 64)  # the first count makes PyTorch load modules, whose lines would be counted
    cases = [
        Case(f"latents {side}x{side}, patches {patch}x{patch}, width {width}", (side, patch, width))
        for side, patch, width in ((32, 2, 384), (32, 8, 64), (8, 2, 128), (12, 4, 64))
    ]
    return [*cases, large("latents 64x64, XL", 64, 2, 1152, lines=5000)]


def block_cost_spec(side: int, patch: int, width: int) -> int:
    cost = 0
    for _ in range(side // patch):
        for _ in range(side // patch):  # each token
            for outputs in (width, width, width):
                cost += width * outputs  # its query, key and value
            for _ in range((side // patch) ** 2):  # and each that it attends to
                cost += width  # query times key, over all heads
                cost += width  # weight times value
            cost += width * width  # the heads joined
            cost += width * 4 * width + 4 * width * width  # the MLP
    for _ in range(6):
        cost += width * width  # two shifts, scales and gates, once an image
    return cost


@cache
def block_cost(side: int, patch: int, width: int) -> int:
    """What the second of two blocks adds, counted by running both on the meta device."""
    heads = max(1, width // 64)
    one = replace(
        dit.published(1, width, heads, patch), latent_size=side, learned_variance=False, classes=2
    )
    return dit.multiply_adds(replace(one, depth=2)) - dit.multiply_adds(one)


def parts(side: int, patch: int, width: int) -> tuple[int, int, int]:
    """Multiply-adds of what grows with the tokens, of attention, and of the modulation."""
    tokens = (side // patch) ** 2
    return 12 * tokens * width**2, 2 * tokens**2 * width, 6 * width**2


def attention_free(side: int, patch: int, width: int) -> int:
    linear, _, modulation = parts(side, patch, width)
    return linear + modulation


def one_product(side: int, patch: int, width: int) -> int:
    linear, attention, modulation = parts(side, patch, width)
    return linear + attention // 2 + modulation


def one_side(side: int, patch: int, width: int) -> int:
    tokens = side // patch
    return 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2


def as_many_tokens_as_pixels(side: int, patch: int, width: int) -> int:
    return sum(parts(side, 1, width))


def multiplications_and_additions(side: int, patch: int, width: int) -> int:
    return 2 * sum(parts(side, patch, width))


def modulated_per_token(side: int, patch: int, width: int) -> int:
    linear, attention, modulation = parts(side, patch, width)
    return linear + attention + modulation * (side // patch) ** 2


def modulation_forgotten(side: int, patch: int, width: int) -> int:
    linear, attention, _ = parts(side, patch, width)
    return linear + attention


def narrow_mlp(side: int, patch: int, width: int) -> int:
    return sum(parts(side, patch, width)) - 6 * (side // patch) ** 2 * width**2


def queries_only(side: int, patch: int, width: int) -> int:
    return sum(parts(side, patch, width)) - 2 * (side // patch) ** 2 * width**2


def heads_not_joined(side: int, patch: int, width: int) -> int:
    return sum(parts(side, patch, width)) - (side // patch) ** 2 * width**2


def in_billions(side: int, patch: int, width: int) -> float:
    return sum(parts(side, patch, width)) / 1e9


BLOCK_COST = Exercise(
    name="block_cost",
    topic="dit",
    points=2,
    difficulty=2,
    signature="def block_cost(side: int, patch: int, width: int) -> int:",
    task="The multiply-adds of one adaLN-Zero block for one image: latents side x side in patches\n"
    "patch x patch, tokens `width` wide. Norms, activations and biases are not counted.",
    specification=block_cost_spec,
    reference=block_cost,
    cases=cost_cases,
    mutants=(
        Mutant(attention_free, "Attention is missing: each token also attends to every token."),
        Mutant(one_product, "Attention multiplies twice: queries by keys, then weights by values."),
        Mutant(one_side, "Patches form a square: how many are there in all?"),
        Mutant(as_many_tokens_as_pixels, "A token is a patch of patch x patch latents."),
        Mutant(multiplications_and_additions, "A multiply-add counts once, not as two operations."),
        Mutant(
            modulated_per_token,
            "Shifts, scales and gates are computed once per image, not per token.",
        ),
        Mutant(modulation_forgotten, "Shifts, scales and gates come from a linear layer, too."),
        Mutant(narrow_mlp, "The hidden layer of the MLP is four times as wide."),
        Mutant(queries_only, "Queries, keys and values: three linear layers."),
        Mutant(heads_not_joined, "One more linear layer joins the heads after attention."),
        Mutant(in_billions, "Return the number itself, not billions of multiply-adds."),
    ),
    why="Half the patch is four times the tokens, and a little more than four times the work.",
    where="nanosd3/related/dit.py, multiply_adds (arXiv 2212.09748, section 3.3)",
    differentiable=False,
    names=("side", "patch", "width"),
    slow_hint="Write it as one sum of products.",
)

EXERCISES = (BLOCK_COST,)
