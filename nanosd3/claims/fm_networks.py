"""Networks trained along OT, VP and cosine paths, which several experiments share.

The same network, images, noise and recipe for each; only the path differs. They are trained once,
in the folder of the records, and kept at some steps on the way.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.material import network_job, open_encoded
from nanosd3.config_types import Recipe
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.paths import PATHS, ProbabilityPath
from nanosd3.related.train_paths import (
    PATH_EMA_DECAY,
    PATH_RECIPES,
    kept_file,
    load_kept,
    train_path,
    velocity_for,
)
from nanosd3.samplers import Velocity, euler
from nanosd3.training.cached_features import Features
from nanosd3.training.evaluation import Draw, Scorer, draw_prompts, to_digits
from nanosd3.training.stages import Job, training_of

RECIPE = PATH_RECIPES["mnist"]
KEPT_STEPS = (100, 300, 600)
FAST_RECIPE, FAST_KEPT_STEPS = Recipe(steps=4, batch=8, lr=8e-3, warmup=1, weight_decay=0.0), (2, 4)
SAMPLED_AT_ONCE = 250  # images sampled at once


@dataclass(frozen=True)
class Material:
    """What experiments with trained paths start from."""

    conditions: Conditions
    finished: FinishedRun
    features: Features

    @property
    def pipeline(self) -> Pipeline:
        """Of the finished run, for its autoencoder and text."""
        return self.finished.pipeline

    @property
    def scorer(self) -> Scorer:
        return self.finished.scorer

    @property
    def kept(self) -> tuple[int, ...]:
        """The steps after which networks are looked at."""
        return FAST_KEPT_STEPS if self.conditions.fast else KEPT_STEPS

    @property
    def samples(self) -> int:
        return 20 if self.conditions.fast else 1000


def open_material(conditions: Conditions) -> Material:
    """Open the finished run and encode its images, once. Raises InputError if it is none."""
    finished, features = open_encoded(conditions)
    return Material(conditions, finished, features)


def job_for(material: Material, name: str, seed: int) -> Job:
    """The training run of a path."""
    conditions, finished = material.conditions, material.finished
    recipe = FAST_RECIPE if conditions.fast else RECIPE
    training = replace(training_of(finished.config), flow=recipe, ema_decay=PATH_EMA_DECAY)
    config = replace(finished.config, training=training)
    return network_job(conditions, finished, name, config, seed, path=name)


def trained(material: Material, name: str, seed: int) -> tuple[Job, MMDiT]:
    """The network of a path and a seed, trained now or before."""
    job = job_for(material, name, seed)
    with job.run.alone():
        print(f"{name}, seed {seed}", flush=True)
        return job, train_path(PATHS[name], job, material.features, material.kept)


def kept_networks(material: Material, name: str, seed: int) -> dict[int, MMDiT]:
    """The networks of a path after each of the steps that are kept."""
    job, final = trained(material, name, seed)
    *early, last = material.kept
    assert all(kept_file(job, step).exists() for step in early)
    return {step: load_kept(job, step) for step in early} | {last: final}


def training_seconds(material: Material, names: tuple[str, ...]) -> float:
    """Of a core, for all networks of these paths."""
    jobs = [job_for(material, n, seed) for n in names for seed in material.conditions.seeds]
    return sum(job.run.stages["flow"]["thread_seconds"] for job in jobs)


@dataclass(frozen=True)
class Prompted:
    """Prompts to draw, the noise to start from and what tells the network: the same for all."""

    draw: Draw
    noise: Tensor
    pooled: Tensor
    floor: float


def prompted(material: Material, seed: int, count: int) -> Prompted:
    draw = draw_prompts(material.scorer.source, count, seed)
    pooled = torch.stack([material.features[text][1] for text in draw.prompts])
    config = material.pipeline.config
    side = config.image_size // config.vae.factor
    noise = material.pipeline.noise(len(draw.prompts), seed, (side, side))
    return Prompted(draw, noise, pooled, material.scorer.floor(draw))


def fields(model: MMDiT, what: Prompted) -> list[tuple[Velocity, Tensor]]:
    """The velocity field and the noise of some images at a time."""
    rows = torch.arange(len(what.noise)).split(SAMPLED_AT_ONCE)
    return [(velocity_for(model, what.pooled[r]), what.noise[r]) for r in rows]


@torch.no_grad()
def score(
    material: Material, path: ProbabilityPath, model: MMDiT, what: Prompted, evaluations: int
) -> tuple[float, float]:
    """Accuracy, and Frechet distance relative to real images, of Euler's samples in even steps."""
    ts = torch.linspace(1, path.first, evaluations + 1)
    latents = torch.cat([euler(v, path.prior_std * z, ts) for v, z in fields(model, what)])
    digits = to_digits(torch.from_numpy(material.pipeline.decode(latents)))
    accuracy, distance = material.scorer.score(digits, what.draw)
    return accuracy, distance / what.floor
