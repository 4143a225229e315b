"""Exercises on paths from data to noise: the velocity of one pair, and the mean of all."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related.paths import PATHS, exact_velocity

# --- the velocity of one pair ---------------------------------------------------------------------


def pair_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, *shape: int) -> Case:
        t = torch.rand(shape[0], generator=generator) * 0.8 + 0.1
        return Case(label, (normal(generator, *shape), normal(generator, *shape), t))

    single = (normal(generator, 3, 2), normal(generator, 3, 2), torch.tensor(0.3))
    return [
        case("images (2, 3, 4, 5)", 2, 3, 4, 5),
        case("points (7, 2)", 7, 2),
        Case("one time for all", single),
        large("256 points", *case("", 256, 2).arguments),
    ]


def conditional_velocity_spec(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """How far z moves between two times that are almost the same, by how far apart they are."""

    def place(a: float, b: float, time: float) -> float:
        return math.cos(math.pi / 2 * time) * a + math.sin(math.pi / 2 * time) * b

    h, v = 1e-5, torch.empty(x0.shape, dtype=x0.dtype)
    for i in range(len(x0)):
        time = float(t[i] if t.ndim else t)
        for k, (a, b) in enumerate(zip(x0[i].flatten(), noise[i].flatten(), strict=True)):
            moved = place(float(a), float(b), time + h) - place(float(a), float(b), time - h)
            v[i].view(-1)[k] = moved / (2 * h)
    return v


def conditional_velocity(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return PATHS["cosine"].velocity_target(x0, noise, t)


def circle(
    weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """The sum of x0 and noise, weighted by two functions of cosine and sine."""
    angle = math.pi / 2 * (t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t)
    a, b = weights(torch.cos(angle), torch.sin(angle))
    return a * x0 + b * noise


def as_on_a_line(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return noise - x0


def inner_derivative_forgotten(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return circle(lambda cos, sin: (-sin, cos), x0, noise, t)


def to_the_data(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return -conditional_velocity(x0, noise, t)


def cosine_rises(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return math.pi / 2 * circle(lambda cos, sin: (sin, cos), x0, noise, t)


def the_place(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return circle(lambda cos, sin: (cos, sin), x0, noise, t)


def sine_stays_sine(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return math.pi / 2 * circle(lambda cos, sin: (-cos, sin), x0, noise, t)


def by_half_a_circle(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return 2 * conditional_velocity(x0, noise, t)


def divided_by_quarter(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return circle(lambda cos, sin: (-sin, cos), x0, noise, t) / (math.pi / 2)


def one_time_for_all_pairs(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return conditional_velocity(x0, noise, t.reshape(-1)[0])


CONDITIONAL = Exercise(
    name="conditional_velocity",
    topic="paths",
    points=2,
    difficulty=1,
    signature="def conditional_velocity(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:",
    task="dz/dt of the cosine path z_t = cos(pi t / 2) x0 + sin(pi t / 2) noise. x0 and noise are\n"
    "(B, ...); t is (B,), or () for one time shared by all. (The specification only measures it:\n"
    "take the derivative on paper.)",
    specification=conditional_velocity_spec,
    reference=conditional_velocity,
    cases=pair_cases,
    mutants=(
        Mutant(as_on_a_line, "That is the velocity of the straight line, the same at every t."),
        Mutant(
            inner_derivative_forgotten,
            "The angle is pi t / 2: by the chain rule its own derivative is a factor.",
        ),
        Mutant(to_the_data, "t grows towards noise; which way does yours point?"),
        Mutant(cosine_rises, "The share of the image falls as t grows: what is its sign?"),
        Mutant(the_place, "That is z itself: where it is, not how it moves."),
        Mutant(sine_stays_sine, "What is the derivative of a sine?"),
        Mutant(by_half_a_circle, "From t = 0 to 1 the angle grows by pi / 2, a quarter turn."),
        Mutant(divided_by_quarter, "The inner derivative is a factor, not a divisor."),
        Mutant(one_time_for_all_pairs, "Every pair has its own time; do you use only one?"),
    ),
    size_hint="t is (B,), x0 is (B, ...): give t trailing axes, as many as x0 has after the first.",
    why="Any path can be learned this way; the network only ever sees z, t and this target.",
    where="nanosd3/related/paths.py, ProbabilityPath.velocity_target (arXiv 2210.02747, eq. 13)",
    tolerance=1e-4,
    names=("x0", "noise", "t"),
)

# --- the mean of all ------------------------------------------------------------------------------


def point_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, B: int, n: int, D: int, t: float) -> Case:
        points = normal(generator, n, D)
        z = (1 - t) * points[torch.arange(B) % n] + t * normal(generator, B, D)
        return Case(label, (z, torch.tensor(t), points))

    return [
        case("3 places, 5 points, t = 0.6", 3, 5, 2, 0.6),
        case("7 places, 4 points, t = 1", 7, 4, 3, 1.0),
        case("400 numbers each, t = 0.1", 4, 6, 400, 0.1),
        large("16 places, 60 points", *case("", 16, 60, 5, 0.3).arguments),
    ]


def marginal_velocity_spec(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    rows = []
    for place in z:
        squares = [sum((place - (1 - t) * x) ** 2) for x in points]  # distance to each, squared
        nearest = min(squares)
        weights = [torch.exp((nearest - square) / (2 * t**2)) for square in squares]
        mean = sum(w * x for w, x in zip(weights, points, strict=True)) / sum(weights)
        rows.append((place - mean) / t)
    return torch.stack(rows)


def marginal_velocity(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return exact_velocity(PATHS["ot"], points)(z, t)


def squared_distances(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return (z[:, None] - (1 - t) * points).square().sum(2)  # (B, n)


def towards(logits: Tensor, z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    """The velocity if points are weighted by the softmax of logits (B, n)."""
    return (z - logits.softmax(1) @ points) / t


def nearest_point_only(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return (z - points[squared_distances(z, t, points).argmin(1)]) / t


def all_points_alike(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return (z - points.mean(0)) / t


def divided_by_t(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return towards(-squared_distances(z, t, points) / (2 * t), z, t, points)


def half_forgotten(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return towards(-squared_distances(z, t, points) / t**2, z, t, points)


def points_not_moved(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return towards(-torch.cdist(z, points).square() / (2 * t**2), z, t, points)


def distance_itself(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return towards(-squared_distances(z, t, points).sqrt() / (2 * t**2), z, t, points)


def farthest_most(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return towards(squared_distances(z, t, points) / (2 * t**2), z, t, points)


def velocity_to_data(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return -marginal_velocity(z, t, points)


def whole_way(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return t * marginal_velocity(z, t, points)


def mean_of_points(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    return z - t * marginal_velocity(z, t, points)


def softmax_over_places(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    logits = -squared_distances(z, t, points) / (2 * t**2)
    return (z - logits.softmax(0) @ points) / t


def weights_underflow(z: Tensor, t: Tensor, points: Tensor) -> Tensor:
    weights = torch.exp(-squared_distances(z, t, points) / (2 * t**2))
    return (z - weights @ points / weights.sum(1, keepdim=True)) / t


MARGINAL = Exercise(
    name="marginal_velocity",
    topic="paths",
    points=3,
    difficulty=2,
    signature="def marginal_velocity(z: Tensor, t: Tensor, points: Tensor) -> Tensor:",
    task="The velocity that a perfect network learns from a data set of points (n, D), for z\n"
    "(B, D) at one time t (), 0 < t <= 1, on rectified flow's path. z = (1 - t) x + t noise may\n"
    "come from any point x: each counts as much as the noise that it would take is probable.\n"
    "With the mean of the points under these weights, v = (z - mean) / t.",
    specification=marginal_velocity_spec,
    reference=marginal_velocity,
    cases=point_cases,
    mutants=(
        Mutant(nearest_point_only, "The nearest point counts most, but the others count, too."),
        Mutant(all_points_alike, "Points near z count more than those far away."),
        Mutant(divided_by_t, "The noise has deviation t: what does a Gaussian divide squares by?"),
        Mutant(half_forgotten, "A factor is missing in the exponent of the Gaussian."),
        Mutant(points_not_moved, "At time t a point x is the centre of a cloud around (1 - t) x."),
        Mutant(distance_itself, "A Gaussian falls with the square of the distance."),
        Mutant(farthest_most, "Near points count most; is a sign missing in the exponent?"),
        Mutant(velocity_to_data, "t grows towards noise; which way does yours point?"),
        Mutant(whole_way, "That is the whole way from the mean to z; how much time does it take?"),
        Mutant(mean_of_points, "That is the mean of the points, not the velocity away from it."),
        Mutant(
            softmax_over_places, "The weights of all points add up to 1 for each z: which axis?"
        ),
        Mutant(
            weights_underflow,
            "Near the data every weight rounds to 0: subtract the largest exponent first, as "
            "softmax does.",
        ),
    ),
    why="Its samples are the training data: a network's new images come from its errors.",
    where="nanosd3/related/paths.py, exact_velocity (arXiv 2210.02747, eq. 8)",
    tolerance=1e-4,
    names=("z", "t", "points"),
)

EXERCISES = (CONDITIONAL, MARGINAL)
