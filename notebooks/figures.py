"""Drawing in the notebooks: one look, labelled axes, a caption below, and a description in words.

Four colours have a meaning, the same in every notebook (MEANINGS in training/plot_style.py): data,
noise, prompt and prediction. A label chooses its colour: "real data" is drawn in that of data,
"noise" in that of noise, "t = 0.7" in a mixture of the two. Other curves take colours without a
meaning. Lines also differ in dashes and points, so nothing is lost in black and white.

Digits are light on black everywhere, as in MNIST: 0 is black, 255 white.
"""

import base64
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext
from torch import Tensor

from nanosd3.training.plot_style import INK, MEANINGS, PALE, SERIES

DASHES, MARKS = ("-", "--", ":", "-."), "os^vDxP*"
LABEL = 24  # characters in a line of a row's label
WORDS = {  # in a label, and what they stand for
    "data": "data", "real": "data", "noise": "noise", "prompt": "prompt", "text": "prompt",
    "prediction": "prediction", "predicted": "prediction", "samples": "prediction",
}  # fmt: skip

plt.rcParams.update(
    {
        "figure.figsize": (6.4, 3.2),
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=SERIES) + cycler(linestyle=DASHES),
        "image.cmap": "gray",
        "legend.frameon": False,
    }
)


def colour_of(label: str, otherwise: str = INK) -> str:
    """The colour of what a label names: by the first of WORDS in it, or by "t = ..."."""
    for word in re.findall(r"[a-z]+", label.lower()):
        if word in WORDS:
            return MEANINGS[WORDS[word]]
    time = re.search(r"\bt = ([01](?:\.\d+)?)\b", label)
    return mixture(float(time[1])) if time else otherwise


def mixture(t: float) -> str:
    """The colour of z at time t: that of data at 0, of noise at 1."""
    data, noise = (np.array(to_rgb(MEANINGS[name])) for name in ("data", "noise"))
    return to_hex((1 - t) * data + t * noise)


def in_words(description: str, caption: str) -> str:
    """Both as sentences. A description may end with a colon when no names follow it."""
    return " ".join(part.rstrip(".: ") + "." for part in (description, caption) if part)


def even_lines(text: str, width: int) -> list[str]:
    """The text in as few lines of at most `width` characters as possible, of about equal length."""
    fewest = textwrap.wrap(text, width, break_on_hyphens=False)
    for narrower in range(max(map(len, text.split()), default=width), width):
        lines = textwrap.wrap(text, narrower, break_on_hyphens=False)
        if len(lines) == len(fewest):
            return lines
    return fewest


def label_lines(label: str) -> str:
    """The label of a row in lines, broken after a colon or a comma where that is enough."""
    lines = [""]
    for part in re.split(r"(?<=[:,]) ", label):
        longer = f"{lines[-1]} {part}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= LABEL else [*lines, part]
    return "\n".join(short for line in lines for short in even_lines(line, LABEL))


def finish(figure: Figure, caption: str, description: str = "") -> None:
    """Add the caption below and show the figure. Those who cannot see it get the description."""
    width = int(figure.get_size_inches()[0] * 16)
    figure.supxlabel("\n".join(even_lines(caption, width)), fontsize=9, style="italic")
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        plt.show()
        return
    words = in_words(description, caption)
    ipython.display.display(figure, metadata={"image/png": {"alt": words}})
    plt.close(figure)


def show_bytes(kind: str, content: bytes, words: str) -> None:
    """Show the content of a picture's file below a cell, with a description in words for those who
    cannot see it; outside a notebook, nothing."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        data = {kind: base64.b64encode(content).decode(), "text/plain": "<Film>"}
        ipython.display.display(data, raw=True, metadata={kind: {"alt": words}})


def panels(count: int, width: float = 3.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, list(axes[0])


def to_numpy(x: Tensor | np.ndarray | Sequence) -> np.ndarray:
    """A detached copy or view of `x` on the CPU as an array."""
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


# --- curves -------------------------------------------------------------------------------------


class PlainLogarithm(LogFormatterMathtext):
    """Ticks of a logarithmic axis as numbers, 0.01 or 200, or all of them as powers if some would
    be too long."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        label = super().__call__(x, pos)
        low, high = sorted(self.axis.get_view_interval())
        return f"{x:g}" if label and low > 9e-5 and high < 1e6 else label


