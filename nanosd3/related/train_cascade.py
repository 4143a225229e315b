"""Train a cascade's transformer of fine tokens and its larger decoder, and sample."""

import time
from functools import partial

import torch
from torch import Tensor

from nanosd3.data.sources import Digits
from nanosd3.random_streams import rng
from nanosd3.related.muse import Conditioning, Logits, MuseConfig, cosine_share, guided_logits
from nanosd3.related.muse_editing import MusePipeline, VQPipeline, unpadded
from nanosd3.related.super_resolution import SuperResolution, with_decoder
from nanosd3.related.train_muse import token_prediction_loss
from nanosd3.related.vq import VQAutoencoder
from nanosd3.training.loop import StepRNG, fit
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, last_loss

SUPER_RESOLUTION, LARGER_DECODER = "super_resolution", "larger_decoder"  # stages


def train_super_resolution(
    job: Job,
    source: Digits,
    base: MusePipeline,
    vq: VQAutoencoder,
    texts: Conditioning,
    config: MuseConfig,
    base_depth: int,
) -> SuperResolution:
    """Train the transformer of the fine tokens, or load the one that the run has."""

    def make() -> SuperResolution:
        return SuperResolution(config, base.muse.config, base_depth)

    network = build(job, SUPER_RESOLUTION, make).to(job.device)

    def predict(seen: Tensor, tokens: Tensor, x: Tensor, *text: Tensor) -> Tensor:
        with torch.no_grad():
            given = base.vq.tokenise(x)
        return network(seen, given, *text)

    loss_of = token_prediction_loss(job, source, vq, texts, cosine_share, predict)
    decay = job.training.ema_decay
    train = partial(fit_average, job, SUPER_RESOLUTION, network, loss_of, decay)
    finish_or_load(job, SUPER_RESOLUTION, network, train)
    return network


def train_decoder(
    job: Job, vq: VQAutoencoder, channels: tuple[int, ...], stage: str = LARGER_DECODER
) -> VQAutoencoder:
    """Train a decoder of these widths for the same tokens, or load the one that the run has."""
    decoding = build(job, stage, lambda: with_decoder(vq, channels)).to(job.device)
    recipe = job.training.autoencoder

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        index = step_rng.take(job.source.draw(recipe.batch, step_rng.generator()))
        x = unpadded(job.source.pixels(index), job.config.padding).to(job.device)
        with torch.no_grad():
            tokens = vq.tokenise(x)
        return (decoding.decode(tokens) - x).square().flatten(1).sum(1), {}

    def train() -> dict:
        begin = time.process_time()
        fit(job.run, stage, decoding, loss_of, recipe, job.seed)
        seconds = round(time.process_time() - begin, 1)
        return {"loss": last_loss(job, stage), "thread_seconds": seconds}

    finish_or_load(job, stage, decoding, train)
    return decoding


class CascadePipeline(VQPipeline):
    """Muse's tokens to fine tokens, by a second transformer, to images by their VQ autoencoder."""

    def __init__(self, base: MusePipeline, network: SuperResolution, vq: VQAutoencoder):
        super().__init__(vq, base.main)
        self.base, self.network = base, network

    def refine(
        self,
        base: Tensor,
        prompts: list[str],
        seed: int,
        steps: int,
        guidance: float,
        temperature: float,
        negative: str = "",
    ) -> Tensor:
        """Fine tokens (B, H, W) for base tokens (B, h, w) and a prompt each."""

        def logits_of(rows: Tensor, prompt: Conditioning, without: Conditioning) -> Logits:
            given = base[rows]
            return guided_logits(self.network, (given, *prompt), (given, *without))

        side, generator = self.network.config.grid, rng(seed, SUPER_RESOLUTION)
        return self.fill(
            logits_of, side, prompts, generator, steps, guidance, temperature, negative
        )
