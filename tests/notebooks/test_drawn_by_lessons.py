"""The drawings of notebooks 12, 16 and 17 show what they are given."""

import io
import sys
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from nanosd3.training.grids_and_gifs import CELL
from nanosd3.training.plot_style import SERIES

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import clips
import evidence
import trajectories


@pytest.fixture
def shown(monkeypatch):
    """Figures that were finished, and what is said about them."""
    seen = []
    for module in (clips, evidence, trajectories):
        monkeypatch.setattr(module, "finish", lambda *args: seen.append(args))
    yield seen
    for figure, caption, description in seen:
        axis = figure.axes[0]
        assert caption and description and axis.get_xlabel() + axis.get_ylabel()
    plt.close("all")


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def ticks(axis, which: str) -> list[str]:
    return [text.get_text() for text in getattr(axis, f"get_{which}ticklabels")()]


def test_arrows_go_along_the_way(shown):
    a, b, steps = torch.zeros(2, 2), torch.tensor([[7.0, 0], [0, 14]]), torch.linspace(0, 1, 13)
    way = torch.stack([(1 - t) * a + t * b for t in steps])
    trajectories.arrows(way, (b - a).expand(13, 2, 2), "caption")
    (quiver,) = (c for c in shown[0][0].axes[0].collections if hasattr(c, "U"))
    assert np.allclose(quiver.U, [1, 0] * 3) and np.allclose(quiver.V, [0, 2] * 3)
    assert np.allclose(quiver.XY, way[::6].flatten(0, 1))


def test_stops_are_counted_from_the_top(shown):
    trajectories.stops({"OT": [1.0, 0.5], "cosine": [1.0, 0.6, 0.2]}, "caption")
    axis = shown[0][0].axes[0]
    rows = {line.get_ydata()[0]: list(line.get_xdata()) for line in axis.get_lines()}
    assert rows == {1: [1.0, 0.5], 0: [1.0, 0.6, 0.2]}
    assert texts(axis) == ["cosine: 3", "OT: 2"]


def test_densities_lie_where_their_points_are(shown):
    side = torch.linspace(-2, 2, 5)
    grid = torch.cartesian_prod(side, side).flip(1)
    table = -(grid - torch.tensor([2.0, -1.0])).square().sum(1).view(5, 5)  # peak right, below
    trajectories.log_density_maps({"one": table}, 2, "caption")
    picture = shown[0][0].axes[0].get_images()[0]
    row, column = np.unravel_index(picture.get_array().argmax(), (5, 5))
    assert picture.origin == "lower" and picture.get_extent() == [-2, 2, -2, 2]
    assert (float(side[column]), float(side[row])) == (2.0, -1.0)


def test_the_best_rank_is_on_top(shown):
    evidence.by_seed({"a": [1.0, 3.0, 2.0], "b": [2.0, 1.0, 3.0]}, "rank", "caption")
    axis = shown[0][0].axes[0]
    bottom, top = axis.get_ylim()
    assert bottom > 3 and top < 1
    assert ticks(axis, "x") == ["seed 0", "seed 1", "seed 2"]
    assert texts(axis) == ["a", "a", "b", "b"]


def test_names_do_not_lie_on_each_other(shown):
    """Of equal values at either end, and of points side by side; that of the subject is green."""
    ranks = {"rf": [1.0, 3.0], "cosmap": [1.0, 3.0], "edm": [1.1, 1.0], "v": [4.0, 2.9]}
    evidence.by_seed(ranks, "rank", "caption", "edm")
    axis = shown[0][0].axes[0]
    green = {line.get_color() for line in axis.get_lines()} & {SERIES[1]}
    assert green and [t.get_text() for t in axis.texts if t.get_color() == SERIES[1]] == ["edm"] * 2
    names = ["rf/lognorm(0, 1)", "rf/mode(1.29)", "v/cos"]
    evidence.two_scores(torch.tensor([[0.43, 29.5], [0.44, 29.4], [0.46, 31]]), names, "caption")
    for figure, _, _ in shown:
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_what_is_moved_apart_keeps_its_order():
    assert evidence.apart([3.0, 1.0, 2.0], 0.5) == [3.0, 1.0, 2.0]
    moved = evidence.apart([2.0, 2.0, 2.1, 9.0], 0.5)
    assert moved[0] < moved[1] < moved[2] and moved[3] == 9
    assert np.allclose(np.diff(moved[:3]), 0.5, atol=1e-6) and np.isclose(sum(moved[:3]), 6.1)


