"""Drawings for notebook 12: ways with arrows, a solver's stops, densities in the plane."""

from collections.abc import Mapping, Sequence

from figures import finish, panels, to_numpy
from torch import Tensor

from nanosd3.training.plot_style import INK, MEANINGS, PALE


def arrows(way: Tensor, velocity: Tensor, caption: str) -> None:
    """Ways from data to noise (steps, n, 2), and velocities of the same shape as arrows at some
    places: each as long as the way covered in a seventh of the time."""
    figure, (axis,) = panels(1, 4.2, 3.6)
    places, sides = (to_numpy(x[::6].flatten(0, 1)).T for x in (way, velocity / 7))
    points = to_numpy(way)
    axis.plot(points[..., 0], points[..., 1], color=PALE, linestyle="-")
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005, "color": INK}
    axis.quiver(*places, *sides, zorder=2, **style)
    for label, ends in (("data", points[0]), ("noise", points[-1])):
        axis.scatter(*ends.T, s=14, color=MEANINGS[label], label=label, zorder=3)
    axis.set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
    axis.margins(0.1)
    axis.legend()
    finish(figure, caption, "Curves in the plane with arrows along them")


def stops(times: Mapping[str, Sequence[float]], caption: str) -> None:
    """The times at which a solver's steps begin, a row for each name."""
    figure, (axis,) = panels(1, 6.4, 1.0 + 0.4 * len(times))
    for row, (name, each) in enumerate(reversed(times.items())):
        axis.plot(each, [row] * len(each), "|", color=INK, markersize=14)
        axis.text(1.03, row, f"{name}: {len(each)}", ha="right", va="center")
    axis.set(xlabel="t (1 noise, 0 data)", xlim=(1.02, -0.02), ylim=(-0.6, len(times) - 0.4))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    finish(figure, caption, f"Marks on axes of time: {', '.join(times)}")


def log_density_maps(tables: Mapping[str, Tensor], side: float, caption: str) -> None:
    """Log densities (n, n) on squares from -side to side, rows from the bottom; dark is dense."""
    figure, axes = panels(len(tables), 3.0, 3.0)
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        box = (-side, side, -side, side)
        picture = axis.imshow(
            to_numpy(table), origin="lower", extent=box, cmap="gray_r", vmin=-8, vmax=1
        )
        axis.set(title=name, xlabel="first coordinate")
    axes[0].set_ylabel("second coordinate")
    figure.colorbar(picture, ax=axes, label="log density (nats)", shrink=0.8)
    finish(figure, caption, f"Heat maps of log densities: {', '.join(tables)}")
