"""Train Muse beside a finished run: first its tokens, then the transformer that predicts them.

    python -m nanosd3.related muse
    python -m nanosd3.related muse --sample "a bold 3" --steps 8

The tokeniser learns from the run's images alone; the transformer reads their captions through the
run's frozen text encoders; neither uses the run's latents. Together they take about five minutes of
one core.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from nanosd3.cli import Parser, unicode_text
from nanosd3.config_types import Config, Recipe
from nanosd3.errors import InputError
from nanosd3.machine.accelerate import accelerate
from nanosd3.official.limits import limited_config
from nanosd3.related.command import Study, check_guidance, size_of, with_flow_recipe
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.muse import Muse, MuseConfig, cosine_share
from nanosd3.related.muse_editing import (
    MUSE_GUIDANCE,
    MUSE_STEPS,
    MUSE_TEMPERATURE,
    MusePipeline,
    VQPipeline,
    passes,
    unpadded,
)
from nanosd3.related.sample_command import SamplingSystem, repeated_prompts, warn_of
from nanosd3.related.scoring import (
    SCORED_DRAWS,
    draw_and_floor,
    evaluations_in_words,
    grid_of_prompts,
    save_beside_main,
    score_samples,
)
from nanosd3.related.train_muse import train_muse, train_tokens
from nanosd3.related.vq import VQAutoencoder, VQConfig, perplexity
from nanosd3.storage.files import read_module
from nanosd3.storage.run import Run
from nanosd3.text import check_prompts
from nanosd3.training.evaluation import to_digits
from nanosd3.training.stages import training_of

TOKEN_RECIPES = {
    "mnist": Recipe(230, batch=64, lr=2e-3, warmup=50, weight_decay=0.0),
    "tiny": Recipe(4, batch=16, lr=2e-3, warmup=1, weight_decay=0.0),
}
MUSE_RECIPES = {
    "mnist": Recipe(1500, batch=32, lr=1e-2, warmup=100, weight_decay=0.0, optimizer="muon"),
    "tiny": Recipe(4, batch=16, lr=1e-2, warmup=1, weight_decay=0.0, optimizer="muon"),
}
CODES = {"mnist": (128, 8), "tiny": (64, 4)}  # how many, and how wide
MUSE_SIZES = {"mnist": (3, 128), "tiny": (2, 64)}  # depth and width
MUSE_EMA, MUSE_STAGE = 0.995, "muse"
MUSE_FILES = {"tokens": "tokens", MUSE_STAGE: MUSE_STAGE}  # of its weights


def vq_config(config: Config, size: str) -> VQConfig:
    """A tokeniser as large as the run's autoencoder."""
    vae, (codes, width) = config.vae, CODES[size]
    return VQConfig(vae.image_channels, vae.channels, vae.channels, vae.norm_groups, codes, width)


