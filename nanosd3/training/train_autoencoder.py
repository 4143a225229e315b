"""Training the autoencoder, and measuring the mean and standard deviation of its latents."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from nanosd3.machine.distributed import Compute, ParallelModel
from nanosd3.measure.memory_check import autoencoder_rows
from nanosd3.pipeline import images_at_once
from nanosd3.training.loop import StepRNG, fit
from nanosd3.training.stages import Job, build, finish_or_load
from nanosd3.vae import AutoencoderKL, kl_divergence, sample_posterior

MEASURED_IMAGES = 5000  # at most, to estimate the latents' mean and standard deviation
MEASURING_BATCH = 8  # at most


def train_autoencoder(job: Job) -> AutoencoderKL:
    """Train the autoencoder, or load it.

    The config of the model returned has the measured `shift` and `scale`, which normalise latents.
    """
    training = job.training
    vae = build(job, "autoencoder", lambda: AutoencoderKL(job.config.vae)).to(job.device)
    recipe = training.autoencoder

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator = step_rng.generator()
        index = step_rng.take(job.source.draw(recipe.batch, generator))
        x = job.source.pixels(index).to(job.device)
        mean, logvar = vae.encode(x)
        noise = torch.randn(recipe.batch, *mean.shape[1:], generator=generator)
        noise = step_rng.take(noise).to(job.device)
        difference = vae.decode(sample_posterior(mean, logvar, noise)) - x
        reconstruction = difference.square().flatten(1).sum(1).mean()
        kl = kl_divergence(mean, logvar).mean()
        loss = reconstruction + training.kl_weight * kl
        return loss, {"reconstruction": reconstruction.item(), "kl": kl.item()}

    def train() -> dict:
        compute = Compute(accumulate=recipe.batch // autoencoder_rows(job.config))
        parallel = ParallelModel(vae, compute=compute)
        fit(job.run, "autoencoder", vae, loss_of, recipe, job.seed, parallel=parallel)
        return measured_latents(job, vae)

    results = finish_or_load(job, "autoencoder", vae, train)
    vae.config = replace(vae.config, shift=results["shift"], scale=results["scale"])
    deviation = 1 / results["scale"]
    print(f"autoencoder: latents have mean {results['shift']:.3f}, std {deviation:.3f}")
    return vae


@torch.no_grad()
def measured_latents(job: Job, vae: AutoencoderKL) -> dict[str, float]:
    """The `shift` and `scale` that bring the latents to mean 0 and standard deviation 1."""
    count = total = squares = 0.0
    for group in job.source.groups(range(min(job.source.trained, MEASURED_IMAGES))):
        pixels = job.source.pixels(group[:1])[0, 0].numel()
        for index in group.split(min(MEASURING_BATCH, images_at_once(vae.config, pixels))):
            mean, logvar = vae.encode(job.source.pixels(index).to(job.device))
            count += mean.numel()
            total += mean.double().sum().item()
            squares += (mean.double().square() + logvar.double().exp()).sum().item()
    mean_of_all = total / count
    return {"shift": mean_of_all, "scale": 1 / math.sqrt(squares / count - mean_of_all**2)}
