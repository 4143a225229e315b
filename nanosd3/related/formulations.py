"""Formulations: DDPM, EDM and rectified flow are one model, parametrised in different ways.

A path alpha(t) x0 + sigma(t) noise can be written in many ways, but only the ratio sigma / alpha
says how much of the image is left; the rest is scale. Divided by alpha + sigma, the input of any of
these models lies on rectified flow's line,

    z = (1 - t) x0 + t noise,     t = sigma / (alpha + sigma),

and all of them can be written in this one time. They then differ in four choices:

                  t in training            network predicts         input   steps of a sampler
    rf            uniform, logit-normal,   noise - x0               z       even in t
                  mode, cosmap
    eps/linear    LDM's thousand steps     noise                    z / n   even among these
    v/cos         cosmap                   v, see below             z / n   even in the angle
    edm(m, s)     logit-normal(m, s)       v                        z / n   Karras' noise levels

    n = sqrt((1 - t)^2 + t^2),     v = ((1 - t) noise - t x0) / n

z / n has unit variance if x0 does. Three of these look like three theories, but in one time they
are close: v/cos and rf/cosmap draw the same times, edm is v with rectified flow's best times (since
EDM's F is -v where the data's deviation is 1, as it is here), and a step that keeps the estimates
of x0 and noise, as DDIM's does, is an Euler step along the line. So one sampler serves all, and
comparing them compares the choices.

Each is trained by plain mean squared error of its own output. If the output is a x0 + b noise, that
weighs an error of the estimated noise by (b - a t / (1 - t))^2. With the density of log-SNR, l = 2
ln((1 - t) / t), this gives the paper's weights w(l), up to a factor:

    rf           t / (1 - t) = exp(-l / 2), times the density of t if it is not uniform
    eps/cosine   sech(l / 2)         v/cos   exp(-l / 2)
    edm(m, s)    N(l; -2 m, (2 s)^2) (exp(-l) + 1)

How the network is given the time is not part of a formulation; here it always gets t. Papers: arXiv
2403.03206, sections 2 and 3 (the study); 2112.10752 (LDM), 2202.00512 (v), 2206.00364 (EDM).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanosd3.embeddings import TIMESTEP_SCALE
from nanosd3.flow import cosmap, logit_normal, mode, uniform
from nanosd3.related.ddpm import NoiseSchedule, spaced_steps
from nanosd3.related.train_dit import flow_times

# --- what is predicted: a and b of a x0 + b noise, at t -----------------------------------------

OutputCoefficients = tuple[Tensor, Tensor]


def deviation(t: Tensor) -> Tensor:
    """n: that of z if x0 and noise have deviation 1."""
    return torch.sqrt((1 - t) ** 2 + t**2)


def velocity_coefficients(t: Tensor) -> OutputCoefficients:
    return -torch.ones_like(t), torch.ones_like(t)


def noise_coefficients(t: Tensor) -> OutputCoefficients:
    return torch.zeros_like(t), torch.ones_like(t)


def v_coefficients(t: Tensor) -> OutputCoefficients:
    return -t / deviation(t), (1 - t) / deviation(t)


# --- LDM's thousand steps ------------------------------------------------------------------------


def latent_diffusion_schedule() -> NoiseSchedule:
    """Latent diffusion's: sqrt(beta) rises linearly. 7% of the image is left at the last step."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEP_SCALE, dtype=torch.float64) ** 2
    return NoiseSchedule(torch.arange(TIMESTEP_SCALE), torch.cumprod(1 - betas, dim=0))


def uniform_ldm_steps(u: Tensor) -> Tensor:
    """The thousand steps, uniformly."""
    times = flow_times(latent_diffusion_schedule()).to(u)
    return times[(u * len(times)).long()]


# --- times of a sampler (steps + 1,), from the noisiest down to 0 --------------------------------


def even_steps(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1)


def even_ldm_steps(steps: int) -> Tensor:
    times = flow_times(latent_diffusion_schedule().respaced(spaced_steps(steps)))
    return torch.cat([times.flip(0), torch.zeros(1)]).float()


def even_angles(steps: int) -> Tensor:
    """For alpha = cos, sigma = sin of an angle."""
    return cosmap(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()


def karras(steps: int, largest: float = 80.0, smallest: float = 0.002, rho: float = 7.0) -> Tensor:
    """Even in the seventh root of sigma / alpha (EDM, equation 5)."""
    roots = torch.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps, dtype=torch.float64)
    sigma = roots**rho
    return torch.cat([sigma / (1 + sigma), torch.zeros(1)]).float()


# --- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formulation:
    """Four choices, in rectified flow's time. Tensors are (B, ...), times (B,) or ()."""

    density: Callable[[Tensor], Tensor]  # from u, uniform in [0, 1], to t
    coefficients: Callable[[Tensor], OutputCoefficients]  # of the network's output
    steps: Callable[[int], Tensor]
    unit_variance: bool = True  # whether the network's input is z / n, or z

    def network_input(self, z: Tensor, t: Tensor) -> Tensor:
        """z as the network gets it."""
        return z / deviation(like(t, z)) if self.unit_variance else z

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network regresses."""
        a, b = self.coefficients(like(t, x0))
        return a * x0 + b * noise

    def to_velocity(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """noise - x0 from an output at z and t: put x0 = z - t v and noise = z + (1 - t) v into it,
        and solve for v. (From the noise it cannot be computed at t = 1.)"""
        t = like(t, z)
        a, b = self.coefficients(t)
        return (output - (a + b) * z) / (b * (1 - t) - a * t)

    def flow_model(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The velocity of a network that was trained this way, for the core's samplers; arguments
        after z and t are passed on."""

        def velocity(z: Tensor, t: Tensor, *others: Tensor) -> Tensor:
            return self.to_velocity(model(self.network_input(z, t), t, *others), z, t)

        return velocity


def like(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) shaped to multiply a tensor (B, ...); one time for all stays as it is."""
    return t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def rectified(density: Callable[[Tensor], Tensor]) -> Formulation:
    return Formulation(density, velocity_coefficients, even_steps, unit_variance=False)


def edm(mean: float, std: float) -> Formulation:
    """ln(sigma / alpha) is normal, so t is logit-normal."""
    return Formulation(partial(logit_normal, mean=mean, std=std), v_coefficients, karras)


FORMULATIONS = {  # by the paper's names
    "rf": rectified(uniform),
    "rf/lognorm(0, 1)": rectified(logit_normal),
    "rf/mode(1.29)": rectified(mode),
    "rf/cosmap": rectified(cosmap),
    "eps/linear": Formulation(uniform_ldm_steps, noise_coefficients, even_ldm_steps),
    "v/cos": Formulation(cosmap, v_coefficients, even_angles),
    "edm(-1.2, 1.2)": edm(-1.2, 1.2),
    "edm(0, 0.6)": edm(0.0, 0.6),
}
