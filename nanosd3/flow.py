"""Rectified flow: the training objective and everything that has to do with time.

Data and noise are joined by a straight line, z_t = (1 - t) x0 + t noise, and the network learns
its direction, the velocity v = noise - x0, by plain least squares. Where lines of different pairs
cross, the best the network can do is the average, so the learned paths bend; sampling follows
them from t = 1 (noise) to t = 0 (data) with an ODE solver (samplers.py).

At which t to train? The ends are easy (near t = 1 the answer is the data's mean, near t = 0 the
noise's); the middle is hard and decides what the image shows. SD3 keeps the loss as it is
and draws t more often from the middle: that *is* the weighting, and a second weight on top
would apply it twice. The four densities of the paper are given here as inverse transforms: each
maps u, uniform in [0, 1], to t. Fed evenly spread u, they give evenly spread t.

`shift` moves time towards noise for larger images, where neighbouring pixels are redundant, so the
same noise level destroys less information. The same function serves training, where alpha follows
each image's size, and sampling, where it is the model's number at every size.
Paper: arXiv 2403.03206, sections 2 to 3.1 and 5.3.2.

Left out: the other trajectories of the paper's study (EDM, cosine, LDM-linear); they are in
related/formulations.py.
"""

import math

import torch
from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x0 + t noise, for x0 and noise (B, ...) and t (B,) or () (eq. 13)."""
    t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """dz/dt of `interpolate`, the same at every t: the direction from data to noise."""
    return noise - x0


def flow_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,). Unweighted: the density of t is the weight."""
    return (velocity - velocity_target(x0, noise)).square().flatten(1).mean(1)


# --- densities of t: inverse transforms of u, uniform in [0, 1] ---------------------------------


def uniform(u: Tensor) -> Tensor:
    """t = u: every timestep as often as any other."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(n), n normal: most in the middle, never at the ends; SD3's choice, with (0, 1).

    A negative mean favours data, a positive one noise (paper, eq. 19).
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """Heavier in the middle for scale > 0, at the ends for scale < 0; never zero (eq. 20).

    Raises ValueError outside [-1, 2 / (pi - 2)], where the map is not one to one.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"mode's scale must be in [-1, {2 / (math.pi - 2):.4f}], got {scale}")
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """The density whose log-SNR is that of the cosine schedule (eq. 21)."""
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """`count` numbers in (0, 1), one in each of `count` equal intervals, in random order.

    Taken alone, each is uniform; together they cover all of time in every batch, which makes the
    loss and its gradient less noisy than independent draws would.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return u[torch.randperm(count, generator=generator)].clamp(1e-6, 1 - 1e-6)


# --- time for larger images ---------------------------------------------------------------------


def shift(t: Tensor, alpha: float) -> Tensor:
    """Move t towards noise: alpha t / (1 + (alpha - 1) t) (eq. 23).

    This is a constant step in log-SNR: it falls by 2 ln(alpha) everywhere, so shifts multiply.
    The paper derives alpha = sqrt(pixels / pixels trained at) and uses 3 at 1024 x 1024.
    """
    return alpha * t / (1 + (alpha - 1) * t)


def schedule(steps: int, alpha: float = 1.0) -> Tensor:
    """Times (steps + 1,) for sampling, from 1 down to 0, as in the official models.

    They go evenly from 1 to shift(0.001), are shifted (so the smallest above 0 is shifted twice,
    to 0.0089 for alpha = 3), and end at 0. Raises ValueError for fewer than one step or alpha <= 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not alpha > 0:
        raise ValueError(f"shift must be above 0, got {alpha}")
    smallest = float(shift(torch.tensor(0.001, dtype=torch.float64), alpha))
    u = torch.linspace(1, smallest, steps, dtype=torch.float64)
    return torch.cat([shift(u, alpha), torch.zeros(1, dtype=torch.float64)]).float()
