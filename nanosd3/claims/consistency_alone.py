"""x-cm-2, x-cm-3: consistency training without a teacher, and what made it better."""

from pathlib import Path

from nanosd3.claims.consistency_variants import (
    TOP,
    ConsistencyVariant,
    scores_of_times,
    trained_consistency,
)
from nanosd3.claims.dit_loss_swap import middle_levels
from nanosd3.claims.dit_networks import DiTTrainer
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, once, table_of, verdict
from nanosd3.related.train_dit import DiTLoss
from nanosd3.training.plot_style import INK, MEANINGS, new_figure, save_plot

CHANGES = {
    "pseudo-Huber": ConsistencyVariant(huber=True),
    "no average as target": ConsistencyVariant(itself=True),
    "levels doubled": ConsistencyVariant(doubled=True),
    "lognormal levels": ConsistencyVariant(lognormal=True),
    "weight 1 / gap": ConsistencyVariant(weighted=True),
}
ORIGINAL, ALL_CHANGES = "original", "all five"
CONSISTENCY_VARIANTS = (
    {ORIGINAL: ConsistencyVariant()}
    | CHANGES
    | {ALL_CHANGES: ConsistencyVariant(True, True, True, True, True)}
)
CONSISTENCY_STEPS, CONSISTENCY_RATE = 300, 8e-3  # steps, learning rate
# The network alone: longer, and as this project trains (related/train_consistency.py).
ALONE, ALONE_STEPS = ConsistencyVariant(huber=True, itself=True, doubled=True), 600
FLOW_STEPS = 800  # as long: its step has one forward pass, not two
FLOW_ONE, FLOW_TWO, CONSISTENCY_ONE = "flow, 1 step", "flow, 2 steps", "consistency, 1 step"


def table_of_scores(found: dict[str, list[tuple[float, float]]]) -> dict:
    rows = [[name, *map(list, zip(*scores, strict=True))] for name, scores in found.items()]
    return table_of(["", "read as asked", "Frechet ratio"], rows)


@once
def variants_study(conditions: Conditions) -> dict:
    """Scores of one step of each variant, by seed."""
    trainer, seconds = DiTTrainer(conditions), 0.0
    found: dict[str, list[tuple[float, float]]] = {}
    for name, variant in CONSISTENCY_VARIANTS.items():
        found[name] = []
        for seed in conditions.seeds:
            trained = trained_consistency(
                trainer, variant, seed, CONSISTENCY_STEPS, CONSISTENCY_RATE
            )
            seconds += trained.seconds
            found[name].append(scores_of_times(trainer, trained.network, seed, [TOP, 0.0]))
    return {"scores": found, "training_seconds": seconds, "table": table_of_scores(found)}


@once
def alone_study(conditions: Conditions) -> dict:
    """Scores of one step of a consistency model and of one and two of a flow, by seed."""
    trainer = DiTTrainer(conditions)
    config = trainer.config(learned_variance=False)
    loss = DiTLoss("flow", middle_levels)
    found: dict[str, list[tuple[float, float]]] = {
        name: [] for name in (CONSISTENCY_ONE, FLOW_ONE, FLOW_TWO)
    }
    times: tuple[list[float], list[float]] = ([], [])
    for seed in conditions.seeds:
        alone = trained_consistency(trainer, ALONE, seed, ALONE_STEPS, CONSISTENCY_RATE)
        flow = trainer.trained("flow-alone", seed, config, loss, FLOW_STEPS, CONSISTENCY_RATE)
        times[0].append(alone.seconds)
        times[1].append(flow.seconds)
        network = alone.network
        found[CONSISTENCY_ONE].append(scores_of_times(trainer, network, seed, [TOP, 0.0]))
        for name, ts in ((FLOW_ONE, [1.0, 0.0]), (FLOW_TWO, [1.0, 0.5, 0.0])):
            found[name].append(scores_of_times(trainer, flow.network, seed, ts))
    table = table_of_scores(found)
    table["columns"].append("seconds of training")
    for row, taken in zip(table["rows"], (times[0], times[1], times[1]), strict=True):
        row += table_of([], [[taken]])["rows"][0]
    return {"scores": found, "training_seconds": sum(map(sum, times)), "table": table}


def distances_of(results: dict, name: str) -> list[float]:
    return [ratio for _, ratio in results["scores"][name]]


