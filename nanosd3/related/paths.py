"""Flow Matching: many paths from noise to data, one loss to learn them (arXiv 2210.02747).

A path is a pair of functions of time. It carries an image x0 and noise to

    z_t = alpha(t) x0 + sigma(t) noise,     dz/dt = alpha'(t) x0 + sigma'(t) noise

and a network that regresses dz/dt from z_t and t learns the velocity field that moves noise to
data. Training simulates nothing, and the path enters only through four numbers for each t.
Diffusion is one choice among others. In our time, with data at t = 0 and noise at t = 1, they are:

    ot       alpha = 1 - t,               sigma = sigma_min + (1 - sigma_min) t
    vp       alpha = exp(-T(t) / 2),      sigma = sqrt(1 - alpha^2),  T = 19.9 t^2 / 2 + 0.1 t
    cosine   alpha = cos(pi t / 2),       sigma = sin(pi t / 2)
    ve       alpha = 1,                   sigma = 0.002 (80 / 0.002)^t

The first moves along straight lines at constant speed ("optimal transport" between x0's Gaussian
and the prior, not between data and noise). With sigma_min 0 it is rectified flow, the core's
flow.py; the paper's sigma_min is just above 0. VP is the diffusion of DDPM in continuous time, VE
that of score matching (arXiv 2011.13456). The paths end almost in N(0, sigma(1)^2): VP keeps 0.66%
of the image at t = 1.

What a network predicts is a matter of choice. At a given z_t and t, velocity, noise, x0 and score
are each an affine function of any other; with Delta = alpha sigma' - sigma alpha'

    x0    = (sigma' z - sigma v) / Delta         noise = (alpha v - alpha' z) / Delta
    score = grad_z log p_t(z) = -noise / sigma   (on average over all x0 that could be behind z)

The paper's t is our 1 - t, and its velocity is minus ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanosd3.samplers import Velocity


class Coefficients(NamedTuple):
    """A path at some times: each of t's shape, or shaped for a batch, (B, 1, 1, 1)."""

    alpha: Tensor
    sigma: Tensor
    alpha_slope: Tensor  # the derivatives in t
    sigma_slope: Tensor


def optimal_transport(t: Tensor, sigma_min: float = 0.0) -> Coefficients:
    """Straight lines at constant speed; sigma_min is the noise left at t = 0."""
    one = torch.ones_like(t)
    return Coefficients(1 - t, sigma_min + (1 - sigma_min) * t, -one, (1 - sigma_min) * one)


def variance_preserving(t: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Coefficients:
    """DDPM's linear betas in continuous time. sigma' grows without bound towards t = 0."""
    beta = beta_min + (beta_max - beta_min) * t
    integral = beta_min * t + (beta_max - beta_min) * t**2 / 2  # of beta, from 0 to t
    alpha = torch.exp(-integral / 2)
    sigma = torch.sqrt(-torch.expm1(-integral))  # 1 - alpha^2 would lose the digits near t = 0
    alpha_slope = -beta / 2 * alpha
    return Coefficients(alpha, sigma, alpha_slope, -alpha * alpha_slope / sigma)


def cosine_schedule(t: Tensor) -> Coefficients:
    """A quarter circle: variance-preserving like VP, at constant angular speed."""
    angle = math.pi / 2 * t
    alpha, sigma = torch.cos(angle), torch.sin(angle)
    return Coefficients(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)


def variance_exploding(
    t: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Coefficients:
    """The image stays, the noise grows geometrically."""
    growth = math.log(sigma_max / sigma_min)
    sigma = sigma_min * torch.exp(growth * t)
    return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), growth * sigma)


@dataclass(frozen=True)
class ProbabilityPath:
    """A path, and what follows from it. Tensors are (B, ...), times (B,) or ()."""

    coefficients: Callable[[Tensor], Coefficients]
    first: float = 0.0  # the earliest time in training and sampling: slopes are finite from there

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """The coefficients of each sample of a batch, shaped to multiply a tensor `like` it."""
        return self.coefficients(t.view(-1, *[1] * (like.ndim - 1)) if t.ndim else t)

    @property
    def prior_std(self) -> float:
        """The deviation of the noise that sampling starts from at t = 1."""
        return float(self.coefficients(torch.ones((), dtype=torch.float64)).sigma)

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t of an image and noise."""
        c = self.at(t, x0)
        return c.alpha * x0 + c.sigma * noise

    def velocity_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dz/dt of `interpolate`, what the network regresses."""
        c = self.at(t, x0)
        return c.alpha_slope * x0 + c.sigma_slope * noise

    # Conversions between the four predictions, at z_t and t.

    def velocity_to_x0(self, velocity: Tensor, z: Tensor, t: Tensor) -> Tensor:
        c = self.at(t, z)
        return (c.sigma_slope * z - c.sigma * velocity) / determinant(c)

    def velocity_to_noise(self, velocity: Tensor, z: Tensor, t: Tensor) -> Tensor:
        c = self.at(t, z)
        return (c.alpha * velocity - c.alpha_slope * z) / determinant(c)

    def velocity_to_score(self, velocity: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return -self.velocity_to_noise(velocity, z, t) / self.at(t, z).sigma

    def x0_to_velocity(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Divides by sigma: not at t = 0."""
        c = self.at(t, z)
        return c.alpha_slope * x0 + c.sigma_slope * (z - c.alpha * x0) / c.sigma

    def noise_to_velocity(self, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Divides by alpha: not at t = 1, where OT and cosine keep nothing of the image."""
        c = self.at(t, z)
        return c.alpha_slope * (z - c.sigma * noise) / c.alpha + c.sigma_slope * noise

    def score_to_velocity(self, score: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.noise_to_velocity(-self.at(t, z).sigma * score, z, t)


def determinant(c: Coefficients) -> Tensor:
    """Delta = alpha sigma' - sigma alpha', of the map from (x0, noise) to (z, dz/dt)."""
    return c.alpha * c.sigma_slope - c.sigma * c.alpha_slope


def path_loss(
    path: ProbabilityPath, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Mean square error of each sample, (B,): flow.flow_loss for any path (the paper's eq. 9)."""
    return (velocity - path.velocity_target(x0, noise, t)).square().flatten(1).mean(1)


def exact_velocity(path: ProbabilityPath, points: Tensor) -> Velocity:
    """The velocity field that a perfect network learns from a finite data set, points (n, D): the
    mean of the targets of all points that z (B, D) may come from at t, () or (B,)."""
    squares = points.square().sum(1)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        c = path.at(t, z)
        # -|z - alpha x|^2 / (2 sigma^2), without the part that is the same for all points
        logits = (c.alpha * (z @ points.T) - c.alpha**2 * squares / 2) / c.sigma**2  # (B, n)
        return path.x0_to_velocity(torch.softmax(logits, dim=1) @ points, z, t)

    return velocity


PATHS = {
    "ot": ProbabilityPath(optimal_transport),
    "vp": ProbabilityPath(variance_preserving, first=1e-3),
    "cosine": ProbabilityPath(cosine_schedule),
    "ve": ProbabilityPath(variance_exploding),
}
