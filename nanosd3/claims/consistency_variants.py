"""Consistency training without a teacher, as first published and with each later change alone.

The first recipe (arXiv 2303.01469) uses a moving average of the network as the target, and squared
distances. The improved one (2310.14189) changes five things, each of which is a switch here. The
network is a small class-conditional DiT in the main job's latents; variants differ only in their
switches.
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor, nn

from nanosd3.claims.dit_networks import DiTTrainer
from nanosd3.claims.runs import network_job
from nanosd3.config_types import Recipe
from nanosd3.flow import interpolate
from nanosd3.related.consistency import (
    SIGMA_MAX,
    consistency_loss,
    doubling_count,
    draw_levels,
    even_levels,
    gap_weight,
    lognormal_weights,
    squared_distance,
    target_decay,
    time_of,
)
from nanosd3.related.dit import DiT
from nanosd3.related.scoring import accuracy_and_ratio, draw_and_floor
from nanosd3.samplers import euler
from nanosd3.training.ema import make_ema
from nanosd3.training.loop import StepLoss, StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, in_chunks, training_of

CONSISTENCY_STAGE = "consistency"
CONSISTENCY_LEVELS = (2, 8)  # at first, where they double, and at last
TOP = float(time_of(torch.tensor(SIGMA_MAX)))  # the last level, 0.988: samples start there


@dataclass(frozen=True)
class ConsistencyVariant:
    """The original training with some of the changes."""

    huber: bool = False  # pseudo-Huber distance; else the square
    itself: bool = False  # the target is the network itself; else the average of its weights
    doubled: bool = False  # few levels at first, then twice as many; else all from the start
    lognormal: bool = False  # pairs drawn by a lognormal of their noise; else all equally often
    weighted: bool = False  # by 1 / the gap of their noise; else all equally

    @property
    def name(self) -> str:
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return "-".join(on) or "original"


@dataclass(frozen=True)
class TrainedConsistency:
    """The average of a network's weights, and the seconds of a core that it took."""

    network: DiT
    seconds: float


def variant_loss(
    job: Job, trainer: DiTTrainer, network: DiT, average: nn.Module, variant: ConsistencyVariant
) -> StepLoss:
    """Losses of pairs that are the same image with the same noise, at two levels."""
    recipe, (first, last) = job.training.flow, CONSISTENCY_LEVELS
    target = None if variant.itself else average
    distance = None if variant.huber else squared_distance

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator, step = step_rng.generator(), int(step_rng.name[-1])
        count = doubling_count(step, recipe.steps, first, last) - 1 if variant.doubled else last
        times = TOP * even_levels(count)
        images = step_rng.take(job.source.draw(recipe.batch, generator))
        often = lognormal_weights(times) if variant.lognormal else None
        levels = draw_levels(times, recipe.batch, generator, often)
        t, s = (step_rng.take(x) for x in levels)
        x0, noise = trainer.features.latents_and_noise(images, step_rng)
        z_t, z_s = interpolate(x0, noise, t), interpolate(x0, noise, s)
        y = trainer.labels[images]
        options = {"target_network": target, "distance": distance}
        losses = consistency_loss(network, z_t, t, z_s, s, y, **options)
        return losses * gap_weight(t, s) if variant.weighted else losses, {"levels": count}

    return loss_of


def trained_consistency(
    trainer: DiTTrainer, variant: ConsistencyVariant, seed: int, steps: int, lr: float
) -> TrainedConsistency:
    """The network of a variant and a seed, trained now or before."""
    conditions, finished = trainer.conditions, trainer.finished
    steps = min(steps, 4) if conditions.fast else steps
    recipe = Recipe(steps, batch=64, lr=lr, warmup=min(50, steps // 2), weight_decay=0.0)
    training = replace(training_of(finished.config), flow=recipe)
    config, dit = replace(finished.config, training=training), trainer.config()
    dit = replace(dit, learned_variance=False)
    name = f"way-{variant.name}-{steps}"
    job = network_job(conditions, finished, name, config, seed, dit=asdict(dit), way=variant.name)
    run = job.run
    network = build(job, CONSISTENCY_STAGE, lambda: DiT(dit))
    average = make_ema(network)
    loss_of = variant_loss(job, trainer, network, average, variant)
    decay = target_decay(CONSISTENCY_LEVELS[1])
    train = partial(fit_average, job, CONSISTENCY_STAGE, network, loss_of, decay, average=average)
    with run.alone(), torch.enable_grad():
        if CONSISTENCY_STAGE not in run.stages:
            print(f"{variant.name}, seed {seed}", flush=True)
        finish_or_load(job, CONSISTENCY_STAGE, network, train)
    return TrainedConsistency(network, run.stages[CONSISTENCY_STAGE]["thread_seconds"])


@torch.no_grad()
def scores_of_times(
    trainer: DiTTrainer, network: DiT, seed: int, times: list[float]
) -> tuple[float, float]:
    """Share of samples in Euler steps at these times classified as prompted, and their Frechet
    distance over that of real images. One step from a time to 0 is a consistency model's."""
    finished = trainer.finished
    count = 20 if trainer.conditions.fast else 1000
    draw, floor = draw_and_floor(finished, count, 100 + seed)
    size = trainer.latent_size
    noise = times[0] * finished.pipeline.noise(len(draw.labels), seed, (size, size))
    rows = torch.arange(len(noise))

    def sampled(row: Tensor) -> Tensor:
        velocity = partial(network, y=draw.labels[row])
        return euler(velocity, noise[row], torch.tensor(times))

    latents = in_chunks(sampled, rows)
    return accuracy_and_ratio(finished, finished.pipeline.decode(latents), draw, floor)
