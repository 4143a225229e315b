"""Exercises on distilling a velocity network into few steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from nanosd3 import few_steps
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.exercises.grader.recording import FIELD
from nanosd3.related import consistency

Velocity = Callable[[Tensor, Tensor], Tensor]


def pair_cases(generator: torch.Generator) -> list[Case]:
    def case(t: float, s: float, *shape: int) -> Case:
        times = torch.tensor(t), torch.tensor(s)
        return Case(f"{t} to {s}", (FIELD, FIELD, normal(generator, *shape), *times))

    return [case(0.75, 0.5, 3, 2), case(1.0, 0.4, 2, 3, 4), case(0.25, 0.0, 4, 2, 1, 5)]


def distillation_loss(
    student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """The package's step and loss, with one time for the whole batch."""
    with torch.no_grad():
        z_s = consistency.teacher_step(teacher, z, t, s)
    return consistency.consistency_loss(student, z, t, z_s, s)


def loss_between(
    student: Velocity, z: Tensor, t: Tensor, z_s: Tensor, s: Tensor, c: float | None = None
) -> Tensor:
    answer, target = z - t * student(z, t), (z_s - s * student(z_s, s)).detach()
    c = consistency.huber_constant(z[0].numel()) if c is None else c
    return consistency.pseudo_huber(answer, target, c)


