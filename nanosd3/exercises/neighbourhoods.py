"""Exercises on HDiT's grid: which tokens a token reads, and which four are merged."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related import hdit, neighbourhood


def mask_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("5x4 tokens, windows of 3", (5, 4, 3)),
        Case("6x8 tokens, windows of 5", (6, 8, 5)),
        Case("2x7 tokens, windows of 3", (2, 7, 3)),
        large("16x12 tokens, windows of 7", 16, 12, 7),
    ]


def neighbourhood_mask_spec(rows: int, columns: int, window: int) -> Tensor:
    tall, wide = min(window, rows), min(window, columns)
    reads = torch.zeros(rows * columns, rows * columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):  # the token that reads
            top = min(max(i - tall // 2, 0), rows - tall)
            left = min(max(j - wide // 2, 0), columns - wide)
            for a in range(top, top + tall):
                for b in range(left, left + wide):  # the token that is read
                    reads[i * columns + j, a * columns + b] = True
    return reads


def neighbourhood_mask(rows: int, columns: int, window: int) -> Tensor:
    return neighbourhood.neighbourhood_mask((rows, columns), window)


def joined(by_row: Tensor, by_column: Tensor) -> Tensor:
    """The mask of a grid from those of its axes."""
    both = by_row[:, None, :, None] & by_column[None, :, None, :]
    return both.reshape(2 * (len(by_row) * len(by_column),))


def offsets(n: int) -> Tensor:
    """From each place of an axis (row) to each (column)."""
    return torch.arange(n) - torch.arange(n)[:, None]


def cut_off_at_the_border(rows: int, columns: int, window: int) -> Tensor:
    return joined(*(offsets(n).abs() <= window // 2 for n in (rows, columns)))


def around_the_border(rows: int, columns: int, window: int) -> Tensor:
    return joined(*((offsets(n) + window // 2) % n < window for n in (rows, columns)))


def along_the_list(rows: int, columns: int, window: int) -> Tensor:
    return neighbourhood.neighbours(rows * columns, min(window**2, rows * columns))


def begins_at_the_token(rows: int, columns: int, window: int) -> Tensor:
    masks = []
    for n in (rows, columns):
        k = min(window, n)
        start = torch.arange(n).clamp(max=n - k)[:, None]
        masks.append((torch.arange(n) >= start) & (torch.arange(n) < start + k))
    return joined(*masks)


def window_as_radius(rows: int, columns: int, window: int) -> Tensor:
    return neighbourhood_mask(rows, columns, 2 * window + 1)


def blocks_side_by_side(rows: int, columns: int, window: int) -> Tensor:
    blocks = (torch.arange(n) // window for n in (rows, columns))
    return joined(*(block == block[:, None] for block in blocks))


def read_and_reader_exchanged(rows: int, columns: int, window: int) -> Tensor:
    return neighbourhood_mask(rows, columns, window).T


def column_by_column(rows: int, columns: int, window: int) -> Tensor:
    return neighbourhood_mask(columns, rows, window)


def true_is_hidden(rows: int, columns: int, window: int) -> Tensor:
    return ~neighbourhood_mask(rows, columns, window)


def not_itself(rows: int, columns: int, window: int) -> Tensor:
    itself = torch.eye(rows * columns, dtype=torch.bool)
    return neighbourhood_mask(rows, columns, window) & ~itself


NEIGHBOURHOOD_MASK = Exercise(
    name="neighbourhood_mask",
    topic="hdit",
    points=3,
    difficulty=2,
    signature="def neighbourhood_mask(rows: int, columns: int, window: int) -> Tensor:",
    task="Which tokens of a grid each token reads: bool (N, N) for N = rows * columns tokens, in\n"
    "order row by row, True at [i, j] if token i reads token j. A token reads the window x window\n"
    "tokens around it (window is odd); where that square would reach over the border it is moved\n"
    "inside. Of an axis that is shorter than the window it reads all.",
    specification=neighbourhood_mask_spec,
    reference=neighbourhood_mask,
    cases=mask_cases,
    mutants=(
        Mutant(
            cut_off_at_the_border, "At the border the whole square is moved inside, not cut off."
        ),
        Mutant(
            around_the_border,
            "The picture ends at its border; it does not continue on the opposite side.",
        ),
        Mutant(
            along_the_list,
            "The tokens above and below are neighbours, too, though far apart in the list.",
        ),
        Mutant(begins_at_the_token, "The token is in the middle of its square, not at its corner."),
        Mutant(window_as_radius, "`window` is the side of the square."),
        Mutant(blocks_side_by_side, "Each token has its own square, with itself in the middle."),
        Mutant(read_and_reader_exchanged, "The rows of the mask are the tokens that read."),
        Mutant(column_by_column, "Tokens are counted row by row."),
        Mutant(true_is_hidden, "True stands for a token that is read."),
        Mutant(not_itself, "A token reads itself, too."),
    ),
    why="Each token reads as many others, however large the picture: the cost grows with pixels.",
    where="nanosd3/related/neighbourhood.py, neighbourhood_mask (arXiv 2204.07143, section 3.1)",
    differentiable=False,
    other_devices=False,  # takes no tensors
    names=("rows", "columns", "window"),
)


def merge_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, B: int, rows: int, columns: int, D: int) -> Case:
        return Case(label, (normal(generator, B, rows * columns, D), rows, columns))

    cases = [case("4x6 tokens of 3 features", 2, 4, 6, 3), case("6x2 tokens", 3, 6, 2, 5)]
    return [*cases, large("20x16 tokens", *case("", 3, 20, 16, 7).arguments)]


def merge_spec(x: Tensor, rows: int, columns: int) -> Tensor:
    merged = []
    for i in range(0, rows, 2):
        for j in range(0, columns, 2):
            four = [x[:, (i + a) * columns + j + b] for a in (0, 1) for b in (0, 1)]
            merged.append(torch.cat(four, dim=1))
    return torch.stack(merged, dim=1)


def merge(x: Tensor, rows: int, columns: int) -> Tensor:
    return hdit.merge(x, (rows, columns))


def squares(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows / 2, 2, columns / 2, 2, D)"""
    return x.reshape(len(x), rows // 2, 2, columns // 2, 2, -1)


def four_in_a_row(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.reshape(len(x), rows * columns // 4, -1)


def columns_first(x: Tensor, rows: int, columns: int) -> Tensor:
    return squares(x, rows, columns).permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)


def features_first(x: Tensor, rows: int, columns: int) -> Tensor:
    return squares(x, rows, columns).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def down_the_columns(x: Tensor, rows: int, columns: int) -> Tensor:
    return squares(x, rows, columns).permute(0, 3, 1, 2, 4, 5).flatten(3).flatten(1, 2)


def one_of_each_quarter(x: Tensor, rows: int, columns: int) -> Tensor:
    quarters = x.reshape(len(x), 2, rows // 2, 2, columns // 2, -1)
    return quarters.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def mean_of_four(x: Tensor, rows: int, columns: int) -> Tensor:
    return squares(x, rows, columns).mean((2, 4)).flatten(1, 2)


def top_left_alone(x: Tensor, rows: int, columns: int) -> Tensor:
    return squares(x, rows, columns)[:, :, 0, :, 0].flatten(1, 2)


def rows_alone(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.reshape(len(x), rows * columns // 2, -1)


def sides_exchanged(x: Tensor, rows: int, columns: int) -> Tensor:
    return merge(x, columns, rows)


MERGE = Exercise(
    name="merge",
    topic="hdit",
    points=2,
    difficulty=2,
    signature="def merge(x: Tensor, rows: int, columns: int) -> Tensor:",
    task="Make one token of each 2x2 of a grid: x (B, rows * columns, D), row by row, becomes\n"
    "(B, rows * columns / 4, 4 D). The features of the four follow each other: top left, top\n"
    "right, bottom left, bottom right. Both sides are even.",
    specification=merge_spec,
    reference=merge,
    cases=merge_cases,
    mutants=(
        Mutant(four_in_a_row, "The four form a square; in the list, two of them come a row later."),
        Mutant(columns_first, "Top right comes before bottom left."),
        Mutant(features_first, "All features of the first token, then all of the second."),
        Mutant(down_the_columns, "The merged tokens are in order row by row, too."),
        Mutant(one_of_each_quarter, "The four tokens touch each other in the grid."),
        Mutant(mean_of_four, "Nothing is averaged: all 4 D numbers are kept."),
        Mutant(top_left_alone, "Three quarters of the numbers are lost."),
        Mutant(
            rows_alone,
            "You merge two tokens side by side; the two below them belong to the square, too.",
        ),
        Mutant(sides_exchanged, "Rows and columns are swapped."),
    ),
    why="A quarter of the tokens, and no number lost: a linear layer chooses what to keep.",
    where="nanosd3/related/hdit.py, merge (arXiv 2401.11605, section 4.1)",
    names=("x", "rows", "columns"),
)

EXERCISES = (NEIGHBOURHOOD_MASK, MERGE)
