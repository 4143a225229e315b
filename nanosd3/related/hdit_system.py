"""Train HDiT to draw digits of 64 x 64 pixels from captions, and draw with it.

    python -m nanosd3.related hdit
    python -m nanosd3.related hdit --sample "a bold seven" "a thin 2" --out digits.png

With `--flat` the same blocks form one level where every patch attends to every other, as in a DiT,
and train for as long.
"""

import argparse
from dataclasses import replace

import numpy as np

from nanosd3.cli import Parser
from nanosd3.config_types import Config, Recipe, Sampling
from nanosd3.errors import InputError
from nanosd3.machine.accelerate import accelerate
from nanosd3.official.limits import limited_config
from nanosd3.related.command import (
    RECIPE_SIZES,
    Study,
    check_guidance,
    size_of,
    with_flow_recipe,
)
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.hdit import HDiT, HDiTConfig, HDiTLevel, hdit_multiply_adds
from nanosd3.related.sample_command import (
    SAMPLES,
    SamplingSystem,
    add_guidance,
    repeated_prompts,
    warn_of,
    with_sampling,
)
from nanosd3.related.scoring import (
    evaluations,
    evaluations_in_words,
    grid_of_prompts,
    save_beside_main,
    score_samples,
)
from nanosd3.related.train_hdit import (
    drawn_images,
    normalised_pixels,
    pooled_text,
    trained_hdit,
)
from nanosd3.storage.files import read_module
from nanosd3.storage.run import Run
from nanosd3.training.evaluation import Draw
from nanosd3.training.stages import training_of

SIDES = {"mnist": 64, "tiny": 32}  # of the images, in pixels
HOURGLASSES = {
    "mnist": (HDiTLevel(96, 1, 3), HDiTLevel(128, 3, None)),
    "tiny": (HDiTLevel(16, 1, 3), HDiTLevel(16, 1, None)),
}
FLAT_ONES = {"mnist": HDiTLevel(128, 3, None), "tiny": HDiTLevel(16, 2, None)}
PATCH, HEAD_DIM = 8, 32
MAPPING = {"mnist": (128, 2), "tiny": (16, 1)}  # width, depth
HDIT_RECIPES = {  # by size, and whether it is flat; both "mnist" take equally long
    ("mnist", False): Recipe(2000, batch=64, lr=8e-3, warmup=50, weight_decay=0.0),
    ("mnist", True): Recipe(1560, batch=64, lr=8e-3, warmup=50, weight_decay=0.0),
    ("tiny", False): Recipe(4, batch=8, lr=8e-3, warmup=1, weight_decay=0.0),
    ("tiny", True): Recipe(4, batch=8, lr=8e-3, warmup=1, weight_decay=0.0),
}
HDIT_EMA_DECAY = 0.99
HDIT_SAMPLING = Sampling(steps=10, guidance=1.5, shift=4.0, sampler="euler")


def hdit_config(size: str, flat: bool, main: Config) -> HDiTConfig:
    """For the images and the text of a main model."""
    levels = (FLAT_ONES[size],) if flat else HOURGLASSES[size]
    head_dim = min(HEAD_DIM, levels[0].width)
    channels, pooled_dim = main.vae.image_channels, main.mmdit.pooled_dim
    return HDiTConfig(channels, PATCH, levels, head_dim, *MAPPING[size], pooled_dim)


class HDiTSystem(SamplingSystem):
    name = "hdit"
    what = "HDiT: a transformer that draws pixels, shaped like an hourglass."
    paper = "arXiv 2401.11605"

    def add_options(self, parser: Parser) -> None:
        parser.epilog = SAMPLES
        add = parser.add_argument
        text = "the same blocks in one level, where every patch attends to all, as in a DiT"
        add("--flat", action="store_true", help=text)
        text = "guidance scale of the samples (default: %(default)s)"
        add("--guidance", type=float, default=HDIT_SAMPLING.guidance, help=text)

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        check_guidance(args.guidance)
        size = size_of(args, finished)
        config = with_flow_recipe(finished.config, HDIT_RECIPES[size, args.flat], args)
        training = replace(training_of(config), ema_decay=HDIT_EMA_DECAY)
        sampling = replace(HDIT_SAMPLING, guidance=args.guidance)
        return replace(config, image_size=SIDES[size], training=training, sampling=sampling)

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        return {"size": size_of(args, finished), "flat": args.flat}

    def train(self, study: Study) -> dict:
        job, finished = study.job, study.finished
        config = network_of(job.run, finished)
        pixels = normalised_pixels(finished.source, job.config)
        pooled = pooled_text(finished.pipeline, finished.source.texts)
        model, sampling = trained_hdit(job, config, pixels, pooled), job.config.sampling

        def draw(prompts: list[str], seed: int) -> np.ndarray:
            return drawn_images(model, pixels, finished.pipeline, prompts, seed, sampling)

        def generate(d: Draw, seed: int) -> np.ndarray:
            return draw(d.prompts, seed)

        scores = score_samples(finished, generate, job.training.evaluate, evaluations(sampling))
        ours = grid_of_prompts(finished, lambda prompts: draw(prompts, 0))
        title = f"pixels, {evaluations_in_words(scores['evaluations'])}"
        save_beside_main(finished, title, ours, job.run.folder / "samples.png")
        side = job.config.image_size
        return scores | {
            "multiply_adds": hdit_multiply_adds(config, side, side),
            "training_seconds": job.run.stages["hdit"]["seconds"],
            "thread_seconds": job.run.stages["hdit"]["thread_seconds"],
        }

    def add_sampling_options(self, parser: Parser) -> None:
        add_guidance(parser)

    def draw(self, args: argparse.Namespace, run: Run, finished: FinishedRun) -> np.ndarray:
        config = limited_config(run.identity["config"], run.folder / "run.json")
        sampling = with_sampling(config, args).sampling
        warn_of(finished.pipeline, args.sample)
        sizes = network_of(run, finished)
        model = read_module(lambda: HDiT(sizes), run.folder / "hdit.safetensors")
        accelerate(model.to(finished.device))
        pixels = normalised_pixels(finished.source, config)
        return drawn_images(
            model, pixels, finished.pipeline, repeated_prompts(args), args.seed, sampling
        )


def network_of(run: Run, finished: FinishedRun) -> HDiTConfig:
    """The sizes of a run's network. Raises InputError if its run.json is damaged."""
    size, flat = run.identity.get("size"), run.identity.get("flat")
    if size not in RECIPE_SIZES or not isinstance(flat, bool):
        raise InputError(f"{run.folder / 'run.json'}: damaged: no size of an HDiT")
    return hdit_config(size, flat, finished.config)
