"""Exercises on the scale and shift between the autoencoder and the flow."""

from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from nanosd3 import vae
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal


def scaling_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shift {shift}, scale {scale}", (normal(generator, 2, 3, 4, 5), shift, scale))
        for shift, scale in ((0.0609, 1.5305), (-0.4, 0.18215))
    ] + [large("8 latents", normal(generator, 8, 4, 4, 4), 0.2, 0.7)]


def stand_in(shift: float, scale: float) -> vae.AutoencoderKL:
    """The part of an autoencoder that scaling uses: its config."""
    config = SimpleNamespace(shift=shift, scale=scale)
    return cast(vae.AutoencoderKL, SimpleNamespace(config=config))


def normalise(z: Tensor, shift: float, scale: float) -> Tensor:
    return vae.AutoencoderKL.normalise(stand_in(shift, scale), z)


def denormalise(x0: Tensor, shift: float, scale: float) -> Tensor:
    return vae.AutoencoderKL.denormalise(stand_in(shift, scale), x0)


def normalise_spec(z: Tensor, shift: float, scale: float) -> Tensor:
    x0 = torch.empty(z.shape, dtype=z.dtype)
    for i, value in enumerate(z.flatten()):
        x0.view(-1)[i] = (value - shift) * scale
    return x0


def scaled_first(z: Tensor, shift: float, scale: float) -> Tensor:
    return z * scale - shift


def shift_forgotten(z: Tensor, shift: float, scale: float) -> Tensor:
    return z * scale


def divided_by_scale(z: Tensor, shift: float, scale: float) -> Tensor:
    return (z - shift) / scale


def shift_added(z: Tensor, shift: float, scale: float) -> Tensor:
    return (z + shift) * scale


def normalised_twice(z: Tensor, shift: float, scale: float) -> Tensor:
    return normalise(normalise(z, shift, scale), shift, scale)


def the_way_back(z: Tensor, shift: float, scale: float) -> Tensor:
    return denormalise(z, shift, scale)


NORMALISE = Exercise(
    name="normalise",
    topic="latents",
    points=1,
    difficulty=1,
    signature="def normalise(z: Tensor, shift: float, scale: float) -> Tensor:",
    task="Map latents z of any shape, as the encoder makes them, to what the flow works on, mean\n"
    "0 and standard deviation 1: shift is their mean, scale one over their standard deviation.",
    specification=normalise_spec,
    reference=normalise,
    cases=scaling_cases,
    mutants=(
        Mutant(scaled_first, "Subtract the mean before scaling."),
        Mutant(
            shift_forgotten,
            "The shift is not used: SD3 was the first of its line to have one, and training "
            "scripts shipped without it.",
        ),
        Mutant(divided_by_scale, "scale is one over the standard deviation, so it multiplies."),
        Mutant(shift_added, "shift is the mean: subtract it."),
        Mutant(normalised_twice, "Shift and scale are applied twice."),
        Mutant(the_way_back, "That is the way back, to what the decoder expects."),
    ),
    why="The noise has standard deviation 1: latents of another scale are lost in it, or hide it.",
    where="nanosd3/vae.py, AutoencoderKL.normalise",
    names=("z", "shift", "scale"),
)


def denormalise_spec(x0: Tensor, shift: float, scale: float) -> Tensor:
    z = torch.empty(x0.shape, dtype=x0.dtype)
    for i, value in enumerate(x0.flatten()):
        z.view(-1)[i] = value / scale + shift
    return z


def shifted_first(x0: Tensor, shift: float, scale: float) -> Tensor:
    return (x0 + shift) / scale


def only_divided(x0: Tensor, shift: float, scale: float) -> Tensor:
    return x0 / scale


def multiplied(x0: Tensor, shift: float, scale: float) -> Tensor:
    return x0 * scale + shift


def applied_again(x0: Tensor, shift: float, scale: float) -> Tensor:
    return (x0 - shift) * scale


def denormalised_twice(x0: Tensor, shift: float, scale: float) -> Tensor:
    return denormalise(denormalise(x0, shift, scale), shift, scale)


def shift_subtracted(x0: Tensor, shift: float, scale: float) -> Tensor:
    return x0 / scale - shift


DENORMALISE = Exercise(
    name="denormalise",
    topic="latents",
    points=1,
    difficulty=1,
    signature="def denormalise(x0: Tensor, shift: float, scale: float) -> Tensor:",
    task="The way back: map latents x0 of any shape, as the flow makes them ((z - shift) scale),\n"
    "to what the decoder expects.",
    specification=denormalise_spec,
    reference=denormalise,
    cases=scaling_cases,
    mutants=(
        Mutant(shifted_first, "Undo in reverse order: the scale was applied last."),
        Mutant(only_divided, "The shift is not undone."),
        Mutant(multiplied, "The scale was multiplied; undo that."),
        Mutant(applied_again, "That normalises a second time; the decoder needs the inverse."),
        Mutant(denormalised_twice, "Shift and scale are undone twice."),
        Mutant(shift_subtracted, "The mean was subtracted; undo that."),
    ),
    why="A forgotten shift makes every image slightly wrong, and nobody notices for months.",
    where="nanosd3/vae.py, AutoencoderKL.denormalise",
    names=("x0", "shift", "scale"),
)

EXERCISES = (NORMALISE, DENORMALISE)
