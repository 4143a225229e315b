"""Autoencoders with more and with fewer channels, and transformers that draw in their latents.

The latents are 8x8, as in the main job, and so are the transformer's 16 tokens: a pass costs the
same whatever the number of channels. Images, captions, draws and recipe of a seed are the same for
all. The autoencoders are half as wide as the main job's and trained for a tenth of its seconds.
"""

import time
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import measured_once, network_job
from nanosd3.claims.sd3_variants import VARIANT_AVERAGE, TrainedVariant
from nanosd3.config_types import Config, Recipe, VAEConfig
from nanosd3.data.sources import Digits
from nanosd3.lazy_modules import LazyModules
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import reconstruction_scores
from nanosd3.storage.files import sha256
from nanosd3.training.cached_features import Encoders, Features, get_features
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, training_of
from nanosd3.training.train_autoencoder import train_autoencoder
from nanosd3.training.train_flow import flow_step
from nanosd3.vae import AutoencoderKL

CHANNELS, CHANNEL_DEPTHS = (2, 4, 8), (1, 2)
IMAGES_USED = 5000  # of the training images
NARROW = VAEConfig(1, (8, 16, 16), 1, latent_channels=4, norm_groups=4, shift=0.0, scale=1.0)
AUTOENCODER = Recipe(steps=200, batch=16, lr=8e-3, warmup=20, weight_decay=0.0)
KL_WEIGHT = 1e-3  # with the main job's 1e-2 much of many channels would be noise
FLOW = Recipe(200, batch=48, lr=1e-2, warmup=20, weight_decay=0.0, optimizer="muon")


@dataclass(frozen=True)
class TrainedLatents:
    """An autoencoder, what it makes of the images, and where it was trained."""

    vae: AutoencoderKL
    job: Job
    features: Features

    @property
    def seconds(self) -> float:
        """Of a core."""
        return self.job.run.stages["cost"]["thread_seconds"]


def some_digits(finished: FinishedRun) -> Digits:
    """The images that all train on."""
    images = finished.source.images
    return Digits(images.first(IMAGES_USED, len(images.test_images)), finished.config)


def channels_config(conditions: Conditions, finished: FinishedRun, channels: int) -> Config:
    """The finished run's config, for latents with this many channels."""
    autoencoder, flow = AUTOENCODER, FLOW
    if conditions.fast:
        autoencoder = replace(AUTOENCODER, steps=3, batch=8, warmup=1)
        flow = replace(FLOW, steps=4, batch=8, warmup=1)
    training = replace(
        training_of(finished.config),
        autoencoder=autoencoder,
        flow=flow,
        kl_weight=KL_WEIGHT,
        ema_decay=VARIANT_AVERAGE,
    )
    mmdit = replace(finished.config.mmdit, latent_channels=channels, dual_attention=())
    vae = replace(NARROW, latent_channels=channels)
    return replace(finished.config, vae=vae, mmdit=mmdit, training=training)


def trained_latents(
    conditions: Conditions, finished: FinishedRun, source: Digits, channels: int, seed: int
) -> TrainedLatents:
    """The autoencoder with this many channels, trained now or before, and the images in it."""
    config = channels_config(conditions, finished, channels)
    job = network_job(conditions, finished, f"autoencoder-{channels}", config, seed, source)
    with job.run.alone():
        begin = time.process_time()
        vae = train_autoencoder(job)
        parts = LazyModules({**finished.pipeline.parts.sources(), "vae": vae}, finished.device)
        config = replace(config, vae=vae.config)
        pipeline = Pipeline(config, finished.pipeline.text.tokenizers, parts)
        name = f"{finished.encoders_name}-{sha256(job.run.folder / 'autoencoder.safetensors')}"
        features = get_features(job, Encoders(config, name, lambda: pipeline), [])
        if "cost" not in job.run.stages:
            job.run.finish("cost", {"thread_seconds": round(time.process_time() - begin, 1)})
    return TrainedLatents(vae, job, features)


def reconstruction_of(
    conditions: Conditions, finished: FinishedRun, latents: TrainedLatents
) -> dict[str, float]:
    """PSNR in decibels, and the Frechet distance over that of real images."""
    vae = latents.vae

    def decode(x0: Tensor) -> Tensor:
        return vae.decode(vae.denormalise(x0))

    def measure() -> dict[str, float]:
        scores = reconstruction_scores(finished, vae, decode, 20 if conditions.fast else 500)
        return {key: scores[key] for key in ("psnr", "frechet_ratio_to_real")}

    return measured_once(latents.job.run, "reconstruction", measure)


def transformer_in(
    conditions: Conditions, finished: FinishedRun, latents: TrainedLatents, depth: int
) -> TrainedVariant:
    """A transformer of this depth, trained now or before in these latents."""
    job, features = latents.job, latents.features
    config = replace(job.config, mmdit=replace(job.config.mmdit, depth=depth))
    name = f"channels-{config.mmdit.latent_channels}-depth-{depth}"
    own = network_job(conditions, finished, name, config, job.seed, job.source)
    model = build(own, "flow", lambda: MMDiT(config.mmdit))

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return flow_step(own, features, model, step_rng), {}

    with own.run.alone():
        train = partial(fit_average, own, "flow", model, loss_of, own.training.ema_decay)
        finish_or_load(own, "flow", model, train)
    return TrainedVariant(model, own, features)
