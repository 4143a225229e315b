"""How many channels should latents have? (arXiv 2403.03206, section 5.2.1, table 3 and figure 10)

More channels keep more of an image, and leave more to be drawn. The autoencoder bounds what any
transformer can reach in its latents; whether a transformer gets near that bound is a matter of its
size. So the paper chose 16 channels for the models it had in mind, not for the small ones it tried
them on.
"""

import math
from itertools import pairwise
from pathlib import Path

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.runs import open_main_run
from nanosd3.claims.sd3_latents import (
    AUTOENCODER,
    CHANNEL_DEPTHS,
    CHANNELS,
    FLOW,
    IMAGES_USED,
    reconstruction_of,
    some_digits,
    trained_latents,
    transformer_in,
)
from nanosd3.claims.sd3_variants import sample_scores
from nanosd3.training.plot_style import INK, SERIES, label_counts, new_figure, save_plot

SHALLOW, DEEP = CHANNEL_DEPTHS[0], CHANNEL_DEPTHS[-1]
ENDS = FEW_CHANNELS, MANY_CHANNELS = CHANNELS[0], CHANNELS[-1]  # where transformers are trained


def reconstruction_study(conditions: Conditions) -> dict:
    """By channels and seed: how well images are encoded and decoded again."""
    finished = open_main_run(conditions)
    source, seconds = some_digits(finished), 0.0
    found: dict[str, dict[str, list[float]]] = {}
    for channels in CHANNELS:
        one: dict[str, list[float]] = {"psnr": [], "ratio": []}
        for seed in conditions.seeds:
            latents = trained_latents(conditions, finished, source, channels, seed)
            seconds += latents.seconds
            scores = reconstruction_of(conditions, finished, latents)
            one["psnr"].append(scores["psnr"])
            one["ratio"].append(scores["frechet_ratio_to_real"])
        found[str(channels)] = one
    rows = [[name, 64 * int(name), one["psnr"], one["ratio"]] for name, one in found.items()]
    columns = ["channels", "numbers an image", "PSNR (dB)", "Frechet ratio"]
    return {"channels": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def channels_study(conditions: Conditions) -> dict:
    """By depth, channels and seed: the share of samples classified as prompted, and their Frechet
    ratio; and the ratio of reconstructions, which bounds it."""
    finished = open_main_run(conditions)
    source, seconds = some_digits(finished), 0.0
    keys = ("accuracy", "ratio")
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        str(depth): {str(c): {key: [] for key in keys} for c in ENDS} for depth in CHANNEL_DEPTHS
    }
    bound: dict[str, list[float]] = {str(c): [] for c in ENDS}
    for seed in conditions.seeds:
        for channels in ENDS:
            latents = trained_latents(conditions, finished, source, channels, seed)
            seconds += latents.seconds
            scores = reconstruction_of(conditions, finished, latents)
            bound[str(channels)].append(scores["frechet_ratio_to_real"])
            for depth in CHANNEL_DEPTHS:
                network = transformer_in(conditions, finished, latents, depth)
                seconds += network.seconds
                pair = sample_scores(conditions, finished, network, seed)
                for key, value in zip(keys, pair, strict=True):
                    found[str(depth)][str(channels)][key].append(value)
    rows = [
        [depth, channels, one["accuracy"], one["ratio"], bound[channels]]
        for depth, by_channels in found.items()
        for channels, one in by_channels.items()
    ]
    columns = ["depth", "channels", "read as asked", "Frechet ratio", "of reconstructions"]
    return {"depths": found, "bound": bound, "training_seconds": seconds,
            "table": table_of(columns, rows)}  # fmt: skip


def decide_reconstruction(results: dict) -> Verdict:
    steps = []
    for few, more in pairwise(map(str, CHANNELS)):
        a, b = results["channels"][few], results["channels"][more]
        steps += [lead(a["psnr"], b["psnr"]), lead(b["ratio"], a["ratio"])]
    return verdict(
        all(mean > spread for mean, spread in steps),
        any(mean < -spread for mean, spread in steps),
    )


def gains(results: dict, depth: int) -> list[float]:
    """What a depth gains from the most channels over the fewest, seed by seed: the logarithm of how
    many times smaller the Frechet ratio is."""
    by_channels = results["depths"][str(depth)]
    few, many = (by_channels[str(c)]["ratio"] for c in (FEW_CHANNELS, MANY_CHANNELS))
    return [math.log(a / b) for a, b in zip(few, many, strict=True)]


