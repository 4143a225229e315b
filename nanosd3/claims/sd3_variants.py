"""The main job's transformer trained for a tenth of its time, in variants, for several experiments.

The text, the images, the recipe and the draws of a step are the same for all variants of a seed.
Depth sets the width too (64 a block), as everywhere in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import measured_once, network_job
from nanosd3.claims.sd3_one_way import OneWayMMDiT
from nanosd3.config_types import MMDiTConfig, Recipe, Sampling
from nanosd3.mmdit import MMDiT
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import pipeline_scores
from nanosd3.training.cached_features import Features
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, training_of
from nanosd3.training.train_flow import flow_step, validation_loss

VARIANT_STEPS = 500
CHECKPOINTS = (0.3, 0.6, 1.0)  # shares of the steps after which the validation loss is taken
VARIANT_AVERAGE = 0.98  # decay of the average of the weights, which is what is measured


@dataclass(frozen=True)
class Variant:
    """What differs from the main job's transformer."""

    depth: int = 2
    image_reads_text: bool = True
    text_reads_image: bool = True
    encoder_dropout: bool = True  # of each encoder at random, in training
    data: str = ""  # what it is trained on, if not the main job's images and captions
    steps: int = VARIANT_STEPS

    @property
    def name(self) -> str:
        cuts = {"-image-blind": not self.image_reads_text, "-text-blind": not self.text_reads_image}
        parts = [f"depth-{self.depth}", *(cut for cut, is_so in cuts.items() if is_so)]
        parts += [] if self.encoder_dropout else ["-all-heard"]
        parts += [f"-{self.data}"] if self.data else []
        return "".join(parts)

    def make(self, config: MMDiTConfig) -> MMDiT:
        return OneWayMMDiT(config, self.image_reads_text, self.text_reads_image)


@dataclass(frozen=True)
class TrainedVariant:
    """The average of a network's weights, and where it was trained."""

    model: MMDiT
    job: Job
    features: Features

    def once(self, what: str, measure: Callable[[], Any]) -> Any:
        """What has been measured of it, now or before, as JSON keeps it."""
        return measured_once(self.job.run, what, measure)

    @property
    def seconds(self) -> float:
        """Of a core."""
        return self.job.run.stages["flow"]["thread_seconds"]

    @property
    def losses(self) -> dict[int, float]:
        """The validation loss (mean over t) by training step."""
        log = self.job.run.read_log()
        return {entry["step"] + 1: entry["mean"] for entry in log if "mean" in entry}


def trained_variant(
    conditions: Conditions,
    finished: FinishedRun,
    features: Features,
    variant: Variant,
    seed: int,
) -> TrainedVariant:
    """The network of a variant and a seed, trained now or before on the images of `features`."""
    training = training_of(finished.config)
    recipe = replace(training.flow, steps=variant.steps, batch=64, lr=8e-3, warmup=50)
    if conditions.fast:
        recipe = replace(recipe, steps=5, batch=8, warmup=1)
    training = replace(
        training,
        flow=recipe,
        ema_decay=VARIANT_AVERAGE,
        encoder_dropout=training.encoder_dropout if variant.encoder_dropout else 0.0,
    )
    mmdit = replace(finished.config.mmdit, depth=variant.depth, dual_attention=())
    config = replace(finished.config, training=training, mmdit=mmdit)
    name, source = variant.name, features.source
    job = network_job(conditions, finished, name, config, seed, source, variant=name)
    model = build(job, "flow", lambda: variant.make(mmdit))
    with job.run.alone():
        if "flow" not in job.run.stages:
            print(f"{name}, seed {seed}", flush=True)
        train_variant(job, features, model, recipe, log_losses=not variant.data)
    return TrainedVariant(model, job, features)


def train_variant(
    job: Job, features: Features, model: nn.Module, recipe: Recipe, log_losses: bool = True
) -> None:
    """Train in place, logging validation losses if `log_losses`, or load. (Losses on other data, or
    for other captions, cannot be compared.)"""
    logged_after = (
        [max(1, round(share * recipe.steps)) for share in CHECKPOINTS] if log_losses else []
    )

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return flow_step(job, features, model, step_rng), {}

    def watch(step: int, average: nn.Module) -> None:
        if step + 1 in logged_after:
            job.run.log(stage="flow", step=step, mean=mean_loss(job, features, average))

    decay = job.training.ema_decay
    train = partial(fit_average, job, "flow", model, loss_of, decay, watch)
    finish_or_load(job, "flow", model, train)


@torch.no_grad()
def mean_loss(job: Job, features: Features, model: nn.Module) -> float:
    """The validation loss, a mean over its times."""
    losses = validation_loss(job, features, model)
    return sum(losses) / len(losses)


def sample_scores(
    conditions: Conditions, finished: FinishedRun, network: TrainedVariant, seed: int
) -> tuple[float, float]:
    """Share of samples classified as prompted; Frechet distance over that of real images."""

    def measure() -> dict:
        pipeline = network.features.pipeline(network.model, finished.device)
        sampling = Sampling(steps=8, guidance=1.6, shift=1.0, sampler="heun")
        count = 20 if conditions.fast else 500
        return pipeline_scores(finished, pipeline, count, sampling, (100 + seed,))

    scores = network.once("scores", measure)
    return scores["prompt_accuracy"], scores["frechet_ratio_to_real"]
