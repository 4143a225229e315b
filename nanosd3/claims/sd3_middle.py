"""Is the middle of the path harder? (arXiv 2403.03206, section 3.1)

The loss itself does not show it. Its largest part is noise that cannot be predicted: near t = 0 the
noise is all but hidden behind the image, and the best answer there has a loss of about 1. What can
be learned is the rest. So a network is compared with itself after more training, on the same images
and noise: where the two are far apart, there was much to learn. Both draw their times evenly, so
that neither was trained more in the middle than at the ends.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.claims.runs import network_job, open_encoded
from nanosd3.config_types import Recipe
from nanosd3.mmdit import MMDiT
from nanosd3.related.finished_run import FinishedRun
from nanosd3.training.cached_features import Features
from nanosd3.training.loop import StepRNG
from nanosd3.training.plot_style import GREY, INK, PALE, new_figure, save_plot
from nanosd3.training.stages import CHUNK, Job, build, finish_or_load, fit_average, training_of
from nanosd3.training.train_flow import VALIDATION_TIMES, Network, flow_step, losses_over_time

ALMOST_UNIFORM = 0.0, 1.7  # logit-normal, within 0.01 of uniform: no time is favoured in advance
EARLY, LATE = 150, 900  # training steps
EVEN = Recipe(EARLY, batch=64, lr=8e-3, warmup=20, weight_decay=0.0)
QUARTER = VALIDATION_TIMES // 4


def trained_evenly(
    conditions: Conditions, finished: FinishedRun, features: Features, steps: int, seed: int
) -> tuple[Job, MMDiT]:
    """The main job's network after some steps of training, its times drawn evenly."""
    recipe = replace(EVEN, steps=steps)
    if conditions.fast:
        recipe = replace(EVEN, steps=max(4, steps // 100), batch=8, warmup=1)
    mean, std = ALMOST_UNIFORM
    training = replace(
        training_of(finished.config), flow=recipe, time_mean=mean, time_std=std, ema_decay=0.95
    )
    config = replace(finished.config, training=training)
    job = network_job(conditions, finished, f"even-{steps}", config, seed)
    with job.run.alone():
        model = build(job, "flow", lambda: MMDiT(config.mmdit))

        def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
            return flow_step(job, features, model, step_rng), {}

        decay = training.ema_decay
        finish_or_load(job, "flow", model, partial(fit_average, job, "flow", model, loss_of, decay))
    return job, model


@torch.no_grad()
def loss_by_time(job: Job, features: Features, network: Network) -> list[float]:
    """Mean loss on held-out images, with their captions, at equally spaced t."""
    images = torch.arange(job.source.trained, job.source.count)
    parts = [losses_over_time(job, features, network, rows) for rows in images.split(CHUNK)]
    return [torch.cat(losses).mean().item() for losses in zip(*parts, strict=True)]


def share_of_draws(first: float, last: float) -> float:
    """How often logit-normal(0, 1) draws a t between `first` and `last`."""
    ends = torch.tensor([first, last], dtype=torch.float64)
    return torch.special.ndtr(torch.logit(ends)).diff().item()


def middle_study(conditions: Conditions) -> dict:
    """Losses by t, early and late in training, for each seed."""
    finished, features = open_encoded(conditions)
    early: list[list[float]] = []
    late: list[list[float]] = []
    seconds = 0.0
    for seed in conditions.seeds:
        for steps, losses in ((EARLY, early), (LATE, late)):
            job, model = trained_evenly(conditions, finished, features, steps, seed)
            losses.append(loss_by_time(job, features, model))
            seconds += job.run.stages["flow"]["thread_seconds"]
    edges = [k / VALIDATION_TIMES for k in range(VALIDATION_TIMES + 1)]
    shares = [share_of_draws(a, b) for a, b in pairwise(edges)]
    to_learn = [
        [a - b for a, b in zip(*losses, strict=True)] for losses in zip(early, late, strict=True)
    ]
    times = [(a + b) / 2 for a, b in pairwise(edges)]
    rows: list[list[object]] = [
        [f"loss after {EARLY} steps", *map(list, zip(*early, strict=True))],
        [f"loss after {LATE} steps", *map(list, zip(*late, strict=True))],
        ["left to learn", *map(list, zip(*to_learn, strict=True))],
        ["logit-normal(0, 1) draws around t", *(f"{share:.1%}" for share in shares)],
    ]
    return {
        "times": times,
        "early": early,
        "late": late,
        "left_to_learn": to_learn,
        "shares": shares,
        "training_seconds": seconds,
        "table": table_of(["t", *times], rows),
    }


def regions(by_time: list[float]) -> tuple[float, float, float]:
    """Means over the quarter near the data, the half in the middle, the quarter near noise."""
    parts = by_time[:QUARTER], by_time[QUARTER:-QUARTER], by_time[-QUARTER:]
    data, middle, noise = (sum(part) / len(part) for part in parts)
    return data, middle, noise


def decide_middle(results: dict) -> Verdict:
    found = [regions(each) for each in results["left_to_learn"]]
    alone = len(found) < 2
    most = all(middle > max(data, noise) for data, middle, noise in found)
    less_than_data = all(middle < data for data, middle, _ in found)
    less_than_noise = all(middle < noise for _, middle, noise in found)
    return verdict(most and not alone, (less_than_data or less_than_noise) and not alone)


def plot_middle(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    times, seeds = results["times"], len(results["early"])
    for key, style, steps in (("early", "--s", EARLY), ("late", "-o", LATE)):
        means = [sum(each) / seeds for each in zip(*results[key], strict=True)]
        axes[0].plot(times, means, style, markersize=5, label=f"after {steps} steps")
    axes[0].set(title="Loss", ylabel="velocity loss (per latent)")
    axes[0].set_ylim(bottom=0)
    for i, each in enumerate(results["left_to_learn"]):
        axes[1].plot(times, each, "-", color=INK, label="" if i else "left to learn, each seed")
    highest = max(max(each) for each in results["left_to_learn"])
    scale = highest / max(results["shares"])
    shares = [scale * share for share in results["shares"]]
    label = "logit-normal(0, 1), to scale"
    axes[1].bar(times, shares, 1 / len(times), color=PALE, edgecolor=GREY, label=label)
    axes[1].set(title="What is left to learn", ylabel="difference of the losses")
    axes[1].set_ylim(top=1.45 * highest)  # room for the legend
    for axis in axes:
        axis.set_xlabel("t   (0 data, 1 noise)")
        axis.set_xlim(0, 1)
        axis.legend()
    save_plot(figure, path)


MIDDLE = Experiment(
    name="x-sd3-middle",
    claim="The velocity is harder to learn in the middle of the path than at its ends, which is "
    "why t should be drawn from there more often.",
    source="SD3, arXiv 2403.03206, section 3.1",
    measured=f"The main job's network after {EARLY} and after {LATE} training steps, its times "
    "drawn evenly. Losses on 256 images held out, with their captions and the same noise, at 8 "
    f"equally spaced t; the difference is what is left to learn after {EARLY} steps.",
    rule="Supported if in every seed there is more left to learn in the middle (mean over t from "
    "1/4 to 3/4) than in the quarter at either end. Refuted if in every seed there is less than "
    "at the data's end, or in every seed less than at the noise's. (One seed decides nothing.)",
    minutes=6,
    run=middle_study,
    decide=decide_middle,
    plot=plot_middle,
    remark="The loss alone says something else: after training it is lowest just past the middle, "
    "and highest near the data, where most of it is noise that nobody can guess. What is left to "
    "learn has a peak where logit-normal(0, 1) has its own, with a heavier side towards the data.",
)
