"""Which formulation is best, and at how many steps (arXiv 2403.03206, sections 3 and 5.1).

The answer is an average rank (sd3_ranks.py) over settings: steps, guidance, weights.
"""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from nanosd3.claims.data_sets import Latents, open_data_sets, sample_inputs, scores_of_samples
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.sd3_networks import sample_formulation, trained_formulation
from nanosd3.claims.sd3_ranks import BySetting, Score, average_ranks
from nanosd3.related.formulations import FORMULATIONS
from nanosd3.training.plot_style import INK, PALE, SERIES, new_figure, save_plot

PLAIN, WEIGHTED = "rf", "rf/lognorm(0, 1)"
STEPS_MADE, FAST_STEPS_MADE = {"few": 5, "many": 50}, {"few": 1, "many": 2}
SETTINGS = {  # of each data set: steps, guidance, weights (the last differ little: on one set only)
    "latents": list(product(STEPS_MADE, (1.0, 2.0), ("average", "last"))),
    "pixels": list(product(STEPS_MADE, (1.0, 2.0), ("average",))),
}
COMPARED_FAST = (PLAIN, WEIGHTED, "v/cos")
SampledHow = tuple[str, float, str]


def network_scores(
    data: Latents, name: str, seed: int, steps_made: dict[str, int], samples: int
) -> tuple[list[Score], float]:
    """Scores of a network in the settings of its data set, in their order, measured now or before;
    and the seconds of a core that it took to train."""
    trained, scores = trained_formulation(data, name, seed), "scores"
    if scores not in trained.run.stages:
        found, inputs = [], sample_inputs(data, seed, samples)
        for count, guidance, weights in SETTINGS[data.name]:
            model, steps = getattr(trained, weights), steps_made[count]
            made = sample_formulation(FORMULATIONS[name], model, inputs, steps, guidance)
            found.append(scores_of_samples(data, made, inputs))
        with trained.run.alone():
            trained.run.finish(scores, {"found": found})
    return [(a, ratio) for a, ratio in trained.run.stages[scores]["found"]], trained.seconds


def formulation_study(images: str, conditions: Conditions) -> dict:
    """Scores of every formulation in every setting of a data set, and the average ranks."""
    samples, steps_made = (20, FAST_STEPS_MADE) if conditions.fast else (400, STEPS_MADE)
    names = COMPARED_FAST if conditions.fast else tuple(FORMULATIONS)
    data = next(each for each in open_data_sets(conditions) if each.name == images)
    settings = SETTINGS[images]
    scores: BySetting = {name: [[] for _ in settings] for name in names}
    seconds = 0.0
    for seed, name in product(conditions.seeds, names):
        found, took = network_scores(data, name, seed, steps_made, samples)
        seconds += took
        for of_setting, score in zip(scores[name], found, strict=True):
            of_setting.append(score)
    ranks = {
        key: average_ranks(scores, [i for i, s in enumerate(settings) if key in ("all", s[0])])
        for key in ("all", *STEPS_MADE)
    }
    order = sorted(names, key=lambda name: sum(ranks["all"][name]))
    rows = [
        [name, *(ranks[key][name] for key in ranks), *typical(scores[name], settings)]
        for name in order
    ]
    counts = STEPS_MADE.values()
    columns = ["formulation", "average rank", *(f"at {n} steps" for n in counts)]
    columns += [f"{what} in {n}" for n in counts for what in ("Frechet ratio", "read as asked")]
    return {
        "settings": settings,
        "scores": scores,
        "ranks": ranks,
        "training_seconds": seconds,
        "table": table_of(columns, rows),
    }


def typical(by_setting: list[list[Score]], settings: list[SampledHow]) -> list[list[float]]:
    """Frechet ratio and accuracy without guidance, of averaged weights, in few and many steps."""
    chosen = [by_setting[settings.index((n, 1.0, "average"))] for n in STEPS_MADE]
    return [[score[k] for score in each] for each in chosen for k in (1, 0)]


def decide_best(results: dict) -> Verdict:
    ranks = results["ranks"]["all"]
    leads = [lead(ranks[WEIGHTED], ranks[name]) for name in ranks if name != WEIGHTED]
    return verdict(all(m > s for m, s in leads), any(m < -2 * s for m, s in leads))


def decide_few(results: dict) -> Verdict:
    few, many = results["ranks"]["few"], results["ranks"]["many"]
    falls, spread = lead(few[PLAIN], many[PLAIN])
    weighted_falls, weighted_spread = lead(few[WEIGHTED], many[WEIGHTED])
    keeps = weighted_falls <= weighted_spread
    return verdict(falls > spread and keeps, falls < -spread or weighted_falls > weighted_spread)


