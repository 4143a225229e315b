"""Plots of runs and of benchmarks."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanosd3.training.plot_style import (
    GREY,
    INK,
    MEANINGS,
    PALE,
    SERIES,
    label_counts,
    new_figure,
    save_plot,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def smooth(values: list[float], window: int) -> np.ndarray:
    """Running mean over `window` values."""
    kernel = np.ones(window) / window
    return np.convolve(np.asarray(values, float), kernel, mode="valid")


def plot_loss(log: list[dict], path: Path) -> None:
    """Plot the transformer's loss over training and, if there is a validation set, its loss."""
    steps = [entry for entry in log if entry["stage"] == "flow" and "loss" in entry]
    held_out = [entry for entry in log if entry.get("validation")]
    figure, axes = new_figure(9, 2) if held_out else new_figure(5.5, 1)
    losses: list[float] = [entry["loss"] for entry in steps]
    window = max(1, len(losses) // 60)
    axes[0].plot(losses, color=PALE, linewidth=0.6, label="one batch")
    axes[0].plot(
        np.arange(window - 1, len(losses)), smooth(losses, window), label=f"mean of {window}"
    )
    for key, style, colour, label in (
        ("validation", ":o", SERIES[1], "held out, mean latents, even t"),
        ("validation_ema", "--s", SERIES[2], "the same, averaged weights"),
    ):
        means = [float(np.mean(entry[key])) for entry in held_out]
        steps_of = [entry["step"] for entry in held_out]
        axes[0].plot(steps_of, means, style, color=colour, markersize=4, label=label)
        losses += means  # for the axis limits
    axes[0].set(xlabel="step", ylabel="velocity loss (per latent)", title="Loss")
    low, high = np.quantile(losses, [0.0, 0.98])
    if high > low:
        axes[0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    axes[0].legend()
    if held_out:
        plot_loss_by_time(held_out, axes[1])
    save_plot(figure, path)


def plot_loss_by_time(held_out: list[dict], axis: "Axes") -> None:
    """Plot the validation loss of the EMA weights against t: early, halfway and at the end."""
    for style, colour, entry in zip(
        (":o", "--s", "-^"),
        (SERIES[1], SERIES[2], INK),
        [held_out[0], held_out[len(held_out) // 2], held_out[-1]],
        strict=True,
    ):
        losses = entry["validation_ema"]
        times = (np.arange(len(losses)) + 0.5) / len(losses)
        label = f"after step {entry['step'] + 1}"
        axis.plot(times, losses, style, color=colour, markersize=4, label=label)
    axis.set(
        xlabel="t   (0 data, 1 noise)",
        ylabel="velocity loss (per latent)",
        title="Loss of images held out, by timestep",
    )
    axis.set_xlim(0, 1)
    axis.legend()


def plot_samplers(errors: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot each sampler's error: points (evaluations, distance from the exact solution)."""
    figure, (axis,) = new_figure(5.5, 1)
    styles = {"euler": "-o", "heun": "--s", "dpmpp_2m": ":^"}
    for (sampler, points), colour in zip(errors.items(), SERIES, strict=False):
        style = {"color": colour, "markersize": 5, "label": sampler}
        axis.loglog(*zip(*points, strict=True), styles[sampler], **style)
    label_counts(axis, [n for n, _ in errors["euler"]])
    axis.set(
        xlabel="network evaluations per image",
        ylabel="error of the latents (r.m.s.)",
        title="Samplers at equal cost",
    )
    axis.legend()
    save_plot(figure, path)


def plot_frontier(points: list[tuple[float, float, float]], real: float, path: Path) -> None:
    """Plot (guidance, accuracy, distance relative to the floor) as distance against accuracy;
    `real` is the accuracy of the classifier on real images."""
    figure, (axis,) = new_figure(5.5, 1)
    _, accuracies, ratios = zip(*points, strict=True)
    axis.plot([100 * a for a in accuracies], ratios, "-o", color=MEANINGS["prediction"])
    for guidance, accuracy, ratio in points:
        place = 100 * accuracy, ratio
        axis.annotate(
            f"{guidance:g}", place, xytext=(-6, 5), textcoords="offset points", ha="right"
        )
    data = MEANINGS["data"]
    axis.axvline(100 * real, color=data, linestyle=":", label="real images, read correctly")
    axis.axhline(1, color=data, linestyle="--", label="real images, distance")
    axis.margins(0.12)
    axis.set_ylim(bottom=0)
    axis.set(
        xlabel="prompt accuracy (%)",
        ylabel="Frechet distance / that of real images",
        title="Along the guidance scale",
    )
    axis.legend(loc="upper left")
    save_plot(figure, path)


# Points of a cost curve: size, seconds, gigabytes.
Costs = list[tuple[int, float, float]]


def plot_growth(columns: dict[str, tuple[Costs, Costs]], title: str, path: Path) -> None:
    """Plot time (top) and memory (bottom), a column for each quantity that grows: measured points
    and the line of the formula."""
    figure, axes = new_figure(11, len(columns), rows=2)
    figure.suptitle(title, fontsize="medium")
    for i, (size, (measured, formula)) in enumerate(columns.items()):
        for j, cost in enumerate(("seconds", "GB of gradients and activations")):
            axis = axes[j * len(columns) + i]
            for costs, style, label in ((formula, "-", "formula"), (measured, "o", "measured")):
                sizes, *values = zip(*costs, strict=True)
                colour = GREY if style == "-" else INK
                axis.plot(sizes, values[j], style, color=colour, linewidth=2, label=label)
            axis.set(xlabel=size, ylabel=cost)
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.legend(loc="upper left")
    save_plot(figure, path)
