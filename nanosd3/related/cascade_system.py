"""Train Muse's cascade on a finished Muse: fine tokens, the transformer that predicts them from the
Muse's tokens, and a larger decoder.

    python -m nanosd3.related muse-cascade
    python -m nanosd3.related muse-cascade --sample "a bold 3"

The Muse is left unchanged; its two networks are copied into the run.
"""

import argparse
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from nanosd3.cli import Parser
from nanosd3.config_types import Config, Recipe
from nanosd3.errors import InputError
from nanosd3.machine.accelerate import accelerate
from nanosd3.related.command import Study, size_of, with_flow_recipe
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.muse import MuseConfig
from nanosd3.related.muse_editing import MUSE_STEPS, VQPipeline, passes
from nanosd3.related.muse_system import (
    CODES,
    MUSE_STAGE,
    TOKEN_RECIPES,
    MuseSystem,
    muse_sampling,
    open_muse_pipeline,
    reconstruction,
)
from nanosd3.related.sample_command import SamplingSystem, open_trained, repeated_prompts, warn_of
from nanosd3.related.scoring import grid_of_prompts, score_samples
from nanosd3.related.super_resolution import SuperResolution
from nanosd3.related.train_cascade import (
    LARGER_DECODER,
    SUPER_RESOLUTION,
    CascadePipeline,
    train_decoder,
    train_super_resolution,
)
from nanosd3.related.train_muse import train_tokens
from nanosd3.related.vq import VQAutoencoder, VQConfig
from nanosd3.storage.files import read_module, sha256, write_file
from nanosd3.storage.run import Run
from nanosd3.text import check_prompts
from nanosd3.training.grids_and_gifs import png, side_by_side
from nanosd3.training.stages import training_of

FINE_RECIPES = {
    "mnist": Recipe(900, batch=16, lr=1e-2, warmup=100, weight_decay=0.0, optimizer="muon"),
    "tiny": Recipe(4, batch=16, lr=1e-2, warmup=1, weight_decay=0.0, optimizer="muon"),
}
FINE_SIZES = {"mnist": (2, 128, 1), "tiny": (1, 64, 1)}  # depth, width, layers for the base tokens
COARSER = 2  # a base token's side in fine tokens
LARGER = 2  # the larger decoder's width, relative to the other's
FINE_EMA = 0.99
COPIES = {"tokens": "base_tokens", MUSE_STAGE: "base"}  # the Muse's weights, and the run's copies


def fine_vq_config(config: Config, size: str) -> VQConfig:
    """A tokeniser for tokens of half the side: the Muse's without its coarsest level."""
    channels, (codes, width) = config.vae.channels[:-1], CODES[size]
    vae = config.vae
    return VQConfig(vae.image_channels, channels, channels, vae.norm_groups, codes, width)


def fine_config(base: MuseConfig, size: str) -> MuseConfig:
    """The transformer for its tokens."""
    depth, width, _ = FINE_SIZES[size]
    return replace(base, depth=depth, width=width, codes=CODES[size][0], grid=COARSER * base.grid)


def larger_channels(config: VQConfig) -> tuple[int, ...]:
    """Widths of the larger decoder."""
    return tuple(LARGER * width for width in config.decoder_channels)


def open_cascade(run: Run, finished: FinishedRun) -> CascadePipeline:
    """The networks of a finished run, with its copy of the Muse."""
    base = open_muse_pipeline(run, finished, COPIES)
    size, config = run.identity["size"], finished.config
    fine = fine_vq_config(config, size)
    paths = (run.folder / f"{name}.safetensors" for name in (LARGER_DECODER, SUPER_RESOLUTION))
    larger = replace(fine, decoder_channels=larger_channels(fine))
    vq = read_module(lambda: VQAutoencoder(larger), next(paths))
    sizes, layers = fine_config(base.muse.config, size), FINE_SIZES[size][2]
    network = read_module(lambda: SuperResolution(sizes, base.muse.config, layers), next(paths))
    for module in (vq, network):
        accelerate(module.to(finished.device))
    return CascadePipeline(base, network, vq)


