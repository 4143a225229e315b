"""Training and judging for notebook 15: small networks that draw pixels, beside the lesson model.

The loop is that of notebook 11; what is special about pixels is the noise and the weight.
"""

from collections.abc import Mapping, Sequence
from math import log

import numpy as np
import torch
from lab import Lesson, pick
from torch import Tensor

from nanosd3.config import Recipe, Sampling
from nanosd3.flow import flow_loss, interpolate, logit_normal, stratified
from nanosd3.random_streams import rng
from nanosd3.related.hdit import HDiT, hdit_loss
from nanosd3.related.train_hdit import Pixels, pooled_text, sample_pixels
from nanosd3.training.ema import make_ema, update_ema
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.optimizer import learning_rate

STEPS, GUIDANCE = pick(10, 2), 2.0
MARGIN = 2  # pixels around MNIST's 28 x 28
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(lesson: Lesson, pixels: Pixels, pooled: Tensor, step: int, middle: float) -> Batch:
    """Images, noise, times and texts (a tenth of them zeros). `middle` is the median of the noise,
    in deviations of a pixel."""
    size, g = pick(64, 8), rng("pixels", step)
    i, keep = lesson.source.draw(size, g), torch.rand(size, 1, generator=g) >= 0.1
    text = pooled[lesson.source.captions(i, torch.rand(size, generator=g))] * keep
    x0, t = pixels[i], logit_normal(stratified(size, g), log(middle))
    return x0, torch.randn(x0.shape, generator=g), t, text


def train_on_pixels(
    net: HDiT, lesson: Lesson, pixels: Pixels, steps: int, middle: float, data_std: float | None
) -> dict[str, Tensor]:
    """The moving average of a network's weights after `steps` steps. The loss is weighted by
    soft-min-SNR for data of deviation `data_std`; without it, errors at all times count alike."""
    pooled = pooled_text(lesson.pipeline, list(lesson.source.texts))
    ema, recipe = make_ema(net), Recipe(steps, 64, 8e-3, min(50, steps // 4), 0.0)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe)
        x0, noise, t, text = batch(lesson, pixels, pooled, step, middle)
        velocity = net(interpolate(x0, noise, t), t, text)
        if data_std is None:
            loss = flow_loss(velocity, x0, noise)
        else:
            loss = hdit_loss(velocity, x0, noise, t, data_std)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        update_ema(ema, net, step, 0.99)
    return dict(ema.state_dict())


def draw_pixels(
    net: HDiT, lesson: Lesson, pixels: Pixels, prompts: list[str], shift: float
) -> np.ndarray:
    """Digits uint8 (n, 28, 28), from the same noise on each call, in Euler steps at times
    shifted towards noise."""
    side = pixels.config.image_size
    noise = torch.randn(len(prompts), 1, side, side, generator=rng("drawn"))
    way = Sampling(STEPS, GUIDANCE, shift, "euler")
    x = sample_pixels(net, noise, pooled_text(lesson.pipeline, prompts), way)
    return pixels.to_uint8(x)[:, MARGIN:-MARGIN, MARGIN:-MARGIN].numpy()


def scores(
    lesson: Lesson, rows: Mapping[str, np.ndarray], digits: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """For each row of images: the share that is read as asked, and the Frechet distance to 2,000
    real digits."""
    real = lesson.look(lesson.images.test_images[:2000])
    return {
        name: (lesson.right(x, digits), frechet_distance(lesson.look(x), real))
        for name, x in rows.items()
    }
