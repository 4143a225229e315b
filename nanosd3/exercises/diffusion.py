"""Exercises on diffusion in discrete steps, DDPM: the objective DiT was published with."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related.ddpm import NoiseSchedule


def kept(steps: int) -> Tensor:
    """alpha_bar (S,) of a few large steps."""
    return torch.cumprod(1 - torch.linspace(0.05, 0.6, steps), dim=0)


def schedule_of(alpha_bar: Tensor) -> NoiseSchedule:
    return NoiseSchedule(torch.arange(len(alpha_bar)), alpha_bar)


def posterior_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, S: int, n: list[int], *shape: int) -> Case:
        x0, z = normal(generator, len(n), *shape), normal(generator, len(n), *shape)
        return Case(label, (x0, z, kept(S), torch.tensor(n)))

    cases = [
        case("3 images of 6 steps", 6, [1, 5, 3], 2, 4, 5),
        case("4 points of 5 steps", 5, [4, 1, 2, 2], 3),
        case("the first step", 4, [0, 0], 3, 5),
    ]
    return [*cases, large("latents", *case("", 6, [2, 4, 5, 1, 3], 4, 8, 8).arguments)]


def posterior_mean_spec(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    mean = torch.empty_like(z)
    for b in range(len(z)):
        now = alpha_bar[n[b]]
        before = alpha_bar[n[b] - 1] if n[b] > 0 else 1.0  # all of x0, before the first step
        beta = 1 - now / before
        for place in range(z[b].numel()):
            mean.view(len(z), -1)[b, place] = (
                before**0.5 * beta * x0.reshape(len(z), -1)[b, place]
                + (1 - beta) ** 0.5 * (1 - before) * z.reshape(len(z), -1)[b, place]
            ) / (1 - now)
    return mean


def posterior_mean(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return schedule_of(alpha_bar).posterior_mean(x0, z, n)


def weights(alpha_bar: Tensor, n: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """alpha_bar, the previous step's, and beta, shaped to multiply `like`."""
    schedule = schedule_of(alpha_bar)
    shape = (-1, *[1] * (like.ndim - 1))
    values = schedule.alpha_bar, schedule.previous, schedule.betas
    return tuple(value[n].view(shape) for value in values)


