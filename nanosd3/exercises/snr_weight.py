"""An exercise on the weight of noise levels."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large
from nanosd3.related import hdit


def weight_cases(generator: torch.Generator) -> list[Case]:
    def times(n: int) -> Tensor:
        return 0.02 + 0.96 * torch.rand(n, generator=generator)

    cases = [("5 times, deviation 0.5", times(5), 0.5), ("7 times, deviation 3", times(7), 3.0)]
    return [Case(label, (t, data_std)) for label, t, data_std in cases] + [
        large("300 times, deviation 8", times(300), 8.0)
    ]


def soft_min_snr_spec(t: Tensor, data_std: float) -> Tensor:
    out, limit = torch.empty_like(t), 1 / data_std**2
    for i in range(len(t)):
        snr = ((1 - t[i]) / t[i]) ** 2
        of_the_image = limit * snr / (snr + limit)
        out[i] = t[i] ** 2 * of_the_image  # an error of x0 is t times that of the velocity
    return out


def snr_of(t: Tensor) -> Tensor:
    return ((1 - t) / t).square()


def hard_minimum(t: Tensor, data_std: float) -> Tensor:
    return t**2 * snr_of(t).clamp(max=1 / data_std**2)


def weight_of_the_image(t: Tensor, data_std: float) -> Tensor:
    return hdit.soft_min_snr(t, data_std) / t**2


def error_not_squared(t: Tensor, data_std: float) -> Tensor:
    return hdit.soft_min_snr(t, data_std) / t


def harmonic_mean(t: Tensor, data_std: float) -> Tensor:
    return 2 * hdit.soft_min_snr(t, data_std)


def ratio_not_squared(t: Tensor, data_std: float) -> Tensor:
    snr, limit = (1 - t) / t, 1 / data_std**2
    return t**2 * limit * snr / (snr + limit)


def noise_over_signal(t: Tensor, data_std: float) -> Tensor:
    snr, limit = 1 / snr_of(t), 1 / data_std**2
    return t**2 * limit * snr / (snr + limit)


def limit_not_squared(t: Tensor, data_std: float) -> Tensor:
    return hdit.soft_min_snr(t, data_std**0.5)


def limit_upside_down(t: Tensor, data_std: float) -> Tensor:
    return hdit.soft_min_snr(t, 1 / data_std)


def starts_at_one(t: Tensor, data_std: float) -> Tensor:
    return data_std**2 * hdit.soft_min_snr(t, data_std)


def no_limit(t: Tensor, data_std: float) -> Tensor:
    return (1 - t) ** 2 + 0 * data_std * t


def time_the_other_way(t: Tensor, data_std: float) -> Tensor:
    return hdit.soft_min_snr(1 - t, data_std)


SOFT_MIN_SNR = Exercise(
    name="soft_min_snr",
    topic="hdit",
    points=2,
    difficulty=2,
    signature="def soft_min_snr(t: Tensor, data_std: float) -> Tensor:",
    task="The weight (B,) of the velocity's squared error at times t (B,), such that the squared\n"
    "error of the image x0 has the weight g SNR / (SNR + g), where g = 1 / data_std^2 and SNR is\n"
    "((1 - t) / t)^2, the variance of a pixel (1) over that of the noise in z / (1 - t).",
    specification=soft_min_snr_spec,
    reference=hdit.soft_min_snr,
    cases=weight_cases,
    mutants=(
        Mutant(hard_minimum, "That is min(SNR, g); the soft one has no corner."),
        Mutant(
            weight_of_the_image,
            "An error of x0 is t times as large as the velocity's error that causes it.",
        ),
        Mutant(error_not_squared, "Errors are squared, and so is the t between them."),
        Mutant(harmonic_mean, "It is half the harmonic mean of SNR and g."),
        Mutant(ratio_not_squared, "SNR compares variances, not deviations."),
        Mutant(noise_over_signal, "SNR is signal over noise."),
        Mutant(limit_not_squared, "g holds a variance, the square of data_std."),
        Mutant(limit_upside_down, "Widely spread data make g small: g is 1 over the variance."),
        Mutant(
            starts_at_one, "The weight of the image's error is g itself where there is no noise."
        ),
        Mutant(no_limit, "Without the limit g, low noise levels would dominate."),
        Mutant(time_the_other_way, "t = 0 is data, t = 1 noise."),
    ),
    why="At low noise the weight is at most g: such errors are hardly visible.",
    where="nanosd3/related/hdit.py, soft_min_snr (arXiv 2401.11605)",
    names=("t", "data_std"),
)

EXERCISES = (SOFT_MIN_SNR,)
