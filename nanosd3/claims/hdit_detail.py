"""What latents lose of an image before anything is generated (arXiv 2401.11605)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.data.mnist import STROKE_WEIGHTS, bins, from_uint8, measure_strokes
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.training.evaluation import draw_prompts
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.plot_style import INK, MEANINGS, SERIES, new_figure, save_plot

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


@torch.no_grad()
def detail_study(conditions: Conditions) -> dict:
    """Distances of reconstructions and of samples, and the error by the width of strokes."""
    finished = open_finished_run(conditions.run, None, torch.device("cpu"))
    source, scorer, count = finished.source, finished.scorer, 50 if conditions.fast else 1000
    digits, labels = source.images.test_images[:count], source.images.test_labels[:count]
    rebuilt = rebuilt_digits(finished, digits)
    lost = frechet_distance(scorer.features(rebuilt), scorer.features(digits))
    psnr = decibels(digits, rebuilt)
    weight, _ = measure_strokes(digits)
    third = bins(weight, labels, source.described.weight_limits)
    generated = []
    for seed in conditions.seeds:
        draw = draw_prompts(source, count, seed)
        samples = np.asarray(finished.pipeline(draw.prompts, seed=seed))
        _, distance = scorer.score(torch.from_numpy(samples), draw)
        generated.append(distance - scorer.floor(draw))
    by_stroke = [psnr[third == i].mean().item() for i in range(3)]
    rows: list[list[object]] = [
        ["Frechet distance of reconstructions to the images themselves", lost],
        ["Frechet distance of samples, that of real images taken off", generated],
        ["the first as a share of the second", [lost / other for other in generated]],
        ["of pixels, which HDiT draws", "nothing is lost"],
    ]
    for name, value in zip(SIZES_OF_STROKES, by_stroke, strict=True):
        rows.append([f"PSNR of {name} strokes, dB", value])
    return {
        "lost": lost,
        "generated": generated,
        "psnr": by_stroke,
        "table": table_of(["", f"{count} digits"], rows),
    }


def decide_detail(results: dict) -> Verdict:
    shares = [results["lost"] / generated for generated in results["generated"]]
    thin, _, bold = results["psnr"]
    return verdict(min(shares) >= SHARE and thin < bold, max(shares) < SHARE)


def plot_detail(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    samples = results["generated"]
    axes[0].bar(["lost by latents", "samples"], [results["lost"], sum(samples) / len(samples)],
                color=[SERIES[3], MEANINGS["prediction"]])  # fmt: skip
    axes[0].set(ylabel="Frechet distance", title="Before and after generating")
    axes[1].plot(SIZES_OF_STROKES, results["psnr"], "o", color=INK)
    axes[1].set(ylabel="PSNR (dB)", title="Reconstructions by width of strokes")
    axes[1].margins(0.3)
    save_plot(figure, path)


DETAIL = Experiment(
    name="x-hd-3",
    claim="Latent diffusion loses fine detail of an image before anything is generated; a model of "
    "pixels does not.",
    source="HDiT, arXiv 2401.11605, introduction",
    measured="1000 test digits through the main job's autoencoder (8x8x4 numbers) and "
    "back: their Frechet distance to the digits themselves, beside that of 1000 samples of the "
    "main model to real digits less that of as many real ones; and the error by width of strokes.",
    rule="Supported if in every draw of samples what the autoencoder loses is at least a tenth of "
    "what the generator does, and thin strokes have the lower PSNR than bold ones. Refuted if it "
    "is below a tenth in every draw.",
    minutes=4,
    run=detail_study,
    decide=decide_detail,
    plot=plot_detail,
    remark="This autoencoder keeps 256 numbers of 784 pixels, roomy beside those of large models. "
    "Bold strokes have the larger error since they are more ink.",
)