def before_not_rooted(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    now, before, beta = weights(alpha_bar, n, z)
    return (before * beta * x0 + (1 - beta) * (1 - before) * z) / (1 - now)


def exchanged(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return posterior_mean(z, x0, alpha_bar, n)


def not_divided(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    now, _, _ = weights(alpha_bar, n, z)
    return posterior_mean(x0, z, alpha_bar, n) * (1 - now)


def now_for_before(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    now, _, beta = weights(alpha_bar, n, z)
    return (now.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - now) * z) / (1 - now)


def around_the_end(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    shape = (-1, *[1] * (z.ndim - 1))
    now, before = alpha_bar[n].view(shape), alpha_bar[n - 1].view(shape)
    beta = 1 - now / before
    return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * z) / (1 - now)


def same_noise(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    now, before, _ = weights(alpha_bar, n, z)
    noise = (z - now.sqrt() * x0) / (1 - now).sqrt()
    return before.sqrt() * x0 + (1 - before).sqrt() * noise


def first_step_for_all(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return posterior_mean(x0, z, alpha_bar, n[:1].expand(len(n)))


def x0_unscaled(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    now, before, beta = weights(alpha_bar, n, z)
    return (beta * x0 + (1 - beta).sqrt() * (1 - before) * z) / (1 - now)


POSTERIOR_MEAN = Exercise(
    name="posterior_mean",
    topic="dit",
    points=3,
    difficulty=2,
    signature="def posterior_mean(x0: Tensor, z: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:",
    task="One step back in DDPM: the mean of z at step n - 1, given x0 and z at step n, both\n"
    "(B, ...). n (B,) is the step of each image; alpha_bar (S,) is the share of the image's\n"
    "variance that is left after each step, and 1 before step 0.",
    specification=posterior_mean_spec,
    reference=posterior_mean,
    cases=posterior_cases,
    mutants=(
        Mutant(before_not_rooted, "Roots are missing: alpha_bar is a share of the variance."),
        Mutant(exchanged, "x0 and z are exchanged."),
        Mutant(not_divided, "The two weights are shares of 1 - alpha_bar: divide by it."),
        Mutant(now_for_before, "Two of the three alpha_bar are those of the step before."),
        Mutant(around_the_end, "Before step 0 there is x0 itself: alpha_bar is 1 there."),
        Mutant(
            same_noise,
            "That is DDIM, which keeps all the noise in z; the posterior forgets some of it.",
        ),
        Mutant(first_step_for_all, "Each image has a step of its own."),
        Mutant(x0_unscaled, "x0's weight contains the root of the previous step's alpha_bar."),
    ),
    size_hint="n is (B,): give what you take from alpha_bar an axis for each further axis of z.",
    why="With the network's guess for x0 this is a step of DDPM's sampler, but for the noise.",
    where="nanosd3/related/ddpm.py, posterior_mean (arXiv 2006.11239, eq. 7)",
    names=("x0", "z", "alpha_bar", "n"),
    constants=("alpha_bar",),
    tolerance=1e-4,
)


def variance_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, S: int, n: list[int], *shape: int) -> Case:
        return Case(label, (1.5 * normal(generator, len(n), *shape), kept(S), torch.tensor(n)))

    cases = [
        case("3 images of 6 steps", 6, [1, 5, 3], 2, 4, 5),
        case("4 points of 5 steps", 5, [4, 1, 2, 3], 3),
        case("the first step", 4, [0, 0], 3, 5),
    ]
    return [*cases, large("latents", *case("", 6, [2, 4, 5, 1, 3], 4, 8, 8).arguments)]


def log_variance_spec(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    out = torch.empty_like(s)
    for b in range(len(s)):
        now, at = alpha_bar[n[b]], max(int(n[b]), 1)  # beta~ of step 0 would be 0
        beta = 1 - now / (alpha_bar[n[b] - 1] if n[b] > 0 else 1.0)
        beta_there = 1 - alpha_bar[at] / alpha_bar[at - 1]
        small = beta_there * (1 - alpha_bar[at - 1]) / (1 - alpha_bar[at])  # beta~
        for place in range(s[b].numel()):
            f = (s.reshape(len(s), -1)[b, place] + 1) / 2
            out.view(len(s), -1)[b, place] = f * torch.log(beta) + (1 - f) * torch.log(small)
    return out


def log_variance(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return schedule_of(alpha_bar).log_variance(s, n)


def share_not_moved(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return log_variance(2 * s - 1, alpha_bar, n)


def ends_exchanged(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return log_variance(-s, alpha_bar, n)


def variance_itself(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return log_variance(s, alpha_bar, n).exp()


def log_deviation(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return log_variance(s, alpha_bar, n) / 2


def between_variances(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    low, high = (log_variance(torch.full_like(s, end), alpha_bar, n).exp() for end in (-1, 1))
    f = (s + 1) / 2
    return (f * high + (1 - f) * low).log()


def always_beta(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return log_variance(torch.ones_like(s), alpha_bar, n)


def minus_infinity(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    _, before, beta = weights(alpha_bar, n, s)
    now, f = weights(alpha_bar, n, s)[0], (s + 1) / 2
    return f * beta.log() + (1 - f) * (beta * (1 - before) / (1 - now)).log()


def first_for_every_image(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:
    return log_variance(s, alpha_bar, n[:1].expand(len(n)))


LOG_VARIANCE = Exercise(
    name="log_variance",
    topic="dit",
    points=3,
    difficulty=2,
    signature="def log_variance(s: Tensor, alpha_bar: Tensor, n: Tensor) -> Tensor:",
    task="The logarithm of the variance that a network has learned for step n (B,) of each image:\n"
    "between that of beta~ = beta (1 - alpha_bar before) / (1 - alpha_bar), at s = -1, and that\n"
    "of beta, at s = 1. s is (B, ...). At step 0 beta~ is 0, and that of step 1 stands in.",
    specification=log_variance_spec,
    reference=log_variance,
    cases=variance_cases,
    mutants=(
        Mutant(share_not_moved, "s goes from -1 to 1; a share goes from 0 to 1."),
        Mutant(ends_exchanged, "s = 1 is beta, the larger of the two."),
        Mutant(variance_itself, "Return the logarithm."),
        Mutant(log_deviation, "That is the logarithm of the deviation, half of what is asked."),
        Mutant(between_variances, "Interpolate between the logarithms, not between the variances."),
        Mutant(always_beta, "s has no effect in your answer."),
        Mutant(minus_infinity, "At step 0 the logarithm of beta~ is -inf: take step 1's there."),
        Mutant(first_for_every_image, "Each image has a step of its own."),
    ),
    size_hint="n is (B,): give what you take from alpha_bar an axis for each further axis of s.",
    why="The two ends differ by less and less as steps get smaller; with few of them it matters.",
    where="nanosd3/related/ddpm.py, log_variance (arXiv 2102.09672, eq. 15)",
    names=("s", "alpha_bar", "n"),
    constants=("alpha_bar",),
    tolerance=1e-4,
)

EXERCISES = (POSTERIOR_MEAN, LOG_VARIANCE)
