"""Exercises on consistency models: one network evaluation per image."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related import consistency

Three = tuple[Tensor, Tensor, Tensor]


def form_cases(generator: torch.Generator) -> list[Case]:
    t = torch.rand(5, generator=generator)
    return [
        Case("5 times, deviation 0.5", (t, 0.5)),
        Case("both ends", (torch.tensor([0.0, 1.0]), 0.7)),
        large("300 times, deviation 2", torch.rand(300, generator=generator), 2.0),
    ]


def edm_form_spec(t: Tensor, data_std: float) -> Three:
    c_skip, c_out, c_in = (torch.empty_like(t) for _ in range(3))
    for i in range(len(t)):
        variance = (1 - t[i]) ** 2 * data_std**2 + t[i] ** 2  # of z = (1 - t) x0 + t noise
        c_skip[i] = (1 - t[i]) * data_std**2 / variance
        c_out[i] = t[i] * data_std / variance**0.5
        c_in[i] = 1 / variance**0.5
    return c_skip, c_out, c_in


def edm_form(t: Tensor, data_std: float) -> Three:
    return consistency.edm_form(t, data_std)


def deviation_for_variance(t: Tensor, data_std: float) -> Three:
    return edm_form(t, data_std**0.5)


def straight_variance(t: Tensor, data_std: float) -> Three:
    variance = (1 - t) * data_std**2 + t
    return (1 - t) * data_std**2 / variance, t * data_std / variance**0.5, variance**-0.5


def not_at_the_data(t: Tensor, data_std: float) -> Three:
    c_skip, _, c_in = edm_form(t, data_std)
    return c_skip, data_std * c_in, c_in


def out_negative(t: Tensor, data_std: float) -> Three:
    c_skip, c_out, c_in = edm_form(t, data_std)
    return c_skip, -c_out, c_in


def deviations_added(t: Tensor, data_std: float) -> Three:
    deviation = (1 - t) * data_std + t
    return (1 - t) * data_std**2 / deviation**2, t * data_std / deviation, 1 / deviation


def skip_not_shrunk(t: Tensor, data_std: float) -> Three:
    c_skip, c_out, c_in = edm_form(t, data_std)
    return c_skip / (1 - t + 1e-12), c_out, c_in


def in_multiplies(t: Tensor, data_std: float) -> Three:
    c_skip, c_out, c_in = edm_form(t, data_std)
    return c_skip, c_out, 1 / c_in


def out_before_skip(t: Tensor, data_std: float) -> Three:
    c_skip, c_out, c_in = edm_form(t, data_std)
    return c_out, c_skip, c_in


EDM_FORM = Exercise(
    name="edm_form",
    topic="consistency",
    points=2,
    difficulty=2,
    signature="def edm_form(t: Tensor, data_std: float) -> tuple[Tensor, Tensor, Tensor]:",
    task="The three factors of f(z, t) = c_skip z + c_out F(c_in z, t), each (B,) like t, for\n"
    "data of deviation data_std and z = (1 - t) x0 + t noise. c_in makes z of unit variance. At\n"
    "t = 0 f is z itself, whatever the network F says. F's answers have unit variance, too.",
    specification=edm_form_spec,
    reference=edm_form,
    cases=form_cases,
    mutants=(
        Mutant(
            deviation_for_variance, "data_std is a standard deviation; the variance is its square."
        ),
        Mutant(
            straight_variance,
            "Variances add up, but a factor such as 1 - t enters a variance squared.",
        ),
        Mutant(not_at_the_data, "At t = 0 the network should have no effect: c_out is 0 there."),
        Mutant(out_negative, "c_out is positive in this form."),
        Mutant(deviations_added, "Variances add up; deviations do not."),
        Mutant(skip_not_shrunk, "c_skip contains 1 - t, too: at t = 1 nothing of z is left in f."),
        Mutant(in_multiplies, "c_in divides z by its deviation."),
        Mutant(out_before_skip, "c_skip comes first, then c_out, then c_in."),
    ),
    why="The boundary condition is built in: no training can break it.",
    where="nanosd3/related/consistency.py, edm_form (arXiv 2303.01469, appendix C)",
    names=("t", "data_std"),
)


def huber_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, c: float, *shape: int) -> Case:
        return Case(label, (normal(generator, *shape), normal(generator, *shape), c))

    same = normal(generator, 3, 5)
    cases = [
        case("images (2, 3, 4, 5)", 0.3, 2, 3, 4, 5),
        case("points (7, 2), c = 2", 2.0, 7, 2),
        Case("the same", (same, same.clone(), 0.5)),
    ]
    return [*cases, large("latents", *case("", 0.00864, 6, 4, 8, 8).arguments)]


def pseudo_huber_spec(a: Tensor, b: Tensor, c: float) -> Tensor:
    out = torch.empty(len(a), dtype=a.dtype)
    for i in range(len(a)):
        squares = 0.0
        for x, y in zip(a[i].flatten(), b[i].flatten(), strict=True):
            squares = squares + (x - y) ** 2
        out[i] = (squares + c**2) ** 0.5 - c
    return out


def norm_of_each_number(a: Tensor, b: Tensor, c: float) -> Tensor:
    return (((a - b).square() + c**2).sqrt() - c).flatten(1).sum(1)


def mean_of_squares(a: Tensor, b: Tensor, c: float) -> Tensor:
    return ((a - b).square().flatten(1).mean(1) + c**2).sqrt() - c


def c_not_squared(a: Tensor, b: Tensor, c: float) -> Tensor:
    return ((a - b).square().flatten(1).sum(1) + c).sqrt() - c


def c_kept(a: Tensor, b: Tensor, c: float) -> Tensor:
    return consistency.pseudo_huber(a, b, c) + c


def plain_squares(a: Tensor, b: Tensor, c: float) -> Tensor:
    return (a - b).square().flatten(1).sum(1)


def plain_norm(a: Tensor, b: Tensor, c: float) -> Tensor:
    return plain_squares(a, b, c).sqrt()


def batch_in_one(a: Tensor, b: Tensor, c: float) -> Tensor:
    return consistency.pseudo_huber(a, b, c).mean()


PSEUDO_HUBER = Exercise(
    name="pseudo_huber",
    topic="consistency",
    points=1,
    difficulty=1,
    signature="def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:",
    task="How far apart the images of two batches (B, ...) are, (B,): the root of (the squared\n"
    "distance over the whole image plus c^2), minus c.",
    specification=pseudo_huber_spec,
    reference=consistency.pseudo_huber,
    cases=huber_cases,
    mutants=(
        Mutant(norm_of_each_number, "Take one root for the whole image, not one for each number."),
        Mutant(mean_of_squares, "Add the squares; averaging them would change what c means."),
        Mutant(c_not_squared, "c is squared inside the root."),
        Mutant(c_kept, "Two images that are the same should have distance 0."),
        Mutant(plain_squares, "Far apart it should grow like the distance, not like its square."),
        Mutant(plain_norm, "c has no effect: near zero the distance should be smooth."),
        Mutant(batch_in_one, "One number for each image of the batch."),
    ),
    why="Quadratic near zero, linear beyond c: no single image dominates the batch.",
    where="nanosd3/related/consistency.py, pseudo_huber (arXiv 2310.14189, eq. 8)",
    names=("a", "b", "c"),
)

EXERCISES = (EDM_FORM, PSEUDO_HUBER)
