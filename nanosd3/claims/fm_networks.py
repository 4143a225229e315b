"""Networks trained along OT, VP and cosine paths, which several experiments share.

The same network, images, noise and recipe for each; only the path differs. They are trained once,
in the folder of the records, and kept at some steps along the way.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nanosd3.claims.data_sets import Latents, SampleInputs, sample_inputs, scores_of_samples
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import network_job
from nanosd3.config_types import Recipe
from nanosd3.mmdit import MMDiT
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
from nanosd3.training.stages import Job, training_of

RECIPE = PATH_RECIPES["mnist"]
KEPT_STEPS = (100, 300, 600)
FAST_RECIPE, FAST_KEPT_STEPS = Recipe(steps=4, batch=8, lr=8e-3, warmup=1, weight_decay=0.0), (2, 4)
SAMPLED_AT_ONCE = 250  # images sampled at once


def kept_steps(conditions: Conditions) -> tuple[int, ...]:
    """The steps after which networks are kept."""
    return FAST_KEPT_STEPS if conditions.fast else KEPT_STEPS


def samples_drawn(conditions: Conditions) -> int:
    """How many samples are scored."""
    return 20 if conditions.fast else 1000


def path_job(data: Latents, name: str, seed: int) -> Job:
    """The training run of a path."""
    conditions, finished = data.conditions, data.finished
    recipe = FAST_RECIPE if conditions.fast else RECIPE
    training = replace(training_of(finished.config), flow=recipe, ema_decay=PATH_EMA_DECAY)
    config = replace(finished.config, training=training)
    return network_job(conditions, finished, name, config, seed, path=name)


def trained_path(data: Latents, name: str, seed: int) -> tuple[Job, MMDiT]:
    """The network of a path and a seed, trained now or before."""
    job = path_job(data, name, seed)
    with job.run.alone():
        print(f"{name}, seed {seed}", flush=True)
        return job, train_path(PATHS[name], job, data.features, kept_steps(data.conditions))


def kept_networks(data: Latents, name: str, seed: int) -> dict[int, MMDiT]:
    """The networks of a path after each of the steps that are kept."""
    job, final = trained_path(data, name, seed)
    *early, last = kept_steps(data.conditions)
    assert all(kept_file(job, step).exists() for step in early)
    return {step: load_kept(job, step) for step in early} | {last: final}


def training_seconds(data: Latents, names: tuple[str, ...]) -> float:
    """Of a core, for all networks of these paths."""
    jobs = [path_job(data, n, seed) for n in names for seed in data.conditions.seeds]
    return sum(job.run.stages["flow"]["thread_seconds"] for job in jobs)


def path_inputs(data: Latents, seed: int, count: int) -> SampleInputs:
    """Prompts, and the pipeline's own noise for them."""
    inputs, config = sample_inputs(data, seed, count), data.finished.config
    side = config.image_size // config.vae.factor
    noise = data.finished.pipeline.noise(len(inputs.noise), seed, (side, side))
    return replace(inputs, noise=noise)


def fields(model: MMDiT, inputs: SampleInputs) -> list[tuple[Velocity, Tensor]]:
    """The velocity field and the noise of some images at a time."""
    rows = torch.arange(len(inputs.noise)).split(SAMPLED_AT_ONCE)
    return [(velocity_for(model, inputs.pooled[r]), inputs.noise[r]) for r in rows]


@torch.no_grad()
def path_scores(
    data: Latents, path: ProbabilityPath, model: MMDiT, inputs: SampleInputs, evaluations: int
) -> tuple[float, float]:
    """Accuracy, and Frechet distance relative to real images, of samples in even Euler steps."""
    ts = torch.linspace(1, path.first, evaluations + 1)
    latents = torch.cat([euler(v, path.prior_std * z, ts) for v, z in fields(model, inputs)])
    return scores_of_samples(data, latents, inputs)
