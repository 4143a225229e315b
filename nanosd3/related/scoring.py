"""Compare a system with the main model: the main job's metrics on the same draws, and samples of
both for the same prompts, side by side."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanosd3.config_types import Sampling
from nanosd3.data.mnist import to_uint8
from nanosd3.pipeline import Pipeline
from nanosd3.related.finished_run import FinishedRun
from nanosd3.storage.files import write_file
from nanosd3.training.evaluation import Draw, draw_prompts, to_digits
from nanosd3.training.grids_and_gifs import grid, grid_of, png, side_by_side
from nanosd3.training.report import (
    RECONSTRUCTION_BATCH,
    reconstructions,
    sample_images,
    shown_prompts,
)
from nanosd3.vae import AutoencoderKL

SCORED_DRAWS = (1, 2)  # seeds of the fresh draws of prompts and noise that samples are scored on
SHOWN_OF_EACH = 4  # images of a prompt in a picture
SHOWN_IMAGES = 8  # decoded
Decode = Callable[[Tensor], Tensor]  # normalised latents (B, c, h, w) to images in [-1, 1]
Generate = Callable[[Draw, int], np.ndarray]  # a draw and its seed to samples uint8 (B, H, W[, C])


def draw_and_floor(finished: FinishedRun, count: int, seed: int) -> tuple[Draw, float]:
    """Prompts to score samples on, and the distance of as many real images."""
    key = ("draw", count, seed)
    if key not in finished.measured:
        draw = draw_prompts(finished.source, count, seed)
        finished.measured[key] = draw, finished.scorer.floor(draw)
    return finished.measured[key]


def accuracy_and_ratio(
    finished: FinishedRun, images: np.ndarray, draw: Draw, floor: float
) -> tuple[float, float]:
    """The share of samples uint8 (B, H, W[, C]) of a draw that the classifier reads as prompted,
    and their Frechet distance over that of real images."""
    accuracy, distance = finished.scorer.score(to_digits(torch.from_numpy(images)), draw)
    return accuracy, distance / floor


def distance_of_reconstructions(finished: FinishedRun, count: int, seed: int) -> float:
    """The distance of the same real images, encoded and decoded."""
    key = ("reconstructions", count, seed)
    if key not in finished.measured:
        draw, _ = draw_and_floor(finished, count, seed)
        rebuilt = reconstructions(finished.source, draw.chosen, finished.pipeline)
        finished.measured[key] = finished.scorer.distance(rebuilt)
    return finished.measured[key]


def score_samples(
    finished: FinishedRun,
    generate: Generate,
    count: int,
    evaluations: int,
    draws: Sequence[int] = SCORED_DRAWS,
) -> dict:
    """Scores of about `count` samples of each draw, and their means.

    The distance is also given relative to that of as many real images: distances are comparable
    only for one classifier and one number of samples.
    """
    scorer, scores = finished.scorer, []
    for seed in draws:
        draw, floor = draw_and_floor(finished, count, seed)
        begin = time.perf_counter()
        samples = to_digits(torch.from_numpy(generate(draw, seed)))
        seconds = time.perf_counter() - begin
        accuracy, distance = scorer.score(samples, draw)
        scores.append(
            {
                "prompt_accuracy": accuracy,
                "frechet_distance": distance,
                "frechet_floor_real": floor,
                "frechet_ratio_to_real": distance / floor,
                "images_per_second": len(samples) / seconds,
            }
        )
    means = {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}
    return means | {
        "frechet_floor_reconstructions": distance_of_reconstructions(finished, count, seed),
        "samples": len(draw.prompts),
        "evaluations": evaluations,
        "draws": scores,
    }


def evaluations(sampling: Sampling) -> int:
    """Network evaluations of one image; guidance doubles them."""
    steps = 2 * sampling.steps - 1 if sampling.sampler == "heun" else sampling.steps
    return steps if sampling.guidance == 1 else 2 * steps


def in_words(scores: dict) -> str:
    """Scores in a line."""
    return (
        f"{evaluations_in_words(scores['evaluations'])} an image, prompt accuracy "
        f"{scores['prompt_accuracy']:.1%}, Frechet distance "
        f"{scores['frechet_ratio_to_real']:.2f} times that of real images"
    )


def evaluations_in_words(count: int) -> str:
    return "1 network evaluation" if count == 1 else f"{count} network evaluations"


def pipeline_scores(
    finished: FinishedRun,
    pipeline: Pipeline,
    count: int,
    sampling: Sampling,
    draws: Sequence[int] = SCORED_DRAWS,
) -> dict:
    """Scores of a pipeline, with its own sampling or another."""

    def generate(draw: Draw, seed: int) -> np.ndarray:
        images = pipeline(
            draw.prompts,
            seed=seed,
            steps=sampling.steps,
            guidance=sampling.guidance,
            sampler=sampling.sampler,
        )
        return cast(np.ndarray, images)

    return score_samples(finished, generate, count, evaluations(sampling), draws)


def grid_of_prompts(finished: FinishedRun, draw: Callable[[list[str]], np.ndarray]) -> Image.Image:
    """A row of images for each of a few prompts, from the same noise for every model."""
    prompts = shown_prompts(finished.source)
    images = draw([prompt for prompt in prompts for _ in range(SHOWN_OF_EACH)])
    return grid_of(prompts, images)


def save_beside_main(
    finished: FinishedRun, title: str, ours: Image.Image, path: Path, main: str = "the main model"
) -> None:
    """Write a grid and, to its right, under the title `main`, the main model's samples."""
    theirs = grid_of_prompts(finished, partial(sample_images, finished.pipeline))
    write_file(path, png(side_by_side([(title, ours), (main, theirs)])))


