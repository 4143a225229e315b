"""Drawings for notebook 17: ranks by seed, pairs of results, two scores at once, who beats whom."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from figures import finish, panels, to_numpy
from matplotlib.axes import Axes
from torch import Tensor

from nanosd3.training.plot_style import INK, PALE, SERIES

PLACES = ((0, 9), (0, -9), (0, 20), (0, -20))  # of a name above or below its point


def apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, in the same order but so that neighbours are at least `gap` apart."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    moved = list(values)
    for _ in range(100):
        for a, b in pairwise(order):
            missing = max(0.0, gap - (moved[b] - moved[a]))
            moved[a] -= missing / 2
            moved[b] += missing / 2
    return moved


def by_seed(
    ranks: Mapping[str, Sequence[float]], ylabel: str, caption: str, subject: str = ""
) -> None:
    """A line for each name through its values, seed by seed; 1, the best, on top. The line of the
    subject is green. Names that would overlap are moved apart."""
    figure, (axis,) = panels(1, 6.4, 3.6)
    everything = [value for values in ranks.values() for value in values]
    gap = 0.07 * (max(everything) - min(everything))
    ends = [apart([values[i] for values in ranks.values()], gap) for i in (0, -1)]
    for (name, values), left, right in zip(ranks.items(), *ends, strict=True):
        dark, line = (SERIES[1], SERIES[1]) if name == subject else (INK, PALE)
        seeds, style = range(len(values)), {"markerfacecolor": dark, "markeredgecolor": dark}
        axis.plot(seeds, values, "-o", color=line, zorder=2 + 0.5 * (name == subject), **style)
        thin = {"arrowstyle": "-", "color": PALE, "shrinkA": 0, "shrinkB": 4}
        for x, y, to, side in ((0, left, -0.12, "right"), (seeds[-1], right, 0.12, "left")):
            axis.annotate(name, (x, values[x]), (x + to, y), color=dark, ha=side, va="center",
                          arrowprops=thin)  # fmt: skip
    count = max(len(values) for values in ranks.values())
    axis.set_xticks(range(count), [f"seed {seed}" for seed in range(count)])
    axis.set(ylabel=ylabel, xlim=(-0.9, count - 0.1))
    axis.margins(y=0.08)
    axis.invert_yaxis()
    finish(figure, caption, f"Lines from seed to seed: {', '.join(ranks)}")


def pairs(parts: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str, caption: str) -> None:
    """Results of two methods side by side, those of one seed joined by a line; a plot for each of
    `parts`."""
    figure, axes = panels(len(parts), 3.2, 3.0)
    for axis, (title, results) in zip(axes, parts.items(), strict=True):
        for row in zip(*results.values(), strict=True):
            axis.plot(range(len(row)), row, "-o", color=PALE, mfc=INK, mec=INK)
        axis.set_xticks(range(len(results)), list(results))
        axis.set(title=title, xlim=(-0.4, len(results) - 0.6))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel(ylabel)
    finish(figure, caption, f"Results joined seed by seed: {', '.join(parts)}")


def two_scores(
    scores: Tensor, names: Sequence[str], caption: str, fronts: Sequence[int] | None = None
) -> None:
    """Points (accuracy, Frechet ratio) with their names; members of a front are joined. Points
    with ratios far above the best would hide what is between the others, and are only named."""
    figure, (axis,) = panels(1, 6.4, 3.8)
    points = to_numpy(scores)
    near = points[:, 1] < 1.3 * points[:, 1].min()
    labels = [f"{n}: {k}" for n, k in zip(names, fronts, strict=True)] if fronts else list(names)
    for number in sorted(set(fronts or ())):
        own = points[near & (to_numpy(fronts or ()) == number)]
        axis.plot(*own[own[:, 0].argsort()].T, "-", color=PALE)
    axis.plot(*points[near].T, "o", color=INK, linestyle="")
    axis.set(xlabel="share read as asked (more is better)", ylabel="Frechet ratio (less is better)")
    axis.margins(0.15)
    name_points(axis, {labels[i]: points[i] for i in near.nonzero()[0]})
    far = ", ".join(label for label, close in zip(labels, near, strict=True) if not close)
    finish(figure, f"{caption} Far above: {far}." if far else caption, "Points with names")


def name_points(axis: Axes, points: Mapping[str, Sequence[float]]) -> None:
    """Each name above its point, or where the names before leave room."""
    axis.figure.draw_without_rendering()  # only now are positions known
    taken = []
    for name, point in points.items():
        label = axis.annotate(name, point, PLACES[0], textcoords="offset points", ha="center",
                              va="center")  # fmt: skip
        for place in PLACES:
            label.set_position(place)
            if not any(label.get_window_extent().overlaps(box) for box in taken):
                break
        taken.append(label.get_window_extent())


def who_beats_whom(signs: Tensor, names: Sequence[str], caption: str) -> None:
    """A square for each pair: black where the row beats the column, white where it loses."""
    figure, (axis,) = panels(1, 6.4, 3.8)
    axis.imshow(to_numpy(signs), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.spines[["top", "right"]].set_visible(True)
    finish(figure, caption, f"Who beats whom among {', '.join(names)}")


def bars_and_line(
    centres: Sequence[float], bars: Sequence[float], line: Sequence[float], caption: str
) -> None:
    """Shares of draws as bars and, beside them, what is left to learn as a line."""
    figure, axes = panels(2, 3.2, 2.8)
    axes[0].bar(centres, to_numpy(bars), width=0.11, color=PALE)
    axes[1].plot(centres, to_numpy(line), "-o", color=INK, markersize=4)
    for axis, ylabel in zip(axes, ("share of draws", "left to learn"), strict=True):
        axis.set(xlabel="t (0 data, 1 noise)", ylabel=ylabel, xlim=(0, 1))
        axis.set_ylim(bottom=0)
    finish(figure, caption, "Bars, and beside them a line, over eight intervals of t")
