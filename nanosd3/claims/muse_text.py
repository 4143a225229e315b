"""x-muse-6: does it matter that the text encoder was trained on language?

Muse's generator gets frozen states of T5-XXL, trained on far more text than there are captions, and
the paper gives this as the reason why its pictures follow their prompts. Here the same Muse is
trained on the same captions with three encoders (muse_encoders.py). The captions name each digit by
its word, "a bold seven", never by its numeral, so Muse can know of "a bold 7" only what the encoder
has made of it.
"""

from pathlib import Path

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, once, table_of, verdict
from nanosd3.claims.muse_encoders import (
    ENCODER_SCORES,
    TEXT_ENCODERS,
    TEXT_STEPS,
    encoder_scores,
    muse_by_encoder,
    stage_of,
)
from nanosd3.claims.muse_networks import SHORT_STEPS, muse_study
from nanosd3.training.plot_style import SERIES, new_figure, save_plot

ENCODER_SAMPLES = 500
ENCODER_TICKS = ("trained\nencoders", "the same,\nuntrained", "a table\nof words")  # of the plot


@once
def text_study(conditions: Conditions) -> dict:
    """By encoder, the scores of each seed."""
    count = 20 if conditions.fast else ENCODER_SAMPLES
    found: dict[str, dict[str, list[float]]] = {}
    seconds = 0.0
    for name in TEXT_ENCODERS:
        found[name] = {key: [] for key in ENCODER_SCORES}
        for seed in conditions.seeds:
            print(f"{name}, seed {seed}", flush=True)
            with muse_study(conditions, seed, SHORT_STEPS) as study:
                pipeline, stages = muse_by_encoder(study, name), study.job.run.stages
            seconds += stages[stage_of(name)]["thread_seconds"]
            if name == TEXT_ENCODERS[0]:  # tokens are the same for all
                seconds += stages["tokens"]["thread_seconds"]
            scores = encoder_scores(study.finished, pipeline, count, seed)
            for key, value in zip(ENCODER_SCORES, scores, strict=True):
                found[name][key].append(value)
    columns = ["told by", "cross-entropy", "right digit", "right attributes", "by numeral: digit"]
    table = table_of(columns, [[name, *scores.values()] for name, scores in found.items()])
    return {"scores": found, "training_seconds": seconds, "table": table}


def shares_gained(results: dict, key: str) -> list[float]:
    """By how much a score is higher with trained encoders than with untrained, seed by seed."""
    ours, theirs = (results["scores"][name][key] for name in TEXT_ENCODERS[:2])
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def decide_encoder(results: dict) -> Verdict:
    ours, theirs = (results["scores"][name]["loss"] for name in TEXT_ENCODERS[:2])
    shares = [shares_gained(results, key) for key in ("digit", "attributes")]
    none = [0.0] * len(ours)
    lower, spread = lead([1.0] * len(ours), [b / a for a, b in zip(ours, theirs, strict=True)])
    better = [mean > max(wobble, 0.02) for mean, wobble in (lead(none, each) for each in shares)]
    as_low = all(b / a < 1.01 for a, b in zip(ours, theirs, strict=True))
    as_right = all(max(each) < 0.02 for each in shares)
    return verdict(lower > max(spread, 0.01) and any(better), len(ours) > 1 and as_low and as_right)


def decide_unseen(results: dict) -> Verdict:
    scores = results["scores"]
    ours, theirs = (scores[name]["unheard"] for name in TEXT_ENCODERS[:2])
    each = list(zip(ours, theirs, scores[TEXT_ENCODERS[0]]["digit"], strict=True))
    enough = len(each) > 1
    understood = all(u >= h / 2 and r <= u / 2 for u, r, h in each)
    return verdict(enough and understood, enough and all(u < 0.2 or u <= r for u, r, _ in each))


def plot_encoders(results: dict, path: Path) -> None:
    figure, axes = new_figure(10, 3)
    panels = {
        "Cross-entropy, held out": ("loss",),
        "Read as asked (%)": ("digit", "attributes"),
        "Asked by a numeral (%)": ("unheard",),
    }
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for i, scores in enumerate(results["scores"].values()):
            for key, mark, colour in zip(keys, "os", SERIES, strict=False):
                factor = 1 if key == "loss" else 100
                values = [factor * value for value in scores[key]]
                label = key if i == 0 and len(keys) > 1 else None
                axis.plot([i] * len(values), values, mark, color=colour, label=label)
        axis.set_xticks(range(len(TEXT_ENCODERS)), ENCODER_TICKS)
        axis.margins(0.25)
        axis.set_title(title)
    for axis in axes[1:]:
        axis.set_ylim(0, 105)
    axes[1].legend(loc="lower left")
    save_plot(figure, path)


ENCODERS_MEASURED = (
    f"Muses of {TEXT_STEPS} steps, which start alike and see the same images, captions and hidden "
    "tokens, told by the main job's encoders, by the same with random weights (both frozen), or by "
    "one-hot words. They hear captions that name the digit by its word, and none by its numeral. "
)

TRAINED_ENCODER = Experiment(
    name="x-muse-6",
    claim="It matters that the text encoder was trained on language before.",
    source="Muse, arXiv 2301.00704, sections 1 and 2.1; Imagen, arXiv 2205.11487",
    measured=ENCODERS_MEASURED + "Cross-entropy of hidden tokens of 256 images held out, and of "
    f"{ENCODER_SAMPLES} samples of captions with words the shares with the right digit, and with "
    "the right stroke and slant where the caption has one. The table is beside the rule.",
    rule="Supported if over seeds the cross-entropy with trained encoders is below that with "
    "untrained ones by more than the spread of that difference and by more than 1%, and digits or "
    "attributes are right more often by more than the spread and by more than 2 points. Refuted if "
    "in every seed all three differences are smaller than 1%, 2 points and 2 points, or against "
    "the trained ones. (One seed decides nothing.)",
    minutes=9,
    run=text_study,
    decide=decide_encoder,
    plot=plot_encoders,
    remark="Captions made of so few words need no knowledge of language: random encoders, or a "
    "table of words, tell them apart as well. What the trained ones bring shows in x-muse-6-words.",
)

UNSEEN_WORDS = Experiment(
    name="x-muse-6-words",
    claim="What the encoder knows of words carries over to images: the generator draws what it "
    "never heard said.",
    source="Muse, arXiv 2301.00704, section 2.1",
    measured=ENCODERS_MEASURED
    + f"Of {ENCODER_SAMPLES} samples of captions with numerals the share with "
    "the right digit. The encoders themselves were trained with both names.",
    rule="Supported if in every seed, with trained encoders, at least half as many are right as "
    "of captions with words, and with untrained ones at most half as many as that. Refuted if in "
    "every seed, with trained encoders, fewer than 20% are right, or no more than with untrained "
    "ones. (One seed decides nothing; chance is 10%.)",
    minutes=9,
    run=text_study,
    decide=decide_unseen,
    plot=plot_encoders,
    remark="Of captions with numerals, which no generator was trained on, 74% are drawn right with "
    "trained encoders, almost as many as with words (81%). With untrained encoders or a table of "
    "words it is 11% and 9%, which is chance.",
)
