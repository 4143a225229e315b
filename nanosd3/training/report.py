"""Samples, metrics and pictures of a run: previews while it trains, the report at its end.

The metrics are taken on samples whose prompts are captions drawn as in training, the same number
for each class:

    prompt accuracy     share of samples that the classifier assigns to the prompted class
    Frechet distance    in the classifier's features, with two floors that give it a scale
    weight, slant       share of samples that match the attribute in their prompt, as measured in
                        the image
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanosd3.data.mnist import DIGITS, SIDE, bins, measure_strokes
from nanosd3.data.sources import Digits
from nanosd3.errors import shortened
from nanosd3.machine.device import peak_memory
from nanosd3.machine.distributed import ParallelModel
from nanosd3.pipeline import Pipeline, images_at_once
from nanosd3.samplers import Callback
from nanosd3.storage.files import write_file, write_json
from nanosd3.training import plots
from nanosd3.training.cached_features import Features
from nanosd3.training.evaluation import Scorer, draw_prompts, to_digits
from nanosd3.training.grids_and_gifs import gif, grid, grid_of, png, shades
from nanosd3.training.stages import Job
from nanosd3.training.train_flow import every_so_often

PREVIEWS = 10  # per run
RECONSTRUCTION_BATCH = 50  # at most
TERMINAL_SAMPLES = 5
EXACT_STEPS = 100  # of Heun, for the solution that solvers are compared with
SOLVER_EVALUATIONS = (5, 9, 17, 33)  # per image, to compare solvers at; odd, because of Heun
WEIGHT_WORDS = {"thin": 0, "bold": 2}  # the third of the stroke weights that a word stands for
SLANT_WORDS = {"leaning left": 0, "upright": 1, "leaning right": 2}
DIGIT_PROMPTS = (
    "a handwritten zero",
    "1",
    "a bold two leaning right",
    "the digit 3",
    "a thin 4 leaning left",
    "the number five",
    "an upright six",
    "a bold handwritten seven leaning right",
    "8",
    "a thin nine",
)


def shown_prompts(source: Digits) -> list[str]:
    """The prompts of previews and sample grids: one for each class, differently worded."""
    if source.images.names is DIGITS:
        return list(DIGIT_PROMPTS)
    choices = source.described.captions.choices
    return [source.texts[int(choices[c, 1, 1, c % choices.shape[3]])] for c in range(len(choices))]


def sample_images(
    pipeline: Pipeline, prompts: list[str], seed: int = 0, callback: Callback | None = None
) -> np.ndarray:
    """An image for each prompt: uint8 (B, H, W) or (B, H, W, C)."""
    images = pipeline(prompts, seed=seed, callback=callback)
    assert isinstance(images, np.ndarray)
    return images


def sample_latents(
    pipeline: Pipeline,
    prompts: list[str],
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
) -> Tensor:
    """Normalised latents (B, C, h, w) for each prompt."""
    latents = pipeline(prompts, seed=seed, sampler=sampler, steps=steps, output="latent")
    assert isinstance(latents, Tensor)
    return latents


# --- previews -------------------------------------------------------------------------------------


def preview(pipeline: Pipeline, step: int, prompts: list[str], folder: Path, is_main: bool) -> None:
    """Write early samples to the run folder and print small greyscale ones to the terminal.

    All ranks must call this: a sharded network needs them all to sample. The main process draws.
    """
    latents = sample_latents(pipeline, prompts, seed=1)
    if not is_main:
        return
    images = pipeline.decode(latents)
    picture = grid_of(prompts, images)
    write_file(folder / f"preview-{step:08d}.png", png(picture))
    if images.ndim == 3 and images.shape[1] <= SIDE:
        drawing = shades(images[:TERMINAL_SAMPLES])
        captions = ", ".join(shortened(prompt, 40) for prompt in prompts[:TERMINAL_SAMPLES])
        print(f"\n  step {step}: {captions}\n{drawing}\n", file=sys.stderr)


def previews(
    job: Job, features: Features, prompts: list[str]
) -> Callable[[int, ParallelModel], None]:
    """A callback for `train_flow` that draws `prompts`, PREVIEWS times per run."""
    every = every_so_often(job.training.flow.steps, PREVIEWS)

    def watch(step: int, average: ParallelModel) -> None:
        if (step + 1) % every == 0:
            pipeline = features.pipeline(average, job.device)
            preview(pipeline, step + 1, prompts, job.run.folder, job.group.is_main)

    return watch


# --- metrics --------------------------------------------------------------------------------------


def attribute_accuracy(
    prompts: list[str], words: dict[str, int], measured: Tensor, values: Tensor
) -> dict:
    """Do samples match the attribute in their prompts?

    `words` maps a word to the third of the values it stands for (0, 1 or 2); `measured` (B,) holds
    the third that each sample falls into, `values` (B,) the measured attribute itself. Returns the
    share of matches among prompts with such a word, and the mean value for each word. Both are None
    if there is no such prompt.
    """
    expected = thirds_asked(prompts, words)
    means = {word: mean_or_none(values[expected == third]) for word, third in words.items()}
    matches = (measured == expected)[expected >= 0]
    return {"accuracy": mean_or_none(matches.float()), "mean_by_word": means}


def thirds_asked(prompts: list[str], words: dict[str, int]) -> Tensor:
    """The third of the values (B,) that each prompt asks for with one of the words; -1 if none."""
    return torch.tensor(
        [
            next((third for word, third in words.items() if f" {word} " in f" {prompt} "), -1)
            for prompt in prompts
        ]
    )


def mean_or_none(values: Tensor) -> float | None:
    """The mean, or None if there are no values."""
    return values.mean().item() if len(values) else None


@torch.no_grad()
def evaluate(job: Job, scorer: Scorer, pipeline: Pipeline) -> dict:
    """The metrics of samples (see the module's docstring), for metrics.json."""
    source, described = scorer.source, scorer.source.described
    draw = draw_prompts(source, job.training.evaluate, job.seed)

    begin = time.perf_counter()
    samples = to_digits(torch.from_numpy(sample_images(pipeline, draw.prompts, job.seed)))
    seconds = time.perf_counter() - begin
    floor = scorer.floor(draw)
    accuracy, distance = scorer.score(samples, draw)
    weight, slant = measure_strokes(samples)
    weight_third = bins(weight, draw.labels, described.weight_limits)
    slant_third = bins(slant, draw.labels, described.slant_limits)
    return {
        "samples": len(draw.prompts),
        "prompt_accuracy": accuracy,
        "frechet_distance": distance,
        "frechet_floor_real": floor,
        "frechet_floor_reconstructions": scorer.distance(
            reconstructions(source, draw.chosen, pipeline)
        ),
        "frechet_ratio_to_real": distance / floor,
        "weight": attribute_accuracy(draw.prompts, WEIGHT_WORDS, weight_third, weight),
        "slant": attribute_accuracy(draw.prompts, SLANT_WORDS, slant_third, slant),
        "images_per_second": len(draw.prompts) / seconds,
    }


def reconstructions(source: Digits, index: Tensor, pipeline: Pipeline) -> Tensor:
    """Training images encoded and decoded again, as digits uint8 (B, 28, 28)."""
    decoded = []
    pixels = source.pixels(index[:1])[0, 0].numel()
    size = min(RECONSTRUCTION_BATCH, images_at_once(pipeline.config.vae, pixels))
    for batch in index.split(size):
        mean, _ = pipeline.posterior(source.pixels(batch))
        decoded.append(torch.from_numpy(pipeline.decode(pipeline.vae.normalise(mean))))
    return to_digits(torch.cat(decoded))


@torch.no_grad()
def solver_errors(pipeline: Pipeline, prompts: list[str]) -> dict[str, list[tuple[int, float]]]:
    """For each solver, (network evaluations, r.m.s. distance from a very fine solution)."""
    exact = sample_latents(pipeline, prompts, sampler="heun", steps=EXACT_STEPS)
    errors: dict[str, list[tuple[int, float]]] = {}
    for sampler in ("euler", "heun", "dpmpp_2m"):
        for evaluations in SOLVER_EVALUATIONS:
            steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
            latents = sample_latents(pipeline, prompts, sampler=sampler, steps=steps)
            error = (latents - exact).square().mean().sqrt().item()
            errors.setdefault(sampler, []).append((evaluations, error))
    return errors


# --- pictures -------------------------------------------------------------------------------------


@torch.no_grad()
def draw_trajectory(pipeline: Pipeline, prompts: list[str], path: Path) -> None:
    """Animate sampling. Each frame has two rows: the noisy latents, decoded, and the clean image
    that the velocity points to, decoded."""
    frames = []

    def record(step: int, t: Tensor, z: Tensor, x0: Tensor) -> None:
        noisy = (f"t = {float(t):.2f}, decoded as it is", pipeline.decode(z))
        clean = ("where its velocity points", pipeline.decode(x0))
        frames.append(grid([noisy, clean]))

    final = sample_images(pipeline, prompts, seed=2, callback=record)
    captions = ("t = 0.00, decoded as it is", "where its velocity points")
    frames.append(grid([(caption, final) for caption in captions]))
    times = [120] * (len(frames) - 1) + [2000]  # milliseconds; the last one longer
    write_file(path, gif(frames, times))


def draw_samples(pipeline: Pipeline, prompts: list[str], columns: int, path: Path) -> None:
    """Write a grid with a row for each prompt."""
    images = sample_images(pipeline, [prompt for prompt in prompts for _ in range(columns)])
    write_file(path, png(grid_of(prompts, images)))


# --- the report -----------------------------------------------------------------------------------


def about_training(job: Job) -> dict:
    """The part of metrics.json that every run has."""
    validation = [e for e in job.run.read_log() if "validation" in e]
    last = validation[-1] if validation else {}
    return {
        "validation": last.get("validation"),
        "validation_ema": last.get("validation_ema"),
        "stages": job.run.stages,
        "threads": torch.get_num_threads(),
        "peak_memory_gb": peak_memory(job.device),
    }


def report_digits(job: Job, scorer: Scorer, pipeline: Pipeline, turbo: dict | None) -> dict:
    """Write samples.png, trajectory.gif, loss.png, samplers.png and metrics.json.

    Returns the metrics; `turbo` are those of the distilled model, if there is one.
    """
    folder = job.run.folder
    prompts = shown_prompts(scorer.source)
    metrics = evaluate(job, scorer, pipeline)
    draw_samples(pipeline, prompts, 8, folder / "samples.png")
    draw_trajectory(pipeline, prompts, folder / "trajectory.gif")
    plots.plot_loss(job.run.read_log(), folder / "loss.png")
    errors = solver_errors(pipeline, prompts)
    plots.plot_samplers(errors, folder / "samplers.png")
    metrics |= {"solver_errors": errors, "turbo": turbo, **about_training(job)}
    write_json(folder / "metrics.json", metrics)
    return metrics


def report_pictures(job: Job, prompts: list[str], pipeline: Pipeline) -> None:
    """Write samples.png, loss.png and metrics.json."""
    folder = job.run.folder
    draw_samples(pipeline, prompts, 8, folder / "samples.png")
    plots.plot_loss(job.run.read_log(), folder / "loss.png")
    write_json(folder / "metrics.json", about_training(job))
