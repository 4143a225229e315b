"""DPO on the finished model (arXiv 2403.03206, appendix C; Wallace et al., arXiv 2311.12908).

The papers' preferences are people's. Here a classifier and two measurements decide whether a sample
has the digit, the stroke and the slant of its prompt. The tuned model is scored by the same three,
so what is measured is what it was tuned for, as with the people in the papers.
"""

from functools import cache, partial
from pathlib import Path

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.runs import open_encoded
from nanosd3.claims.sd3_preferences import (
    PAIRS_DRAWN,
    RANK,
    TUNED_ON,
    TUNING,
    preferred_pairs,
    sample_and_score,
    tuned_transformer,
)
from nanosd3.pipeline import Pipeline
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import draw_and_floor
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.plot_style import GREY, INK, new_figure, save_plot

BEFORE = "before"
ALL_ARMS = (BEFORE, *TUNED_ON)
TOLERATED = 0.1  # of the Frechet ratio, as in x-sd3-t5


def right_and_ratio(
    finished: FinishedRun, pipeline: Pipeline, seed: int, count: int
) -> dict[str, list[bool] | float]:
    """Of samples of a fresh draw of prompts: which are right, and their Frechet distance over that
    of real images."""
    draw, floor = draw_and_floor(finished, count, 100 + seed)
    samples = sample_and_score(finished, pipeline, draw, 100 + seed)
    distance = frechet_distance(samples.features, finished.scorer.test)
    return {"right": samples.right.tolist(), "ratio": distance / floor}


def dpo_study(conditions: Conditions) -> dict:
    """By arm and seed: the share right, the win rate against the model before, the ratio."""
    finished, features = open_encoded(conditions, images=False)
    count, prompts = (20, 40) if conditions.fast else (1000, PAIRS_DRAWN)
    keys = ("right", "wins", "losses", "rate", "ratio")
    found: dict[str, dict[str, list[float]]] = {arm: {k: [] for k in keys} for arm in ALL_ARMS}
    pairs_found, seconds = [], 0.0
    for seed in conditions.seeds:
        base = features.pipeline(finished.pipeline.mmdit, finished.device)
        first = right_and_ratio(finished, base, seed, count)
        add_scores(found[BEFORE], first, first)
        pairs = cache(partial(preferred_pairs, finished, features, seed, prompts))
        for what in TUNED_ON:
            network = tuned_transformer(conditions, finished, features, pairs, what, seed)
            seconds += network.seconds
            pipeline = network.features.pipeline(network.model, finished.device)
            measure = partial(right_and_ratio, finished, pipeline, seed, count)
            add_scores(found[what], network.once("judged", measure), first)
        pairs_found.append(network.job.run.stages["flow"]["pairs"])
    rows: list[list[object]] = []
    for name, one in found.items():
        compared: list[object] = ["", ""] if name == BEFORE else [one["rate"], deciding(one)]
        called = name if name == BEFORE else f"tuned on {name}"
        rows.append([called, one["right"], *compared, one["ratio"]])
    columns = ["", "as asked", "win rate", "prompts that decide", "Frechet ratio"]
    return {"arms": found, "pairs": pairs_found, "training_seconds": seconds,
            "table": table_of(columns, rows)}  # fmt: skip


def deciding(one: dict[str, list[float]]) -> list[float]:
    """On how many prompts, by seed, one of two models was right and the other wrong."""
    return [won + lost for won, lost in zip(one["wins"], one["losses"], strict=True)]


def add_scores(one: dict[str, list[float]], ours: dict, before: dict) -> None:
    """Append a seed's scores: of samples, compared with those of the model before tuning from the
    same prompts and noise."""
    pairs = list(zip(ours["right"], before["right"], strict=True))
    wins = sum(mine and not theirs for mine, theirs in pairs)
    losses = sum(theirs and not mine for mine, theirs in pairs)
    one["right"].append(sum(ours["right"]) / len(pairs))
    one["wins"].append(wins)
    one["losses"].append(losses)
    one["rate"].append(wins / (wins + losses) if wins + losses else 0.5)
    one["ratio"].append(ours["ratio"])


