"""Hourglass and flat transformers in 64 x 64 pixels, with equal multiply-adds per pass, trained for
experiments.

All see the same images, captions, noise and times in the same order, for as many steps. All are
scored by the weighted loss on held-out images, whatever loss they were trained with, and by
samples.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import measured_once, network_job, open_main_run
from nanosd3.config_types import Recipe
from nanosd3.flow import interpolate, stratified
from nanosd3.random_streams import rng
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.hdit import HDiT, HDiTConfig, HDiTLevel, hdit_loss, hdit_multiply_adds
from nanosd3.related.hdit_system import HDIT_EMA_DECAY, HDIT_SAMPLING, HEAD_DIM, MAPPING, SIDES
from nanosd3.related.scoring import evaluations, score_samples
from nanosd3.related.train_hdit import (
    SIGMA_DATA,
    Pixels,
    drawn_images,
    noisy_times,
    normalised_pixels,
    pooled_text,
    trained_hdit,
)
from nanosd3.training.evaluation import Draw
from nanosd3.training.stages import Job, training_of

PIXEL_STEPS, PIXEL_BATCH = 420, 32
LOSS_CHECKPOINTS = (0.25, 0.5, 0.75, 1.0)  # shares of the steps, after which the loss is taken
NOISES_PER_IMAGE = 2  # in the validation loss


@dataclass(frozen=True)
class HDiTVariant:
    """A network's sizes, learning rate and loss."""

    name: str
    patch: int
    levels: tuple[HDiTLevel, ...]  # outermost first; a single one without a window is flat
    lr: float
    sigma_data: float | None = SIGMA_DATA  # of the loss's weight; None: no weight


class HDiTTrainer:
    """Trains HDiTs on pixels and the text of a finished main job."""

    def __init__(self, conditions: Conditions):
        self.conditions = conditions
        self.finished = finished = open_main_run(conditions)
        self.config = replace(
            finished.config,
            image_size=SIDES["mnist"],
            training=replace(training_of(finished.config), ema_decay=HDIT_EMA_DECAY),
            sampling=HDIT_SAMPLING,
        )
        self.pixels = normalised_pixels(finished.source, self.config)
        self.pooled = pooled_text(finished.pipeline, finished.source.texts)

    def sizes(self, net: HDiTVariant) -> HDiTConfig:
        main = self.finished.config
        channels, pooled_dim = main.vae.image_channels, main.mmdit.pooled_dim
        sizes = (net.patch, net.levels, HEAD_DIM, *MAPPING["mnist"])
        return HDiTConfig(channels, *sizes, pooled_dim)

    def multiply_adds(self, net: HDiTVariant) -> float:
        """Of a pass on one image, in millions."""
        side = self.config.image_size
        return hdit_multiply_adds(self.sizes(net), side, side) / 1e6

    def trained(self, net: HDiTVariant, seed: int) -> "TrainedHDiT":
        """The network of a seed, trained now or before."""
        recipe = Recipe(PIXEL_STEPS, PIXEL_BATCH, net.lr, warmup=50, weight_decay=0.0)
        if self.conditions.fast:
            recipe = replace(recipe, steps=4, batch=8, warmup=1)
        config = replace(self.config, training=replace(training_of(self.config), flow=recipe))
        sizes, finished = self.sizes(net), self.finished
        what = {"sizes": asdict(sizes), "strongest": net.sigma_data}
        job = network_job(self.conditions, finished, net.name, config, seed, network=what)
        measured_after = [max(1, round(share * recipe.steps)) for share in LOSS_CHECKPOINTS]

        def watch(step: int, average: nn.Module) -> None:
            if step + 1 in measured_after:
                job.run.log(stage="hdit", step=step, held_out=self.held_out_loss(average))

        with job.run.alone():
            if "hdit" not in job.run.stages:
                print(f"{net.name}, seed {seed}", flush=True)
            model = trained_hdit(job, sizes, self.pixels, self.pooled, net.sigma_data, watch)
        return TrainedHDiT(model, job, self.pixels)

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """The weighted loss on held-out images, at noise and times that are always the same."""
        source, generator = self.finished.source, rng("pixels held out")
        images = torch.arange(source.trained, source.count).repeat(NOISES_PER_IMAGE)
        x0 = self.pixels[images]
        noise = torch.randn(x0.shape, generator=generator)
        t = noisy_times(stratified(len(images), generator))
        text = self.pooled[source.captions(images, torch.zeros(len(images)))]
        losses: list[Tensor] = []
        for rows in torch.arange(len(images)).split(PIXEL_BATCH):
            x, n, s = x0[rows], noise[rows], t[rows]
            velocity = model(interpolate(x, n, s), s, text[rows])
            losses.append(hdit_loss(velocity, x, n, s, SIGMA_DATA))
        return torch.cat(losses).mean().item()


@dataclass(frozen=True)
class TrainedHDiT:
    """The average of a network's weights, and where it was trained."""

    model: HDiT
    job: Job
    pixels: Pixels

    @property
    def seconds(self) -> float:
        """Of a core."""
        return self.job.run.stages["hdit"]["thread_seconds"]

    @property
    def losses(self) -> dict[int, float]:
        """The loss on held-out images, by training step."""
        log = self.job.run.read_log()
        return {entry["step"] + 1: entry["held_out"] for entry in log if "held_out" in entry}

    def scores(self, finished: FinishedRun, count: int) -> tuple[float, float]:
        """Share of samples classified as prompted; Frechet distance over that of real images."""
        sampling, seed = self.job.config.sampling, 100 + self.job.seed

        def generate(draw: Draw, noise_seed: int) -> np.ndarray:
            return drawn_images(
                self.model, self.pixels, finished.pipeline, draw.prompts, noise_seed, sampling
            )

        def measure() -> dict:
            return score_samples(finished, generate, count, evaluations(sampling), (seed,))

        found = measured_once(self.job.run, "scores", measure)
        return found["prompt_accuracy"], found["frechet_ratio_to_real"]
