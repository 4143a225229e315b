"""Exercises on latents: sampling one, the KL term."""

import math

import torch
from torch import Tensor

from nanosd3 import vae
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def posterior_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            f"shape {shape}",
            (normal(generator, *shape), normal(generator, *shape), normal(generator, *shape)),
        )
        for shape in ((2, 3, 4, 5), (7, 2))
    ] + [large("8 latents", *(normal(generator, 8, 4, 4, 4) for _ in range(3)))]


def posterior_spec(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    z = torch.empty(mean.shape, dtype=mean.dtype)
    triples = zip(mean.flatten(), logvar.flatten(), noise.flatten(), strict=True)
    for i, (m, log_variance, n) in enumerate(triples):
        variance = math.exp(log_variance)
        z.view(-1)[i] = m + math.sqrt(variance) * n
    return z


def variance_as_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + logvar.exp() * noise


def log_as_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + logvar * noise


def half_the_log(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + 0.5 * logvar * noise


def inverse_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + torch.exp(-0.5 * logvar) * noise


def mean_only(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + 0 * logvar * noise


def root_of_log(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + logvar.sqrt() * noise


def noise_alone(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + noise + 0 * logvar


POSTERIOR = Exercise(
    name="sample_posterior",
    topic="latents",
    points=1,
    difficulty=1,
    signature="def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:",
    task="Sample a latent from the encoder's Gaussian: mean and log-variance come from the\n"
    "network, noise from N(0, 1), all of one shape. Gradients should reach mean and logvar.",
    specification=posterior_spec,
    reference=vae.sample_posterior,
    cases=posterior_cases,
    mutants=(
        Mutant(
            variance_as_deviation,
            "exp(logvar) is the variance; multiply the noise by its square root.",
        ),
        Mutant(log_as_deviation, "logvar is a logarithm; the logarithm of what?"),
        Mutant(half_the_log, "Half of logvar is the logarithm of the deviation: exp is missing."),
        Mutant(inverse_deviation, "A larger logvar should mean more noise; yours means less."),
        Mutant(mean_only, "That is the mean; a sample needs the noise too."),
        Mutant(
            root_of_log,
            "Take the exponential first: a logarithm may be negative, a variance is not.",
        ),
        Mutant(noise_alone, "The noise is multiplied by the standard deviation."),
    ),
    why="The randomness comes from outside, so the encoder can be trained through the sample.",
    where="nanosd3/vae.py, sample_posterior",
    names=("mean", "logvar", "noise"),
)


def kl_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", (normal(generator, *shape), normal(generator, *shape)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ] + [large("8 latents", *(normal(generator, 8, 4, 4, 4) for _ in range(2)))]


def kl_spec(mean: Tensor, logvar: Tensor) -> Tensor:
    totals = []
    for m, log_variance in zip(mean, logvar, strict=True):
        total = 0.0
        for a, b in zip(m.flatten().tolist(), log_variance.flatten().tolist(), strict=True):
            total += 0.5 * (a * a + math.exp(b) - 1 - b)
        totals.append(total)
    return torch.tensor(totals, dtype=mean.dtype)


def kl_averaged(mean: Tensor, logvar: Tensor) -> Tensor:
    return vae.kl_divergence(mean, logvar) / mean[0].numel()


def kl_without_half(mean: Tensor, logvar: Tensor) -> Tensor:
    return 2 * vae.kl_divergence(mean, logvar)


def kl_of_deviation(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + torch.exp(0.5 * logvar) - 1 - logvar).flatten(1).sum(1)


def kl_without_one(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + logvar.exp() - logvar).flatten(1).sum(1)


def kl_negative(mean: Tensor, logvar: Tensor) -> Tensor:
    return -vae.kl_divergence(mean, logvar)


def kl_log_added(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + logvar.exp() - 1 + logvar).flatten(1).sum(1)


def kl_of_batch(mean: Tensor, logvar: Tensor) -> Tensor:
    return vae.kl_divergence(mean, logvar).mean()


def kl_mean_not_squared(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean + logvar.exp() - 1 - logvar).flatten(1).sum(1)


KL = Exercise(
    name="kl_divergence",
    topic="latents",
    points=2,
    difficulty=1,
    signature="def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:",
    task="KL(N(mean, exp(logvar)) || N(0, 1)) of each image, summed over its latents:\n"
    "(B, ...) twice -> (B,). A latent contributes (mean^2 + variance - 1 - log variance) / 2.",
    specification=kl_spec,
    reference=vae.kl_divergence,
    cases=kl_cases,
    mutants=(
        Mutant(
            kl_averaged,
            "Sum over an image's latents, do not average: the weight of the term assumes it.",
        ),
        Mutant(kl_without_half, "Each latent contributes half of the bracket."),
        Mutant(
            kl_of_deviation,
            "The bracket holds the variance, exp(logvar), not the standard deviation.",
        ),
        Mutant(kl_without_one, "For mean 0 and variance 1 the divergence is 0; yours is not."),
        Mutant(kl_negative, "A divergence is never negative."),
        Mutant(kl_log_added, "The logarithm of the variance is subtracted."),
        Mutant(kl_of_batch, "One value for each image, (B,): sum over all axes but the first."),
        Mutant(kl_mean_not_squared, "The mean is squared."),
    ),
    why="It keeps latents close together, so that the flow has a simple distribution to learn.",
    where="nanosd3/vae.py, kl_divergence",
    names=("mean", "logvar"),
)

EXERCISES = (POSTERIOR, KL)
