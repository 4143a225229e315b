"""Guidance: what it gives to the prompt it takes from diversity (arXiv 2403.03206, section 5).

Guided velocities lead further away from what the model draws without a prompt. Samples then fit
their prompts better, and resemble each other more.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.claims.runs import open_encoded
from nanosd3.related.scoring import draw_and_floor
from nanosd3.training.evaluation import to_digits
from nanosd3.training.plot_style import INK, new_figure, save_plot

SCALES = (1.0, 1.6, 2.5, 4.0, 7.0)


def spread_within(features: Tensor, labels: Tensor) -> float:
    """How different images of one label are: the root mean square distance of their features
    (B, F) from the label's mean."""
    squares = 0.0
    for label in labels.unique():
        mine = features[labels == label].double()
        squares += float((mine - mine.mean(0)).square().sum())
    return (squares / (len(features) - len(labels.unique()))) ** 0.5


def guidance_study(conditions: Conditions) -> dict:
    """By seed and guidance scale: accuracy, Frechet ratio, and the spread over that of real
    images."""
    finished, _ = open_encoded(conditions)
    scorer, count = finished.scorer, 40 if conditions.fast else 1000
    found: dict[str, list[list[float]]] = {key: [] for key in ("accuracy", "ratio", "spread")}
    for seed in conditions.seeds:
        draw, floor = draw_and_floor(finished, count, 100 + seed)
        real = scorer.features(finished.source.images.train_images[draw.chosen])
        real_spread = spread_within(real, draw.labels)
        rows = []
        for scale in SCALES:
            images = finished.pipeline(draw.prompts, seed=100 + seed, guidance=scale)
            digits = to_digits(torch.as_tensor(images))
            accuracy, distance = scorer.score(digits, draw)
            spread = spread_within(scorer.features(digits), draw.labels)
            rows.append([accuracy, distance / floor, spread / real_spread])
        for key, values in zip(found, zip(*rows, strict=True), strict=True):
            found[key].append(list(values))
    rows_of_table = [
        [scale, *([by_seed[i] for by_seed in found[key]] for key in found)]
        for i, scale in enumerate(SCALES)
    ]
    columns = ["guidance", "read as asked", "Frechet ratio", "spread (real images: 1)"]
    return {**found, "table": table_of(columns, rows_of_table)}


def falls_throughout(values: Sequence[float]) -> bool:
    return all(b < a for a, b in pairwise(values))


def decide_guidance(results: dict) -> Verdict:
    accuracy, spread = results["accuracy"], results["spread"]
    enough = len(accuracy) > 1
    follows = [max(each[1:]) > each[0] for each in accuracy]
    narrows = [falls_throughout(each) for each in spread]
    no_narrower = [each[-1] >= each[0] for each in spread]
    return verdict(
        enough and all(follows) and all(narrows),
        enough and (not any(follows) or all(no_narrower)),
    )


def plot_guidance(results: dict, path: Path) -> None:
    figure, axes = new_figure(10, 3)
    titles = ("Read as asked", "Frechet ratio", "Spread within a digit (real: 1)")
    for axis, key, title in zip(axes, ("accuracy", "ratio", "spread"), titles, strict=True):
        for values in results[key]:
            axis.plot(SCALES, values, "-o", color=INK, markersize=4, linewidth=0.8)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        axis.set(title=title, xlabel="guidance scale (a line a seed)")
    save_plot(figure, path)


GUIDANCE_TRADE = Experiment(
    name="x-sd3-guidance",
    claim="Guidance trades diversity for following the prompt.",
    source="SD3, arXiv 2403.03206, section 5; Ho and Salimans, arXiv 2207.12598",
    measured="1000 samples of the main job's model at guidance scales 1 (none), 1.6, 2.5, 4 and 7, "
    "with the same captions and noise; a seed is another draw of both. The share read as asked, "
    "the Frechet distance over that of real images, and the spread of the classifier's features "
    "within a digit, over that of as many real images.",
    rule="Supported if in every seed more are read as asked at some scale above 1 than at 1, and "
    "the spread falls from each scale to the next. Refuted if in no seed more are read as asked, "
    "or in every seed the spread is no smaller at 7 than at 1. (One seed decides nothing.)",
    minutes=6,
    run=guidance_study,
    decide=decide_guidance,
    plot=plot_guidance,
    remark="From 1 to 4 more are read as asked and the spread falls in every seed, as claimed. "
    "From 4 to 7 it rises again a little, and the Frechet distance with it: there images are "
    "overdone, and differ in how.",
)
