"""Train a class-conditional DiT in the latents of a finished run, as in the paper.

    python -m nanosd3.related dit --block adaln_zero

It uses the main model's latents and, in place of captions, their labels; a tenth of the labels are
dropped, so that guidance works. The default objective is the paper's, DDPM's; with `--loss flow`
the same network learns the velocity, as the main model does. Samples are drawn from the prompts'
classes and decoded by the finished run's autoencoder.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanosd3.cli import Parser
from nanosd3.config_types import Config, Recipe, Sampling
from nanosd3.random_streams import rng
from nanosd3.related.command import Study, System, check_guidance, size_of, with_flow_recipe
from nanosd3.related.dit import BLOCKS, DIT_CONFIGS, DiT, DiTConfig
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import (
    SHOWN_OF_EACH,
    evaluations,
    evaluations_in_words,
    save_beside_main,
    score_samples,
)
from nanosd3.related.train_dit import (
    OBJECTIVES,
    DiTLoss,
    density_of,
    sample_dit,
    steps_evenly,
    train_dit,
)
from nanosd3.training.evaluation import Draw
from nanosd3.training.grids_and_gifs import grid_of
from nanosd3.training.stages import training_of

RECIPES_OF_DIT = {
    "mnist": Recipe(2000, batch=64, lr=8e-3, warmup=50, weight_decay=0.0, optimizer="muon"),
    "tiny": Recipe(4, batch=16, lr=8e-3, warmup=1, weight_decay=0.0),
}
EMA_DECAY_OF_DIT = 0.995
DIT_GUIDANCE = 1.6


class DiTSampler(NamedTuple):
    """A sampler, and how many steps it takes."""

    name: str
    steps: int
    fresh_noise: bool = False


DIT_SAMPLERS = {  # the last one gives the scores of the run
    "ddpm": (
        DiTSampler("DDIM", 10),
        DiTSampler("DDIM", 50),
        DiTSampler("ancestral", 50, fresh_noise=True),
    ),
    "flow": (DiTSampler("Euler", 5), DiTSampler("Euler", 10), DiTSampler("Euler", 25)),
}


def dit_config(args: argparse.Namespace, finished: FinishedRun) -> DiTConfig:
    """The network for the finished run's latents and classes."""
    config = finished.config
    return replace(
        DIT_CONFIGS[size_of(args, finished)],
        latent_size=config.image_size // config.vae.factor,
        latent_channels=config.vae.latent_channels,
        classes=len(finished.source.images.names),
        learned_variance=args.loss == "ddpm",
        block=args.block,
    )


def dit_loss_of(study: Study) -> DiTLoss:
    density = steps_evenly if study.args.loss == "ddpm" else density_of(study.job)
    return DiTLoss(study.args.loss, density)


def labels_to_images(
    study: Study, network: DiT, sampler: DiTSampler
) -> Callable[[Tensor, int], np.ndarray]:
    """A function from labels (B,) and a seed to images uint8."""
    pipeline, guidance = study.finished.pipeline, study.job.config.sampling.guidance
    size = (network.config.latent_size,) * 2

    def draw(labels: Tensor, seed: int) -> np.ndarray:
        noise = pipeline.noise(len(labels), seed, size).to(study.job.device)
        fresh = rng(seed, "ancestral") if sampler.fresh_noise else None
        y = labels.to(noise.device)
        latents = sample_dit(network, study.args.loss, noise, y, sampler.steps, guidance, fresh)
        return pipeline.decode(latents)

    return draw


def scores_of(study: Study, network: DiT, sampler: DiTSampler) -> dict:
    """Scores of about as many samples as the main model's, on the same draws."""
    images = labels_to_images(study, network, sampler)

    def generate(draw: Draw, seed: int) -> np.ndarray:
        return images(draw.labels, seed)

    count, sampling = study.job.training.evaluate, study.job.config.sampling
    made = evaluations(replace(sampling, steps=sampler.steps))
    return score_samples(study.finished, generate, count, made)


def draw_beside(study: Study, network: DiT, sampler: DiTSampler) -> None:
    """Write samples.png: samples of every class and, to their right, the main model's for a
    prompt."""
    finished = study.finished
    names = finished.source.images.names
    labels = torch.arange(len(names)).repeat_interleave(SHOWN_OF_EACH)
    images = labels_to_images(study, network, sampler)(labels, 0)
    ours = grid_of([name for name, *_ in names], images)
    made = evaluations(replace(study.job.config.sampling, steps=sampler.steps))
    title = f"{sampler.name}, {evaluations_in_words(made)}"
    save_beside_main(finished, title, ours, study.job.run.folder / "samples.png")


class DiTSystem(System):
    name = "dit"
    what = "DiT: a transformer trained as a class-conditional diffusion model."
    paper = "arXiv 2212.09748"

    def add_options(self, parser: Parser) -> None:
        add = parser.add_argument
        text = "how blocks are given time and class (default: %(default)s)"
        add("--block", choices=BLOCKS, default="adaln_zero", help=text)
        text = "what it learns: DDPM's noise, or the flow's velocity (default: %(default)s)"
        add("--loss", choices=OBJECTIVES, default="ddpm", help=text)
        text = "guidance scale of the samples (default: %(default)s)"
        add("--guidance", type=float, default=DIT_GUIDANCE, help=text)

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        check_guidance(args.guidance)
        config = with_flow_recipe(finished.config, RECIPES_OF_DIT[size_of(args, finished)], args)
        training = replace(training_of(config), ema_decay=EMA_DECAY_OF_DIT)
        steps = DIT_SAMPLERS[args.loss][-1].steps
        sampling = Sampling(steps, args.guidance, shift=1.0, sampler="euler")
        return replace(config, training=training, sampling=sampling)

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        return {"loss": args.loss, "dit": asdict(dit_config(args, finished))}

    def train(self, study: Study) -> dict:
        dit = dit_config(study.args, study.finished)
        labels = study.finished.source.labels
        network = train_dit(study.job, study.features, labels, dit, dit_loss_of(study))
        found = {}
        for sampler in DIT_SAMPLERS[study.args.loss]:
            found[f"{sampler.name} {sampler.steps}"] = scores_of(study, network, sampler)
        scores = found[f"{sampler.name} {sampler.steps}"]
        draw_beside(study, network, sampler)
        results = study.job.run.stages["dit"]
        return scores | {
            "by_sampler": found,
            "validation": results["validation"],
            "training_seconds": results["seconds"],
        }
