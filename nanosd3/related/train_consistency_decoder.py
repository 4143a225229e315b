"""Train a consistency decoder for the latents of a finished run, or for a strong compression.

`generate --decoder FOLDER` then decodes with it what the finished run generates. That run's latents
hold nearly all of an image, so there is little to gain. With `--compress`, where there is more to
gain, an autoencoder with an eighth of the latent size is trained first.
"""

import argparse
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanosd3.cli import Parser
from nanosd3.config import MNIST_COMPRESSED
from nanosd3.config_types import Config, Recipe
from nanosd3.errors import InputError
from nanosd3.flow import interpolate
from nanosd3.official.limits import limited_config
from nanosd3.pipeline import Pipeline
from nanosd3.random_streams import rng
from nanosd3.related.command import Study, System, size_of, with_flow_recipe
from nanosd3.related.consistency import (
    consistency_loss,
    doubling_count,
    draw_levels,
    even_levels,
)
from nanosd3.related.consistency_decoder import (
    DECODING_TIMES,
    ConsistencyDecoder,
    decode_in_steps,
)
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import (
    Decode,
    draw_decoded,
    pipeline_scores,
    reconstruction_scores,
)
from nanosd3.storage.files import read_module, sha256
from nanosd3.storage.run import Run
from nanosd3.training.loop import StepLoss, StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average
from nanosd3.training.train_autoencoder import train_autoencoder
from nanosd3.vae import AutoencoderKL, sample_posterior

WIDTHS = {"mnist": (16, 32, 64), "tiny": (8, 8, 8)}
DECODER_RECIPES = {
    "mnist": Recipe(1000, batch=64, lr=2e-3, warmup=50, weight_decay=0.0),
    "tiny": Recipe(4, batch=8, lr=2e-3, warmup=1, weight_decay=0.0),
}
DECODER_LEVELS = (2, 8)  # at first and at last
DECODER_EMA = 0.995


# --- training -------------------------------------------------------------------------------------


def decoder_loss(job: Job, vae: AutoencoderKL, decoder: nn.Module) -> StepLoss:
    """Losses of consistency training on images, each beside its latents."""
    recipe = job.training.flow

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator, step = step_rng.generator(), int(step_rng.name[-1])
        count = doubling_count(step, recipe.steps, *DECODER_LEVELS) - 1
        x0 = job.source.pixels(step_rng.take(job.source.draw(recipe.batch, generator)))
        levels = draw_levels(even_levels(count), recipe.batch, generator)
        t, s = (step_rng.take(x).to(job.device) for x in levels)
        with torch.no_grad():
            mean, logvar = vae.encode(x0.to(job.device))
        sizes = [x[0].numel() for x in (x0, mean)]
        noise, posterior = step_rng.noise((sum(sizes),)).to(job.device).split(sizes, dim=1)
        noise, x0 = noise.view_as(x0), x0.to(job.device)
        latents = vae.normalise(sample_posterior(mean, logvar, posterior.view_as(mean)))
        z_t, z_s = interpolate(x0, noise, t), interpolate(x0, noise, s)
        return consistency_loss(decoder, z_t, t, z_s, s, latents), {"levels": count}

    return loss_of


def empty_decoder(config: Config) -> ConsistencyDecoder:
    widths = WIDTHS["tiny" if config.name == "tiny" else "mnist"]
    return ConsistencyDecoder(config.vae.image_channels, config.vae.latent_channels, widths)


def trained_decoder(job: Job, vae: AutoencoderKL) -> ConsistencyDecoder:
    """The decoder, trained or loaded: the moving average of its weights."""
    decoder = build(job, "decoder", lambda: empty_decoder(job.config)).to(job.device)
    loss_of = decoder_loss(job, vae, decoder)
    train = partial(fit_average, job, "decoder", decoder, loss_of, DECODER_EMA)
    finish_or_load(job, "decoder", decoder, train)
    return decoder