def scale(axis: Axes, log: str) -> None:
    """Make the axes named in `log`, "x", "y" or "xy", logarithmic."""
    for name in log:
        axis.set(**{f"{name}scale": "log"})
        ticks = getattr(axis, f"{name}axis")
        ticks.set_major_formatter(PlainLogarithm())
        ticks.set_minor_formatter(PlainLogarithm(minor_thresholds=(2, 0.4)))


def lines(
    curves: Mapping[str, tuple[Sequence, Sequence]],
    xlabel: str,
    ylabel: str,
    caption: str,
    log: str = "",
    ticks: Sequence | None = None,
) -> None:
    """Plot curves given as name -> (x, y). `log` may be "x", "y" or "xy"; `ticks` are the values
    of x to label, if not matplotlib's choice."""
    figure, (axis,) = panels(1, 6.4, 3.4)
    for i, (name, (x, y)) in enumerate(curves.items()):
        style: dict[str, Any] = {"marker": MARKS[i % len(MARKS)] if len(x) <= 20 else ""}
        turn = i + i // len(SERIES)  # the fifth has the first's colour but other dashes
        style |= {"linestyle": DASHES[turn % len(DASHES)], "markersize": 4, "label": name}
        colour = colour_of(name, SERIES[i % len(SERIES)])
        axis.plot(to_numpy(x), to_numpy(y), color=colour, **style)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    scale(axis, log)
    if ticks is not None:
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.xaxis.minorticks_off()
    if len(curves) > 1:
        axis.legend()
    finish(figure, caption, f"Plot of {ylabel} against {xlabel}: {', '.join(curves)}")


def curves(
    parts: Mapping[str, tuple[Sequence, Sequence]], xlabel: str, caption: str, log: str = ""
) -> None:
    """Plots side by side, one for each quantity, given as its name -> (x, y)."""
    figure, axes = panels(len(parts), 2.4)
    for axis, (name, (x, y)) in zip(axes, parts.items(), strict=True):
        axis.plot(to_numpy(x), to_numpy(y), "-o" if len(x) <= 20 else "-", color=INK, markersize=4)
        axis.set(xlabel=xlabel, ylabel=name)
        scale(axis, log)
    finish(figure, caption, f"Plots side by side, against {xlabel}: {', '.join(parts)}")


def densities(
    parts: Mapping[str, tuple[Sequence, Sequence, Sequence]], xlabel: str, caption: str
) -> None:
    """Histograms of numbers in (0, 1) side by side, each below a curve, given as title ->
    (draws, x, density)."""
    figure, axes = panels(len(parts), max(1.9, 3.8 / len(parts)), 2.6)
    top = 1.1 * max(to_numpy(density).max() for _, _, density in parts.values())
    for axis, (title, (draws, x, density)) in zip(axes, parts.items(), strict=True):
        axis.hist(to_numpy(draws), bins=40, range=(0, 1), density=True, color=PALE)
        axis.plot(to_numpy(x), to_numpy(density), color=INK, linestyle="-", linewidth=1)
        axis.set(title=title, xlabel=xlabel, xlim=(0, 1), ylim=(0, top))
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis.set_ylabel("density" if axis is axes[0] else "")
    finish(figure, caption, f"Histograms side by side, each with its curve: {', '.join(parts)}")


# --- points in the plane ------------------------------------------------------------------------


def clouds(parts: Mapping[str, Tensor], caption: str, side: float = 3.0) -> None:
    """Scatter plots side by side, given as title -> points (n, 2) in the title's colour."""
    figure, axes = panels(len(parts), 2.4, 2.9)
    for axis, (title, points) in zip(axes, parts.items(), strict=True):
        axis.scatter(*to_numpy(points).T, s=3, color=colour_of(title, MEANINGS["prediction"]))
        axis.set(title=title, xlim=(-side, side), ylim=(-side, side), aspect="equal")
        axis.set_xlabel("first coordinate")
    axes[0].set_ylabel("second coordinate")
    finish(figure, caption, f"Clouds of points side by side: {', '.join(parts)}")


