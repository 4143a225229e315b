"""Which path samples in fewer steps, and which is learned sooner (arXiv 2210.02747)."""

from pathlib import Path

from nanosd3.claims.data_sets import open_latents
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.fm_networks import (
    kept_networks,
    kept_steps,
    path_inputs,
    path_scores,
    samples_drawn,
    trained_path,
    training_seconds,
)
from nanosd3.claims.fm_straightness import LABELS, STYLES
from nanosd3.related.paths import PATHS
from nanosd3.related.train_paths import LEARNED
from nanosd3.training.plot_style import label_counts, new_figure, plain_logarithm, save_plot

FEW = (1, 2, 4, 8, 16, 32)  # network evaluations an image
COMPARED = ("ot", "vp")  # while they learn
EVALUATIONS_IN_TRAINING = 16  # of samples on the way
Scores = dict[str, list[list[float]]]  # of a path: a row for each number, a value for each seed

# --- x-fm-1: sampling ----------------------------------------------------------------------------


def sampling_study(conditions: Conditions) -> dict:
    """Scores at few evaluations."""
    data = open_latents(conditions)
    counts = FEW[:3] if conditions.fast else FEW
    accuracies: Scores = {name: [[] for _ in counts] for name in LEARNED}
    ratios: Scores = {name: [[] for _ in counts] for name in LEARNED}
    for seed in conditions.seeds:
        inputs = path_inputs(data, seed, samples_drawn(conditions))
        for name in LEARNED:
            _, model = trained_path(data, name, seed)
            for k, count in enumerate(counts):
                accuracy, ratio = path_scores(data, PATHS[name], model, inputs, count)
                accuracies[name][k].append(accuracy)
                ratios[name][k].append(ratio)
    rows = [
        [f"{LABELS[name]}, {what}", *values[name]]
        for name in LEARNED
        for what, values in (("Frechet ratio", ratios), ("read as asked", accuracies))
    ]
    return {
        "evaluations": counts,
        "ratios": ratios,
        "accuracies": accuracies,
        "training_seconds": training_seconds(data, LEARNED),
        "table": table_of(["network evaluations", *counts], rows),
    }


def leads_over_vp(ratios: Scores) -> list[tuple[float, float]]:
    return [lead(ot, vp) for ot, vp in zip(ratios["ot"], ratios["vp"], strict=True)]


def decide_sampling(results: dict) -> Verdict:
    leads = dict(zip(results["evaluations"], leads_over_vp(results["ratios"]), strict=True))
    del leads[1]
    ahead = all(mean > spread for mean, spread in leads.values())
    behind = any(mean < -spread for n, (mean, spread) in leads.items() if n <= 8)
    return verdict(ahead, behind)


def plot_sampling(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    counts = results["evaluations"]
    for axis, key, unit in zip(axes, ("ratios", "accuracies"), (1, 100), strict=True):
        for name, rows in results[key].items():
            means = [unit * sum(row) / len(row) for row in rows]
            axis.plot(counts, means, STYLES[name], markersize=5, label=LABELS[name])
        label_counts(axis, counts)
        axis.set_xlabel("network evaluations an image (Euler)")
    plain_logarithm(axes[0])
    axes[0].set(ylabel="Frechet distance / that of real images", title="Frechet distance")
    axes[1].set(ylabel="samples read as asked (%)", title="Accuracy")
    axes[0].legend()
    save_plot(figure, path)


FEW_STEPS = Experiment(
    name="x-fm-1",
    claim="Trained along OT paths, a network samples better in few steps than along VP's diffusion "
    "paths.",
    source="Flow Matching, arXiv 2210.02747, section 6.2 and figure 7",
    measured="One network and recipe for OT, VP and cosine (600 steps in the main job's latents, "
    "uniform times, no guidance). 1000 prompted samples by Euler in 1 to 32 even steps: Frechet "
    "distance relative to real images, and the share that a classifier reads as asked.",
    rule="Supported if OT's Frechet distance is below VP's by more than the spread over seeds at "
    "2, 4, 8, 16 and 32 evaluations. Refuted if it is above VP's by more than that at 2, 4 or 8. "
    "(A single evaluation is shown, and decides nothing.)",
    minutes=8,
    run=sampling_study,
    decide=decide_sampling,
    plot=plot_sampling,
    remark="The claim is against VP, the diffusion of DDPM. The cosine schedule is a diffusion "
    "path too, and its Frechet distance is below OT's at every number of evaluations: it is not "
    "for being diffusion that VP is slow.",
)

# --- x-fm-2: training ----------------------------------------------------------------------------


def training_study(conditions: Conditions) -> dict:
    """Scores on the way."""
    data = open_latents(conditions)
    ratios: Scores = {name: [[] for _ in kept_steps(conditions)] for name in COMPARED}
    for seed in conditions.seeds:
        inputs = path_inputs(data, seed, samples_drawn(conditions))
        for name in COMPARED:
            networks = kept_networks(data, name, seed)
            for k, model in enumerate(networks.values()):
                _, ratio = path_scores(data, PATHS[name], model, inputs, EVALUATIONS_IN_TRAINING)
                ratios[name][k].append(ratio)
    rows = [[LABELS[name], *ratios[name]] for name in COMPARED]
    return {
        "steps": kept_steps(conditions),
        "ratios": ratios,
        "training_seconds": training_seconds(data, COMPARED),
        "table": table_of(["Frechet ratio after steps", *kept_steps(conditions)], rows),
    }


def steps_to_reach(steps: list[int], ratios: list[list[float]], goal: float) -> float:
    """The first of the kept steps whose mean ratio is no higher than a goal; infinite if none."""
    means = [sum(row) / len(row) for row in ratios]
    return next((s for s, mean in zip(steps, means, strict=True) if mean <= goal), float("inf"))


def decide_training(results: dict) -> Verdict:
    leads, steps = leads_over_vp(results["ratios"]), results["steps"]
    final = results["ratios"]["vp"][-1]
    reached = steps_to_reach(steps, results["ratios"]["ot"], sum(final) / len(final))
    ahead = all(mean > spread for mean, spread in leads)
    mean, spread = leads[-1]
    return verdict(ahead and reached <= 0.6 * steps[-1], mean < -spread)


def plot_training(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(5.5, 1)
    for name, rows in results["ratios"].items():
        means = [sum(row) / len(row) for row in rows]
        axis.plot(results["steps"], means, STYLES[name], markersize=5, label=LABELS[name])
    plain_logarithm(axis)
    axis.set(
        xlabel="training steps",
        ylabel="Frechet distance / that of real images",
        title=f"While training, {EVALUATIONS_IN_TRAINING} evaluations",
    )
    axis.legend()
    save_plot(figure, path)


TRAINING_SPEED = Experiment(
    name="x-fm-2",
    claim="A network learns faster along OT paths than along VP's.",
    source="Flow Matching, arXiv 2210.02747, section 6.1 and figure 5",
    measured="The networks of x-fm-1 after 100, 300 and 600 steps (averaged weights): Frechet "
    "distance of 1000 samples by 16 Euler steps, relative to real images.",
    rule="Supported if OT's distance is below VP's by more than the spread over seeds each time, "
    "and OT reaches VP's final distance in at most 60% of the steps. Refuted if it is above VP's "
    "by more than the spread after the last.",
    minutes=8,
    run=training_study,
    decide=decide_training,
    plot=plot_training,
    remark="OT is ahead throughout, in every seed. What the rule misses is the factor: after 300 "
    "steps OT is not quite where VP is after 600.",
)
