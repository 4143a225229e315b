"""An exercise on images as tokens: the nearest code."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related.vq import Quantiser


def code_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, codes: int, *shape: int) -> Case:
        lengths = 0.5 + 3 * torch.rand(codes, 1, generator=generator)
        z, alphabet = normal(generator, *shape), normal(generator, codes, shape[1])
        return Case(label, (z, lengths * F.normalize(alphabet, dim=1)))

    cases = [
        case("2 images of 3x5, 7 codes of 4 numbers", 7, 2, 4, 3, 5),
        case("3 images of 4x2, 11 codes of 6 numbers", 11, 3, 6, 4, 2),
        case("one position, 5 codes", 5, 1, 3, 1, 1),
    ]
    return [*cases, large("images of 7x7, 64 codes", *case("", 64, 6, 8, 7, 7).arguments)]


def nearest_code_spec(z: Tensor, codes: Tensor) -> Tensor:
    B, _, h, w = z.shape
    tokens = torch.zeros(B, h, w, dtype=torch.long)
    for b in range(B):
        for i in range(h):
            for j in range(w):
                here = z[b, :, i, j] / z[b, :, i, j].norm()
                best = float("inf")
                for k in range(len(codes)):
                    distance = (here - codes[k] / codes[k].norm()).square().sum()
                    if distance < best:
                        best, tokens[b, i, j] = distance, k
    return tokens


def nearest_code(z: Tensor, codes: Tensor) -> Tensor:
    """The package's quantiser with these codes."""
    quantiser = Quantiser(1, 1)
    quantiser.codes = nn.Parameter(codes)
    return quantiser.nearest(F.normalize(z, dim=1))


def products(z: Tensor, codes: Tensor) -> Tensor:
    return torch.einsum("bchw,kc->bhwk", z, codes)


def long_codes_win(z: Tensor, codes: Tensor) -> Tensor:
    return products(z, codes).argmax(-1)


def lengths_count(z: Tensor, codes: Tensor) -> Tensor:
    return (codes.square().sum(1) - 2 * products(z, codes)).argmin(-1)


def only_z_of_length_one(z: Tensor, codes: Tensor) -> Tensor:
    return lengths_count(F.normalize(z, dim=1), codes)


def farthest(z: Tensor, codes: Tensor) -> Tensor:
    return products(z, F.normalize(codes, dim=1)).argmin(-1)


def either_direction(z: Tensor, codes: Tensor) -> Tensor:
    return products(z, F.normalize(codes, dim=1)).abs().argmax(-1)


def normed_over_codes(z: Tensor, codes: Tensor) -> Tensor:
    return products(z, F.normalize(codes, dim=0)).argmax(-1)


def only_reshaped(z: Tensor, codes: Tensor) -> Tensor:
    B, C, h, w = z.shape
    return (z.reshape(-1, C) @ F.normalize(codes, dim=1).T).argmax(-1).view(B, h, w)


def columns_first(z: Tensor, codes: Tensor) -> Tensor:
    return nearest_code(z, codes).mT


def code_itself(z: Tensor, codes: Tensor) -> Tensor:
    return F.embedding(nearest_code(z, codes), F.normalize(codes, dim=1)).movedim(-1, 1)


def nearest_place(z: Tensor, codes: Tensor) -> Tensor:
    return products(z, F.normalize(codes, dim=1)).flatten(1, 2).argmax(1)


NEAREST_CODE = Exercise(
    name="nearest_code",
    topic="muse",
    points=2,
    difficulty=2,
    signature="def nearest_code(z: Tensor, codes: Tensor) -> Tensor:",
    task="The tokens (B, h, w), of type long, of encodings z (B, C, h, w): at each position the\n"
    "number of the nearest of the codes (K, C). Both are first brought to length 1.",
    specification=nearest_code_spec,
    reference=nearest_code,
    cases=code_cases,
    mutants=(
        Mutant(long_codes_win, "Bring the codes to length 1; a long one must not win by length."),
        Mutant(lengths_count, "Both sides have length 1 before they are compared."),
        Mutant(only_z_of_length_one, "The codes are brought to length 1, too."),
        Mutant(
            farthest, "That is the farthest code: which measure is small when two vectors are near?"
        ),
        Mutant(either_direction, "A code that points the opposite way is the farthest of all."),
        Mutant(normed_over_codes, "Each code is a row: its length is that of its own C numbers."),
        Mutant(only_reshaped, "Axis 1 holds the C numbers of a position: move it to the end."),
        Mutant(columns_first, "Rows first, then columns, as in z."),
        Mutant(code_itself, "A token is the code's number, not its vector."),
        Mutant(nearest_place, "Find a code for each position, not a position for each code."),
    ),
    why="An image is now a sequence of symbols, which a transformer can learn to predict.",
    where="nanosd3/related/vq.py, Quantiser.nearest (arXiv 2012.09841, eq. 2)",
    names=("z", "codes"),
    differentiable=False,
)

EXERCISES = (NEAREST_CODE,)
