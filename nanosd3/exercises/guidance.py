"""An exercise on classifier-free guidance."""

import torch
from torch import Tensor

from nanosd3 import samplers
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def guide(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    """`samplers.guided` with a network that predicts these two velocities."""

    def network(z: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return context

    prompt, negative = (v_prompt, v_prompt), (v_negative, v_negative)
    velocity = samplers.guided(network, prompt, negative, scale)
    return velocity(torch.zeros_like(v_prompt), torch.tensor(0.5))


def guide_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"scale {s}", (normal(generator, 2, 3, 4, 5), normal(generator, 2, 3, 4, 5), s))
        for s in (4.5, 1.5, 1.0, 0.5, 0.0)
    ] + [large("8 latents", normal(generator, 8, 4, 4, 4), normal(generator, 8, 4, 4, 4), 3.0)]


def guide_spec(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    v = torch.empty(v_prompt.shape, dtype=v_prompt.dtype)
    for i, (a, b) in enumerate(zip(v_prompt.flatten(), v_negative.flatten(), strict=True)):
        v.view(-1)[i] = b + scale * (a - b)  # scale 0: the negative one, 1: the prompt's
    return v


def one_plus_scale(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_prompt + scale * (v_prompt - v_negative)


def away_from_prompt(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_prompt + scale * (v_negative - v_prompt)


def blended(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return (v_negative + scale * v_prompt) / (1 + scale)


def no_difference(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_negative + scale * v_prompt


def scale_minus_one(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_negative + (scale - 1) * (v_prompt - v_negative)


GUIDANCE = Exercise(
    name="guide",
    topic="sampling",
    points=2,
    difficulty=1,
    signature="def guide(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:",
    task="Classifier-free guidance: combine the velocities for the prompt and for the negative\n"
    "prompt, both of one shape. Scale 0 gives the negative one, 1 the prompt's, more goes beyond\n"
    "it.",
    specification=guide_spec,
    reference=guide,
    cases=guide_cases,
    mutants=(
        Mutant(
            one_plus_scale,
            "At scale 1 the prompt's velocity should come out unchanged; some papers count from 0.",
        ),
        Mutant(away_from_prompt, "This leads away from the prompt."),
        Mutant(blended, "A blend stays between the two; guidance goes beyond."),
        Mutant(no_difference, "The scale multiplies the difference of the two."),
        Mutant(
            scale_minus_one,
            "At scale 1 the prompt's velocity should come out, not the negative one.",
        ),
    ),
    why="It trades variety for prompt adherence; both conventions for the scale are in print.",
    where="nanosd3/samplers.py, guided",
    names=("v_prompt", "v_negative", "scale"),
)


EXERCISES = (GUIDANCE,)
