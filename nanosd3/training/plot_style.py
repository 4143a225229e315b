"""What all plots share: colours, axes and the way they are saved.

matplotlib is imported only where it is used. Lines can be told apart without colour. Four colours
have a meaning, the same in notebooks and plots of runs; colour-blind readers can tell them apart,
too (a test simulates three kinds).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanosd3.storage.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "black", "0.6", "0.8"  # of lines in plots
MEANINGS = {"data": "#0072B2", "noise": "#8C8C8C", "prompt": "#C77F00", "prediction": "#A3004F"}
SERIES = (INK, "#009E73", "#CC79A7", "#56B4E9")  # of other curves, Okabe and Ito's
DPI = 110  # of saved plots


def save_plot(figure: "Figure", path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_file(path, buffer.getvalue())


def new_figure(width: float, columns: int, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure `width` inches wide and its axes, row by row. Curves take the colours of SERIES in
    turn, so the first curve has the same colour on all axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for axis in axes:
        axis.set_prop_cycle(color=SERIES)
    return figure, axes


def label_counts(axis: "Axes", counts: Sequence[float]) -> None:
    """Label a logarithmic axis with counts, such as network evaluations; no ticks in between."""
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
