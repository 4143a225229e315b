"""DDPM: diffusion in a thousand small steps, the objective that rectified flow replaced.

Noise is added in T = 1000 steps of variance beta_n, which rises linearly from 0.0001 to 0.02. What
matters is the product alpha_bar_n of all 1 - beta so far, because n steps at once give

    z_n = sqrt(alpha_bar_n) x0 + sqrt(1 - alpha_bar_n) noise

The network predicts the noise, trained by plain mean squared error. Sampling goes backwards with
the posterior: if x0 were known, the step before z_n would be a Gaussian with mean and variance

    mean    = (sqrt(alpha_bar_{n-1}) beta_n x0 + sqrt(1 - beta_n) (1 - alpha_bar_{n-1}) z_n)
              / (1 - alpha_bar_n)
    beta~_n = beta_n (1 - alpha_bar_{n-1}) / (1 - alpha_bar_n)

and the network's estimate is used for x0. Since it is only an estimate, the right variance lies
between beta~ (x0 known) and beta (x0 a unit Gaussian). DiT's networks learn it: a second set of
channels s, about -1 to 1, gives log variance = f log beta + (1 - f) log beta~, f = (s + 1) / 2. The
variational bound trains s, and no gradient of it reaches the noise. It is a KL divergence between
Gaussians and, at the first step, the likelihood of pixels in 256 bins. (For latents that means
little, but the published networks were trained this way.)

`respaced` keeps a subset of the steps, with fewer, larger betas. DDIM is deterministic: it goes to
the point with the same x0 and the same noise at the next step. Divided by sqrt(alpha_bar) + sqrt(1
- alpha_bar), its z lie on the straight lines of rectified flow, and its steps are Euler steps.

Steps count from 0, and step n is time n / 1000 for a network.
Papers: arXiv 2006.11239 (DDPM), 2010.02502 (DDIM), 2102.09672 (learned variance).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.embeddings import TIMESTEP_SCALE
from nanosd3.samplers import Velocity

StepIndex = Tensor | int  # of a step, or of one for each sample


@dataclass(frozen=True)
class NoiseSchedule:
    """Some of the thousand steps, ascending, and how much of the image is left after each."""

    steps: Tensor  # (S,) their numbers, 0 to 999
    alpha_bar: Tensor  # (S,) float64

    # (S,) each

    @property
    def previous(self) -> Tensor:
        """alpha_bar one step earlier, 1 before the first."""
        return torch.cat([torch.ones_like(self.alpha_bar[:1]), self.alpha_bar[:-1]])

    @property
    def betas(self) -> Tensor:
        return 1 - self.alpha_bar / self.previous

    @property
    def posterior_variance(self) -> Tensor:
        """beta~: 0 at the first step, which leads to x0 itself."""
        return self.betas * (1 - self.previous) / (1 - self.alpha_bar)

    @property
    def times(self) -> Tensor:
        """The time given to a network: t in [0, 1)."""
        return self.steps / TIMESTEP_SCALE

    def respaced(self, steps: Tensor) -> "NoiseSchedule":
        """Only some of these steps, ascending."""
        return NoiseSchedule(self.steps[steps], self.alpha_bar[steps])

    # Conversions between image, noise and their mixtures: samples (B, ...), steps n (B,) or ().

    def signal_and_noise(self, n: StepIndex, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar), shaped to multiply a tensor `like` it."""
        alpha_bar = at_step(self.alpha_bar, n, like)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, n: StepIndex) -> Tensor:
        a, s = self.signal_and_noise(n, x0)
        return (a * x0 + s * noise).to(x0.dtype)

    def noise_to_x0(self, noise: Tensor, z: Tensor, n: StepIndex) -> Tensor:
        a, s = self.signal_and_noise(n, z)
        return ((z - s * noise) / a).to(z.dtype)

    def x0_to_noise(self, x0: Tensor, z: Tensor, n: StepIndex) -> Tensor:
        a, s = self.signal_and_noise(n, z)
        return ((z - a * x0) / s).to(z.dtype)

    def v_target(self, x0: Tensor, noise: Tensor, n: StepIndex) -> Tensor:
        """ "v-prediction" (arXiv 2202.00512): z turned by a quarter circle from x0 to the noise."""
        a, s = self.signal_and_noise(n, x0)
        return (a * noise - s * x0).to(x0.dtype)

    def v_to_x0(self, v: Tensor, z: Tensor, n: StepIndex) -> Tensor:
        a, s = self.signal_and_noise(n, z)
        return (a * z - s * v).to(z.dtype)

    def v_to_noise(self, v: Tensor, z: Tensor, n: StepIndex) -> Tensor:
        a, s = self.signal_and_noise(n, z)
        return (s * z + a * v).to(z.dtype)

    def posterior_mean(self, x0: Tensor, z: Tensor, n: StepIndex) -> Tensor:
        """The mean of z one step before, given x0 and z."""
        values = self.alpha_bar, self.previous, self.betas
        alpha_bar, previous, beta = (at_step(value, n, z) for value in values)
        mean = previous.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - previous) * z
        return (mean / (1 - alpha_bar)).to(z.dtype)

    def log_variance(self, s: Tensor, n: StepIndex) -> Tensor:
        """Between log beta~ for s = -1 and log beta for s = 1. At the first step beta~ is 0; that
        of the second stands in for it."""
        smallest = self.posterior_variance
        smallest = torch.cat([smallest[1:2] if len(smallest) > 1 else self.betas, smallest[1:]])
        f = (s + 1) / 2
        low, high = (at_step(variance.log(), n, s) for variance in (smallest, self.betas))
        return (f * high + (1 - f) * low).to(s.dtype)


