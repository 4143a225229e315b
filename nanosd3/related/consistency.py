"""Consistency models: from any point of a path directly to its end.

A velocity network says which way a path goes *here*, so sampling takes many small steps. A
consistency model says where the path *ends*: f(z_t, t) is the same clean image for all points of
one path, so one evaluation gives a sample. Write it with a velocity network F of any kind:

    f(z, t) = z - t F(z, t)         at t = 0 it is z itself, as it must be: the end of a path is
                                    where it is. And one Euler step from t to 0 *is* f.

Training asks for the same output at two neighbouring points of one path, t and s < t:

    loss = d( f(z_t, t),  f(z_s, s) without gradient )

In *distillation*, a trained velocity network steps from z_t to z_s (`teacher_step`), with its
guidance, which is thereby built in. In *training alone*, z_s is made from the same image and noise
as z_t: an unbiased guess of such a step. Errors add up from level to level, so few levels are
learned fast and many are exact; the curricula begin with few.

The papers write noise levels as sigma, with x_sigma = x0 + sigma noise. In this project's time
sigma = t / (1 - t) and z_t = (1 - t) x_sigma, and what is lognormal in sigma is logit-normal in t.
Papers: arXiv 2303.01469 (Song et al.), 2310.14189 (Song and Dhariwal, the improved training).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanosd3.samplers import Velocity

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of EDM's grid, arXiv 2206.00364


def clean_image(velocity: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """f(z, t) = z - t F: where a path ends, from F's output at z (B, ...) and t (B,)."""
    return z - per_image(t, z) * velocity


def per_image(t: Tensor, z: Tensor) -> Tensor:
    """t (B,) with trailing axes, to multiply z (B, ...)."""
    return t.view(-1, *[1] * (z.ndim - 1))


def teacher_step(velocity: Velocity, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One Heun step of each image z (B, ...) from its t (B,) to its s (B,).

    The network has hardly been trained at t = 0, so the second slope is taken at 0.001 there.
    """
    h = per_image(s - t, z)
    v = velocity(z, t)
    ahead = velocity(z + h * v, s.clamp(min=0.001))
    return z + h * (v + ahead) / 2


def consistency_loss(
    network: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    z_s: Tensor,
    s: Tensor,
    *given: Tensor,
    target_network: Callable[..., Tensor] | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The distance between a network's outputs at two points (B, ...) of a path, (B,). The output
    at the point nearer to the data is the target. `given` are its other inputs, such as the text.

    The original training used a second network for the target, with a moving average of this one's
    weights, and squared distances.
    """
    with torch.no_grad():
        target = clean_image((target_network or network)(z_s, s, *given), z_s, s)
    answer = clean_image(network(z_t, t, *given), z_t, t)
    distance = distance or partial(pseudo_huber, c=huber_constant(z_t[0].numel()))
    return distance(answer, target)


# --- distances between two outputs ----------------------------------------------------------------


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c for each image (B,), with one norm over the whole image.

    Quadratic near zero, linear beyond c: outliers do not dominate (2310.14189, eq. 8).
    """
    return (squared_distance(a, b) + c * c).sqrt() - c


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 for each image (B,)."""
    return (a - b).square().flatten(1).sum(1)


def huber_constant(size: int) -> float:
    """c for images of `size` elements: 0.00054 sqrt(size) (2310.14189, section 3.3)."""
    return 0.00054 * math.sqrt(size)


def gap_weight(t: Tensor, s: Tensor) -> Tensor:
    """1 / (sigma_t - sigma_s) = (1 - t)(1 - s) / (t - s): close levels have more weight."""
    return (1 - t) * (1 - s) / (t - s)


# --- levels: the times that pairs are made of -----------------------------------------------------


def time_of(sigma: Tensor) -> Tensor:
    """t = sigma / (1 + sigma)."""
    return sigma / (1 + sigma)


def even_levels(count: int) -> Tensor:
    """`count` steps from 0 to 1: times (count + 1,), ascending."""
    return torch.linspace(0, 1, count + 1)


def karras_levels(count: int) -> Tensor:
    """EDM's `count` noise levels as times (count,), ascending: close together near the data."""
    ends = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return time_of(torch.linspace(*ends, count, dtype=torch.float64) ** RHO).float()


def growing_count(step: int, steps: int, first: int = 2, last: int = 150) -> int:
    """How many levels the original training uses at a step (2303.01469, appendix C)."""
    done = step / steps
    return math.ceil(math.sqrt(done * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def doubling_count(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """How many levels the improved training uses: doubled at equal intervals, from `first` to
    `last`, and one more (2310.14189, section 3.4)."""
    stage = math.floor(steps / (math.log2(last // first) + 1))
    return min(first * 2 ** (step // max(1, stage)), last) + 1


def target_decay(count: int, first: int = 2, initial: float = 0.9) -> float:
    """The original training's decay of the target's moving average at `count` levels; the
    improved training has none: its target is the student itself."""
    return math.exp(first * math.log(initial) / count)


def lognormal_weights(times: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """How often each pair of neighbours in `times` (n + 1,) is drawn, (n,): the probability of
    its interval when ln(sigma), which is logit(t), is normal (2310.14189, section 3.5)."""
    scaled = (torch.logit(times.double()) - mean) / (std * math.sqrt(2))
    chance = torch.erf(scaled).diff()
    return (chance / chance.sum()).float()


def draw_levels(
    times: Tensor, count: int, generator: torch.Generator, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`count` pairs of neighbours t and s < t in `times`, each (count,)."""
    weights = torch.ones(len(times) - 1) if weights is None else weights
    i = torch.multinomial(weights, count, replacement=True, generator=generator)
    return times[i + 1], times[i]


# --- the form of the papers -----------------------------------------------------------------------


def edm_form(t: Tensor, data_std: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of EDM's f = c_skip z + c_out F(c_in z), for z in flow form.

    Another way to the same boundary condition, for networks with inputs and outputs of unit
    variance. `clean_image` has c_skip = c_in = 1, c_out = -t and leaves the scale to the network.
    """
    variance = t**2 + (1 - t) ** 2 * data_std**2  # of z, for data of this deviation
    return (1 - t) * data_std**2 / variance, t * data_std / variance.sqrt(), variance.rsqrt()


def inconsistency(
    clean: Callable[[Tensor, Tensor], Tensor], path: list[tuple[Tensor, Tensor]]
) -> float:
    """The variance of f over the points (t, z) of paths, as a share of the images' variance: 0
    for a perfect consistency model."""
    answers = torch.stack([clean(z, t.expand(len(z))) for t, z in path])  # (points, B, ...)
    return float(answers.var(0).mean() / answers[-1].var(0).mean())