def decide_wins(results: dict) -> Verdict:
    rates = results["arms"][TUNED_ON[0]]["rate"]
    mean, spread = lead([0.5] * len(rates), rates)
    return verdict(mean > spread, mean < -spread)


def rise(results: dict, arm: str) -> list[float]:
    """The rise of the Frechet ratio, by seed, relative to what it was before."""
    before, after = (results["arms"][name]["ratio"] for name in (BEFORE, arm))
    return [b / a - 1 for a, b in zip(before, after, strict=True)]


def decide_distance(results: dict) -> Verdict:
    rises = rise(results, TUNED_ON[0])
    mean, spread = lead([0.0] * len(rises), rises)
    return verdict(mean + spread <= TOLERATED, mean - spread > TOLERATED)


def plot_dpo(results: dict, path: Path) -> None:
    figure, axes = new_figure(10, 3)
    arms = results["arms"]
    shown = (
        ("right", "As asked", ALL_ARMS),
        ("rate", "Win rate against before (dotted: 0.5)", TUNED_ON),
        ("ratio", "Frechet ratio", ALL_ARMS),
    )
    for axis, (key, title, names) in zip(axes, shown, strict=True):
        for values in zip(*(arms[name][key] for name in names), strict=True):  # of a seed
            axis.plot(range(len(names)), values, "-o", color=INK, markersize=4, linewidth=0.8)
        labels = ["nothing" if name == BEFORE else name.replace(" ", "\n") for name in names]
        axis.set_xticks(range(len(names)), labels)
        axis.margins(0.25)
        axis.set(title=title, xlabel="tuned on")
    axes[1].axhline(0.5, color=GREY, linestyle=":")
    save_plot(figure, path)


TUNED = (
    f"The main job's transformer with weights of rank {RANK} on the linear layers of its blocks, "
    f"{TUNING.steps} steps of {TUNING.batch} pairs. The pairs are its own samples without "
    f"guidance, two for each of {PAIRS_DRAWN:,} prompts, of which just one is as asked: read as "
    "the digit, with the stroke and the slant that the prompt names. Beside it, the same tuned on "
    "the winners alone, by the usual loss. 1,000 samples of fresh prompts without guidance, from "
    "the same noise as those of the model before. "
)

DPO_WINS = Experiment(
    name="x-sd3-dpo",
    claim="A low-rank fine-tune on preferences (DPO) makes samples that are preferred to those of "
    "the model before.",
    source="SD3, arXiv 2403.03206, appendix C; Wallace et al., arXiv 2311.12908",
    measured=TUNED
    + "The win rate: of the prompts where one of the two is as asked and the other is not, the "
    "share where it is that of the tuned model.",
    rule="Supported if the win rate is above one half, in the mean over seeds, by more than its "
    "spread over seeds. Refuted if it is below one half by more than that.",
    minutes=3,
    run=dpo_study,
    decide=decide_wins,
    plot=plot_dpo,
    remark="Some 40 of 1,000 prompts decide. Tuning on the winners alone, which are the model's "
    "own samples, wins nearly as often (88%), and as many are as asked in the end. What losers add "
    "is care: fewer prompts are lost (2 in the mean, against 6), and samples keep their distance "
    "from real ones, which winners alone raise. Who judges the win rate also made the preferences, "
    "so this shows that DPO finds what it is rewarded for, and no more.",
)

DPO_DISTANCE = Experiment(
    name="x-sd3-dpo-distance",
    claim="What DPO gains does not cost how real samples look.",
    source="SD3, arXiv 2403.03206, appendix C; Wallace et al., arXiv 2311.12908",
    measured=TUNED
    + "By how much the tuned model's Frechet distance is above that of the model before, relative "
    "to it.",
    rule="Supported if the rise, in the mean over seeds, and its spread together are at most a "
    "tenth. Refuted if the rise less its spread is more than a tenth.",
    minutes=3,
    run=dpo_study,
    decide=decide_distance,
    plot=plot_dpo,
    remark="The mean rise is 1%, but seeds range from -11% to 13%, so it is the spread that does "
    "not allow a verdict. Tuning on the winners alone raises the distance in every seed, by 12% to "
    "28%.",
)
