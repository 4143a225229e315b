"""Exercises on tokens: images to patches and back."""

import torch
from torch import Tensor

from nanosd3 import patchify
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def patch_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("not square, 4x6 with patches of 2", (normal(generator, 2, 3, 4, 6), 2)),
        Case("square, 6x6 with patches of 3", (normal(generator, 2, 4, 6, 6), 3)),
        Case("one channel", (normal(generator, 5, 1, 2, 8), 2)),
        Case("5 rows, which patches of 2 do not cover", (normal(generator, 1, 3, 5, 4), 2)),
        Case("7 columns, which patches of 3 do not cover", (normal(generator, 1, 2, 6, 7), 3)),
        large("latents of 16x16", normal(generator, 2, 4, 16, 16), 2),
    ]


def patchify_spec(x: Tensor, patch: int) -> Tensor:
    B, C, H, W = x.shape
    if H % patch or W % patch:
        raise ValueError("patches do not cover the image")
    tokens = torch.empty(B, (H // patch) * (W // patch), patch * patch * C, dtype=x.dtype)
    for b in range(B):
        for row in range(H // patch):
            for column in range(W // patch):
                n = row * (W // patch) + column  # tokens go row by row
                for i in range(patch):
                    for j in range(patch):
                        for c in range(C):  # within a token: row, column, channel
                            value = x[b, c, row * patch + i, column * patch + j]
                            tokens[b, n, (i * patch + j) * C + c] = value
    return tokens


def channels_first(x: Tensor, patch: int) -> Tensor:
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, patch * patch * C)


def columns_first(x: Tensor, patch: int) -> Tensor:
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 4, 2, 3, 5, 1).reshape(B, -1, patch * patch * C)


def transposed_patches(x: Tensor, patch: int) -> Tensor:
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 5, 3, 1).reshape(B, -1, patch * patch * C)


def only_reshaped(x: Tensor, patch: int) -> Tensor:
    B, C, H, W = x.shape
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def split_by_view(x: Tensor, patch: int) -> Tensor:
    B, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def rest_cut_off(x: Tensor, patch: int) -> Tensor:
    H, W = (size // patch * patch for size in x.shape[2:])
    return patchify.patchify(x[:, :, :H, :W], patch)


PATCHIFY = Exercise(
    name="patchify",
    topic="patches",
    points=3,
    difficulty=2,
    signature="def patchify(x: Tensor, patch: int) -> Tensor:",
    task="Cut images (B, C, H, W) into tokens (B, N, p*p*C), N = (H/p)(W/p), row by row; the\n"
    "features of a token are ordered (row in patch, column in patch, channel). Raise an error if\n"
    "H or W is not divisible by p.",
    specification=patchify_spec,
    reference=patchify.patchify,
    cases=patch_cases,
    mutants=(
        Mutant(channels_first, "Within a token the channel should vary fastest."),
        Mutant(columns_first, "Tokens should go row by row; yours go down the columns."),
        Mutant(transposed_patches, "Rows and columns are swapped within each token."),
        Mutant(
            only_reshaped,
            "A reshape alone keeps the order in memory, where neighbours in a patch are not "
            "adjacent. Split the axes, then permute.",
        ),
        Mutant(
            split_by_view,
            "A view takes whole rows of the image: split H and W in two, then permute.",
        ),
        Mutant(
            rest_cut_off,
            "Rows or columns are lost where patches do not cover the image: raise an error.",
        ),
    ),
    why="The cost of attention grows with the square of the number of tokens.",
    where="nanosd3/patchify.py, patchify",
    names=("x", "patch"),
)


def token_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("not square, 4x6 with patches of 2", (normal(generator, 2, 6, 12), 2, 4, 6)),
        Case("square, 6x6 with patches of 3", (normal(generator, 2, 4, 36), 3, 6, 6)),
        Case("one channel", (normal(generator, 5, 4, 4), 2, 2, 8)),
        large("latents of 16x16", normal(generator, 2, 64, 16), 2, 16, 16),
    ]


def unpatchify_spec(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    B, N, features = tokens.shape
    C, columns = features // patch**2, width // patch
    x = torch.empty(B, C, height, width, dtype=tokens.dtype)
    for b in range(B):
        for n in range(N):
            for f in range(features):
                c, place = f % C, f // C
                i, j = place // patch, place % patch
                x[b, c, n // columns * patch + i, n % columns * patch + j] = tokens[b, n, f]
    return x


def unpatchify_channels_first(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    B, _, features = tokens.shape
    x = tokens.reshape(B, height // patch, width // patch, features // patch**2, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, height, width)


def unpatchify_only_reshaped(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    return tokens.reshape(len(tokens), -1, height, width)


def unpatchify_columns_first(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    B, _, features = tokens.shape
    x = tokens.reshape(B, width // patch, height // patch, patch, patch, features // patch**2)
    return x.permute(0, 5, 2, 3, 1, 4).reshape(B, -1, height, width)


def unpatchify_transposed(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    B, _, features = tokens.shape
    x = tokens.reshape(B, height // patch, width // patch, patch, patch, features // patch**2)
    return x.permute(0, 5, 1, 4, 2, 3).reshape(B, -1, height, width)


def axes_not_interleaved(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    B, _, features = tokens.shape
    x = tokens.reshape(B, height // patch, width // patch, patch, patch, features // patch**2)
    return x.permute(0, 5, 1, 2, 3, 4).reshape(B, -1, height, width)


def unpatchify_sides_exchanged(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    return patchify.unpatchify(tokens, patch, width, height)


UNPATCHIFY = Exercise(
    name="unpatchify",
    topic="patches",
    points=3,
    difficulty=2,
    signature="def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:",
    task="Put tokens (B, N, p*p*C), as made by patchify, back together: (B, C, height, width).",
    specification=unpatchify_spec,
    reference=patchify.unpatchify,
    cases=token_cases,
    mutants=(
        Mutant(
            unpatchify_channels_first,
            "This gives a fine checkerboard of colours: within a token the channel varies fastest.",
        ),
        Mutant(
            unpatchify_only_reshaped,
            "A reshape alone does not undo patchify; where do a token's features belong?",
        ),
        Mutant(
            unpatchify_columns_first, "Tokens go row by row; yours are laid out down the columns."
        ),
        Mutant(unpatchify_transposed, "Rows and columns are swapped within each patch."),
        Mutant(
            axes_not_interleaved,
            "Before the last reshape, H/p must stand next to its p, and W/p next to its.",
        ),
        Mutant(unpatchify_sides_exchanged, "Height and width are swapped; square images hide it."),
    ),
    why="Official models order a token's features differently on input; this is the output.",
    where="nanosd3/patchify.py, unpatchify",
    names=("tokens", "patch", "height", "width"),
)

EXERCISES = (PATCHIFY, UNPATCHIFY)