def decide_alone(results: dict) -> Verdict:
    ours = results["scores"][CONSISTENCY_ONE]
    flow = distances_of(results, FLOW_ONE)
    wins = [read >= 0.5 and ratio < other for (read, ratio), other in zip(ours, flow, strict=True)]
    enough = len(wins) > 1
    return verdict(enough and all(wins), enough and not any(wins))


def decide_improved(results: dict) -> Verdict:
    mean, spread = lead(distances_of(results, ALL_CHANGES), distances_of(results, ORIGINAL))
    return verdict(mean > spread, mean < -spread)


def decide_each(results: dict) -> Verdict:
    original = distances_of(results, ORIGINAL)
    gains = [lead(distances_of(results, name), original) for name in CHANGES]
    helps = all(mean > spread for mean, spread in gains)
    return verdict(helps, any(mean < -spread for mean, spread in gains))


def plot_alone(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    names = list(results["scores"])
    panels = ((axes[0], 1, 1, "Frechet distance / real"), (axes[1], 0, 100, "Read as asked (%)"))
    for axis, i, unit, title in panels:
        for row, name in enumerate(names):
            values = [unit * score[i] for score in results["scores"][name]]
            ours = name in (ALL_CHANGES, CONSISTENCY_ONE)
            colour = MEANINGS["prediction"] if ours else INK
            axis.plot(values, [row] * len(values), "o", color=colour, markersize=5)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set(title=title)
    save_plot(figure, path)


VARIANTS_MEASURED = (
    f"A DiT (width 128, depth 2) told the label, in the main job's latents, {CONSISTENCY_STEPS} "
    "steps of 64 by consistency training without a teacher, up to 8 levels at even times: squared "
    "distance, a moving average as target, all levels from the start and drawn evenly, no "
    "weight; then with each of the five changes of the improved training alone, and with all of "
    "them. One rate for all. 1,000 samples by one step: Frechet distance over that of real images. "
)

ALONE_AT_ALL = Experiment(
    name="x-cm-2",
    claim="A consistency model can be trained alone, without a teacher: its one step is better "
    "than one of a flow network trained as long.",
    source="Consistency Models, arXiv 2303.01469, section 6.2",
    measured="A DiT (width 128, depth 2) told the label, in the main job's latents: by consistency "
    f"training ({ALONE_STEPS} steps of 64, 2 to 8 levels, pseudo-Huber, the network itself as "
    f"target), and as a flow ({FLOW_STEPS} steps, about as many seconds; a tenth of the labels "
    "dropped). 1,000 samples without guidance by one step, and by two of the flow: share read as "
    "asked, and Frechet distance over that of real images.",
    rule="Supported if in every seed at least half of the samples of one step are read as asked "
    "and their distance is below that of the flow's one step. Refuted if that holds in no seed. "
    "(One seed decides nothing.)",
    minutes=6,
    run=alone_study,
    decide=decide_alone,
    plot=plot_alone,
    remark="The flow's one step is the mean of a class: all are read, none looks like a digit. "
    "With two steps the flow is ahead again, in every seed; so training alone pays for one "
    "evaluation only, at this budget.",
)

IMPROVED = Experiment(
    name="x-cm-3",
    claim="The improved training's five changes together make better samples of one step than the "
    "original training.",
    source="Improved Techniques for Training Consistency Models, arXiv 2310.14189, section 3",
    measured=VARIANTS_MEASURED,
    rule="Supported if the distance with all five is below the original's by more than the spread "
    "over seeds. Refuted if it is above it by more than that.",
    minutes=9,
    run=variants_study,
    decide=decide_improved,
    plot=plot_alone,
    remark="At 300 steps and 8 levels, which the original raises by a schedule of its own. A "
    "lognormal and weights by the gap turn to weak noise; one step begins at the strongest, which "
    "they hardly train. With the other three changes and twice the steps x-cm-2 got 15.5.",
)

EACH_CHANGE = Experiment(
    name="x-cm-3-each",
    claim="Each of the five changes makes them better, made alone.",
    source="Improved Techniques for Training Consistency Models, arXiv 2310.14189, section 3",
    measured=VARIANTS_MEASURED,
    rule="Supported if the distance with each change alone is below the original's by more than "
    "the spread over seeds. Refuted if with one of them it is above it by more than that.",
    minutes=9,
    run=variants_study,
    decide=decide_each,
    plot=plot_alone,
    remark="Doubling and pseudo-Huber help here, the other three do harm. Without an average as "
    "target training diverged with squared distances in every seed; the paper drops it together "
    "with them.",
)
