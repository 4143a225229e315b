"""An exercise on rotary positions."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related import axial_rope


def rotate_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, B: int, heads: int, N: int, d: int) -> Case:
        x, angles = normal(generator, B, heads, N, d), 3 * normal(generator, heads, N, d // 4)
        return Case(label, (x, angles.cos(), angles.sin()))

    cases = [case("3 tokens of 8 features", 2, 1, 3, 8), case("two heads", 1, 2, 5, 16)]
    return [*cases, large("60 tokens of 32 features", *case("", 3, 4, 60, 32).arguments)]


def rotate_spec(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, pairs = x.clone(), x.shape[3] // 4
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for n in range(x.shape[2]):
                for i in range(pairs):
                    first, second = x[b, h, n, i], x[b, h, n, i + pairs]
                    out[b, h, n, i] = first * cos[h, n, i] - second * sin[h, n, i]
                    out[b, h, n, i + pairs] = second * cos[h, n, i] + first * sin[h, n, i]
    return out


def quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the second features of all pairs, and the features that are not turned."""
    n = x.shape[3] // 4
    return x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]


def the_other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return axial_rope.rotate(x, cos, -sin)


def sign_forgotten(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, rest = quarters(x)
    return torch.cat([a * cos + b * sin, b * cos + a * sin, rest], dim=3)


def first_already_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, rest = quarters(x)
    a = a * cos - b * sin
    return torch.cat([a, b * cos + a * sin, rest], dim=3)


def neighbours_as_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = x.shape[3] // 2
    a, b, rest = x[..., :n:2], x[..., 1:n:2], x[..., n:]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=4).flatten(3)
    return torch.cat([turned, rest], dim=3)


def half_a_head_apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, kept, b, rest = x.chunk(4, dim=3)
    return torch.cat([a * cos - b * sin, kept, b * cos + a * sin, rest], dim=3)


def all_features_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = axial_rope.rotate(x, cos, sin).roll(x.shape[3] // 2, 3)
    return axial_rope.rotate(turned, cos, sin).roll(x.shape[3] // 2, 3)


def rest_left_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return axial_rope.rotate(x, cos, sin)[..., : x.shape[3] // 2]


def rest_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return axial_rope.rotate(x, cos, sin).roll(x.shape[3] // 2, 3)


def only_cosines(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, rest = quarters(x)
    return torch.cat([a * cos, b * cos, rest], dim=3)


def angles_added(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, rest = quarters(x)
    return torch.cat([a + cos, b + sin, rest], dim=3)


ROTATE = Exercise(
    name="rotate",
    topic="hdit",
    points=2,
    difficulty=2,
    signature="def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:",
    task="Rotary positions: turn queries or keys x (B, heads, N, d) by angles that are given by\n"
    "their cosines and sines (heads, N, d/4). Features i and i + d/4, for i below d/4, are a\n"
    "point in the plane, which is turned about zero. The other half of the features stays.",
    specification=rotate_spec,
    reference=axial_rope.rotate,
    cases=rotate_cases,
    mutants=(
        Mutant(the_other_way, "Positive angles turn from the first axis towards the second."),
        Mutant(sign_forgotten, "A rotation keeps lengths; one of the two sines has a minus sign."),
        Mutant(
            first_already_turned, "The second of a pair needs the first as it was before the turn."
        ),
        Mutant(neighbours_as_pairs, "The second of a pair is d/4 further, not next to the first."),
        Mutant(half_a_head_apart, "The second of a pair is d/4 further, not d/2."),
        Mutant(all_features_turned, "The second half of the features is not turned."),
        Mutant(rest_left_out, "The features that are not turned are part of the result."),
        Mutant(rest_first, "Turned features come first, the others after them."),
        Mutant(only_cosines, "Each of the two also gets a share of the other."),
        Mutant(angles_added, "Positions are not added to features: they turn them."),
    ),
    why="A query times a key then depends on how far apart they are, and not on where.",
    where="nanosd3/related/axial_rope.py, rotate (arXiv 2104.09864, section 3.2)",
    names=("x", "cos", "sin"),
)

EXERCISES = (ROTATE,)
