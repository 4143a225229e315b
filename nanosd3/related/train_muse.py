"""Train a tokeniser, and a masked transformer on its tokens.

Images are taken without the black frame that the finished run's latents need. Tokens are computed
in every step, not cached: a short run sees few images twice.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanosd3.data.sources import Digits
from nanosd3.flow import stratified
from nanosd3.related.autoregressive import CausalMuse
from nanosd3.related.finished_run import TEXT_DROPOUT
from nanosd3.related.muse import Conditioning, Muse, MuseConfig, hide, masked_loss
from nanosd3.related.muse_editing import unpadded
from nanosd3.related.vq import (
    VQAutoencoder,
    VQConfig,
    perplexity,
    quantising_loss,
    straight_through,
)
from nanosd3.training.loop import StepLoss, StepRNG, fit
from nanosd3.training.stages import Job, build, finish_or_load, fit_average

RESTART_EVERY, RESTART_UNTIL = 25, 0.75  # steps, share of them


def train_tokens(job: Job, config: VQConfig, stage: str = "tokens") -> VQAutoencoder:
    """Train the tokeniser, or load the one that the run has."""
    vq = build(job, stage, lambda: VQAutoencoder(config)).to(job.device)
    recipe = job.training.autoencoder

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator, step = step_rng.generator(), int(step_rng.name[-1])
        index = step_rng.take(job.source.draw(recipe.batch, generator))
        x = unpadded(job.source.pixels(index), job.config.padding).to(job.device)
        z, restarted = vq.encode(x), 0
        if step % RESTART_EVERY == 0 and step < RESTART_UNTIL * recipe.steps:
            restarted = vq.quantiser.restart_unused(z.detach(), generator)
        tokens = vq.quantiser.nearest(z)
        e = vq.quantiser.vectors(tokens)
        error = (vq.decoder(straight_through(z, e)) - x).square().flatten(1).sum(1)
        used_codes = perplexity(tokens, config.codes)
        return error + quantising_loss(z, e), {"perplexity": used_codes, "restarted": restarted}

    def train() -> dict:
        begin = time.process_time()
        fit(job.run, stage, vq, loss_of, recipe, job.seed)
        seconds = round(time.process_time() - begin, 1)
        used_codes = job.run.read_log(stage)[-1]["perplexity"]
        return {"perplexity": used_codes, "thread_seconds": seconds}

    used_codes = finish_or_load(job, stage, vq, train)["perplexity"]
    print(f"tokens: perplexity {used_codes:.0f} of {config.codes} codes")
    return vq


def train_muse(
    job: Job,
    source: Digits,
    vq: VQAutoencoder,
    texts: Conditioning,
    config: MuseConfig,
    share_of: Callable[[Tensor], Tensor],
    stage: str,
) -> Muse:
    """Train the transformer, or load the one that the run has: the average of its weights.

    `texts` are the encodings of the source's captions; `share_of` gives the share to hide for a u.
    """
    muse = build(job, "muse", lambda: Muse(config)).to(job.device)

    def predict(seen: Tensor, tokens: Tensor, x: Tensor, *text: Tensor) -> Tensor:
        return muse(seen, *text)

    loss_of = token_prediction_loss(job, source, vq, texts, share_of, predict)
    train = partial(fit_average, job, stage, muse, loss_of, job.training.ema_decay)
    finish_or_load(job, stage, muse, train)
    return muse


def token_prediction_loss(
    job: Job,
    source: Digits,
    vq: VQAutoencoder,
    texts: Conditioning,
    share_of: Callable[[Tensor], Tensor],
    predict: Callable[..., Tensor],
) -> StepLoss:
    """The loss of a training step from a network's logits, `predict(seen, tokens, x, context,
    pooled)`: it is given the tokens of images x with some hidden, all tokens, the images and their
    texts."""
    recipe = job.training.flow

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        size, generator = recipe.batch, step_rng.generator()
        images = step_rng.take(source.draw(size, generator))
        captions = source.captions(images, step_rng.take(torch.rand(size, generator=generator)))
        keep = step_rng.take(torch.rand(size, generator=generator) >= TEXT_DROPOUT).to(job.device)
        share = step_rng.take(share_of(stratified(size, generator)))
        x = unpadded(source.pixels(images), job.config.padding).to(job.device)
        with torch.no_grad():
            tokens = vq.tokenise(x)
        places = step_rng.take(torch.rand(size, tokens[0].numel(), generator=generator))
        seen = hide(tokens, share, places)
        context, pooled = (text[captions.to(job.device)] for text in texts)
        context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        return masked_loss(predict(seen, tokens, x, context, pooled), tokens, seen), {}

    return loss_of


def train_causal(
    job: Job,
    source: Digits,
    vq: VQAutoencoder,
    texts: Conditioning,
    config: MuseConfig,
    stage: str,
) -> CausalMuse:
    """Train a transformer on the same tokens one after another, or load the run's."""
    network = build(job, stage, lambda: CausalMuse(config)).to(job.device)

    def predict(seen: Tensor, tokens: Tensor, x: Tensor, *text: Tensor) -> Tensor:
        return network(tokens, *text)

    loss_of = token_prediction_loss(job, source, vq, texts, torch.ones_like, predict)  # all count
    train = partial(fit_average, job, stage, network, loss_of, job.training.ema_decay)
    finish_or_load(job, stage, network, train)
    return network
