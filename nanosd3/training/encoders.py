"""Text encoders and autoencoder, trained by this run or taken from another model."""

from dataclasses import replace

from nanosd3.lazy_modules import LazyModules
from nanosd3.official.checkpoint import Checkpoint
from nanosd3.pipeline import Pipeline, open_pipeline
from nanosd3.storage.files import sha256
from nanosd3.text import TextEncoders
from nanosd3.training.cached_features import Encoders
from nanosd3.training.stages import Job
from nanosd3.training.train_autoencoder import train_autoencoder
from nanosd3.training.train_text import train_text_encoders
from nanosd3.vae import AutoencoderKL


def frozen_encoders(job: Job, checkpoint: Checkpoint) -> Encoders:
    """Another model's encoders, opened when they are first used."""
    encoders = replace(checkpoint, config=job.config, parts=checkpoint.encoders)
    return Encoders(
        job.config,
        name=job.run.identity["encoders"],
        open=lambda: open_pipeline(encoders, job.device, None, staged=False),
    )


def trained_encoders(job: Job, vae: AutoencoderKL, text: TextEncoders) -> Encoders:
    """The encoders that this run has trained."""
    config = replace(job.config, vae=vae.config)
    modules = LazyModules({**text.parts, "vae": vae}, job.device)
    pipeline = Pipeline(config, text.tokenizers, modules)
    files = [job.run.folder / f"{name}.safetensors" for name in ("autoencoder", "text")]
    return Encoders(config, "-".join(sha256(file) for file in files), lambda: pipeline)


def get_encoders(job: Job, frozen: Checkpoint | None) -> Encoders:
    """The encoders of `frozen`, if given; otherwise this run's own, trained or loaded."""
    if frozen:
        return frozen_encoders(job, frozen)
    return trained_encoders(job, train_autoencoder(job), train_text_encoders(job))
