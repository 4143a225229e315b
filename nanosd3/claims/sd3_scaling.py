"""What size does: the paper's scaling study (arXiv 2403.03206, section 5.3) on four small depths.

The paper trained depths 15 to 38, found the validation loss to fall smoothly with size and steps
and to rank models as people and benchmarks do, and saw no end to it. Larger models also lost less
when sampled in few steps.
"""

from itertools import pairwise
from pathlib import Path

from nanosd3.claims.experiment import (
    Conditions,
    Experiment,
    Verdict,
    lead,
    rank_correlation,
    table_of,
    verdict,
)
from nanosd3.claims.runs import open_encoded
from nanosd3.claims.sd3_variants import TrainedVariant, Variant, sample_scores, trained_variant
from nanosd3.related.finished_run import FinishedRun
from nanosd3.training.plot_style import label_counts, new_figure, plain_logarithm, save_plot
from nanosd3.training.report import sample_latents, shown_prompts

SCALED_DEPTHS = (1, 2, 3, 4)
FEW, MANY = (5, 10, 20), 50  # Euler steps
ENDS_COMPARED = 8  # samples of each of ten prompts
DEPTH_MARKS = dict(zip(SCALED_DEPTHS, ("o:", "s-.", "^--", "D-"), strict=True))


def scaling_study(conditions: Conditions) -> dict:
    """By depth and seed: losses during training, scores of samples, errors of few steps."""
    finished, features = open_encoded(conditions)
    found: dict[str, dict[str, list]] = {}
    rows, seconds = [], 0.0
    for depth in SCALED_DEPTHS:
        one: dict[str, list] = {key: [] for key in ("losses", "accuracy", "ratio", "errors")}
        for seed in conditions.seeds:
            network = trained_variant(conditions, finished, features, Variant(depth), seed)
            seconds += network.seconds
            one["steps"] = list(network.losses)
            one["losses"].append(list(network.losses.values()))
            accuracy, ratio = sample_scores(conditions, finished, network, seed)
            one["accuracy"].append(accuracy)
            one["ratio"].append(ratio)
            one["errors"].append(errors_of_few_steps(conditions, finished, network, seed))
        one["parameters"] = [sum(p.numel() for p in network.model.parameters())]
        found[str(depth)] = one
        last = [losses[-1] for losses in one["losses"]]
        errors = [list(each) for each in zip(*one["errors"], strict=True)]
        size = f"{one['parameters'][0]:,}"
        rows.append([depth, size, last, one["accuracy"], one["ratio"], *errors])
    columns = ["depth", "parameters", "validation loss", "read as asked", "Frechet ratio"]
    columns += [f"error at {n} of {MANY} steps" for n in FEW]
    return {"depths": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def errors_of_few_steps(
    conditions: Conditions, finished: FinishedRun, network: TrainedVariant, seed: int
) -> list[float]:
    """How far samples of few steps are from those of many, relative to the latter (r.m.s.)."""

    def measure() -> list[float]:
        pipeline = network.features.pipeline(network.model, finished.device)
        prompts = shown_prompts(finished.source) * (1 if conditions.fast else ENDS_COMPARED)
        exact = sample_latents(pipeline, prompts, seed, "euler", MANY)
        size = exact.square().mean().sqrt()
        ends = (sample_latents(pipeline, prompts, seed, "euler", steps) for steps in FEW)
        return [float((end - exact).square().mean().sqrt() / size) for end in ends]

    return network.once("errors", measure)


def last_losses(results: dict, depth: int) -> list[float]:
    """Of each seed, after training."""
    return [losses[-1] for losses in results["depths"][str(depth)]["losses"]]


def decide_smooth(results: dict) -> Verdict:
    gains = [
        lead(last_losses(results, larger), last_losses(results, smaller))
        for smaller, larger in pairwise(SCALED_DEPTHS)
    ]
    falls = all(
        later < earlier
        for one in results["depths"].values()
        for losses in one["losses"]
        for earlier, later in pairwise(losses)
    )
    return verdict(
        falls and all(mean > spread for mean, spread in gains),
        any(mean < -spread for mean, spread in gains),
    )


def decide_predicts(results: dict) -> Verdict:
    losses, accuracies, ratios = [], [], []
    for depth in SCALED_DEPTHS:
        losses += last_losses(results, depth)
        accuracies += results["depths"][str(depth)]["accuracy"]
        ratios += results["depths"][str(depth)]["ratio"]
    agreement = -rank_correlation(losses, accuracies), rank_correlation(losses, ratios)
    return verdict(min(agreement) >= 0.7, min(agreement) < 0.3)


def decide_few_steps(results: dict) -> Verdict:
    small, large = (results["depths"][str(depth)]["errors"] for depth in (1, SCALED_DEPTHS[-1]))
    pairs = list(zip(small, large, strict=True))
    enough = len(pairs) > 1
    less = [[b < a for a, b in zip(*pair, strict=True)] for pair in pairs]
    return verdict(enough and all(map(all, less)), enough and not any(map(any, less)))


def plot_scaling(results: dict, path: Path) -> None:
    figure, axes = new_figure(11, 3)
    for depth, mark in DEPTH_MARKS.items():
        one = results["depths"][str(depth)]
        means = [sum(each) / len(each) for each in zip(*one["losses"], strict=True)]
        axes[0].plot(one["steps"], means, mark, markersize=5, label=f"depth {depth}")
        axes[1].plot(last_losses(results, depth), one["ratio"], mark[0])
        errors = [sum(each) / len(each) for each in zip(*one["errors"], strict=True)]
        axes[2].plot(FEW, errors, mark, markersize=5, label=f"depth {depth}")
    axes[0].set(title="Validation loss", xlabel="training steps")
    axes[0].set_ylim(top=1)  # room for the legend
    axes[0].legend()
    axes[1].set(title="Frechet ratio by loss", xlabel="validation loss, each network")
    axes[2].set(title=f"Distance from {MANY} steps", xlabel="steps (Euler)")
    label_counts(axes[2], FEW)
    plain_logarithm(axes[2])
    save_plot(figure, path)


FOUR_DEPTHS = (
    "The main job's transformer at depths 1 to 4 (width 64 a block), 500 steps of 64, one rate. "
)

SMOOTH = Experiment(
    name="x-sd3-scaling",
    claim="The validation loss falls smoothly with the transformer's size and with training, and "
    "shows no sign of saturation.",
    source="SD3, arXiv 2403.03206, section 5.3",
    measured=FOUR_DEPTHS
    + "The loss of 256 images held out, with their captions and the same noise, a "
    "mean over 8 times, after 150, 300 and 500 steps (averaged weights).",
    rule="Supported if every network's loss falls from each of these steps to the next and, at the "
    "end, each depth's is below that of the depth before by more than the spread over seeds, the "
    "last one's too. Refuted if one is above that of the depth before by more than that.",
    minutes=10,
    run=scaling_study,
    decide=decide_smooth,
    plot=plot_scaling,
    remark="Each step in size brings less (0.130, 0.045, 0.014), which the rule allows, and the "
    "wider the network, the less its loss has come to rest after 500 steps. It took 34 minutes of "
    "one shared core, more than the ten minutes of two that were planned.",
)

PREDICTS = Experiment(
    name="x-sd3-scaling-predicts",
    claim="The validation loss predicts how good a model is.",
    source="SD3, arXiv 2403.03206, section 5.3",
    measured=FOUR_DEPTHS
    + "Their validation losses, and of 500 samples (Heun, 8 steps, guidance 1.6) "
    "the share read as asked and the Frechet distance over that of real images.",
    rule="Supported if over all networks and seeds the rank correlation of the loss with both is "
    "at least 0.7 (a lower loss with more read as asked, and with a lower distance). Refuted if "
    "with either it is below 0.3.",
    minutes=10,
    run=scaling_study,
    decide=decide_predicts,
    plot=plot_scaling,
)

FEWER_STEPS = Experiment(
    name="x-sd3-scaling-steps",
    claim="Larger models lose less when they are sampled in few steps.",
    source="SD3, arXiv 2403.03206, section 5.3",
    measured=FOUR_DEPTHS
    + f"The distance of samples after 5, 10 and 20 Euler steps from those after "
    f"{MANY}, from the same noise, relative to the latents' size (r.m.s., guidance 1.6).",
    rule="Supported if in every seed and at 5, 10 and 20 steps the deepest's is smaller than the "
    "shallowest's. Refuted if it is smaller in no seed and at none of them. (One seed decides "
    "nothing.)",
    minutes=10,
    run=scaling_study,
    decide=decide_few_steps,
    plot=plot_scaling,
)