def test_a_line_joins_what_one_seed_gave(shown):
    evidence.pairs({"5 steps": {"new": [1.0, 2.0], "old": [3.0, 4.0]}}, "distance", "caption")
    axis = shown[0][0].axes[0]
    assert [list(line.get_ydata()) for line in axis.get_lines()] == [[1.0, 3.0], [2.0, 4.0]]
    assert ticks(axis, "x") == ["new", "old"] and axis.get_ylim()[0] == 0


def test_fronts_are_joined_and_what_is_far_is_named(shown):
    scores = torch.tensor([[0.5, 10.0], [0.6, 11.0], [0.4, 12.0], [0.1, 40.0]])
    evidence.two_scores(scores, ["a", "b", "c", "d"], "caption")
    evidence.two_scores(scores, ["a", "b", "c", "d"], "caption", [1, 1, 2, 3])
    (plain, first, _), (joined, second, _) = shown
    assert first == "caption Far above: d." and second == "caption Far above: d: 3."
    assert texts(plain.axes[0]) == ["a", "b", "c"]
    assert texts(joined.axes[0]) == ["a: 1", "b: 1", "c: 2"]
    lines = [list(line.get_xdata()) for line in joined.axes[0].get_lines()]
    assert np.allclose(lines[0], [0.5, 0.6]) and len(lines) == 4


def test_the_winner_of_a_pair_is_black(shown):
    evidence.who_beats_whom(torch.tensor([[0, 1], [-1, 0]]), ["a", "b"], "caption")
    axis = shown[0][0].axes[0]
    colours = axis.get_images()[0].to_rgba(np.array([-1, 0, 1]))[:, 0]
    assert colours[0] == 1 > colours[1] > colours[2] == 0
    assert ticks(axis, "y") == ticks(axis, "x") == ["a", "b"]
    axis.set(xlabel="column", ylabel="row")


def test_bars_and_line_stand_side_by_side(shown):
    evidence.bars_and_line([0.25, 0.75], [0.4, 0.6], [1.0, 2.0], "caption")
    axis, other = shown[0][0].axes
    assert axis.get_position().x1 < other.get_position().x0  # two scales are not laid on each other
    assert [bar.get_height() for bar in axis.patches] == [0.4, 0.6]
    assert list(other.get_lines()[0].get_xdata()) == [0.25, 0.75]


def test_animations_show_the_frames_in_their_order_and_rest_at_the_last():
    row = np.zeros((2, 3, 8, 8), np.uint8)
    row[0, 1, :4] = 255  # the middle frame of the first clip
    row[1, 2] = 255  # the last frame of the second
    content = clips.animation({"left": row, "right": torch.tensor(255 - row)})
    frames, seconds = [], []
    with Image.open(io.BytesIO(content)) as picture:
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("L")).astype(int))
            seconds.append(picture.info["duration"])
        assert picture.info["loop"] == 0
    assert seconds == [clips.MILLISECONDS] * 2 + [clips.LAST] and (frames[0] != frames[1]).any()
    change = frames[2] - frames[0]  # in the second clip of each row: brighter above, darker below
    rows, columns = (np.abs(change) > 200).nonzero()
    half = len(change) // 2
    assert columns.min() > 190 + CELL and (rows < half).any() and (rows > half).any()
    assert ((change[rows, columns] > 0) == (rows < half)).all()


def test_tracks_go_from_frame_to_frame_with_rows_downwards(shown):
    centre = torch.tensor([[[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]])
    clips.tracks({"down": centre}, (8, 4), "caption")
    axis = shown[0][0].axes[0]
    way, end = axis.get_lines()
    assert way.get_xydata().tolist() == [[2, 1], [2, 3], [2, 5]]
    assert end.get_xydata().tolist() == [[2, 5]] and end.get_marker() in clips.MARKS
    assert axis.get_xlim() == (0, 4) and axis.get_ylim() == (8, 0)
