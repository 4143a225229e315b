"""Small transformers trained by each formulation, for several experiments.

The same network, images, captions, noise and recipe for each; only the formulation differs. The
network is one block deep and conditioned on the pooled text alone, which a tenth of the images go
without. Its weights are kept both as they are after the last step and as their average.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanosd3.claims.data_sets import Latents, SampleInputs
from nanosd3.claims.runs import network_job
from nanosd3.config_types import Recipe
from nanosd3.flow import interpolate, stratified
from nanosd3.mmdit import MMDiT
from nanosd3.related.finished_run import TEXT_DROPOUT
from nanosd3.related.formulations import FORMULATIONS, Formulation
from nanosd3.related.train_paths import by_pooled_text
from nanosd3.samplers import Velocity, euler, guided
from nanosd3.storage.files import load_weights, save_weights
from nanosd3.storage.run import Run
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, training_of

SHORT = Recipe(steps=600, batch=64, lr=8e-3, warmup=50, weight_decay=0.0)
FAST_SHORT = Recipe(steps=4, batch=8, lr=8e-3, warmup=1, weight_decay=0.0)
AVERAGED = 0.99  # decay of the average of the weights
SAMPLED_AT_A_TIME = 200


@dataclass(frozen=True)
class TrainedFormulation:
    """A network twice: with its weights after the last step, and with their average."""

    last: MMDiT
    average: MMDiT
    run: Run  # which may keep what was measured of them

    @property
    def seconds(self) -> float:
        """Of a core, to train it."""
        return self.run.stages["flow"]["thread_seconds"]


def trained_formulation(data: Latents, name: str, seed: int) -> TrainedFormulation:
    """The network of a formulation and a seed, trained now or before."""
    conditions, finished = data.conditions, data.finished
    recipe = FAST_SHORT if conditions.fast else SHORT
    training = replace(training_of(finished.config), flow=recipe, ema_decay=AVERAGED)
    config = replace(finished.config, training=training, mmdit=data.mmdit)
    plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    folder = f"{data.name}-{plain}"
    job = network_job(
        conditions, finished, folder, config, seed, formulation=name, images=data.name
    )
    run = job.run
    with run.alone():
        print(f"{data.name}, {name}, seed {seed}", flush=True)
        average = train_formulation(FORMULATIONS[name], data, job)
    last = build(job, "flow", lambda: MMDiT(config.mmdit))
    load_weights(last, last_file(run.folder))
    last.requires_grad_(False).eval()
    return TrainedFormulation(last, average, run)


def last_file(folder: Path) -> Path:
    return folder / "last.safetensors"


def train_formulation(formulation: Formulation, data: Latents, job: Job) -> MMDiT:
    """Train a network, or load it: the average of its weights. The last ones are written too."""
    model, recipe = build(job, "flow", lambda: MMDiT(job.config.mmdit)), job.training.flow

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return formulation_step(formulation, data, job, model, step_rng), {}

    def keep(step: int, average: nn.Module) -> None:
        if step + 1 == recipe.steps:
            save_weights(model, last_file(job.run.folder))

    train = partial(fit_average, job, "flow", model, loss_of, job.training.ema_decay, keep)
    finish_or_load(job, "flow", model, train)
    return model


def formulation_step(
    formulation: Formulation, data: Latents, job: Job, model: MMDiT, step_rng: StepRNG
) -> Tensor:
    """One training step: the loss of each row of a batch, (B,)."""
    size, generator = job.training.flow.batch, step_rng.generator()
    images = step_rng.take(job.source.draw(size, generator))
    captions = job.source.captions(images, step_rng.take(torch.rand(size, generator=generator)))
    keep = step_rng.take(torch.rand(size, generator=generator) >= TEXT_DROPOUT)
    t = formulation.density(step_rng.take(stratified(size, generator)))
    x0, noise = data.x0_and_noise(images, step_rng)
    _, pooled = data.features.text(captions)
    z = interpolate(x0, noise, t)
    answer = by_pooled_text(model, formulation.network_input(z, t), t, pooled * keep[:, None])
    return (answer - formulation.target(x0, noise, t)).square().flatten(1).mean(1)


def formulation_velocity(
    formulation: Formulation, model: MMDiT, pooled: Tensor, guidance: float = 1.0
) -> Velocity:
    """The velocity field for some pooled text, with classifier-free guidance."""
    flow = formulation.flow_model(partial(by_pooled_text, model))
    return guided(flow, (pooled,), (torch.zeros_like(pooled),), guidance)


@torch.no_grad()
def sample_formulation(
    formulation: Formulation, model: MMDiT, inputs: SampleInputs, steps: int, guidance: float
) -> Tensor:
    """Samples (B, C, h, w) by Euler's method."""
    times, samples = formulation.steps(steps), []
    for rows in torch.arange(len(inputs.noise)).split(SAMPLED_AT_A_TIME):
        velocity = formulation_velocity(formulation, model, inputs.pooled[rows], guidance)
        samples.append(euler(velocity, times[0] * inputs.noise[rows], times))
    return torch.cat(samples)
