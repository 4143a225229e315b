"""Larger images need times nearer to noise (arXiv 2403.03206, section 5.3.2, eq. 23).

The same noise hides a large image less than a small one: what neighbouring pixels share can be
averaged over more of them. So an image of m pixels at t looks as uncertain as one of n pixels at
another t, and the two are related by a shift of sqrt(m / n). The paper derives it from constant
images and chose its shift by human preference.

Here it needs no training. A finite data set has an exact velocity field; the same digits at two
sizes have two, and for each the shift with the smallest error of few steps can be found.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.data.mnist import load_images
from nanosd3.flow import schedule
from nanosd3.random_streams import rng
from nanosd3.related.paths import PATHS, exact_velocity
from nanosd3.samplers import Velocity, euler, heun
from nanosd3.training.plot_style import new_figure, plain_logarithm, save_plot

SHIFTED_SIDES = (8, 16, 32)
SHIFTS = [2 ** (k / 2) for k in range(-2, 12)]  # 0.5 to 45
STEPS_TO_SHIFT = (6, 12)
SIDE_MARKS = dict(zip(SHIFTED_SIDES, ("o-", "s--", "^:"), strict=True))


def digits_of_size(images: Tensor, side: int) -> Tensor:
    """Digits uint8 (n, 28, 28) as points (n, side * side) of mean 0 and deviation 1."""
    x = images[:, None].double()
    size = (side, side)
    x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True).flatten(1)
    return ((x - x.mean()) / x.std()).float()


@torch.no_grad()
def errors_by_shift(velocity: Velocity, noise: Tensor, side: int, fine: int) -> list[list[float]]:
    """For each number of steps and each shift, how far Euler's end points are from those of many
    steps (r.m.s.)."""
    end = heun(velocity, noise, schedule(fine, side / 8))
    return [
        [
            float((euler(velocity, noise, schedule(steps, alpha)) - end).square().mean().sqrt())
            for alpha in SHIFTS
        ]
        for steps in STEPS_TO_SHIFT
    ]


def best_shift(errors: list[float]) -> float:
    """Where a parabola through the smallest error and two neighbours on either side, over the
    logarithm of the shift, is lowest: between these neighbours, if it has a minimum."""
    k = min(max(2, errors.index(min(errors))), len(errors) - 3)
    near, at = slice(k - 2, k + 3), np.log2(SHIFTS[k - 2 : k + 3])
    bend, slope, _ = np.polyfit(at, errors[near], 2)
    lowest = -slope / (2 * bend) if bend > 0 else np.log2(SHIFTS[errors.index(min(errors))])
    return float(2 ** np.clip(lowest, at[0], at[-1]))


def shift_study(conditions: Conditions) -> dict:
    """Errors by side, number of steps, seed and shift; the best shifts; how much they grow."""
    points, samples, fine = (50, 8, 12) if conditions.fast else (1000, 200, 200)
    images = load_images().train_images
    errors: dict[str, list] = {str(side): [[] for _ in STEPS_TO_SHIFT] for side in SHIFTED_SIDES}
    for seed in conditions.seeds:
        generator = rng(seed, "x-sd3-shift")
        chosen = images[torch.randperm(len(images), generator=generator)[:points]]
        for side in SHIFTED_SIDES:
            noise = torch.randn(samples, side * side, generator=generator)
            velocity = exact_velocity(PATHS["ot"], digits_of_size(chosen, side))
            found = errors_by_shift(velocity, noise, side, fine)
            for each, row in zip(errors[str(side)], found, strict=True):
                each.append(row)
    best = {
        side: [[best_shift(row) for row in by_seed] for by_seed in by_steps]
        for side, by_steps in errors.items()
    }
    growth = [
        [b / a for steps in zip(best[str(small)], best[str(large)], strict=True)
         for a, b in zip(*steps, strict=True)]
        for small, large in pairwise(SHIFTED_SIDES)
    ]  # fmt: skip
    rows = [[f"{side}x{side}", *best[str(side)]] for side in SHIFTED_SIDES]
    columns = ["images", *(f"best shift in {steps} steps" for steps in STEPS_TO_SHIFT)]
    return {"errors": errors, "best": best, "growth": growth, "table": table_of(columns, rows)}


def decide_shift(results: dict) -> Verdict:
    means = [torch.tensor(ratios).log().mean().exp().item() for ratios in results["growth"]]
    return verdict(
        all(1.5 <= mean <= 2.7 for mean in means),
        any(mean < 1.25 or mean > 3.2 for mean in means),
    )


def plot_shift(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, len(STEPS_TO_SHIFT))
    for i, (axis, steps) in enumerate(zip(axes, STEPS_TO_SHIFT, strict=True)):
        for side, mark in SIDE_MARKS.items():
            rows = torch.tensor(results["errors"][str(side)][i])
            (curve,) = axis.plot(SHIFTS, rows.mean(0), mark, markersize=4, label=f"{side}x{side}")
            for best in results["best"][str(side)][i]:
                axis.axvline(best, color=curve.get_color(), alpha=0.3, zorder=0, linewidth=1)
        axis.set(title=f"Error of {steps} Euler steps", xlabel="shift (upright: best of each seed)")
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
        plain_logarithm(axis)
    axes[0].legend()
    save_plot(figure, path)


TIMES_SHIFT = Experiment(
    name="x-sd3-shift",
    claim="At m pixels in place of n, the best times are those of n shifted by sqrt(m / n).",
    source="SD3, arXiv 2403.03206, section 5.3.2 and eq. 23",
    measured="The exact field of 1000 MNIST images (no training) at 8x8, 16x16 and 32x32. For 14 "
    "shifts from 0.5 to 45: how far the end points of 6 and of 12 Euler steps are from those of "
    "200 Heun steps (r.m.s., 200 samples). The shift with the smallest error, and the factor by "
    "which it grows when the side doubles.",
    rule="Supported if for both doublings that factor, a geometric mean over seeds and numbers of "
    "steps, is 2 within a third (1.5 to 2.7). Refuted if for one it is below 1.25 or above 3.2.",
    minutes=3,
    run=shift_study,
    decide=decide_shift,
    plot=plot_shift,
)