def muse_config(config: Config, size: str) -> MuseConfig:
    """The transformer for its tokens. Raises InputError if images do not divide into them."""
    (depth, width), factor = MUSE_SIZES[size], config.vae.factor
    side = config.image_size - 2 * config.padding
    if side % factor:
        raise InputError(f"images of {side} pixels do not divide into tokens of {factor}")
    widths = (config.mmdit.context_dim, config.mmdit.pooled_dim)
    return MuseConfig(depth, width, CODES[size][0], side // factor, *widths)


def trained_muse_pipeline(
    study: Study,
    share_of: Callable[[Tensor], Tensor] = cosine_share,
    stage: str = MUSE_STAGE,
) -> MusePipeline:
    """The results of both stages, trained or loaded, with the text encoders. Experiments hide
    another share, in a stage with another name."""
    job, finished, size = study.job, study.finished, size_of(study.args, study.finished)
    vq = train_tokens(job, vq_config(job.config, size))
    texts = finished.pipeline.text.encode(finished.source.texts)
    config = muse_config(job.config, size)
    muse = train_muse(job, finished.source, vq, texts, config, share_of, stage)
    return MusePipeline(vq, muse, finished.pipeline)


def reconstruction(finished: FinishedRun, pipeline: VQPipeline, count: int) -> dict:
    """Accuracy and distance of training images that are encoded as tokens and decoded."""
    draw, floor = draw_and_floor(finished, count, SCORED_DRAWS[0])
    x = unpadded(finished.source.pixels(draw.chosen), finished.config.padding)
    tokens = pipeline.tokens(x)
    rebuilt = to_digits(torch.from_numpy(pipeline.images(tokens)))
    accuracy, distance = finished.scorer.score(rebuilt, draw)
    used_codes = perplexity(tokens.cpu(), pipeline.vq.config.codes)
    ratio = distance / floor
    return {"accuracy": accuracy, "frechet_ratio_to_real": ratio, "perplexity": used_codes}


def muse_sampling(
    guidance: float | None, temperature: float | None, identity: dict | None = None
) -> tuple[float, float]:
    """Guidance and temperature of samples: those given, else a run's own, else the recipe's. Raises
    InputError for invalid values."""
    own = identity or {"guidance": MUSE_GUIDANCE, "temperature": MUSE_TEMPERATURE}
    guidance = own["guidance"] if guidance is None else guidance
    temperature = own["temperature"] if temperature is None else temperature
    check_guidance(guidance)
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature must be a number from 0 up, got {temperature}")
    return guidance, temperature


def open_muse_pipeline(
    run: Run, finished: FinishedRun, files: Mapping[str, str] = MUSE_FILES
) -> MusePipeline:
    """The networks that a finished run has trained, or copies of them in files with other names.
    Raises InputError if its run.json is damaged."""
    index = run.folder / "run.json"
    config, size = limited_config(run.identity["config"], index), run.identity.get("size")
    if size not in MUSE_SIZES:
        raise InputError(f"{index}: damaged: no size")
    paths = (run.folder / f"{files[name]}.safetensors" for name in ("tokens", MUSE_STAGE))
    vq = read_module(lambda: VQAutoencoder(vq_config(config, size)), next(paths))
    muse = read_module(lambda: Muse(muse_config(config, size)), next(paths))
    for module in (vq, muse):
        accelerate(module.to(finished.device))
    return MusePipeline(vq, muse, finished.pipeline)


class MuseSystem(SamplingSystem):
    name = "muse"
    what = "Muse: images as tokens, which a transformer predicts many at a time."
    paper = "arXiv 2301.00704"

    def add_options(self, parser: Parser) -> None:
        uses = "--sample PROMPT draws with a finished run, --edit IMAGE edits"
        parser.epilog = f"{uses}; see --sample PROMPT --help and --edit IMAGE --help"
        add = parser.add_argument_group("sampling").add_argument
        text = f"scale at the last step of samples (default: {MUSE_GUIDANCE:g})"
        add("--guidance", type=float, help=text)
        text = f"noise in the choice of tokens to keep (default: {MUSE_TEMPERATURE:g})"
        add("--temperature", type=float, help=text)

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        size = size_of(args, finished)
        muse_sampling(args.guidance, args.temperature)
        config = with_flow_recipe(finished.config, MUSE_RECIPES[size], args)
        muse_config(config, size)
        training = replace(training_of(config), autoencoder=TOKEN_RECIPES[size], ema_decay=MUSE_EMA)
        return replace(config, training=training)

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        config, size = finished.config, size_of(args, finished)
        guidance, temperature = muse_sampling(args.guidance, args.temperature)
        return {
            "size": size,
            "vq": asdict(vq_config(config, size)),
            "muse": asdict(muse_config(config, size)),
            "guidance": guidance,
            "temperature": temperature,
        }

    def train(self, study: Study) -> dict:
        job, finished = study.job, study.finished
        pipeline = trained_muse_pipeline(study)
        guidance, temperature = muse_sampling(study.args.guidance, study.args.temperature)

        def draw(prompts: list[str], seed: int) -> np.ndarray:
            return pipeline.images(pipeline.draw(prompts, seed, MUSE_STEPS, guidance, temperature))

        count, made = job.training.evaluate, passes(MUSE_STEPS, guidance)
        scores = score_samples(finished, lambda d, seed: draw(d.prompts, seed), count, made)
        ours = grid_of_prompts(finished, lambda prompts: draw(prompts, 0))
        title = f"{MUSE_STEPS} steps, {evaluations_in_words(made)}"
        save_beside_main(finished, title, ours, job.run.folder / "samples.png")
        stages = job.run.stages
        return scores | {
            "reconstructions": reconstruction(finished, pipeline, count),
            "training_seconds": stages["tokens"]["seconds"] + stages[MUSE_STAGE]["seconds"],
        }

    def add_sampling_options(self, parser: Parser) -> None:
        add = parser.add_argument
        add("--guidance", type=float, help="scale at the last step (default: the run's)")
        text = "noise in the choice of tokens to keep (default: the run's)"
        add("--temperature", type=float, help=text)
        text = "negative prompt (default: empty)"
        add("--negative", type=unicode_text, default="", help=text)

    def draw(self, args: argparse.Namespace, run: Run, finished: FinishedRun) -> np.ndarray:
        sampling = muse_sampling(args.guidance, args.temperature, run.identity)
        check_prompts(args.sample, args.negative)
        warn_of(finished.pipeline, [*args.sample, args.negative])
        pipeline = open_muse_pipeline(run, finished)
        prompts, steps = repeated_prompts(args), args.steps or MUSE_STEPS
        return pipeline.images(pipeline.draw(prompts, args.seed, steps, *sampling, args.negative))