def distillation_loss_spec(
    student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    v = teacher(z, t)
    ahead = teacher(z + (s - t) * v, torch.clamp(s, min=0.001))
    z_s = (z + (s - t) * (v + ahead) / 2).detach()
    return loss_between(student, z, t, z_s, s)


def eulers_step(student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return loss_between(student, z, t, z + (s - t) * teacher(z, t), s)


def step_backwards(student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return loss_between(student, z, t, consistency.teacher_step(teacher, z, s, t), s)


def same_point(student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return loss_between(student, z, t, z, s)


def points_compared(
    student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    z_s = consistency.teacher_step(teacher, z, t, s)
    return loss_between(lambda z, t: student(z, t) * 0, z, t, z_s, s)


def velocities_compared(
    student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    z_s = consistency.teacher_step(teacher, z, t, s)
    c = consistency.huber_constant(z[0].numel())
    return consistency.pseudo_huber(student(z, t), student(z_s, s).detach(), c)


def target_at_t(student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    z_s = consistency.teacher_step(teacher, z, t, s)
    c = consistency.huber_constant(z[0].numel())
    return consistency.pseudo_huber(z - t * student(z, t), z_s - t * student(z_s, t), c)


def teachers_own_end(
    student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    z_s, c = consistency.teacher_step(teacher, z, t, s), consistency.huber_constant(z[0].numel())
    return consistency.pseudo_huber(z - t * student(z, t), z_s, c)


def without_c(student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return loss_between(student, z, t, consistency.teacher_step(teacher, z, t, s), s, c=0.0)


def one_for_the_batch(
    student: Velocity, teacher: Velocity, z: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    return distillation_loss(student, teacher, z, t, s).mean()


DISTILLATION_LOSS = Exercise(
    name="distillation_loss",
    topic="consistency",
    points=3,
    difficulty=3,
    signature="def distillation_loss(student: Callable, teacher: Callable, z: Tensor, t: Tensor, "
    "s: Tensor) -> Tensor:",
    task="The loss (B,) of consistency distillation for z (B, ...) at time t, and s < t, both ().\n"
    "The teacher, a velocity (z, t), makes one Heun step from z to time s; the student, the same\n"
    "kind of function, is asked where the path ends, at both points. Its answer nearer to the\n"
    "data is the target. Only the other one is trained: no gradient goes through the target.",
    specification=distillation_loss_spec,
    reference=distillation_loss,
    cases=pair_cases,
    mutants=(
        Mutant(eulers_step, "The teacher's step is Heun's: the mean of two velocities."),
        Mutant(step_backwards, "The teacher goes from t to s, towards the data."),
        Mutant(same_point, "The second point is where the teacher's step ends, not z."),
        Mutant(points_compared, "Compare where the student says that the path ends."),
        Mutant(
            velocities_compared, "Along a path the velocity changes; where the path ends does not."
        ),
        Mutant(target_at_t, "The second point is at time s, and has only s left to go."),
        Mutant(
            teachers_own_end, "The target is the student's answer at that point, not the point."
        ),
        Mutant(without_c, "c is 0.00054 times the root of the number of values in an image."),
        Mutant(one_for_the_batch, "One loss for each image of the batch."),
    ),
    formulas="v    = teacher(z, t)\n"
    "v'   = teacher(z + (s - t) v, max(s, 0.001))\n"
    "z_s  = z + (s - t) (v + v') / 2\n"
    "f(z, t) = z - t student(z, t)\n"
    "loss = sqrt(|f(z, t) - f(z_s, s)|^2 + c^2) - c for each image, |.| over all its d numbers,\n"
    "       c = 0.00054 sqrt(d); f(z_s, s) is a constant\n"
    "The teacher is called twice, the student twice.",
    why="The target is the student's own output, one teacher step nearer to the data.",
    where="nanosd3/related/consistency.py, teacher_step and consistency_loss",
    names=("student", "teacher", "z", "t", "s"),
    constants=("t", "s"),
    tolerance=1e-4,
)


def noise_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, t: float, t_next: float, fresh: float, *shape: int) -> Case:
        x0, z, drawn = (normal(generator, *shape) for _ in range(3))
        return Case(label, (x0, z, torch.tensor(t), torch.tensor(t_next), drawn, fresh))

    cases = [
        case("from noise, half fresh", 1.0, 0.75, 0.5, 2, 3, 4, 5),
        case("in between, 0.8 fresh", 0.6, 0.3, 0.8, 5, 2),
        case("all fresh", 0.75, 0.5, 1.0, 3, 4),
        case("nothing fresh", 0.9, 0.2, 0.0, 4, 3),
    ]
    return [*cases, large("latents", *case("", 0.8, 0.4, 0.5, 6, 4, 8, 8).arguments)]


def renoised_spec(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    out = torch.empty(x0.shape, dtype=x0.dtype)
    for i, (x, now, new) in enumerate(zip(x0.flatten(), z.flatten(), drawn.flatten(), strict=True)):
        found = (now - (1 - t) * x) / t  # z = (1 - t) x0 + t found
        noise = fresh * new + (1 - fresh**2) ** 0.5 * found  # of unit variance again
        out.view(-1)[i] = (1 - t_next) * x + t_next * noise
    return out


Numbers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]


def all_fresh(*a: *Numbers) -> Tensor:
    return few_steps.renoised(*a[:5], 1.0)


def nothing_fresh(*a: *Numbers) -> Tensor:
    return few_steps.renoised(*a[:5], 0.0)


def weights_add_up_to_one(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    found = (z - (1 - t) * x0) / t
    return (1 - t_next) * x0 + t_next * (fresh * drawn + (1 - fresh) * found)


def image_not_scaled(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    return few_steps.renoised(x0, z, t, t_next, drawn, fresh) + t_next * x0


def at_the_old_time(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    return few_steps.renoised(x0, z, t, t, drawn, fresh)


def z_as_noise(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    kept = (1 - fresh**2) ** 0.5
    return (1 - t_next) * x0 + t_next * (fresh * drawn + kept * z)


def velocity_as_noise(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    kept = (1 - fresh**2) ** 0.5
    return (1 - t_next) * x0 + t_next * (fresh * drawn + kept * (z - x0) / t)


def shares_of_variance(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    return few_steps.renoised(x0, z, t, t_next, drawn, fresh**0.5)


def kept_and_fresh_exchanged(
    x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, fresh: float
) -> Tensor:
    return few_steps.renoised(x0, z, t, t_next, drawn, (1 - fresh**2) ** 0.5)


RENOISED = Exercise(
    name="renoised",
    topic="consistency",
    points=2,
    difficulty=2,
    signature="def renoised(x0: Tensor, z: Tensor, t: Tensor, t_next: Tensor, drawn: Tensor, "
    "fresh: float) -> Tensor:",
    task="Between two jumps: from z (B, ...) at time t the model jumped to the image x0; put\n"
    "noise back on, up to time t_next. Its amplitude is `fresh` times that of new noise, `drawn`,\n"
    "plus as much of the noise that z and x0 say was in z as gives unit variance in all.",
    specification=renoised_spec,
    reference=few_steps.renoised,
    cases=noise_cases,
    mutants=(
        Mutant(all_fresh, "Part of the noise is the noise that was in z."),
        Mutant(nothing_fresh, "Part of the noise is drawn anew: use `drawn`."),
        Mutant(weights_add_up_to_one, "Variances should add up to 1, not amplitudes."),
        Mutant(image_not_scaled, "At time t_next the share of the image is 1 - t_next."),
        Mutant(at_the_old_time, "The noise goes up to t_next, not back to t."),
        Mutant(z_as_noise, "z is image and noise; take the image out, and divide."),
        Mutant(velocity_as_noise, "z holds 1 - t of the image: z - x0 takes out too much."),
        Mutant(shares_of_variance, "`fresh` is an amplitude, not a share of the variance."),
        Mutant(kept_and_fresh_exchanged, "`fresh` belongs to the new noise."),
    ),
    why="Entirely fresh noise reduces diversity in every step; without any it is Euler's step.",
    where="nanosd3/few_steps.py, renoised",
    names=("x0", "z", "t", "t_next", "drawn", "fresh"),
    constants=("t", "t_next"),
)

EXERCISES = (DISTILLATION_LOSS, RENOISED)
