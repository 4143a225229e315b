"""Image grids with captions, animations, and plots.

Grids and animations are drawn with Pillow, plots with matplotlib, which is imported only where it
is used. Lines in plots can be told apart without colour.
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanosd3.storage.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LINES = 8  # of a caption, at most
CELL = 56  # smaller images are enlarged to about this height, in pixels
GAP = 4  # pixels between images
COLUMNS = 16  # images in a row, at most
INK, GREY, PALE = "black", "0.6", "0.8"  # of lines in plots
SHADES = " .:-=+*#%@"  # characters from dark to light, on a dark terminal


@cache
def font(size: int, ascii_only: bool = True) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which knows little more than ASCII, or DejaVu Sans, which matplotlib
    brings along: it knows many alphabets, and draws a box for other characters."""
    if ascii_only:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def to_image(image: np.ndarray) -> Image.Image:
    """Pixels uint8 (H, W) or (H, W, 3) to a Pillow image, small ones enlarged by an integer."""
    factor = max(1, round(CELL / image.shape[0]))
    return Image.fromarray(
        np.kron(image, np.ones((factor, factor, *[1] * (image.ndim - 2)), np.uint8))
    )


def caption_lines(text: str, width: int, size: int) -> list[str]:
    """Wrap a caption into at most LINES lines of at most `width` pixels, between words if they are
    not too long; "..." stands for the rest."""
    length = font(size, text.isascii()).getlength
    lines, line = [], ""
    for word in text[: LINES * width].split():  # no character is narrower than a pixel
        longer = f"{line} {word}".strip()
        if line and length(longer) > width:
            lines.append(line)
            longer = word
        while length(longer) > width and len(longer) > 1:
            fits = max(1, int(len(longer) * width / length(longer)))
            while fits > 1 and length(longer[:fits]) > width:
                fits -= 1
            lines.append(longer[:fits])
            longer = longer[fits:]
        line = longer
    lines.append(line)
    if len(lines) <= LINES:
        return lines
    last = lines[LINES - 1]
    while length(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: LINES - 1], f"{last}..."]


def grid(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """A row for each caption (on the left) and its images (n, H, W) or (n, H, W, 3)."""
    label, size = 190, 15  # width of the captions and their font size, in pixels
    cell_width, cell_height = to_image(rows[0][1][0]).size
    columns = min(COLUMNS, max(1, 4096 // cell_width), max(len(images) for _, images in rows))
    wrapped = [caption_lines(caption, label - 20, size) for caption, _ in rows]
    heights = [
        max(-(-len(images) // columns) * (cell_height + GAP), len(lines) * (size + 3) + GAP)
        for (_, images), lines in zip(rows, wrapped, strict=True)
    ]
    width = label + columns * (cell_width + GAP) + GAP
    canvas = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for (caption, images), lines, height in zip(rows, wrapped, heights, strict=True):
        middle = top + (height - GAP) / 2 - len(lines) * (size + 3) / 2
        for i, line in enumerate(lines):
            letters = font(size, caption.isascii())
            draw.text((10, middle + i * (size + 3)), line, "black", letters)
        for i, image in enumerate(images):
            left = label + i % columns * (cell_width + GAP)
            canvas.paste(to_image(image), (left, top + i // columns * (cell_height + GAP)))
        top += height
    return canvas


def grid_of(captions: Sequence[str], images: np.ndarray) -> Image.Image:
    """A row for each caption, with equally many of the images (n, H, W) or (n, H, W, 3)."""
    rows = zip(captions, np.split(images, len(captions)), strict=True)
    return grid([(caption or "(no text)", row) for caption, row in rows])


def side_by_side(columns: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures beside each other, each under its title."""
    size, top = 17, 30
    width = sum(picture.width for _, picture in columns)
    canvas = Image.new("RGB", (width, top + max(p.height for _, p in columns)), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for title, picture in columns:
        draw.text((left + 10, 7), title, "black", font(size, title.isascii()))
        canvas.paste(picture, (left, top))
        left += picture.width
    return canvas


def png(picture: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def npy(images: np.ndarray) -> bytes:
    """The content of a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, images)
    return buffer.getvalue()


def drawn_picture(images: np.ndarray, captions: Sequence[str]) -> bytes:
    """The content of a PNG file: one image pixel for pixel, so that it can be edited further, or a
    grid with a row for each caption."""
    if len(images) == 1:
        return png(Image.fromarray(images[0]))
    return png(grid_of(captions, images))


def gif(frames: list[Image.Image], milliseconds: list[int]) -> bytes:
    """The content of a looping greyscale GIF that shows each frame for some time."""
    buffer = io.BytesIO()
    first, *rest = [frame.convert("L").quantize(16) for frame in frames]
    first.save(buffer, "gif", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def shades(images: np.ndarray) -> str:
    """Greyscale images (n, H, W) side by side as characters, for a terminal."""
    small = images[:, ::2, :].astype(int)  # a character is about twice as high as wide
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
    """A figure `width` inches wide and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for axis in axes:
        axis.set_prop_cycle(color=[INK])
    return figure, axes


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
    for key, style, label in (
        ("validation", ":o", "held out, mean latents, even t"),
        ("validation_ema", "--s", "the same, averaged weights"),
    ):
        means = [float(np.mean(entry[key])) for entry in held_out]
        axes[0].plot([e["step"] for e in held_out], means, style, markersize=4, label=label)
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
    for style, entry in zip(
        (":o", "--s", "-^"),
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


def label_counts(axis: "Axes", counts: Sequence[int]) -> None:
    """Counts, such as network evaluations, along a logarithmic axis, and no ticks between them."""
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()


def plain_logarithm(axis: "Axes") -> None:
    """A logarithmic y axis labelled 1, 2, 5, 10, not with powers of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def plot_samplers(errors: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot each sampler's error, (evaluations, distance from the exact solution) points."""
    figure, (axis,) = new_figure(5.5, 1)
    styles = {"euler": "-o", "heun": "--s", "dpmpp_2m": ":^"}
    for sampler, points in errors.items():
        axis.loglog(*zip(*points, strict=True), styles[sampler], markersize=5, label=sampler)
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
    axis.plot([100 * a for a in accuracies], ratios, "-o", markersize=5)
    for guidance, accuracy, ratio in points:
        place = 100 * accuracy, ratio
        axis.annotate(
            f"{guidance:g}", place, xytext=(-6, 5), textcoords="offset points", ha="right"
        )
    axis.axvline(100 * real, color=GREY, linestyle=":", label="real images, read correctly")
    axis.axhline(1, color=GREY, linestyle="--", label="real images, distance")
    axis.margins(0.12)
    axis.set_ylim(bottom=0)
    axis.set(
        xlabel="samples read as asked (%)",
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
