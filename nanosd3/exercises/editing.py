"""Exercises on editing an image: image-to-image, inpainting."""

import torch
from torch import Tensor

from nanosd3 import flow, request, samplers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def start_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            f"{steps} steps, shift {alpha}, strength {strength}",
            (
                normal(generator, 2, 3, 4),
                normal(generator, 2, 3, 4),
                flow.schedule(steps, alpha),
                strength,
            ),
        )
        for steps, alpha, strength in ((10, 3.0, 0.6), (8, 1.0, 0.3), (5, 3.0, 1.0), (7, 1.0, 0.6))
    ] + [
        large(
            "8 latents",
            normal(generator, 8, 4, 4, 4),
            normal(generator, 8, 4, 4, 4),
            flow.schedule(6),
            0.5,
        )
    ]


def start_spec(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    steps = len(ts) - 1
    skipped = int(steps - steps * strength)  # steps at the noisy end
    rest = ts[skipped:]
    z = torch.empty(x0.shape, dtype=x0.dtype)
    for i, (clean, n) in enumerate(zip(x0.flatten(), noise.flatten(), strict=True)):
        z.view(-1)[i] = (1 - rest[0]) * clean + rest[0] * n
    return z, rest


def image_to_image(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """What the pipeline starts from if given an image."""
    rest = ts[request.first_step(len(ts) - 1, strength) :]
    return flow.interpolate(x0, noise, rest[0]), rest


def strength_as_time(
    x0: Tensor, noise: Tensor, ts: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    return flow.interpolate(x0, noise, torch.tensor(strength)), image_to_image(
        x0, noise, ts, strength
    )[1]


def strength_skipped(
    x0: Tensor, noise: Tensor, ts: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    rest = ts[int((len(ts) - 1) * strength) :]
    return flow.interpolate(x0, noise, rest[0]), rest


def noise_on_top(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    _, rest = image_to_image(x0, noise, ts, strength)
    return x0 + rest[0] * noise, rest


def rounded(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    rest = ts[round((len(ts) - 1) * (1 - strength)) :]
    return flow.interpolate(x0, noise, rest[0]), rest


def all_steps(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    return image_to_image(x0, noise, ts, strength)[0], ts


def noised_twice(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    z, rest = image_to_image(x0, noise, ts, strength)
    return flow.interpolate(z, noise, rest[0]), rest


def no_noise(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    return x0, image_to_image(x0, noise, ts, strength)[1]


def one_step_too_late(
    x0: Tensor, noise: Tensor, ts: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    rest = ts[request.first_step(len(ts) - 1, strength) + 1 :]
    return flow.interpolate(x0, noise, rest[0]), rest


IMAGE_TO_IMAGE = Exercise(
    name="image_to_image",
    topic="sampling",
    points=2,
    difficulty=2,
    signature="def image_to_image(x0: Tensor, noise: Tensor, ts: Tensor, strength: float) "
    "-> tuple[Tensor, Tensor]:",
    task="Start from an image: of the steps between the times ts, take only the share `strength`,\n"
    "in (0, 1], at the end (the number of skipped steps is rounded down). Return the noisy\n"
    "latents to start from, those of x0 at the first remaining time, and the remaining times.",
    specification=start_spec,
    reference=image_to_image,
    cases=start_cases,
    mutants=(
        Mutant(
            strength_as_time,
            "The image must be as noisy as the first remaining time says; with a shift, "
            "that is not the strength.",
        ),
        Mutant(
            strength_skipped,
            "Strength is the share of steps taken, not skipped: 1 makes everything new.",
        ),
        Mutant(noise_on_top, "At time t only the share 1 - t of the image is left."),
        Mutant(rounded, "The number of skipped steps is rounded down, not to the nearest."),
        Mutant(all_steps, "Return only the remaining times."),
        Mutant(noised_twice, "The noise is added twice: z_t comes from x0 in one step."),
        Mutant(no_noise, "The latents must be as noisy as the first remaining time says."),
        Mutant(one_step_too_late, "One step too few: start at the first of the remaining times."),
    ),
    why="The layout is decided early: a late start keeps it.",
    where="nanosd3/request.py, first_step, and nanosd3/pipeline.py",
    names=("x0", "noise", "ts", "strength"),
    differentiable=False,
    other_devices=False,  # the length of a slice depends on a value
)


def repaint_cases(generator: torch.Generator) -> list[Case]:
    def case(*shape: int) -> Case:
        v, x0, noise = (normal(generator, *shape) for _ in range(3))
        mask = (torch.rand(shape[-2:], generator=generator) < 0.5).float()
        return Case(f"shape {shape}", (v, mask, x0, noise))

    return [
        case(2, 3, 4, 5),
        case(1, 2, 6, 3),
        large("latents of 20x20", *case(1, 2, 20, 20).arguments),
    ]


def repaint_spec(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    out = torch.empty(v.shape, dtype=v.dtype)
    H, W = v.shape[2:]
    for i in range(H):
        for j in range(W):
            known = noise[:, :, i, j] - x0[:, :, i, j]  # along the straight line
            out[:, :, i, j] = mask[i, j] * v[:, :, i, j] + (1 - mask[i, j]) * known
    return out


def repaint(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity of `samplers.inpainting` at one point."""
    velocity = samplers.inpainting(lambda z, t: v, mask, x0, noise)
    return velocity(v, torch.tensor(0.5))


def mask_inverted(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return repaint(v, 1 - mask, x0, noise)


def held_still(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return mask * v


def wrong_way(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return repaint(v, mask, noise, x0)


def image_as_velocity(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return mask * v + (1 - mask) * x0


def known_everywhere_added(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return v + (1 - mask) * (noise - x0)


def noise_as_velocity(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return mask * v + (1 - mask) * noise


REPAINT = Exercise(
    name="repaint",
    topic="sampling",
    points=2,
    difficulty=2,
    signature="def repaint(v: Tensor, mask: Tensor, x0: Tensor, noise: Tensor) -> Tensor:",
    task="Repaint where mask (h, w) is 1: there the velocity is the network's, v (B, C, h, w).\n"
    "Elsewhere the clean latents x0 are known, and so is the straight line to them from the noise\n"
    "that sampling started with: return the velocity that follows it.",
    specification=repaint_spec,
    reference=repaint,
    cases=repaint_cases,
    mutants=(
        Mutant(mask_inverted, "The network paints where the mask is 1."),
        Mutant(held_still, "A velocity of 0 leaves the noise where it is."),
        Mutant(wrong_way, "Velocities point from data to noise here, and so does the known one."),
        Mutant(image_as_velocity, "x0 is where the line ends, not its direction."),
        Mutant(
            known_everywhere_added,
            "Outside the mask the network's velocity does not count: replace it.",
        ),
        Mutant(noise_as_velocity, "The noise is where the line begins, not its direction."),
    ),
    why="The path to what is known is straight, so every solver follows it exactly.",
    where="nanosd3/samplers.py, inpainting",
    names=("v", "mask", "x0", "noise"),
    constants=("mask",),
)


EXERCISES = (IMAGE_TO_IMAGE, REPAINT)
