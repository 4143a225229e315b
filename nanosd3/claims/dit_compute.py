"""DiT's scaling: more multiply-adds, lower error, wherever they come from (arXiv 2212.09748)."""

from itertools import pairwise
from pathlib import Path

from nanosd3.claims.dit_networks import DiTTrainer
from nanosd3.claims.experiment import (
    Conditions,
    Experiment,
    Verdict,
    lead,
    rank_correlation,
    table_of,
    verdict,
)
from nanosd3.related.dit import multiply_adds
from nanosd3.related.train_dit import DiTLoss, steps_evenly
from nanosd3.training.plot_style import label_counts, new_figure, save_plot

DEPTHS = {32: 3, 64: 4, 96: 6}  # by width
PATCHES = (4, 2, 1)
CELLS = [(w, p) for w in DEPTHS for p in PATCHES if (w, p) != (96, 1)]  # that one takes too long
CELL_MARKS = {32: "o-", 64: "s--", 96: "^:"}


def compute(conditions: Conditions) -> dict:
    """For each width and patch size: multiply-adds, and errors and seconds over seeds."""
    trainer, loss = DiTTrainer(conditions), DiTLoss("ddpm", steps_evenly)
    costs: list[float] = []
    errors: list[list[float]] = []
    seconds: list[list[float]] = []
    for width, patch in CELLS:
        sizes = {"width": width, "depth": DEPTHS[width], "heads": width // 32}
        config = trainer.config(patch_size=patch, **sizes)
        name = f"compute-{width}-{patch}"
        found = [trainer.trained(name, seed, config, loss, 400, 4e-3) for seed in conditions.seeds]
        costs.append(multiply_adds(config) / 1e6)
        errors.append([trained.error for trained in found])
        seconds.append([trained.seconds for trained in found])
    columns = ["width", "patch", "x 10^6 multiply-adds", "validation error", "seconds of training"]
    rows = [
        [w, p, round(cost, 2), error, time]
        for (w, p), cost, error, time in zip(CELLS, costs, errors, seconds, strict=True)
    ]
    return {
        "costs": costs,
        "errors": errors,
        "seconds": seconds,
        "rank_correlations": [
            rank_correlation(costs, [each[i] for each in errors])
            for i in range(len(conditions.seeds))
        ],
        "training_seconds": sum(map(sum, seconds)),
        "table": table_of(columns, rows),
    }


def decide_compute(results: dict) -> Verdict:
    errors = dict(zip(CELLS, results["errors"], strict=True))
    finer = [
        lead(errors[width, fine], errors[width, coarse])
        for width in DEPTHS
        for coarse, fine in pairwise(PATCHES)
        if (width, fine) in errors
    ]
    correlations = results["rank_correlations"]
    mean = sum(correlations) / len(correlations)
    supported = max(correlations) <= -0.8 and all(m > 0 for m, _ in finer)
    return verdict(supported, mean > -0.5 or any(m < -spread for m, spread in finer))


def plot_compute(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    means = [sum(each) / len(each) for each in results["errors"]]
    seconds = [sum(each) / len(each) for each in results["seconds"]]
    for width in DEPTHS:
        mine = [i for i, (w, _) in enumerate(CELLS) if w == width]
        label = f"width {width}, depth {DEPTHS[width]}"
        for axis, x in zip(axes, (results["costs"], seconds), strict=True):
            axis.semilogx(
                [x[i] for i in mine], [means[i] for i in mine], CELL_MARKS[width], label=label
            )
            for i in mine:
                patch = f"/{CELLS[i][1]}"
                up = -12 if width == max(DEPTHS) else 5  # the widest are below the others
                axis.annotate(patch, (x[i], means[i]), (2, up), textcoords="offset points")
    label_counts(axes[0], (0.2, 1, 5, 15))
    label_counts(axes[1], (7, 10, 20, 40, 70))
    for axis in axes:
        axis.set_yscale("log")
        axis.set_ylim(0.14, 0.7)
        axis.set_yticks([0.15, 0.2, 0.3, 0.5], ["0.15", "0.2", "0.3", "0.5"])
        axis.minorticks_off()
    axes[0].set(xlabel="10^6 multiply-adds", ylabel="validation error", title="By compute")
    axes[1].set(xlabel="seconds of training", title="By time")
    axes[0].legend()
    save_plot(figure, path)


DIT_COMPUTE = Experiment(
    name="x-dit-2",
    claim="A DiT's quality follows its multiply-adds: a wider and deeper network or smaller "
    "patches (so more tokens) both lower the error.",
    source="DiT, arXiv 2212.09748, section 5 and figure 8 (correlation with FID -0.93)",
    measured="Eight DiTs of three widths and three patch sizes in the main job's latents (8x8), "
    "each trained 400 steps at one rate, 4e-3. The error of the predicted noise on 256 images "
    "held out.",
    rule="Supported if in every seed the rank correlation of error and multiply-adds is -0.8 or "
    "below, and at each width each smaller patch has the lower mean error. Refuted if the mean "
    "correlation is above -0.5, or a smaller patch is worse by more than the spread over seeds.",
    minutes=8,
    run=compute,
    decide=decide_compute,
    plot=plot_compute,
    remark="Width and depth lower the error at every patch size. Smaller patches do not: patches "
    "of 1 are worse than of 2, and of the largest network 2 than 4, after so few steps and at one "
    "rate. The claim is by training step; by seconds (second plot) small patches look worse still.",
)
