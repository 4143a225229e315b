"""Three ways to draw the same digits: Muse, the main model's flow, and tokens one by one."""

import numpy as np
import torch

from nanosd3.few_steps import even_schedule
from nanosd3.pipeline import Pipeline
from nanosd3.random_streams import rng
from nanosd3.related.autoregressive import CausalMuse, write_tokens
from nanosd3.related.muse_editing import MUSE_GUIDANCE, MusePipeline
from nanosd3.samplers import euler, guided
from nanosd3.training.evaluation import Draw

IMAGES_AT_ONCE = 250  # images


@torch.no_grad()
def sample_flow(pipeline: Pipeline, draw: Draw, seed: int, steps: int) -> np.ndarray:
    """Images of the main model in even Euler steps, with its own guidance."""
    config, found = pipeline.config, []
    side = (config.image_size // config.vae.factor,) * 2
    noise = pipeline.noise(len(draw.prompts), seed, side)
    nothing = pipeline.text.encode([""])
    for rows in torch.arange(len(noise)).split(IMAGES_AT_ONCE):
        prompt = pipeline.text.encode([draw.prompts[i] for i in rows])
        negative = tuple(x.expand(len(rows), *x.shape[1:]) for x in nothing)
        velocity = guided(pipeline.mmdit, prompt, negative, config.sampling.guidance)
        found.append(euler(velocity, noise[rows], even_schedule(steps)))
    return pipeline.decode(torch.cat(found))


def sample_muse(pipeline: MusePipeline, draw: Draw, seed: int, steps: int) -> np.ndarray:
    """Images of Muse, with the sampling that its command has."""
    return pipeline.images(pipeline.draw(draw.prompts, seed, steps))


def sample_causal(
    pipeline: MusePipeline, causal: CausalMuse, draw: Draw, seed: int, steps: int
) -> np.ndarray:
    """Images whose tokens are written one after the other, with Muse's guidance."""
    generator, found = rng(seed, "one by one"), []
    assert steps == causal.config.grid**2
    for i in range(0, len(draw.prompts), IMAGES_AT_ONCE):
        texts = pipeline.texts(draw.prompts[i : i + IMAGES_AT_ONCE], "")
        found.append(write_tokens(causal, *texts, MUSE_GUIDANCE, generator))
    return pipeline.images(torch.cat(found))