def plot_ranks(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(5.5, 1)
    ranks = results["ranks"]
    order = sorted(ranks["all"], key=lambda name: -sum(ranks["all"][name]))
    for key, style, colour, label in (
        ("few", "o", SERIES[1], f"{STEPS_MADE['few']} steps"),
        ("many", "s", SERIES[2], f"{STEPS_MADE['many']} steps"),
        ("all", "D", INK, "all settings"),
    ):
        for i, name in enumerate(order):
            each = ranks[key][name]
            mean = sum(each) / len(each)
            text = label if i == 0 else ""
            axis.plot([mean], [i], style, color=colour, markersize=8, label=text)
            if key == "all":
                axis.plot([min(each), max(each)], [i, i], "-", color=PALE, linewidth=6, zorder=0)
    axis.set_yticks(range(len(order)), order)
    axis.set(xlabel="average rank (1 is best; grey: seeds)", title="Formulations, ranked")
    axis.legend()
    save_plot(figure, path)


def formulations_compared(what: str, weights: str, settings: int) -> str:
    return (
        f"A transformer of one block, 600 steps with each of eight formulations on {what}. 400 "
        "prompted samples by Euler's method in 5 and in 50 steps, without guidance and with 2, of "
        f"{weights}: the share that a classifier reads as asked, and the Frechet distance over "
        f"that of real images. In each of the {settings} settings formulations are sorted into "
        "fronts by both; the rank is the front's number, averaged over settings."
    )


BEST = Experiment(
    name="x-sd3-formulations",
    claim="Of all formulations, rectified flow with times from logit-normal(0, 1) is best.",
    source="SD3, arXiv 2403.03206, section 5.1 and table 1",
    measured=formulations_compared(
        "the main job's latents", "the averaged weights and of the last", 8
    ),
    rule="Supported if its average rank is below that of every other by more than the spread over "
    "seeds. Refuted if another's is below its by more than twice the spread.",
    minutes=10,
    run=partial(formulation_study, "latents"),
    decide=decide_best,
    plot=plot_ranks,
    remark="Here v-prediction with the cosine schedule is alone in the first front everywhere, but "
    "its lead, two ranks in the mean, is one, two or three by seed: no more than twice the spread. "
    "It draws the same times as rf/cosmap and is sampled in nearly the same steps; what "
    "differs is what the network predicts, and the scale of its input. These are 600 steps of a "
    "very small network, where the paper's had many thousands.",
)

FEW_OR_MANY = replace(
    BEST,
    name="x-sd3-formulations-steps",
    claim="Rectified flow with uniform times is good at few steps and loses ground at many; with "
    "times from logit-normal(0, 1) it does not.",
    source="SD3, arXiv 2403.03206, sections 1 and 5.1, table 1",
    measured=BEST.measured + " Here: the average rank at 5 steps, and at 50.",
    rule="Supported if with uniform times the rank at 50 steps is worse than at 5 by more than the "
    "spread over seeds, and with logit-normal ones it is not. Refuted if with uniform times it is "
    "better by more than that, or with logit-normal ones worse by more than that.",
    decide=decide_few,
    remark="The fall is small, 0.4 of a rank in the mean, and seed 1 shows none. An earlier run of "
    "the same seeds, whose numbers differ by rounding, was just over the limit.",
)

PIXELS_COMPARED = formulations_compared("digits of 12 x 12 pixels", "the averaged weights", 4)
BEST_OF_PIXELS = replace(
    BEST,
    name="x-sd3-pixels",
    claim="In pixels too, rectified flow with times from logit-normal(0, 1) is the best of all "
    "formulations.",
    measured=PIXELS_COMPARED,
    run=partial(formulation_study, "pixels"),
    remark="Again v-prediction with the cosine schedule is ahead in every seed. Of "
    "rectified flow's times logit-normal(0, 1) and mode come first here.",
)

FEW_OR_MANY_OF_PIXELS = replace(
    FEW_OR_MANY,
    name="x-sd3-pixels-steps",
    claim="In pixels too, rectified flow with uniform times is good at few steps and loses ground "
    "at many, and with times from logit-normal(0, 1) it does not.",
    measured=PIXELS_COMPARED + " Here: the average rank at 5 steps, and at 50.",
    run=BEST_OF_PIXELS.run,
    remark="",  # nothing of the other's
)
