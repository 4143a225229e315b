"""Train an HDiT on captioned pixels, at noise levels chosen for their size, and sample with it.

There is no autoencoder: the network sees pixels, normalised to mean 0 and deviation 1. It is
conditioned on the pooled text of a finished run's frozen encoders, and a tenth of the time on
zeros, so that guidance works.

The larger an image, the more redundant its neighbouring pixels, and the more noise it takes to hide
what it shows (flow.py). Of the principal components of digits at 64 x 64 the strongest has 17 times
the deviation of a pixel, the tenth 8 times: their shapes are visible up to that much noise. So
noise is drawn around 8, and the loss's weight, which would start to fall at the deviation of a
pixel, starts to fall at 16. The paper also shifts its noise with the image's size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log

import numpy as np
import torch
from torch import Tensor, nn

from nanosd3.config_types import Config, Sampling
from nanosd3.data.mnist import to_uint8
from nanosd3.data.sources import Digits, enlarged
from nanosd3.flow import flow_loss, interpolate, logit_normal, shift, stratified
from nanosd3.machine.device import at_once
from nanosd3.pipeline import Pipeline
from nanosd3.related.finished_run import TEXT_DROPOUT
from nanosd3.related.hdit import HDiT, HDiTConfig, hdit_loss
from nanosd3.request import seeded_noise
from nanosd3.samplers import euler, guided
from nanosd3.training.cached_features import CAPTION_BATCH
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average

MIDDLE_NOISE = 8.0  # the median of the noise, relative to the pixels' deviation
NOISE_SPREAD = 1.0  # the deviation of its logarithm
SIGMA_DATA = 16.0  # the data's deviation, as the loss's weight takes it
MEASURED_DIGITS = 2000  # for the mean and deviation of pixels


# --- pixels and text ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """Images of a source at a config's size, normalised to mean 0 and deviation 1."""

    source: Digits
    config: Config
    mean: float
    std: float

    def __getitem__(self, index: Tensor) -> Tensor:
        """Images (B, 1, side, side) by their indices in the source."""
        images = enlarged(self.source.all_images[index], self.config)
        return (images - self.mean) / self.std

    def to_uint8(self, x: Tensor) -> Tensor:
        """The inverse, uint8 (B, side, side)."""
        return to_uint8(x * self.std + self.mean)


def normalised_pixels(source: Digits, config: Config) -> Pixels:
    first = torch.arange(min(MEASURED_DIGITS, source.trained))
    x = Pixels(source, config, 0.0, 1.0)[first]
    return Pixels(source, config, x.mean().item(), x.std().item())


@torch.no_grad()
def pooled_text(pipeline: Pipeline, texts: list[str]) -> Tensor:
    """Pooled vectors (n, Dp) of texts."""
    batches = (texts[i : i + CAPTION_BATCH] for i in range(0, len(texts), CAPTION_BATCH))
    return torch.cat([pipeline.text.encode(batch)[1].cpu() for batch in batches])


# --- training -------------------------------------------------------------------------------------


def noisy_times(u: Tensor) -> Tensor:
    """Times for u in (0, 1), such that t / (1 - t) is the noise to train at."""
    return logit_normal(u, log(MIDDLE_NOISE), NOISE_SPREAD)


def hdit_step(
    job: Job,
    pixels: Pixels,
    pooled: Tensor,
    model: HDiT,
    step_rng: StepRNG,
    sigma_data: float | None = SIGMA_DATA,
) -> Tensor:
    """The loss of a training step for each row of a batch, (B,). `pooled` are those of the source's
    texts. Without `sigma_data` the loss has no weight."""
    size, generator = job.training.flow.batch, step_rng.generator()
    images = step_rng.take(job.source.draw(size, generator))
    captions = job.source.captions(images, step_rng.take(torch.rand(size, generator=generator)))
    keep = step_rng.take(torch.rand(size, generator=generator) >= TEXT_DROPOUT)
    t = noisy_times(step_rng.take(stratified(size, generator)))
    x0, text = pixels[images], pooled[captions] * keep[:, None]
    noise = step_rng.noise(x0.shape[1:])
    x0, noise, t, text = (x.to(job.device) for x in (x0, noise, t, text))
    velocity = model(interpolate(x0, noise, t), t, text)
    if sigma_data is None:
        return flow_loss(velocity, x0, noise)
    return hdit_loss(velocity, x0, noise, t, sigma_data)


def trained_hdit(
    job: Job,
    config: HDiTConfig,
    pixels: Pixels,
    pooled: Tensor,
    sigma_data: float | None = SIGMA_DATA,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> HDiT:
    """The network, trained or loaded: the moving average of its weights. `watch(step, average)` is
    called after every step."""
    model = build(job, "hdit", lambda: HDiT(config)).to(job.device)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return hdit_step(job, pixels, pooled, model, step_rng, sigma_data), {}

    train = partial(fit_average, job, "hdit", model, loss_of, job.training.ema_decay, watch)
    finish_or_load(job, "hdit", model, train)
    return model


# --- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def sample_pixels(model: HDiT, noise: Tensor, pooled: Tensor, sampling: Sampling) -> Tensor:
    """Images (B, C, H, W) of mean 0 and deviation 1, from noise like them, for pooled text (B, Dp),
    in Euler steps."""
    times = shift(torch.linspace(1, 0, sampling.steps + 1), sampling.shift).to(noise)
    size, samples = at_once(8 * noise[0].numel()), []
    for z, text in zip(noise.split(size), pooled.split(size), strict=True):
        without = (torch.zeros_like(text),)
        samples.append(euler(guided(model, (text,), without, sampling.guidance), z, times))
    return torch.cat(samples)


def drawn_images(
    model: HDiT,
    pixels: Pixels,
    pipeline: Pipeline,
    prompts: list[str],
    seed: int,
    sampling: Sampling,
) -> np.ndarray:
    """An image uint8 (side, side) for each prompt."""
    texts = list(dict.fromkeys(prompts))
    rows = pooled_text(pipeline, texts)
    pooled = rows[torch.tensor([texts.index(prompt) for prompt in prompts])]
    side, device = pixels.config.image_size, next(model.parameters()).device
    noise = seeded_noise((len(prompts), model.config.channels, side, side), seed)
    x = sample_pixels(model, noise.to(device), pooled.to(device), sampling)
    return pixels.to_uint8(x.cpu()).numpy()