def draw_beside_main(finished: FinishedRun, pipeline: Pipeline, path: Path) -> None:
    """Draw the same prompts with a pipeline and, to the right, with the main model."""
    ours = grid_of_prompts(finished, partial(sample_images, pipeline))
    mine, main = (
        evaluations_in_words(evaluations(model.config.sampling))
        for model in (pipeline, finished.pipeline)
    )
    save_beside_main(finished, mine, ours, path, main)


# --- decoders -------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction_scores(
    finished: FinishedRun, vae: AutoencoderKL, decode: Decode, count: int
) -> dict:
    """Scores of training images encoded and decoded again: accuracy and distance as for samples,
    the error in decibels (PSNR), the strength of edges relative to real ones, and the speed."""
    scorer, source = finished.scorer, finished.source
    draw, floor = draw_and_floor(finished, count, SCORED_DRAWS[0])
    decoded, seconds, errors, edges = [], 0.0, [], torch.zeros(2)
    for index in draw.chosen.split(RECONSTRUCTION_BATCH):
        x = source.pixels(index).to(finished.device)
        latents = vae.normalise(vae.encode(x)[0])
        begin = time.perf_counter()
        y = decode(latents).clamp(-1, 1)
        seconds += time.perf_counter() - begin
        errors.append((y - x).square().flatten(1).mean(1))
        edges += torch.tensor([edge_energy(y), edge_energy(x)])
        cut = finished.config.padding
        decoded.append(to_uint8(y[:, :, cut : y.shape[2] - cut, cut : y.shape[3] - cut]).cpu())
    digits = to_digits(torch.cat(decoded))
    accuracy, distance = scorer.score(digits, draw)
    return {
        "prompt_accuracy": accuracy,
        "frechet_distance": distance,
        "frechet_floor_real": floor,
        "frechet_ratio_to_real": distance / floor,
        "psnr": float(10 * torch.log10(4 / torch.cat(errors)).mean()),
        "sharpness": float(edges[0] / edges[1]),
        "images_per_second": len(digits) / seconds,
    }


def edge_energy(x: Tensor) -> float:
    """Squared differences of neighbouring pixels, summed."""
    return float(x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum())


def draw_decoded(
    finished: FinishedRun, vae: AutoencoderKL, ways: dict[str, Decode], path: Path
) -> None:
    """The first held-out digits, and their latents decoded in each way."""
    source = finished.source
    x = source.pixels(torch.arange(source.trained, source.trained + SHOWN_IMAGES))
    with torch.no_grad():
        latents = vae.normalise(vae.encode(x.to(finished.device))[0])
        rows = [("real", to_uint8(x).numpy())]
        rows += [(name, to_uint8(way(latents)).cpu().numpy()) for name, way in ways.items()]
    write_file(path, png(grid(rows)))
