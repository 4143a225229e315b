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

CELL = 56  # pixels of one drawn image, at least
GAP = 4
COLUMNS = 16  # images in one row, at most
SHADES = " .:-=+*#%@"


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def to_image(image: np.ndarray) -> Image.Image:
    """uint8 (H, W) or (H, W, 3) as a picture, small ones enlarged by a whole factor."""
    factor = max(1, CELL // image.shape[0])
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


def new_figure(width: float, columns: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def smooth(values: list[float], window: int) -> np.ndarray:
    """Running mean over `window` values."""
    kernel = np.ones(window) / window
    return np.convolve(np.asarray(values, float), kernel, mode="valid")


def plot_loss(log: list[dict], path: Path) -> None:
    """The flow's loss over training, and by timestep at its start, middle and end."""
    figure, (left, right) = new_figure(9, 2)
    losses = [entry["loss"] for entry in log]
    window = max(1, len(losses) // 60)
    left.plot(losses, color="0.8", linewidth=0.6, label="one batch")
    left.plot(
        np.arange(window - 1, len(losses)), smooth(losses, window), "k", label=f"mean of {window}"
    )
    left.set(xlabel="step", ylabel="velocity loss (per latent)", title="Training loss")
    low, high = np.quantile(losses, [0.0, 0.98])
    if high > low:
        left.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    left.legend()

    by_time = np.array([entry["by_time"] for entry in log], dtype=float)  # None becomes nan
    centres = (np.arange(by_time.shape[1]) + 0.5) / by_time.shape[1]
    tenth, middle = max(1, len(log) // 10), len(log) // 2
    for name, style, part in (
        ("first tenth of training", "k:o", by_time[:tenth]),
        ("middle tenth", "k--s", by_time[middle : middle + tenth]),
        ("last tenth", "k-^", by_time[-tenth:]),
    ):
        count = np.sum(~np.isnan(part), axis=0)
        seen = count > 0
        mean = np.nansum(part, axis=0)[seen] / count[seen]
        right.plot(centres[seen], mean, style, markersize=4, label=name)
    right.set(
        xlabel="t   (0 data, 1 noise)",
        ylabel="velocity loss (per latent)",
        title="Loss by timestep",
    )
    right.set_xlim(0, 1)
    right.legend()
    save_plot(figure, path)


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
