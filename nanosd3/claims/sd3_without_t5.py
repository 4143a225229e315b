"""Leaving out T5, the largest encoder by far (arXiv 2403.03206, section 5.3.3).

In training each encoder is left out of nearly half the captions, so the model can do without any at
inference. The paper finds looks unchanged without T5, prompt following a little worse, and written
text much worse. Here the captions of the main job are of two kinds: "a 3" names a digit and no
more, "a bold 3 leaning right" also says how it is written.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.runs import open_encoded
from nanosd3.claims.sd3_variants import TrainedVariant, Variant, trained_variant
from nanosd3.data.mnist import bins, measure_strokes
from nanosd3.data.sources import Described
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import draw_and_floor
from nanosd3.training.evaluation import Draw, to_digits
from nanosd3.training.plot_style import SERIES, new_figure, save_plot
from nanosd3.training.report import SLANT_WORDS, WEIGHT_WORDS, attribute_accuracy

ENCODERS_USED = {"all three": (), "without T5": ("t5",)}
DROPOUT_VARIANTS = {"some left out": Variant(), "all heard": Variant(encoder_dropout=False)}
T5_SCORES = ("digit", "attributes", "ratio")


def scores_without_encoders(
    finished: FinishedRun, network: TrainedVariant, seed: int, count: int, drop: tuple[str, ...]
) -> dict[str, float]:
    """Of samples: the share of right digits, the share of right attributes (thin or bold, leaning
    or upright) where the caption has one, the Frechet distance over that of real images."""
    pipeline = network.features.pipeline(network.model, finished.device)
    draw, floor = draw_and_floor(finished, count, 100 + seed)
    images = pipeline(draw.prompts, seed=100 + seed, steps=8, drop=drop)
    digits = to_digits(torch.as_tensor(images))
    accuracy, distance = finished.scorer.score(digits, draw)
    right = attributes_right(finished.source.described, draw, digits)
    return dict(zip(T5_SCORES, (accuracy, right, distance / floor), strict=True))


def attributes_right(described: Described, draw: Draw, digits: Tensor) -> float:
    """The share of samples uint8 (B, 28, 28) with the stroke that the prompt asks for, and that
    with the slant, each among prompts that ask for one; the mean of both."""
    matches = []
    limits = described.weight_limits, described.slant_limits
    words = WEIGHT_WORDS, SLANT_WORDS
    for values, limit, meant in zip(measure_strokes(digits), limits, words, strict=True):
        third = bins(values, draw.labels, limit)
        matches.append(attribute_accuracy(draw.prompts, meant, third, values)["accuracy"])
    return sum(match or 0.0 for match in matches) / len(matches)


def t5_study(conditions: Conditions) -> dict:
    """By dropout in training, encoders used and seed: the three scores."""
    finished, features = open_encoded(conditions)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    rows, seconds, count = [], 0.0, 20 if conditions.fast else 1000
    for training, variant in DROPOUT_VARIANTS.items():
        found[training] = {encoders: {key: [] for key in T5_SCORES} for encoders in ENCODERS_USED}
        for seed in conditions.seeds:
            network = trained_variant(conditions, finished, features, variant, seed)
            seconds += network.seconds
            for encoders, drop in ENCODERS_USED.items():
                arguments = (finished, network, seed, count, drop)
                scores = network.once(
                    f"scores, {encoders}", partial(scores_without_encoders, *arguments)
                )
                for key, value in scores.items():
                    found[training][encoders][key].append(value)
        for encoders, one in found[training].items():
            rows.append([training, encoders, *one.values()])
    columns = ["encoders, in training", "sampled with", "right digit"]
    columns += ["right attributes", "Frechet ratio"]
    return {"scores": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def drops_without(results: dict, training: str, key: str) -> list[float]:
    """By how much a score is lower without T5, seed by seed."""
    whole, without = (results["scores"][training][encoders][key] for encoders in ENCODERS_USED)
    return [a - b for a, b in zip(whole, without, strict=True)]


def decide_without(results: dict) -> Verdict:
    digit, attributes, ratio = (drops_without(results, "some left out", k) for k in T5_SCORES)
    whole = results["scores"]["some left out"]["all three"]["ratio"]
    enough, seeds = len(digit) > 1, range(len(digit))
    digits_hold = all(cost <= 0.02 for cost in digit)
    looks_hold = all(-ratio[i] <= 0.1 * whole[i] for i in seeds)
    falls = all(attributes[i] > max(0.02, digit[i]) for i in seeds)
    no_fall = all(attributes[i] <= 0 for i in seeds)
    lost = all(cost > 0.05 for cost in digit)
    return verdict(enough and digits_hold and looks_hold and falls, enough and (no_fall or lost))


def decide_dropout(results: dict) -> Verdict:
    with_dropout, without = (
        drops_without(results, training, "digit") for training in DROPOUT_VARIANTS
    )
    mean, spread = lead(with_dropout, without)  # a smaller loss is better
    return verdict(mean > max(spread, 0.02), mean < -spread)


def plot_t5(results: dict, path: Path) -> None:
    figure, axes = new_figure(10, 3)
    titles = ("Right digit", "Right attributes", "Frechet ratio")
    for axis, key, title in zip(axes, T5_SCORES, titles, strict=True):
        for i, (training, mark) in enumerate(zip(DROPOUT_VARIANTS, "os", strict=True)):
            for j, encoders in enumerate(ENCODERS_USED):
                values = results["scores"][training][encoders][key]
                places = [j + 0.16 * (2 * i - 1)] * len(values)
                label = "" if j else f"in training {training}"
                axis.plot(places, values, mark, color=SERIES[i], markersize=5, label=label)
        axis.set_xticks(range(len(ENCODERS_USED)), list(ENCODERS_USED))
        axis.margins(0.25)
        axis.set(title=title)
    axes[0].legend(loc="best")
    save_plot(figure, path)


T5_LEFT_OUT = (
    "The main job's transformer, 500 steps of 64, in training with each encoder left out of 46.4% "
    "of the captions, or with all of them heard. 1,000 samples of fresh captions (Heun, 8 steps), "
    "with all encoders and without T5. "
)

WITHOUT_T5 = Experiment(
    name="x-sd3-t5",
    claim="T5 can be left out at inference: looks hold, and of the prompts only what takes more "
    "words suffers.",
    source="SD3, arXiv 2403.03206, section 5.3.3",
    measured=T5_LEFT_OUT + "Of the networks trained with encoders left out: right digits; right "
    "attributes (thin, bold, leaning, upright) where a caption has them; Frechet distance over "
    "that of real images.",
    rule="Supported if in every seed, without T5, digits lose no more than 2 points and the "
    "Frechet ratio rises by no more than a tenth, while attributes lose more than 2 points and "
    "more than digits. Refuted if in every seed attributes lose nothing, or in every seed digits "
    "lose more than 5 points. (One seed decides nothing.)",
    minutes=5,
    run=t5_study,
    decide=decide_without,
    plot=plot_t5,
    remark="Digits and looks hold, as claimed, and so do attributes: the CLIPs read captions of "
    "this length as well as T5 does. What T5 is for, long prompts and written text, is not in "
    "these data.",
)

WITH_DROPOUT = Experiment(
    name="x-sd3-t5-dropout",
    claim="It is leaving encoders out in training that makes it possible to leave out T5.",
    source="SD3, arXiv 2403.03206, section 5.3.3",
    measured=T5_LEFT_OUT + "Of both: the points of right digits that are lost without T5.",
    rule="Supported if networks that heard all encoders lose more than the others by more than the "
    "spread over seeds and more than 2 points. Refuted if they lose less by more than the spread.",
    minutes=5,
    run=t5_study,
    decide=decide_dropout,
    plot=plot_t5,
    remark="Even networks that heard all encoders in training lose next to nothing without T5: "
    "what it says is in the CLIPs' pooled vectors, too.",
)
