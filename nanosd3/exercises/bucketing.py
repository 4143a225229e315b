"""Exercises on images of many shapes: which sizes to train at, and which one an image gets."""

import math
from collections.abc import Callable

import torch

from nanosd3.data import buckets
from nanosd3.data.buckets import Size
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant

# --- sizes --------------------------------------------------------------------------------------


def sizes_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("1024 in steps of 64", (1024, 64, 2048, 2.0), lines=900),
        Case("256 in steps of 32, at most 320", (256, 32, 320, 3.0)),
        Case("112 in steps of 16", (112, 16, 512, 2.5)),
        Case("ratio 1, only the square", (96, 16, 512, 1.0)),
    ]


def sizes_spec(side: int, multiple: int, most: int, ratio: float) -> list[tuple[int, int]]:
    area, sizes = side * side, []
    for short in range(multiple, side + 1, multiple):
        best = short
        for long in range(short, area // short + multiple + 1, multiple):  # try every multiple
            if abs(short * long - area) < abs(short * best - area):
                best = long
        if best <= most and best <= ratio * short:
            sizes.append((short, best))  # (height, width): landscape
            if best != short:
                sizes.append((best, short))  # portrait
    sizes.sort(key=lambda size: size[0] / size[1])
    return sizes


def sizes_by(
    longer: Callable[[int], int], side: int, multiple: int, most: int, ratio: float
) -> list[Size]:
    """Bucket sizes with another rule for the longer side."""
    sizes = set()
    for short in range(multiple, side + 1, multiple):
        long = longer(short)
        if long <= min(ratio * short, most):
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def wide_only(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    sizes = buckets.bucket_sizes(side, multiple, most, ratio)
    return [(height, width) for height, width in sizes if height <= width]


def same_perimeter(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    return sizes_by(lambda short: 2 * side - short, side, multiple, most, ratio)


def rounded_down(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    def longer(short: int) -> int:
        return side * side // (short * multiple) * multiple

    return sizes_by(longer, side, multiple, most, ratio)


def to_the_pixel(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    return sizes_by(lambda short: round(side * side / short), side, multiple, most, ratio)


def limit_forgotten(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    return buckets.bucket_sizes(side, multiple, side * side, ratio)


def square_twice(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    sizes = buckets.bucket_sizes(side, multiple, most, ratio)
    return sorted([*sizes, (side, side)], key=lambda size: size[0] / size[1])


def tallest_first(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    return buckets.bucket_sizes(side, multiple, most, ratio)[::-1]


def ratio_forgotten(side: int, multiple: int, most: int, ratio: float) -> list[Size]:
    return buckets.bucket_sizes(side, multiple, most, float(side))


def as_lists(side: int, multiple: int, most: int, ratio: float) -> list[list[int]]:
    return [list(size) for size in buckets.bucket_sizes(side, multiple, most, ratio)]


SIZES = Exercise(
    name="bucket_sizes",
    topic="training",
    points=3,
    difficulty=2,
    signature="def bucket_sizes(side: int, multiple: int, most: int, ratio: float) "
    "-> list[tuple[int, int]]:",
    task="Sizes (height, width) for images of all shapes, with about the area of a square of\n"
    "`side`, which is a multiple of `multiple`. For each shorter side, a multiple of `multiple`\n"
    "up to `side`, the longer one is the multiple whose area is nearest to side * side (of two\n"
    "equally near, the smaller). Leave out sizes whose longer side exceeds `most`, or `ratio`\n"
    "times the shorter. List landscape and portrait sizes, each once, from the widest\n"
    "(the smallest height / width) to the tallest.",
    specification=sizes_spec,
    reference=buckets.bucket_sizes,
    cases=sizes_cases,
    mutants=(
        Mutant(
            wide_only, "A landscape size can also stand upright: each size rotated is a size too."
        ),
        Mutant(
            same_perimeter,
            "Keep the area, not the sum of the sides: yours gives ever smaller areas, and "
            "steps with ever fewer tokens.",
        ),
        Mutant(
            rounded_down,
            "Take the nearest multiple, not the one below: an area may also be a little too large.",
        ),
        Mutant(
            to_the_pixel, "The longer side is a multiple too, or it cannot be cut into patches."
        ),
        Mutant(
            limit_forgotten, "`most` is not used: beyond it there are no positions for the patches."
        ),
        Mutant(square_twice, "A rotated square is the same square: list it once."),
        Mutant(tallest_first, "From the widest to the tallest: height / width grows."),
        Mutant(ratio_forgotten, "`ratio` is not used: very long shapes should be left out."),
        Mutant(as_lists, "Each size is a tuple (height, width)."),
    ),
    slow_hint="Compute the longer side by a division instead of trying every multiple.",
    why="Equal areas mean equal numbers of tokens: each step costs the same, one shift fits all.",
    where="nanosd3/data/buckets.py, bucket_sizes (paper, section 5.3.2)",
    names=("side", "multiple", "most", "ratio"),
    differentiable=False,
    other_devices=False,  # takes no tensors
)

# --- nearest size --------------------------------------------------------------------------------


def nearest_cases(generator: torch.Generator) -> list[Case]:
    sizes = buckets.bucket_sizes(1024, 64, 2048)
    few = [(16, 16), (8, 32), (32, 8), (12, 20), (20, 12)]  # unsorted
    return [
        Case("a photograph, 2000x3000", (sizes, 2000, 3000)),
        Case("a small portrait, 75x50", (sizes, 75, 50)),
        Case("a panorama, 300x2000", (sizes, 300, 2000)),
        Case("nearly square, 1060x1000", (sizes, 1060, 1000)),
        Case("unsorted sizes, 270x100", (few, 270, 100)),
        Case("unsorted sizes, 100x270", (few, 100, 270)),
    ]


def nearest_spec(sizes: list[tuple[int, int]], height: int, width: int) -> tuple[int, int]:
    best, least = sizes[0], math.inf
    for h, w in sizes:
        ratio, target = h / w, height / width
        factor = ratio / target if ratio > target else target / ratio  # 1 for the same shape
        if factor < least:
            best, least = (h, w), factor
    return best


def by_difference(sizes: list[Size], height: int, width: int) -> Size:
    return min(sizes, key=lambda size: abs(size[0] / size[1] - height / width))


def by_other_difference(sizes: list[Size], height: int, width: int) -> Size:
    return min(sizes, key=lambda size: abs(size[1] / size[0] - width / height))


def sides_exchanged(sizes: list[Size], height: int, width: int) -> Size:
    return buckets.nearest(sizes, width, height)


def nearest_in_pixels(sizes: list[Size], height: int, width: int) -> Size:
    return min(sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width))


def next_taller(sizes: list[Size], height: int, width: int) -> Size:
    taller = [size for size in sizes if size[0] * width >= size[1] * height]
    return min(taller or sizes, key=lambda size: size[0] / size[1])


def squares_compared(sizes: list[Size], height: int, width: int) -> Size:
    return min(sizes, key=lambda size: abs(size[0] * size[1] - height * width))


NEAREST = Exercise(
    name="nearest_bucket",
    topic="training",
    points=1,
    difficulty=1,
    signature="def nearest_bucket(sizes: list[tuple[int, int]], height: int, width: int) "
    "-> tuple[int, int]:",
    task="Of sizes (height, width), in any order, the one to which an image of height x width\n"
    "pixels should be scaled and cropped: the one whose height / width is nearest as a *factor*,\n"
    "so that 1:2 and 2:1 are equally far from 1:1.",
    specification=nearest_spec,
    reference=buckets.nearest,
    cases=nearest_cases,
    mutants=(
        Mutant(
            by_difference,
            "Differences of height / width are small among wide sizes and large among tall "
            "ones; how much is cropped depends on the quotient.",
        ),
        Mutant(
            by_other_difference,
            "Differences of width / height are small among tall sizes and large among "
            "wide ones; how much is cropped depends on the quotient.",
        ),
        Mutant(sides_exchanged, "Sizes are (height, width); you give a portrait a landscape size."),
        Mutant(
            nearest_in_pixels,
            "The image will be scaled: a photograph and its thumbnail have the same shape, "
            "and belong to the same size.",
        ),
        Mutant(next_taller, "The next taller size is not always nearer than the next wider one."),
        Mutant(squares_compared, "The image will be scaled: compare shapes, not areas."),
    ),
    formulas="q = height / width of the image, r = height / width of a size\n"
    "factor = r / q or q / r, whichever is at least 1\n"
    "The result is the size with the smallest factor, of equals the first.",
    why="One over that factor is the share of the image that is kept: the nearest loses least.",
    where="nanosd3/data/buckets.py, nearest",
    names=("sizes", "height", "width"),
    differentiable=False,
    other_devices=False,
)

EXERCISES = (SIZES, NEAREST)
