"""Small unconditional consistency models of pixels, for edits.

Edits need a model of what is edited: a latent has no pixels to keep and no blocks to average. And
only an unconditional model can show whether an edit finds the digit that was there. So these are
trained on halved digits (data_sets.py) without a label, by consistency training, with no teacher.
The network is the Consistency Decoder's, whose latents are always zero.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanosd3.claims.data_sets import HalvedPixels
from nanosd3.claims.runs import network_job
from nanosd3.config_types import Recipe
from nanosd3.flow import interpolate
from nanosd3.related.consistency import (
    consistency_loss,
    doubling_count,
    draw_levels,
    even_levels,
)
from nanosd3.related.consistency_decoder import ConsistencyDecoder
from nanosd3.training.loop import StepLoss, StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, training_of

PIXEL_STAGE = "pixels"
PIXEL_WIDTHS = (16, 32, 64)
PIXEL_RECIPE = Recipe(steps=400, batch=64, lr=4e-3, warmup=50, weight_decay=0.0)
FAST_PIXEL_RECIPE = Recipe(steps=4, batch=8, lr=4e-3, warmup=1, weight_decay=0.0)
LEVELS_OF_PIXELS = (2, 8)  # at first and at last
PIXEL_AVERAGE = 0.99  # decay of the average of the weights


@dataclass(frozen=True)
class PixelModel:
    """A network, and the seconds of a core that training it took."""

    network: ConsistencyDecoder
    seconds: float

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Of images z (B, 1, 12, 12) at t (), as a sampler calls it."""
        return self.network(z, t, zero_latents(z))


def zero_latents(z: Tensor) -> Tensor:
    """In place of latents: the model is unconditional."""
    return z.new_zeros(len(z), 1, 1, 1)


def pixel_loss(job: Job, data: HalvedPixels, network: ConsistencyDecoder) -> StepLoss:
    """Losses of consistency training: the same image and noise at two levels."""
    recipe = job.training.flow

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator, step = step_rng.generator(), int(step_rng.name[-1])
        count = doubling_count(step, recipe.steps, *LEVELS_OF_PIXELS) - 1
        images = step_rng.take(job.source.draw(recipe.batch, generator))
        levels = draw_levels(even_levels(count), recipe.batch, generator)
        t, s = (step_rng.take(x) for x in levels)
        x0, noise = data.x0_and_noise(images, step_rng)  # (B, 1, 12, 12) each
        z_t, z_s = interpolate(x0, noise, t), interpolate(x0, noise, s)
        return consistency_loss(network, z_t, t, z_s, s, zero_latents(x0)), {"levels": count}

    return loss_of


def pixel_model(data: HalvedPixels, seed: int) -> PixelModel:
    """The model of a seed, trained now or before."""
    conditions, finished = data.conditions, data.finished
    recipe = FAST_PIXEL_RECIPE if conditions.fast else PIXEL_RECIPE
    training = replace(training_of(finished.config), flow=recipe, ema_decay=PIXEL_AVERAGE)
    config = replace(finished.config, training=training)
    sizes, levels = PIXEL_WIDTHS, LEVELS_OF_PIXELS
    job = network_job(
        conditions, finished, "consistency-pixels", config, seed, widths=sizes, levels=levels
    )
    run = job.run
    network = build(job, PIXEL_STAGE, lambda: ConsistencyDecoder(1, 1, PIXEL_WIDTHS))
    loss_of = pixel_loss(job, data, network)
    train = partial(fit_average, job, PIXEL_STAGE, network, loss_of, PIXEL_AVERAGE)
    with run.alone(), torch.enable_grad():
        if PIXEL_STAGE not in run.stages:
            print(f"consistency model of pixels, seed {seed}", flush=True)
        finish_or_load(job, PIXEL_STAGE, network, train)
    return PixelModel(network, run.stages[PIXEL_STAGE]["thread_seconds"])