class CascadeSystem(SamplingSystem):
    name = "muse-cascade"
    what = "Muse's cascade: finer tokens from a finished Muse's, and a larger decoder."
    paper = "arXiv 2301.00704"
    compared_with = "the Muse alone"

    def add_options(self, parser: Parser) -> None:
        add = parser.add_argument_group("the finished Muse").add_argument
        text = "run of `python -m nanosd3.related muse` (default: %(default)s)"
        add("--muse", type=Path, default=Path("runs/muse"), metavar="FOLDER", help=text)

    def base_run(self, args: argparse.Namespace, finished: FinishedRun) -> Run:
        """The finished Muse. Raises InputError if there is none, or if it has another size."""
        run = open_trained(MuseSystem(), args.muse, finished, "--muse")
        size = size_of(args, finished)
        if run.identity.get("size") != size:
            raise InputError(f"--muse {args.muse}: is not of the size {size}; see --config")
        return run

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        size = size_of(args, finished)
        self.base_run(args, finished)
        config = with_flow_recipe(finished.config, FINE_RECIPES[size], args)
        training = replace(training_of(config), autoencoder=TOKEN_RECIPES[size], ema_decay=FINE_EMA)
        return replace(config, training=training)

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        base, size = self.base_run(args, finished), size_of(args, finished)
        weights = {name: sha256(base.folder / f"{name}.safetensors") for name in COPIES}
        own = {key: base.identity[key] for key in ("size", "guidance", "temperature")}
        fine = asdict(fine_vq_config(finished.config, size))
        return own | {"base": weights, "fine": fine, "sizes": FINE_SIZES[size], "larger": LARGER}

    def train(self, study: Study) -> dict:
        job, finished, size = study.job, study.finished, size_of(study.args, study.finished)
        for name, copy in COPIES.items():
            content = (study.args.muse / f"{name}.safetensors").read_bytes()
            write_file(job.run.folder / f"{copy}.safetensors", content)
        base = open_muse_pipeline(job.run, finished, COPIES)
        vq = train_tokens(job, fine_vq_config(job.config, size))
        texts = finished.pipeline.text.encode(finished.source.texts)
        config, base_depth = fine_config(base.muse.config, size), FINE_SIZES[size][2]
        network = train_super_resolution(job, finished.source, base, vq, texts, config, base_depth)
        larger = train_decoder(job, vq, larger_channels(vq.config))
        cascade = CascadePipeline(base, network, larger)
        sampling, count = muse_sampling(None, None, job.run.identity), job.training.evaluate
        made, whole = passes(MUSE_STEPS, sampling[0]), 2 * passes(MUSE_STEPS, sampling[0])

        def draw(prompts: list[str], seed: int) -> np.ndarray:
            tokens = base.draw(prompts, seed, MUSE_STEPS, *sampling)
            return cascade.images(cascade.refine(tokens, prompts, seed, MUSE_STEPS, *sampling))

        def draw_base(prompts: list[str], seed: int) -> np.ndarray:
            return base.images(base.draw(prompts, seed, MUSE_STEPS, *sampling))

        scores = score_samples(finished, lambda d, seed: draw(d.prompts, seed), count, whole)
        alone = score_samples(finished, lambda d, seed: draw_base(d.prompts, seed), count, made)
        ways = {"fine tokens": draw, "the Muse's tokens": draw_base}
        grids = [
            (name, grid_of_prompts(finished, partial(one, seed=0))) for name, one in ways.items()
        ]
        picture = png(side_by_side(grids))
        write_file(job.run.folder / "samples.png", picture)
        stages = job.run.stages
        decoders = {"smaller": VQPipeline(vq, finished.pipeline), "larger": cascade, "base": base}
        return scores | {
            "main_model": alone,
            "reconstructions": {
                name: reconstruction(finished, tokeniser, count)
                for name, tokeniser in decoders.items()
            },
            "training_seconds": sum(
                stages[name]["seconds"] for name in ("tokens", SUPER_RESOLUTION, LARGER_DECODER)
            ),
        }

    def add_sampling_options(self, parser: Parser) -> None:
        MuseSystem().add_sampling_options(parser)

    def draw(self, args: argparse.Namespace, run: Run, finished: FinishedRun) -> np.ndarray:
        sampling = (*muse_sampling(args.guidance, args.temperature, run.identity), args.negative)
        check_prompts(args.sample, args.negative)
        warn_of(finished.pipeline, [*args.sample, args.negative])
        cascade = open_cascade(run, finished)
        prompts, steps = repeated_prompts(args), args.steps or MUSE_STEPS
        tokens = cascade.base.draw(prompts, args.seed, steps, *sampling)
        return cascade.images(cascade.refine(tokens, prompts, args.seed, steps, *sampling))
