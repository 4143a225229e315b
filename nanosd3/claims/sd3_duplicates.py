"""Images that are in the data many times, and samples for their captions.

A model memorises images that occur often in its data, and draws them for their captions (Carlini et
al., arXiv 2301.13188). SD3's authors keep one of each set of near-copies, found by features that
were trained for it, and extract memorised images from models trained with and without the others:
far fewer are left (arXiv 2403.03206, appendix E.2).

Here one image of each digit is repeated, moved by a pixel and made brighter or darker. Its caption
says that it is bold and leans left, and no other image of its digit is both. A sample for that
caption is a copy if the nearest of the repeats, compared with the nearest image that no network
saw, is nearer to it than to 99% of real images that no network saw either.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanosd3.claims.copy_detection import TRAINED_FOR_IT, found_repeats, trained_detector
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.repeated_digits import (
    Planted,
    RepeatedDigits,
    in_hexadecimal,
    nearness,
    plant,
    shown_picture,
    usual_nearness,
)
from nanosd3.claims.runs import open_main_run
from nanosd3.claims.sd3_variants import TrainedVariant, Variant, trained_variant
from nanosd3.data.mnist import SIDE
from nanosd3.machine.distributed import SINGLE_PROCESS
from nanosd3.related.finished_run import FinishedRun
from nanosd3.training.cached_features import encoded
from nanosd3.training.evaluation import to_digits
from nanosd3.training.plot_style import SERIES, new_figure, save_plot

PLAIN_IMAGES, COPIES = 2000, 40  # in all, and near-copies of one image of each class
DUPLICATES_STEPS = 600
SAMPLES_OF_EACH = 50  # samples of a caption
WITH, WITHOUT = "with repeats", "repeats left out"  # what is trained on
PROMPTED_WITH = {"own": "for their caption", "other": "for another caption"}
SHOWN_DIGITS = (2, 3, 4, 5, 7)


def copies_drawn(
    finished: FinishedRun, network: TrainedVariant, planted: Planted, seed: int, count: int
) -> dict:
    """The share of copies among samples for the captions of repeated images and for other captions;
    and the first sample of some digits, in hexadecimal."""
    source, limit = network.features.source, usual_nearness(planted)
    assert isinstance(source, RepeatedDigits)
    pipeline = network.features.pipeline(network.model, finished.device)
    labels = torch.arange(len(planted.images.names)).repeat_interleave(count)
    found: dict = {}
    for name, texts in (("own", source.own), ("other", source.other)):
        prompts = [source.texts[i] for i in texts[labels].tolist()]
        digits = to_digits(torch.as_tensor(pipeline(prompts, seed=100 + seed, steps=8)))
        ratios = nearness(digits, labels, planted, planted.images.test_images[::2])
        found[name] = float((ratios < limit).float().mean())
        if name == "own":
            shown = [digits[label * count] for label in SHOWN_DIGITS]
            found["pictures"] = [in_hexadecimal(digit) for digit in shown]
    return found


# --- the study ------------------------------------------------------------------------------------


def duplicates_study(conditions: Conditions) -> dict:
    """By seed: how well repeats are found, and copies drawn after training with and without
    them."""
    finished = open_main_run(conditions)
    cache, encoders = conditions.out / "cache", finished.encoders(finished.config)
    count, copies = (100, 3) if conditions.fast else (PLAIN_IMAGES, COPIES)
    each = 2 if conditions.fast else SAMPLES_OF_EACH
    drawn: dict = {arm: {key: [] for key in PROMPTED_WITH} for arm in (WITH, WITHOUT)}
    detection: dict[str, dict[str, list[float]]] = {}
    pictures: dict[str, list[str]] = {}
    seconds = 0.0
    for seed in conditions.seeds:
        planted = plant(finished.source, seed, count, copies)
        detector = trained_detector(conditions, finished, seed)
        left_out, scores = found_repeats(finished.scorer, detector, planted)
        for kind, pair in scores.items():
            one = detection.setdefault(kind, {"precision": [], "recall": []})
            for key, value in zip(one, pair, strict=True):
                one[key].append(value)
        shown = planted.images.train_images[list(SHOWN_DIGITS)]
        pictures.setdefault("repeated image", [in_hexadecimal(digit) for digit in shown])
        seconds += detector.seconds
        for arm, kept in ((WITH, torch.ones_like(left_out)), (WITHOUT, ~left_out)):
            source = RepeatedDigits(planted, finished.config, kept)
            material = encoded(cache, source, encoders, [], SINGLE_PROCESS)
            variant = Variant(depth=1, data=arm.replace(" ", "-"), steps=DUPLICATES_STEPS)
            network = trained_variant(conditions, finished, material, variant, seed)
            seconds += network.seconds
            measure = partial(copies_drawn, finished, network, planted, seed, each)
            found = network.once("copies", measure)
            for key in PROMPTED_WITH:
                drawn[arm][key].append(found[key])
            pictures.setdefault(arm, found["pictures"])
    found = {"copies": drawn, "detection": detection, "pictures": pictures}
    rows = [[f"trained {arm}", *one.values(), "", ""] for arm, one in drawn.items()]
    rows += [[f"found by {kind}", "", "", *one.values()] for kind, one in detection.items()]
    columns = ["", "copies drawn for their caption", "for another", "precision", "recall"]
    return found | {"training_seconds": seconds, "table": table_of(columns, rows)}


def decide_duplicates(results: dict) -> Verdict:
    copied, clean = (results["copies"][arm]["own"] for arm in (WITH, WITHOUT))
    mean, spread = lead(clean, copied)
    pairs, enough = list(zip(copied, clean, strict=True)), len(copied) > 1
    return verdict(
        mean > spread and all(a >= max(3 * b, 0.05) for a, b in pairs),
        enough and all(a < b + 0.02 for a, b in pairs),
    )


def decide_found(results: dict) -> Verdict:
    scores = results["detection"][TRAINED_FOR_IT]
    worse = [min(pair) for pair in zip(scores["precision"], scores["recall"], strict=True)]
    enough = len(worse) > 1
    return verdict(enough and min(worse) >= 0.95, enough and max(worse) < 0.85)


def plot_duplicates(results: dict, path: Path) -> None:
    figure, (shares, images, detection) = new_figure(11, 3)
    panels = {
        "copies": (shares, "Samples that are copies", "in training (a point a seed)"),
        "detection": (detection, "Repeats found", "by features"),
    }
    for key, (axis, title, below) in panels.items():
        groups = results[key]
        for j, one in enumerate(groups.values()):
            for i, (what, values) in enumerate(one.items()):
                places, label = [j + 0.2 * i - 0.1] * len(values), PROMPTED_WITH.get(what, what)
                mark, label = "os"[i], "" if j else label
                axis.plot(places, values, mark, color=SERIES[i], markersize=5, label=label)
        axis.set_xticks(range(len(groups)), [name.replace(" ", "\n", 1) for name in groups])
        axis.margins(0.25, 0.08)
        axis.set(title=title, xlabel=below)
        axis.legend(loc="best")
    rows = [[shown_picture(text) for text in row] for row in results["pictures"].values()]
    images.imshow(np.vstack([np.hstack(row) for row in rows]), cmap="gray")
    images.set_yticks([SIDE * (i + 0.5) for i in range(len(rows))], list(results["pictures"]))
    images.set_xticks([])
    images.set(title="First samples for their caption")
    save_plot(figure, path)


PLANTED = (
    "2,000 training images and 40 near-copies of one of each digit (moved by up to a pixel, up to "
    "a fifth brighter or darker). "
)

DUPLICATES = Experiment(
    name="x-sd3-duplicates",
    claim="A model reproduces images that are repeated in its data when it reads their captions; "
    "with the repeats left out, it does not.",
    source="SD3, arXiv 2403.03206, appendix E.2; Carlini et al., arXiv 2301.13188",
    measured=PLANTED + 'They share a caption that fits no other image ("a bold seven leaning '
    'left"). A transformer of one block, 600 steps of 64, trained on all of these, and on what is '
    "left when repeats that were found are left out. Of 500 samples for those captions (Heun, 8 "
    "steps, guidance 1.6), the share of copies: the distance to the nearest repeat over that to "
    "the nearest of 5,000 unseen images is below what 99% of other unseen images have.",
    rule="Supported if with repeats the share of copies is higher by more than the spread over "
    "seeds and in every seed at least 5% and three times that without. Refuted if in every seed it "
    "is less than 2 points higher. (One seed decides nothing.)",
    minutes=4,
    run=duplicates_study,
    decide=decide_duplicates,
    plot=plot_duplicates,
    remark="Of samples for their captions, 95% are copies with repeats and 8% without: more than "
    "the 1% of real images, since what is asked for is bold and leans left like the repeated "
    "image, and is seen by a small network once in 2,000. Other captions hardly yield copies in "
    "either case (1.6% and 1.2%).",
)

FOUND = Experiment(
    name="x-sd3-duplicates-found",
    claim="Features that were trained for copy detection find the near-copies in a data set.",
    source="SD3, arXiv 2403.03206, appendix E.2; SSCD, arXiv 2202.10261",
    measured=PLANTED + "Images that are nearer to each other than 99% of 4,000 test images are to "
    "the nearest other one go into one cluster, of which one image stays. By pixels, by the "
    "classifier's features, and by those of a network that learned to tell altered versions of an "
    "image from other images: the share of planted copies among what is left out (precision), and "
    "of planted copies that are left out (recall).",
    rule="Supported if in every seed precision and recall of the last are at least 95%. Refuted if "
    "in every seed one of them is below 85%. (One seed decides nothing.)",
    minutes=4,
    run=duplicates_study,
    decide=decide_found,
    plot=plot_duplicates,
    remark="The classifier and pixels find what stays in place: of nine ways to move an image, "
    "one representative each is left. The limit, 1%, was chosen in a pilot with other seeds, for "
    "all three alike.",
)
