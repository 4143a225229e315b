"""How straight paths are, and whether that makes them easy to follow (arXiv 2210.02747).

For a finite data set the velocity field that a perfect network would learn has a closed form
(paths.exact_velocity). On it, a claim about paths is about paths, not about networks.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.data.mnist import load_images
from nanosd3.flow import shift
from nanosd3.random_streams import rng
from nanosd3.related.paths import PATHS, exact_velocity
from nanosd3.related.solvers import midpoint
from nanosd3.samplers import Velocity, euler
from nanosd3.training.plot_style import label_counts, new_figure, save_plot

THREE_PATHS = ("ot", "vp", "cosine")
LABELS = {"ot": "OT", "vp": "VP", "cosine": "cosine", "ot, shift 3": "OT, shift 3"}
STYLES = {"ot": "-o", "vp": "--s", "cosine": ":^", "ot, shift 3": "-.v"}
EVALUATIONS = (2, 4, 8, 16, 32, 64)


def images_and_noise(conditions: Conditions, seed: int) -> tuple[Tensor, Tensor]:
    """Training images (n, 784) in [-1, 1], and noise to start from."""
    images, starts = (50, 8) if conditions.fast else (1000, 64)
    generator = rng(seed, "straightness")
    digits = load_images().train_images
    chosen = torch.randperm(len(digits), generator=generator)[:images]
    points = digits[chosen].flatten(1) / 127.5 - 1
    return points, torch.randn(starts, points.shape[1], generator=generator)


def even_times(steps: int, first: float) -> Tensor:
    return torch.linspace(1, first, steps + 1)


def length_over_chord(
    velocity: Velocity, z: Tensor, ts: Tensor, scale: Callable[[Tensor], Tensor] = torch.ones_like
) -> tuple[Tensor, float]:
    """The ends of trajectories from z (B, ...), and how many times as long as a line they are, if
    the points at t are drawn `scale(t)` times as large."""
    seen: list[Tensor] = []
    end = midpoint(velocity, z, ts, lambda i, t, z, x0: seen.append(scale(t) * z))
    places = [place.flatten(1) for place in (*seen, scale(ts[-1]) * end)]
    length = torch.zeros(len(z))
    for a, b in pairwise(places):
        length += (b - a).norm(dim=1)
    return end, float((length / (places[-1] - places[0]).norm(dim=1)).mean())


def straightness(conditions: Conditions) -> dict:
    """Length over chord of the exact trajectories, and the error of Euler's end points."""
    fine = 20 if conditions.fast else 250
    lengths: dict[str, list[float]] = {name: [] for name in THREE_PATHS}
    errors: dict[str, list[list[float]]] = {n: [[] for _ in EVALUATIONS] for n in STYLES}
    for seed in conditions.seeds:
        points, noise = images_and_noise(conditions, seed)
        for name in THREE_PATHS:
            velocity, first = exact_velocity(PATHS[name], points), PATHS[name].first
            end, ratio = length_over_chord(velocity, noise, even_times(fine, first))
            lengths[name].append(ratio)
            for k, count in enumerate(EVALUATIONS):
                ts = even_times(count, first)
                out = euler(velocity, noise, ts)
                errors[name][k].append(float((out - end).square().mean().sqrt()))
                if name == "ot":
                    out = euler(velocity, noise, shift(ts, 3.0))
                    errors["ot, shift 3"][k].append(float((out - end).square().mean().sqrt()))
    columns = ["path", "length / chord", *(f"error, {n} evaluations" for n in EVALUATIONS)]
    rows = [[LABELS[name], lengths.get(name, lengths["ot"]), *errors[name]] for name in STYLES]
    return {"lengths": lengths, "errors": errors, "table": table_of(columns, rows)}


def decide_straightness(results: dict) -> Verdict:
    excess = {name: [x - 1 for x in found] for name, found in results["lengths"].items()}
    seeds = range(len(excess["ot"]))
    others = [min(excess["vp"][i], excess["cosine"][i]) for i in seeds]
    half = all(excess["ot"][i] <= others[i] / 2 for i in seeds)
    return verdict(half, all(excess["ot"][i] >= others[i] for i in seeds))


def decide_steps(results: dict) -> Verdict:
    leads = [
        lead(ot, vp)
        for ot, vp in zip(results["errors"]["ot"], results["errors"]["vp"], strict=True)
    ]
    return verdict(all(m > s for m, s in leads), any(m < -s for m, s in leads))


def plot_straightness(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    for i, name in enumerate(THREE_PATHS):
        axes[0].plot([i] * len(results["lengths"][name]), results["lengths"][name], "o")
    axes[0].set_xticks(range(len(THREE_PATHS)), [LABELS[name] for name in THREE_PATHS])
    axes[0].set(ylabel="length / chord", title="How straight (1: a line)")
    for name, errors in results["errors"].items():
        means = [sum(each) / len(each) for each in errors]
        axes[1].loglog(EVALUATIONS, means, STYLES[name], markersize=5, label=LABELS[name])
    label_counts(axes[1], EVALUATIONS)
    axes[1].set(xlabel="evaluations (Euler)", ylabel="error (r.m.s.)", title="End points")
    axes[1].legend()
    save_plot(figure, path)


STRAIGHTNESS = Experiment(
    name="x-fm-3",
    claim="Sampling trajectories are straighter on the OT path than on diffusion paths.",
    source="Flow Matching, arXiv 2210.02747, section 4.1 and figure 3",
    measured="The exact field of 1000 MNIST images (no training); 64 trajectories by 250 midpoint "
    "steps. Their length over the distance between their ends, mean over trajectories.",
    rule="Supported if in every seed OT's excess (length / chord - 1) is at most half of VP's and "
    "half of cosine's. Refuted if in every seed one of them is as straight as OT.",
    minutes=2,
    run=straightness,
    decide=decide_straightness,
    plot=plot_straightness,
)

STEPS = Experiment(
    name="x-fm-3-steps",
    claim="Because OT's paths are straighter, Euler's method needs fewer steps: at any number of "
    "them its end points are nearer to the exact ones than on the VP path.",
    source="Flow Matching, arXiv 2210.02747, section 6.2 and figure 7",
    measured="As x-fm-3; the error of Euler's end points (r.m.s. over pixels) after 2 to 64 even "
    "steps. Beside it OT with the timestep shift of 3 that SD3 uses for large images.",
    rule="Supported if OT's error is below VP's by more than the spread over seeds at every number "
    "of evaluations. Refuted if it is above VP's by more than that at any.",
    minutes=2,
    run=straightness,
    decide=decide_steps,
    plot=plot_straightness,
    remark="Straight is not the same as easy to follow. A trajectory decides on its image within a "
    "short stretch of noise levels, and how many of its steps a path spends there counts more than "
    "its shape. Shifting OT's steps towards noise, without any training, shows it.",
)