def at_step(values: Tensor, n: StepIndex, like: Tensor) -> Tensor:
    """The value of each sample's step, float64, shaped to multiply a tensor `like` it."""
    chosen = values.to(like.device)[n]
    return chosen.view(-1, *[1] * (like.ndim - 1)) if chosen.ndim else chosen


def linear_schedule() -> NoiseSchedule:
    """The thousand steps of DDPM, which DiT kept."""
    betas = torch.linspace(1e-4, 0.02, TIMESTEP_SCALE, dtype=torch.float64)
    return NoiseSchedule(torch.arange(TIMESTEP_SCALE), torch.cumprod(1 - betas, dim=0))


def spaced_steps(count: int) -> Tensor:
    """The numbers of `count` steps, ascending, evenly spaced with both ends; for one, the last.

    Raises ValueError unless it is between 1 and 1000.
    """
    if not 1 <= count <= TIMESTEP_SCALE:
        raise ValueError(f"steps must be between 1 and {TIMESTEP_SCALE}, got {count}")
    return torch.linspace(TIMESTEP_SCALE - 1, 0, count, dtype=torch.float64).round().long().flip(0)


# --- training -----------------------------------------------------------------------------------


def ddpm_loss(
    schedule: NoiseSchedule, answer: Tensor, x0: Tensor, noise: Tensor, n: Tensor
) -> Tensor:
    """The loss of each sample, (B,): mean squared error of the noise, plus the variational bound if
    the network's output (B, 2 C, ...) for z_n holds s as well."""
    predicted, s = split_answer(answer, x0.shape[1])
    error = (predicted - noise).square().flatten(1).mean(1)
    if answer.shape[1] == x0.shape[1]:
        return error
    z = schedule.add_noise(x0, noise, n)
    return error + variance_bound(schedule, predicted.detach(), s, x0, z, n)


def split_answer(answer: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Noise and s; without a learned variance s is 1, so the variance is beta."""
    if answer.shape[1] == channels:
        return answer, torch.ones_like(answer)
    predicted, s = answer.chunk(2, dim=1)
    return predicted, s


def variance_bound(
    schedule: NoiseSchedule, predicted: Tensor, s: Tensor, x0: Tensor, z: Tensor, n: Tensor
) -> Tensor:
    """The bound's term for step n, in bits per element, (B,): KL(posterior || step taken), or at
    the first step the negative log-likelihood of x0."""
    mean = schedule.posterior_mean(schedule.noise_to_x0(predicted, z, n), z, n)
    log_variance = schedule.log_variance(s, n)
    wanted = schedule.posterior_mean(x0, z, n)
    wanted_log_variance = schedule.log_variance(torch.full_like(s, -1), n)
    ratio = (wanted_log_variance - log_variance).exp()
    distance = (wanted - mean).square() * (-log_variance).exp()
    kl = (ratio + distance - 1 + log_variance - wanted_log_variance) / 2
    first = (n == 0).view(-1, *[1] * (z.ndim - 1))
    bound = torch.where(first, binned_nll(x0, mean, log_variance), kl)
    return bound.flatten(1).mean(1) / math.log(2)


def binned_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of a Gaussian's mass in the bin of x, one of 256 on [-1, 1]; the outer two are open.

    (The improved DDPM's code approximates the normal distribution function by a tanh.)
    """
    std, half = (log_variance / 2).exp(), 1 / 255
    below = torch.special.ndtr((x - half - mean) / std)
    up_to = torch.special.ndtr((x + half - mean) / std)
    below = torch.where(x < -0.999, torch.zeros_like(below), below)
    up_to = torch.where(x > 0.999, torch.ones_like(up_to), up_to)
    return -(up_to - below).clamp(min=1e-12).log()


# --- sampling: `model(z, t)` returns (B, C, ...) or (B, 2 C, ...) --------------------------------


def ancestral(
    model: Velocity, z: Tensor, schedule: NoiseSchedule, generator: torch.Generator
) -> Tensor:
    """Every step of the schedule backwards, with new noise at all but the last."""
    times = schedule.times.to(z.device)
    for i in reversed(range(len(schedule.steps))):
        predicted, s = split_answer(model(z, times[i]), z.shape[1])
        mean = schedule.posterior_mean(schedule.noise_to_x0(predicted, z, i), z, i)
        if i == 0:
            return mean
        fresh = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        z = mean + (schedule.log_variance(s, i) / 2).exp() * fresh
    return z


def ddim(model: Velocity, z: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Every step of the schedule backwards, without new noise."""
    times = schedule.times.to(z.device)
    for i in reversed(range(len(schedule.steps))):
        predicted, _ = split_answer(model(z, times[i]), z.shape[1])
        x0 = schedule.noise_to_x0(predicted, z, i)
        z = schedule.add_noise(x0, predicted, i - 1) if i else x0
    return z


def guided_noise(
    model: Callable[..., Tensor], y: Tensor, null: int, scale: float, channels: int | None = None
) -> Velocity:
    """Classifier-free guidance: away from the noise predicted without the class, in its first
    `channels` channels, by default all; s is the one predicted with the class.

    DiT's released code guides the first three of four channels, as it did for the paper's images.
    """
    both = torch.cat([y, torch.full_like(y, null)])

    def answer(z: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return model(z, t, y)
        k = z.shape[1] if channels is None else channels
        with_class, without = model(torch.cat([z, z]), t, both).chunk(2)
        noise = without[:, :k] + scale * (with_class[:, :k] - without[:, :k])
        return torch.cat([noise, with_class[:, k:]], dim=1)

    return answer
