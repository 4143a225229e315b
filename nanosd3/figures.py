"""Pictures of what the model does: captioned grids, the path from noise to images, plots.

Grids and the animation are drawn with Pillow, plots with matplotlib, which is imported only
where it is used. All plots tell their lines apart without colour.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanosd3.checkpoint import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 56  # pixels of one drawn image, about, or more
GAP = 4
COLUMNS = 16  # images in one row, at most
SHADES = " .:-=+*#%@"


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def to_image(image: np.ndarray) -> Image.Image:
    """uint8 (H, W) or (H, W, 3) as a picture, small ones enlarged by a whole factor."""
    factor = max(1, round(CELL / image.shape[0]))
    return Image.fromarray(
        np.kron(image, np.ones((factor, factor, *[1] * (image.ndim - 2)), np.uint8))
    )


def caption_lines(text: str, width: int, size: int) -> list[str]:
    """Break a caption into lines of at most `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font(size).getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def grid(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Captions on the left, each with its images (n, H, W) or (n, H, W, 3) beside it."""
    label, size = 190, 15
    cell, tall = to_image(rows[0][1][0]).size
    columns = min(COLUMNS, max(1, 4096 // cell), max(len(images) for _, images in rows))
    wrapped = [caption_lines(caption, label - 20, size) for caption, _ in rows]
    heights = [
        max(-(-len(images) // columns) * (tall + GAP), len(lines) * (size + 3) + GAP)
        for (_, images), lines in zip(rows, wrapped, strict=True)
    ]
    canvas = Image.new("RGB", (label + columns * (cell + GAP) + GAP, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for (_, images), lines, height in zip(rows, wrapped, heights, strict=True):
        middle = top + (height - GAP) / 2 - len(lines) * (size + 3) / 2
        for i, line in enumerate(lines):
            draw.text((10, middle + i * (size + 3)), line, "black", font(size))
        for i, image in enumerate(images):
            place = (label + i % columns * (cell + GAP), top + i // columns * (tall + GAP))
            canvas.paste(to_image(image), place)
        top += height
    return canvas


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def save_animation(frames: list[Image.Image], path: Path) -> None:
    """A GIF that holds its last frame for two seconds."""
    buffer = io.BytesIO()
    times = [120] * (len(frames) - 1) + [2000]
    small = [frame.convert("L").quantize(16) for frame in frames]
    small[0].save(buffer, "gif", save_all=True, append_images=small[1:], duration=times, loop=0)
    write_file(path, buffer.getvalue())


def shades(images: np.ndarray) -> str:
    """A few images (n, H, W) side by side, drawn with characters for a terminal."""
    small = images[:, ::2, :].astype(int)  # characters are twice as high as wide
    index = small * len(SHADES) // 256
    rows = [
        "  ".join("".join(SHADES[v] for v in row) for row in line) for line in index.swapaxes(0, 1)
    ]
    return "\n".join(row.rstrip() for row in rows if row.strip())


# --- plots --------------------------------------------------------------------------------------


def save_plot(figure: "Figure", path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_file(path, buffer.getvalue())


def new_figure(width: float, columns: int, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def smooth(values: list[float], window: int) -> np.ndarray:
    """Running mean over `window` values."""
    kernel = np.ones(window) / window
    return np.convolve(np.asarray(values, float), kernel, mode="valid")


def plot_loss(log: list[dict], path: Path) -> None:
    """The flow's loss over training, and of images held out, by timestep, as it went down."""
    steps = [entry for entry in log if entry["stage"] == "flow" and "loss" in entry]
    held_out = [entry for entry in log if entry.get("validation")]
    figure, axes = new_figure(9, 2) if held_out else new_figure(5.5, 1)
    losses = [entry["loss"] for entry in steps]
    window = max(1, len(losses) // 60)
    axes[0].plot(losses, color="0.8", linewidth=0.6, label="one batch")
    axes[0].plot(
        np.arange(window - 1, len(losses)), smooth(losses, window), "k", label=f"mean of {window}"
    )
    for key, style, label in (
        ("validation", "k:o", "held out, mean latents, even t"),
        ("validation_ema", "k--s", "the same, averaged weights"),
    ):
        means = [float(np.mean(entry[key])) for entry in held_out]
        axes[0].plot([e["step"] for e in held_out], means, style, markersize=4, label=label)
        losses += means  # for the limits
    axes[0].set(xlabel="step", ylabel="velocity loss (per latent)", title="Loss")
    low, high = np.quantile(losses, [0.0, 0.98])
    if high > low:
        axes[0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    axes[0].legend()
    if held_out:
        plot_loss_by_time(held_out, axes[1])
    save_plot(figure, path)


def plot_loss_by_time(held_out: list[dict], axis: "Axes") -> None:
    """The averaged weights' loss of images held out against t, at three moments of training."""
    for style, entry in zip(
        ("k:o", "k--s", "k-^"),
        [held_out[0], held_out[len(held_out) // 2], held_out[-1]],
        strict=True,
    ):
        losses = entry["validation_ema"]
        times = (np.arange(len(losses)) + 0.5) / len(losses)
        axis.plot(times, losses, style, markersize=4, label=f"after step {entry['step'] + 1}")
    axis.set(
        xlabel="t   (0 data, 1 noise)",
        ylabel="velocity loss (per latent)",
        title="Loss of images held out, by timestep",
    )
    axis.set_xlim(0, 1)
    axis.legend()


def plot_samplers(errors: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Distance from the exact path's end against network evaluations, a line a sampler."""
    figure, (axis,) = new_figure(5.5, 1)
    styles = {"euler": "k-o", "heun": "k--s", "dpmpp_2m": "k:^"}
    for sampler, points in errors.items():
        axis.loglog(*zip(*points, strict=True), styles[sampler], markersize=5, label=sampler)
    ticks = [n for n, _ in errors["euler"]]
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.set(xlabel="network evaluations per image", ylabel="error of the latents (r.m.s.)",
             title="Samplers at equal cost")  # fmt: skip
    axis.legend()
    save_plot(figure, path)


# How large, seconds, gigabytes.
Costs = list[tuple[int, float, float]]


def plot_growth(columns: dict[str, tuple[Costs, Costs]], title: str, path: Path) -> None:
    """Time above memory, against each thing that grows: points that were measured, and the line of
    a formula."""
    figure, axes = new_figure(11, len(columns), rows=2)
    figure.suptitle(title, fontsize="medium")
    for i, (what, (measured, formula)) in enumerate(columns.items()):
        for j, quantity in enumerate(("seconds", "GB of gradients and activations")):
            axis = axes[j * len(columns) + i]
            for costs, style, label in ((formula, "-", "formula"), (measured, "o", "measured")):
                large, *values = zip(*costs, strict=True)
                colour = "0.6" if style == "-" else "black"
                axis.plot(large, values[j], style, color=colour, linewidth=2, label=label)
            axis.set(xlabel=what, ylabel=quantity)
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.legend(loc="upper left")
    save_plot(figure, path)