def decoding(decoder: ConsistencyDecoder, factor: int, steps: int = 2) -> Decode:
    """The decoder as a function of the latents alone: every image gets the same noise."""
    ts = (*DECODING_TIMES[:steps], 0.0)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        size = (factor * n for n in latents.shape[2:])
        shape = (steps, 1, decoder.conv_out.out_channels, *size)
        noise = torch.randn(shape, generator=rng("decoder noise")).to(latents)
        return decode_in_steps(decoder, latents, noise.expand(-1, len(latents), -1, -1, -1), ts)

    return decode


# --- decoding with a trained one ------------------------------------------------------------------


def open_decoder(folder: Path, model: Path, device: torch.device) -> Decode:
    """The decoder in a run folder, for the latents of the run `model`.

    Raises InputError if the folder holds none, or one for other latents.
    """
    run = Run.read(folder)
    if run.identity.get("system") != ConsistencyDecoding.name or "decoder" not in run.stages:
        raise InputError(
            f"--decoder {folder}: holds no finished decoder; "
            "`python -m nanosd3.related consistency-decoder` trains one"
        )
    if run.identity.get("compress"):
        raise InputError(f"--decoder {folder}: is for an autoencoder of its own (--compress)")
    own = model / "autoencoder.safetensors"
    if not own.exists() or sha256(own) != run.identity["autoencoder"]:
        raise InputError(
            f"--decoder {folder}: is for the latents of another autoencoder than that of {model}"
        )
    config = limited_config(run.identity["config"], folder / "run.json")
    decoder = read_module(lambda: empty_decoder(config), folder / "decoder.safetensors")
    return decoding(decoder.to(device), config.vae.factor)


class ConsistencyDecoding(System):
    name = "consistency-decoder"
    what = "The Consistency Decoder: generates what the latents leave open, in two steps."
    paper = "OpenAI, 2023; arXiv 2303.01469"
    compared_with = "by the autoencoder's decoder"

    def add_options(self, parser: Parser) -> None:
        text = "train an autoencoder first that compresses eight times more, and decode that"
        parser.add_argument("--compress", action="store_true", help=text)

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        config = with_flow_recipe(finished.config, DECODER_RECIPES[size_of(args, finished)], args)
        if not args.compress:
            return config
        channels = MNIST_COMPRESSED.latent_channels
        mmdit = replace(config.mmdit, latent_channels=channels)
        return replace(config, vae=MNIST_COMPRESSED, mmdit=mmdit)

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        own = finished.run.folder / "autoencoder.safetensors"
        if not own.exists():
            raise InputError(f"{args.run}: has no autoencoder of its own to decode the latents of")
        return {"compress": args.compress, "autoencoder": sha256(own)}

    def train(self, study: Study) -> dict:
        job, finished = study.job, study.finished
        vae = train_autoencoder(job) if study.args.compress else finished.pipeline.vae
        decoder = trained_decoder(job, vae)
        factor = vae.config.factor
        ways: dict[str, Decode] = {
            "autoencoder": lambda latents: vae.decode(vae.denormalise(latents)),
            "consistency decoder, 1 step": decoding(decoder, factor, 1),
            "consistency decoder, 2 steps": decoding(decoder, factor),
        }
        count, sampling = job.training.evaluate, finished.config.sampling
        decoded = {
            name: reconstruction_scores(finished, vae, way, count) for name, way in ways.items()
        }
        draw_decoded(finished, vae, ways, job.run.folder / "samples.png")
        own, _, two = decoded.values()
        result = {"decoded": decoded, "training_seconds": job.run.stages["decoder"]["seconds"]}
        if study.args.compress:
            return two | {"evaluations": 2, "main_model": own | {"evaluations": 1}} | result
        pipeline = replaced_decoder(finished.pipeline, ways["consistency decoder, 2 steps"])
        return pipeline_scores(finished, pipeline, count, sampling) | result


def replaced_decoder(pipeline: Pipeline, decode: Decode) -> Pipeline:
    """The same pipeline with another decoder."""
    other = copy.copy(pipeline)
    other.decoder = decode
    return other
