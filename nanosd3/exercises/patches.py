"""Exercises on tokens: images to patches and back, and the position of each patch."""

import math

import torch
from torch import Tensor

from nanosd3 import patchify
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, normal

# --- patches ------------------------------------------------------------------------------------


def patch_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("not square, 4x6 with patches of 2", (normal(generator, 2, 3, 4, 6), 2)),
        Case("square, 6x6 with patches of 3", (normal(generator, 2, 4, 6, 6), 3)),
        Case("one channel", (normal(generator, 5, 1, 2, 8), 2)),
    ]


def patchify_spec(x: Tensor, patch: int) -> Tensor:
    B, C, H, W = x.shape
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


PATCHIFY = Exercise(
    name="patchify",
    topic="patches",
    points=3,
    difficulty=2,
    signature="def patchify(x: Tensor, patch: int) -> Tensor:",
    task="Cut images (B, C, H, W) into tokens (B, N, p*p*C), N = (H/p)(W/p), row by row; the\n"
    "features of a token are ordered (row in patch, column in patch, channel).",
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
    ),
    why="Official models order a token's features differently on input; this is the output.",
    where="nanosd3/patchify.py, unpatchify",
    names=("tokens", "patch", "height", "width"),
)

# --- positions ----------------------------------------------------------------------------------


def position_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"width {D}, grid {g}", (D, g, s, span))
        for D, g, s, span in ((24, 6, 4, 4), (16, 5, 5, 10), (8, 12, 8, 2), (16, 7, 4, 8))
    ]


def positions_spec(width: int, grid: int, sample: int, span: int) -> Tensor:
    quarter = width // 4

    def code(index: int) -> list[float]:
        coordinate = (index - (grid - sample) / 2) * (span / sample)
        angles = [coordinate * 10000 ** (-k / quarter) for k in range(quarter)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    rows = [code(column) + code(row) for row in range(grid) for column in range(grid)]
    return torch.tensor([rows])


def axes_exchanged(width: int, grid: int, sample: int, span: int) -> Tensor:
    table = patchify.sincos_positions(width, grid, sample, span)
    return torch.cat(table.chunk(2, dim=2)[::-1], dim=2)


def raw_integers(width: int, grid: int, sample: int, span: int) -> Tensor:
    return patchify.sincos_positions(width, grid, grid, grid)


def not_centred(width: int, grid: int, sample: int, span: int) -> Tensor:
    return patchify.sincos_positions(width, grid, grid, grid * span // sample)


def by_turns(width: int, grid: int, sample: int, span: int) -> Tensor:
    a, b, c, d = patchify.sincos_positions(width, grid, sample, span).chunk(4, dim=2)
    return torch.cat([torch.stack(pair, 3).flatten(2) for pair in ((a, b), (c, d))], dim=2)


def cosines_first(width: int, grid: int, sample: int, span: int) -> Tensor:
    a, b, c, d = patchify.sincos_positions(width, grid, sample, span).chunk(4, dim=2)
    return torch.cat([b, a, d, c], dim=2)


POSITIONS = Exercise(
    name="sincos_positions",
    topic="patches",
    points=4,
    difficulty=3,
    signature="def sincos_positions(width: int, grid: int, sample: int, span: int) -> Tensor:",
    task="SD3's fixed position embedding (1, grid*grid, width), row by row. Index i has the\n"
    "coordinate (i - (grid - sample) / 2) span / sample. The code of a coordinate is the sines,\n"
    "then the cosines, of coordinate * 10000^(-k / (width/4)), k = 0 .. width/4 - 1; the column's\n"
    "code comes first, then the row's.",
    specification=positions_spec,
    reference=patchify.sincos_positions,
    cases=position_cases,
    mutants=(
        Mutant(axes_exchanged, "The column's code fills the first half."),
        Mutant(
            raw_integers,
            "Coordinates are not indices: those of the middle `sample` run from 0 to `span`.",
        ),
        Mutant(
            not_centred,
            "Coordinate 0 is where the central square of size `sample` begins, not the edge of "
            "the grid.",
        ),
        Mutant(by_turns, "All sines of an axis, then all its cosines; not interleaved."),
        Mutant(cosines_first, "Sines come first, then cosines."),
    ),
    why="Images of other shapes are cropped from the middle of this grid, never stretching it.",
    where="nanosd3/patchify.py, sincos_positions (paper, section 5.3.2)",
    differentiable=False,
    other_devices=False,  # takes no tensors
    names=("width", "grid", "sample", "span"),
)


def crop_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            f"{rows}x{columns} of {grid}x{grid}", (normal(generator, 1, grid**2, 3), rows, columns)
        )
        for grid, rows, columns in ((6, 2, 4), (7, 4, 3), (5, 5, 5), (8, 5, 3))
    ]


def crop_spec(positions: Tensor, rows: int, columns: int) -> Tensor:
    grid = round(positions.shape[1] ** 0.5)
    top, left = (grid - rows) // 2, (grid - columns) // 2
    kept = [positions[0, (top + i) * grid + left + j] for i in range(rows) for j in range(columns)]
    return torch.stack(kept)[None]


def top_left(positions: Tensor, rows: int, columns: int) -> Tensor:
    grid = round(positions.shape[1] ** 0.5)
    square = positions.view(1, grid, grid, -1)
    return square[:, :rows, :columns].reshape(1, rows * columns, -1)


def first_ones(positions: Tensor, rows: int, columns: int) -> Tensor:
    return positions[:, : rows * columns]


def exchanged_crop(positions: Tensor, rows: int, columns: int) -> Tensor:
    return patchify.centre_crop(positions, columns, rows)


CROP = Exercise(
    name="centre_crop",
    topic="patches",
    points=2,
    difficulty=2,
    signature="def centre_crop(positions: Tensor, rows: int, columns: int) -> Tensor:",
    task="The middle rows x columns of positions (1, grid*grid, D), as (1, rows*columns, D). If\n"
    "the margin is odd, the extra row or column is cut at the bottom or on the right.",
    specification=crop_spec,
    reference=patchify.centre_crop,
    cases=crop_cases,
    mutants=(
        Mutant(top_left, "That is the top left corner, not the middle."),
        Mutant(
            first_ones,
            "The first tokens are the top rows of the whole grid; restore the square first.",
        ),
        Mutant(exchanged_crop, "Rows and columns are swapped."),
    ),
    why="A wrong crop is invisible on square images of full size and ruins all others.",
    where="nanosd3/patchify.py, centre_crop",
    names=("positions", "rows", "columns"),
)

EXERCISES = (PATCHIFY, UNPATCHIFY, POSITIONS, CROP)