def decide_size(results: dict) -> Verdict:
    shallow, deep = gains(results, SHALLOW), gains(results, DEEP)
    (small, small_spread), (large, large_spread) = (
        lead([0.0] * len(each), each) for each in (shallow, deep)
    )
    more, spread = lead(shallow, deep)
    return verdict(
        large > large_spread and more > spread and small <= small_spread,
        large < -large_spread or more < -spread,
    )


def plot_reconstruction(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    titles = {"psnr": "PSNR of reconstructions (dB)", "ratio": "Frechet ratio of reconstructions"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for values in zip(*(one[key] for one in results["channels"].values()), strict=True):
            axis.plot(CHANNELS, values, "-o", color=INK, markersize=5, linewidth=0.8)
        label_counts(axis, CHANNELS)
        axis.margins(0.15)
        axis.set(title=title, xlabel="channels (a line a seed)")
    save_plot(figure, path)


def plot_channels(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    shown = (("ratio", "Frechet ratio of samples", 1), ("accuracy", "Read as asked (%)", 100))
    for axis, (key, title, unit) in zip(axes, shown, strict=True):
        for i, (depth, style) in enumerate(zip(CHANNEL_DEPTHS, ("-o", "--s"), strict=True)):
            by_channels = results["depths"][str(depth)].values()
            for j, values in enumerate(zip(*(one[key] for one in by_channels), strict=True)):
                label = "" if j else f"depth {depth}"
                points = [unit * value for value in values]
                axis.plot(ENDS, points, style, color=SERIES[i], linewidth=0.8, label=label)
        label_counts(axis, ENDS)
        axis.margins(0.15)
        axis.set(title=title, xlabel="channels (a line a seed)")
    axes[0].legend()
    save_plot(figure, path)


AUTOENCODERS = (
    "Autoencoders to 8x8 latents of 2, 4 and 8 channels (128, 256 and 512 numbers an image of 28 x "
    f"28 pixels), {AUTOENCODER.steps} steps of {AUTOENCODER.batch} on {IMAGES_USED:,} digits. "
)

RECONSTRUCTION = Experiment(
    name="x-sd3-channels",
    claim="An autoencoder with more channels reconstructs better.",
    source="SD3, arXiv 2403.03206, section 5.2.1 and table 3",
    measured=AUTOENCODERS + "Of 500 images, encoded and decoded again: PSNR, and the Frechet "
    "distance over that of real images.",
    rule="Supported if from each number of channels to the next PSNR rises and the Frechet ratio "
    "falls, each by more than the spread over seeds. Refuted if at one of these steps one of them "
    "is worse by more than that.",
    minutes=4,
    run=reconstruction_study,
    decide=decide_reconstruction,
    plot=plot_reconstruction,
    remark="These autoencoders are half as wide as the main job's, with a tenth of its KL weight. "
    "After so short a training it is not the channels that limit: 4 are a little ahead in "
    "the mean, 2 and 8 are alike, and all differences are within what another seed changes. The "
    "main job's autoencoder, twice as wide and trained for longer, gets 1.00 with 4 channels.",
)

CHANNELS_BY_SIZE = Experiment(
    name="x-sd3-channels-size",
    claim="Larger transformers profit from latents of more channels, smaller ones do not.",
    source="SD3, arXiv 2403.03206, section 5.2.1 and figure 10",
    measured=AUTOENCODERS
    + f"In latents of {FEW_CHANNELS} and {MANY_CHANNELS} channels, transformers of depth {SHALLOW} "
    f"and {DEEP} (width 64 a block), {FLOW.steps} steps of {FLOW.batch}, one rate. Of 500 samples "
    "(Heun, 8 steps, guidance 1.6) the Frechet distance over that of real images. What a depth "
    "gains is the logarithm of the ratio with 2 channels over that with 8.",
    rule="Supported if, by more than their spreads over seeds, the deeper gains, and more than the "
    "shallower, and the shallower does not gain. Refuted if by more than that the deeper loses, or "
    "gains less than the shallower.",
    minutes=6,
    run=channels_study,
    decide=decide_size,
    plot=plot_channels,
    remark="That more channels are harder to draw, as the paper says of small models, holds for "
    "both depths: Frechet ratios nearly double. The deeper loses a little less (1.8 times against "
    "1.9), within the spread. There was nothing to gain: 8 channels, trained so shortly, do not "
    "even reconstruct better than 2 (x-sd3-channels).",
)