def ways(path: Tensor, caption: str, start: str = "noise", end: str = "data") -> None:
    """Where points went: path (steps, n, 2), from `start` (open circles) to `end` (full ones)."""
    figure, (axis,) = panels(1, 4.2, 3.6)
    points = to_numpy(path)
    axis.plot(points[..., 0], points[..., 1], color=PALE, linestyle="-", linewidth=0.7)
    first, last = colour_of(start), colour_of(end)
    axis.scatter(*points[-1].T, s=12, color=last, label=end, zorder=3)
    axis.scatter(*points[0].T, s=12, facecolors="white", edgecolors=first, label=start, zorder=3)
    axis.set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
    axis.legend()
    finish(figure, caption, f"{points.shape[1]} points on their ways in the plane")


# --- images and tables --------------------------------------------------------------------------


def images(
    rows: Mapping[str, Tensor | np.ndarray],
    caption: str,
    cell: float = 0.6,
    span: tuple[float, float] | None = None,
) -> None:
    """Show rows of images, given as label -> (n, H, W), small values dark.

    `span` is what is black and what is white; without it bytes span 0 to 255, and other numbers
    from the smallest to the largest of their row.
    """
    columns = max(len(row) for row in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.6 + columns * cell, len(rows) * cell + 0.5), squeeze=False
    )
    for line, (label, row) in zip(axes, rows.items(), strict=True):
        pictures = to_numpy(row)
        whole = (0, 255) if pictures.dtype == np.uint8 else (pictures.min(), pictures.max())
        low, high = span or whole
        for axis in line:
            axis.axis("off")
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture, vmin=low, vmax=high, interpolation="nearest")
        style = {"transform": line[0].transAxes, "ha": "right", "va": "center"}
        line[0].text(-0.15, 0.5, label_lines(label), **style)
    finish(figure, caption, f"Rows of images: {', '.join(rows)}")


def maps(
    tables: Mapping[str, Tensor | np.ndarray],
    xlabel: str,
    ylabel: str,
    caption: str,
    unit: str,
    xticks: Sequence[str] = (),
    yticks: Sequence = (),
    border: int | None = None,
    span: tuple[float | None, float | None] = (None, None),
) -> None:
    """Show matrices side by side as heat maps on one grey scale; dark is large.

    `xticks` and `yticks` are labels of all columns and rows; a line is drawn before row and column
    `border`; `span` replaces the smallest and the largest value as ends of the scale.
    """
    arrays = {name: to_numpy(table) for name, table in tables.items()}
    low, high = span
    low = min(float(a.min()) for a in arrays.values()) if low is None else low
    high = max(float(a.max()) for a in arrays.values()) if high is None else high
    width = 2.6 if not xticks else max(2.6, 0.26 * len(xticks))
    with_scale = width + 0.9 / len(arrays)
    figure, axes = panels(len(arrays), with_scale, 2.9 if not xticks else 3.4)
    for axis, (name, array) in zip(axes, arrays.items(), strict=True):
        heatmap = axis.imshow(
            array, cmap="gray_r", vmin=low, vmax=high, interpolation="nearest", aspect="auto"
        )
        axis.set(title=name, xlabel=xlabel, ylabel=ylabel if axis is axes[0] else "")
        axis.locator_params(integer=True)
        if border is not None:
            axis.axhline(border - 0.5, color=INK, linestyle="-", linewidth=0.8)
            axis.axvline(border - 0.5, color=INK, linestyle="-", linewidth=0.8)
        if xticks:
            axis.set_xticks(range(len(xticks)), xticks, rotation=90, fontsize=7)
        if yticks:
            axis.set_yticks(range(len(yticks)), [str(y) for y in yticks])
    figure.colorbar(heatmap, ax=axes, label=unit, shrink=0.8)
    finish(figure, caption, f"Heat maps of {unit}, {ylabel} by {xlabel}: {', '.join(arrays)}")
