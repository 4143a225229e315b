"""Two decoders for the latents of one strongly compressing autoencoder, several seeds of each.

One continues where the autoencoder's own decoder stopped, with the same loss; the other is the
Consistency Decoder. Both see the same latents and equally many images, in equally many steps.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import network_job
from nanosd3.config import MNIST_COMPRESSED
from nanosd3.config_types import Recipe, VAEConfig
from nanosd3.related.consistency_decoder import ConsistencyDecoder
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.train_consistency_decoder import DECODER_EMA, trained_decoder
from nanosd3.training.loop import StepLoss, StepRNG
from nanosd3.training.stages import Job, finish_or_load, fit_average, training_of
from nanosd3.training.train_autoencoder import train_autoencoder
from nanosd3.vae import AutoencoderKL, sample_posterior

LONGER = "longer"  # stage
DECODER_SHORT = Recipe(300, batch=32, lr=2e-3, warmup=50, weight_decay=0.0)
FAST_DECODER_SHORT = Recipe(3, batch=8, lr=2e-3, warmup=1, weight_decay=0.0)


@dataclass(frozen=True)
class TwoDecoders:
    """Decoders of the same latents, and the seconds of a core that each was trained for."""

    longer: AutoencoderKL  # whose encoder is as it was
    consistency: ConsistencyDecoder
    seconds: tuple[float, float]


def decoder_job(
    conditions: Conditions,
    finished: FinishedRun,
    name: str,
    seed: int,
    vae: VAEConfig = MNIST_COMPRESSED,
) -> Job:
    """Where something is trained for the latents of an autoencoder."""
    recipe = FAST_DECODER_SHORT if conditions.fast else DECODER_SHORT
    training = replace(training_of(finished.config), flow=recipe)
    if conditions.fast:
        training = replace(training, autoencoder=recipe)
    config = replace(finished.config, vae=vae, training=training)
    return network_job(conditions, finished, name, config, seed)


def compressing_autoencoder(
    conditions: Conditions, finished: FinishedRun
) -> tuple[AutoencoderKL, float]:
    """The same for all seeds, trained now or before, and how long."""
    job = decoder_job(conditions, finished, "compressing-autoencoder", 0)
    with job.run.alone(), torch.enable_grad():
        vae = train_autoencoder(job)
    return vae, job.run.stages["autoencoder"]["seconds"]


def longer_loss(job: Job, vae: AutoencoderKL) -> StepLoss:
    """The autoencoder's squared error, on latents that no longer change."""

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator = step_rng.generator()
        index = step_rng.take(job.source.draw(job.training.flow.batch, generator))
        x = job.source.pixels(index).to(job.device)
        with torch.no_grad():
            mean, logvar = vae.encode(x)
        noise = step_rng.noise(mean.shape[1:]).to(job.device)
        rebuilt = vae.decode(sample_posterior(mean, logvar, noise))
        return (rebuilt - x).square().flatten(1).sum(1), {}

    return loss_of


def trained_longer(job: Job, vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder with a decoder that was trained further, or loaded: the average of its
    weights."""
    longer = copy.deepcopy(vae)
    longer.decoder.requires_grad_(True)
    loss_of = longer_loss(job, longer)
    train = partial(fit_average, job, LONGER, longer.decoder, loss_of, DECODER_EMA)
    finish_or_load(job, LONGER, longer.decoder, train)
    return longer


def two_decoders(
    conditions: Conditions, finished: FinishedRun, vae: AutoencoderKL, seed: int
) -> TwoDecoders:
    """Those of a seed, trained now or before."""
    job = decoder_job(conditions, finished, "decoders", seed)
    with job.run.alone(), torch.enable_grad():
        print(f"decoders, seed {seed}", flush=True)
        longer, consistency = trained_longer(job, vae), trained_decoder(job, vae)
    seconds = tuple(job.run.stages[s]["thread_seconds"] for s in (LONGER, "decoder"))
    return TwoDecoders(longer, consistency, (seconds[0], seconds[1]))
