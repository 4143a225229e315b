"""The plots of the claims have the palette of the notebooks, and can be told apart in it."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.page import committed
from nanosd3.training.plot_style import GREY, INK, MEANINGS, PALE, SERIES

PALETTE = {to_hex(colour) for colour in (INK, GREY, PALE, "white", *MEANINGS.values(), *SERIES)}
RECORDS = committed(EXPERIMENTS)


@pytest.fixture(scope="module")
def axes():
    """All axes that are drawn of the committed records, by experiment."""
    found = {}
    claims = [m for n, m in sys.modules.items() if "claims." in n and hasattr(m, "save_plot")]
    with pytest.MonkeyPatch.context() as patch:
        for name, record in RECORDS.items():
            seen = []
            for module in claims:
                patch.setattr(module, "save_plot", lambda figure, _, seen=seen: seen.append(figure))
            EXPERIMENTS[name].plot(record["results"], Path("not written"))
            found[name] = seen[0].axes
    return found


def faces(patches) -> set[str]:
    return {to_hex(patch.get_facecolor()) for patch in patches}


@pytest.mark.parametrize("name", RECORDS)
def test_colours(axes, name):
    for axis in axes[name]:
        used = {to_hex(line.get_color()) for line in axis.get_lines()} | faces(axis.patches)
        used |= {to_hex(line.get_markerfacecolor()) for line in axis.get_lines()}
        assert used <= PALETTE


@pytest.mark.parametrize("name", RECORDS)
def test_what_a_legend_tells_apart_differs(axes, name):
    """By its colour, and without it by its dashes or points."""
    for axis in axes[name]:
        labelled = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
        first = labelled[: len(SERIES)]
        assert len({to_hex(line.get_color()) for line in first}) == len(first) or hollow(first)
        looks = {(line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white")
                 for line in labelled}  # fmt: skip
        assert len(looks) == len(labelled)


def pixels_of(line) -> np.ndarray:
    """Points along a line, as drawn."""
    points = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
    if line.get_linestyle() in ("None", "") or len(points) == 1:
        return points
    return np.concatenate([np.linspace(a, b, 40) for a, b in pairwise(points)])


@pytest.mark.parametrize("name", RECORDS)
def test_titles_fit_and_a_legend_covers_no_line(axes, name):
    for axis in axes[name]:
        axis.figure.draw_without_rendering()
        title = axis.title.get_window_extent()
        assert title.x0 >= 0 and title.x1 <= axis.figure.bbox.x1, axis.get_title()
        if legend := axis.get_legend():
            box = legend.get_window_extent()
            for line in axis.get_lines():
                assert not box.count_contains(pixels_of(line)), line.get_label()


@pytest.mark.parametrize("name", ["x-hd-2", "x-hd-4"])
def test_the_line_of_real_images_is_named(axes, name):
    assert "real images" in [text.get_text() for text in axes[name][1].get_legend().texts]


def hollow(lines) -> bool:
    """Two that differ in being filled, each in the colours of its neighbours."""
    return [line.get_markerfacecolor() == "white" for line in lines] == [False, True]
