"""How a neighbour compares with the main model: the main job's yardsticks on the same draws, and
the same prompts drawn by both, side by side."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch

from nanosd3.config_types import Sampling
from nanosd3.pipeline import Pipeline
from nanosd3.related.finished_run import FinishedRun
from nanosd3.storage.files import write_file
from nanosd3.training import figures
from nanosd3.training.evaluation import Draw, draw_prompts, to_digits
from nanosd3.training.report import reconstructions, sample_images, shown_prompts

SCORED_DRAWS = (1, 2)  # seeds of the fresh draws of prompts and noise that samples are scored on
SHOWN_OF_EACH = 4  # images of a prompt in a picture
Generate = Callable[[Draw, int], np.ndarray]  # a draw and its seed to samples uint8 (B, H, W[, C])


def score_samples(finished: FinishedRun, generate: Generate, count: int, evaluations: int) -> dict:
    """Scores of about `count` samples: the means of two draws, and each draw's.

    The distance is also given relative to that of as many real images: distances as such compare
    only within one classifier and one number of samples.
    """
    scorer, draws = finished.scorer, []
    for seed in SCORED_DRAWS:
        draw = draw_prompts(finished.source, count, seed)
        begin = time.perf_counter()
        samples = to_digits(torch.from_numpy(generate(draw, seed)))
        seconds = time.perf_counter() - begin
        accuracy, distance = scorer.score(samples, draw)
        floor = scorer.floor(draw)
        draws.append(
            {
                "prompt_accuracy": accuracy,
                "frechet_distance": distance,
                "frechet_floor_real": floor,
                "frechet_ratio_to_real": distance / floor,
                "images_per_second": len(samples) / seconds,
            }
        )
    rebuilt = reconstructions(finished.source, draw.chosen, finished.pipeline)
    means = {key: sum(d[key] for d in draws) / len(draws) for key in draws[0]}
    return means | {
        "frechet_floor_reconstructions": scorer.distance(rebuilt),
        "samples": len(draw.prompts),
        "evaluations": evaluations,
        "draws": draws,
    }


def evaluations(sampling: Sampling) -> int:
    """Network evaluations of one image; a guided step has two halves."""
    steps = 2 * sampling.steps - 1 if sampling.sampler == "heun" else sampling.steps
    return steps if sampling.guidance == 1 else 2 * steps


def in_words(scores: dict) -> str:
    """Scores in a line."""
    return (
        f"{evaluations_in_words(scores['evaluations'])} an image, {scores['prompt_accuracy']:.1%} "
        f"read as asked, Frechet distance {scores['frechet_ratio_to_real']:.2f} times that of real "
        "images"
    )


def evaluations_in_words(count: int) -> str:
    return "1 network evaluation" if count == 1 else f"{count} network evaluations"


def pipeline_scores(
    finished: FinishedRun, pipeline: Pipeline, count: int, sampling: Sampling
) -> dict:
    """Scores of a pipeline with its own or another sampling."""

    def generate(draw: Draw, seed: int) -> np.ndarray:
        images = pipeline(
            draw.prompts,
            seed=seed,
            steps=sampling.steps,
            guidance=sampling.guidance,
            sampler=sampling.sampler,
        )
        return cast(np.ndarray, images)

    return score_samples(finished, generate, count, evaluations(sampling))


def draw_beside_main(finished: FinishedRun, pipeline: Pipeline, path: Path) -> None:
    """Draw the same prompts from the same noise by a pipeline and, to its right, by the main
    model."""
    prompts, columns = shown_prompts(finished.source), []
    for model in (pipeline, finished.pipeline):
        images = sample_images(model, [prompt for prompt in prompts for _ in range(SHOWN_OF_EACH)])
        rows = list(zip(prompts, np.split(images, len(prompts)), strict=True))
        title = evaluations_in_words(evaluations(model.config.sampling))
        columns.append((title, figures.grid(rows)))
    write_file(path, figures.png(figures.side_by_side(columns)))
