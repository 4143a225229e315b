"""x-muse-2: how many steps Muse needs, and whether that is faster than following a flow."""

import time
from functools import partial
from pathlib import Path

import numpy as np

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, once, table_of, verdict
from nanosd3.claims.muse_networks import MUSE_TRAINED, SHORT_STEPS, trained_causal, trained_muse
from nanosd3.claims.muse_samplers import sample_causal, sample_flow, sample_muse
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import accuracy_and_ratio, draw_and_floor
from nanosd3.training.plot_style import label_counts, new_figure, plain_logarithm, save_plot

MUSE_COUNTS = (1, 2, 4, 8, 16, 49)
FLOW_COUNTS = (1, 2, 4, 8, 16, 50)
FAST_MUSE_COUNTS, FAST_FLOW_COUNTS = (1, 8, 49), (1, 8)
ONE_BY_ONE = (49,)  # tokens
SPEED_SAMPLERS = {
    "muse": "Muse, by steps",
    "flow": "the main model, Euler, by steps",
    "causal": "one token after the other",
}
SAMPLER_MARKERS = {"muse": "-o", "flow": "--s", "causal": "^"}


@once
def muse_speed(conditions: Conditions) -> dict:
    """Accuracy, Frechet ratio and milliseconds an image of both, by steps and seed."""
    count, seconds = 20 if conditions.fast else 1000, 0.0
    counts = {"muse": MUSE_COUNTS, "flow": FLOW_COUNTS, "causal": ONE_BY_ONE}
    if conditions.fast:
        counts |= {"muse": FAST_MUSE_COUNTS, "flow": FAST_FLOW_COUNTS}
    found: dict[str, dict[str, list[list[float]]]] = {
        sampler: {str(n): [] for n in counts[sampler]} for sampler in SPEED_SAMPLERS
    }
    for seed in conditions.seeds:
        trained = trained_muse(conditions, seed, SHORT_STEPS)
        causal, took = trained_causal(conditions, seed, SHORT_STEPS, trained)
        finished = trained.finished
        seconds += trained.token_seconds + trained.seconds + took
        samplers = {
            "muse": partial(sample_muse, trained.pipeline),
            "flow": partial(sample_flow, finished.pipeline),
            "causal": partial(sample_causal, trained.pipeline, causal),
        }
        for sampler, by_steps in found.items():
            for n in counts[sampler]:
                make = partial(samplers[sampler], seed=100 + seed, steps=n)
                by_steps[str(n)].append(scores_and_time(finished, make, count, 100 + seed))
    rows = [
        [SPEED_SAMPLERS[sampler], n, *(list(each) for each in zip(*scores, strict=True))]
        for sampler, by_steps in found.items()
        for n, scores in by_steps.items()
    ]
    columns = ["", "steps", "read as asked", "Frechet ratio", "ms an image"]
    return {"scores": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def scores_and_time(finished: FinishedRun, make: partial, count: int, seed: int) -> list[float]:
    """Accuracy, Frechet distance over that of real images, and milliseconds of a core an image,
    text and decoding included."""
    draw, floor = draw_and_floor(finished, count, seed)
    begin = time.process_time()
    images = make(draw)
    took = time.process_time() - begin
    return [*accuracy_and_ratio(finished, images, draw, floor), 1000 * took / len(images)]


def column(results: dict, sampler: str, steps: int, i: int) -> list[float]:
    """One of the numbers, by seed."""
    return [scores[i] for scores in results["scores"][sampler][str(steps)]]


def decide_few_enough(results: dict) -> Verdict:
    pairs = list(zip(column(results, "muse", 8, 1), column(results, "muse", 49, 1), strict=True))
    return verdict(
        all(few <= 1.2 * many for few, many in pairs), all(few > 1.2 * many for few, many in pairs)
    )


def decide_faster(results: dict) -> Verdict:
    def compared(i: int) -> list[tuple[float, float]]:
        ours, theirs = column(results, "muse", 8, i), column(results, "flow", 8, i)
        return list(zip(ours, theirs, strict=True))

    better = [muse < flow for muse, flow in compared(1)]
    cheaper = [muse < flow for muse, flow in compared(2)]
    return verdict(all(better) and all(cheaper), not any(better) and not any(cheaper))


def decide_faster_than_causal(results: dict) -> Verdict:
    def compared(i: int) -> zip:
        return zip(column(results, "muse", 8, i), column(results, "causal", 49, i), strict=True)

    as_good = [muse <= 1.2 * causal for muse, causal in compared(1)]
    cheaper = [muse < causal for muse, causal in compared(2)]
    both = [good and cheap for good, cheap in zip(as_good, cheaper, strict=True)]
    return verdict(all(both), not any(both))


def plot_speed(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    for sampler, by_steps in results["scores"].items():
        means = np.array([np.mean(scores, axis=0) for scores in by_steps.values()])
        steps = [int(n) for n in by_steps]
        axes[0].plot(
            steps,
            means[:, 1],
            SAMPLER_MARKERS[sampler],
            markersize=5,
            label=SPEED_SAMPLERS[sampler],
        )
        axes[1].plot(means[:, 2], means[:, 1], SAMPLER_MARKERS[sampler], markersize=5)
        beside = (-9, -13) if sampler == "muse" else (5, 5)
        for n, (_, ratio, took) in zip(steps, means, strict=True):
            axes[1].annotate(str(n), (took, ratio), beside, textcoords="offset points")
    label_counts(axes[0], MUSE_COUNTS)
    axes[0].set(xlabel="steps", ylabel="Frechet distance / that of real images")
    axes[1].set(xlabel="milliseconds of a core an image (steps beside the points)", xscale="log")
    axes[1].xaxis.set_major_formatter("{x:g}")
    for axis in axes:
        axis.margins(0.1)
        plain_logarithm(axis)
    axes[0].legend()
    save_plot(figure, path)


SPEED_MEASURED = (
    f"{MUSE_TRAINED}; 1,000 samples a seed in 1 to 49 steps (49 are one for each token), beside "
    "the finished main model's Euler steps at even times with its guidance, and a transformer of "
    "the same size and training that writes the tokens one after the other (causal attention, keys "
    "and values kept). Frechet distance over that of real images, and milliseconds of a core an "
    "image, decoding included."
)

FEW_ENOUGH = Experiment(
    name="x-muse-2",
    claim="Guessing many tokens at once costs no quality: 8 steps give what one step for each "
    "token gives.",
    source="Muse, arXiv 2301.00704, sections 2.8 and 4; MaskGIT, arXiv 2202.04200",
    measured=SPEED_MEASURED,
    rule="Supported if in every seed the distance after 8 steps is at most 1.2 times that after "
    "49. Refuted if in no seed.",
    minutes=10,
    run=muse_speed,
    decide=decide_few_enough,
    plot=plot_speed,
)

FASTER_THAN_FLOW = Experiment(
    name="x-muse-2-flow",
    claim="Muse is faster than diffusion in a latent space: discrete tokens need fewer steps.",
    source="Muse, arXiv 2301.00704, sections 1 and 3.2",
    measured=SPEED_MEASURED,
    rule="Supported if in every seed 8 steps of Muse are both nearer to real images than 8 Euler "
    "steps of the main model and cheaper. Refuted if in every seed they are neither.",
    minutes=10,
    run=muse_speed,
    decide=decide_faster,
    plot=plot_speed,
    remark="The article compares with models of other sizes and with samplers of 50 "
    "and more steps. The main model was trained on over ten times as many images as these Muses. "
    "Here the steps of the two differ in cost: the main model has 16 tokens of "
    "sixteen numbers, Muse 49 of one code each.",
)

FASTER_THAN_CAUSAL = Experiment(
    name="x-muse-2-causal",
    claim="Parallel decoding is more efficient than writing tokens one after the other.",
    source="Muse, arXiv 2301.00704, sections 1 and 2.8; Parti, arXiv 2206.10789",
    measured=SPEED_MEASURED,
    rule="Supported if in every seed 8 steps of Muse give at most 1.2 times the distance of 49 "
    "tokens written one by one, and cost less. Refuted if in no seed both hold.",
    minutes=10,
    run=muse_speed,
    decide=decide_faster_than_causal,
    plot=plot_speed,
    remark="Every token sees all that was written before it, and with keys and values kept all 49 "
    "cost a core about as much as four whole passes of Muse. An accelerator, idle while it writes "
    "one token, may judge otherwise; that was not measured.",
)
