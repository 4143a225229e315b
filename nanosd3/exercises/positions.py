"""Exercises on positions: the code of each patch's place, and its crop for other sizes."""

import math

import torch
from torch import Tensor

from nanosd3 import patchify
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def position_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"width {D}, grid {g}", (D, g, s, span))
        for D, g, s, span in ((24, 6, 4, 4), (16, 5, 5, 10), (8, 12, 8, 2), (16, 7, 4, 8))
    ] + [large("grid 20", 16, 20, 12, 8)]


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


def coded(width: int, grid: int, sample: int, span: int, frequency: Tensor) -> Tensor:
    """Positions with other frequencies (width / 4,)."""
    coordinate = (torch.arange(grid) - (grid - sample) / 2) * span / sample
    angles = coordinate[:, None] * frequency
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    both = torch.cat(torch.broadcast_tensors(code[None], code[:, None]), dim=2)
    return both.reshape(1, grid * grid, width)


def quarter_minus_one(width: int, grid: int, sample: int, span: int) -> Tensor:
    k = torch.arange(width // 4) / (width // 4 - 1)
    return coded(width, grid, sample, span, 10000**-k)


def from_k_equal_one(width: int, grid: int, sample: int, span: int) -> Tensor:
    k = (torch.arange(width // 4) + 1) / (width // 4)
    return coded(width, grid, sample, span, 10000**-k)


def base_1000(width: int, grid: int, sample: int, span: int) -> Tensor:
    return coded(width, grid, sample, span, 1000 ** -(torch.arange(width // 4) / (width // 4)))


def half_the_exponent(width: int, grid: int, sample: int, span: int) -> Tensor:
    return coded(width, grid, sample, span, 10000 ** -(torch.arange(width // 4) / (width // 2)))


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
        Mutant(quarter_minus_one, "The exponent is k over width/4, not over width/4 - 1."),
        Mutant(from_k_equal_one, "k counts from 0, so the first frequency is 1."),
        Mutant(base_1000, "The base of the frequencies is 10000."),
        Mutant(
            half_the_exponent, "The exponent is k over width/4: an axis has width/4 frequencies."
        ),
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
    ] + [large("20x16 of 24x24", normal(generator, 1, 24**2, 3), 20, 16)]


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


def rounded_up_margin(positions: Tensor, rows: int, columns: int) -> Tensor:
    grid = round(positions.shape[1] ** 0.5)
    top, left = (grid - rows + 1) // 2, (grid - columns + 1) // 2
    square = positions.view(1, grid, grid, -1)
    return square[:, top : top + rows, left : left + columns].flatten(1, 2)


def middle_of_the_list(positions: Tensor, rows: int, columns: int) -> Tensor:
    first = (positions.shape[1] - rows * columns) // 2
    return positions[:, first : first + rows * columns]


def still_a_square(positions: Tensor, rows: int, columns: int) -> Tensor:
    return patchify.centre_crop(positions, rows, columns).view(1, rows, columns, -1)


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
        Mutant(
            rounded_up_margin, "If the margin is odd, the top and the left get the smaller half."
        ),
        Mutant(
            middle_of_the_list,
            "The middle of the list is not the middle of the square: restore the square first.",
        ),
        Mutant(still_a_square, "Rows and columns become one axis of tokens again."),
    ),
    why="A wrong crop is invisible on square images of full size and ruins all others.",
    where="nanosd3/patchify.py, centre_crop",
    names=("positions", "rows", "columns"),
)

EXERCISES = (POSITIONS, CROP)
