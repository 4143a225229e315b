"""One look: colours with a meaning that everybody can tell apart, captions, descriptions, and
pictures that are as bright as their numbers."""

import itertools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from nanosd3.training.plot_style import INK, MEANINGS, SERIES

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import figures

EYES = {  # from linear RGB to what is left of it, Machado et al. 2009, severity 1
    "all cones": np.eye(3),
    "no red cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue cones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB, where a distance of about 2 is just visible."""
    x, y, z = np.cbrt(TO_XYZ @ rgb.clip(0.001, 1) / TO_XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
def test_colours_differ_for_all_eyes(eyes):
    seen = {name: lab(EYES[eyes] @ linear(colour)) for name, colour in MEANINGS.items()}
    for (a, first), (b, second) in itertools.combinations(seen.items(), 2):
        assert np.linalg.norm(first - second) > 19, (a, b)


def test_colours_are_legible_on_white_and_no_series_has_a_meaning():
    for colour in MEANINGS.values():
        assert 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05) > 3, colour
    assert not {*SERIES} & {*MEANINGS.values()}


@pytest.fixture
def shown(monkeypatch):
    """Figures that were finished, and what is said about them."""
    seen = []
    monkeypatch.setattr(figures, "finish", lambda *args: seen.append(args))
    yield seen
    plt.close("all")


def test_a_label_chooses_its_colour():
    assert figures.colour_of("real data, t = 1") == MEANINGS["data"]
    assert figures.colour_of("Noise (t = 1)") == MEANINGS["noise"]
    assert figures.colour_of("samples") == figures.colour_of("prediction") == MEANINGS["prediction"]
    assert figures.colour_of("Euler") == INK and figures.colour_of("Euler", "red") == "red"
    ends = [figures.colour_of(f"t = {t}") for t in ("0", "1.0")]
    assert ends == [MEANINGS[name].lower() for name in ("data", "noise")]
    halves = np.array([to_rgb(MEANINGS[name]) for name in ("data", "noise")]).mean(0)
    assert np.allclose(to_rgb(figures.colour_of("t = 0.5")), halves, atol=0.01)


def test_curves_differ_without_colour(shown):
    x = range(5)
    figures.lines(dict.fromkeys("abcdefg", (x, x)), "x", "y", "caption")
    drawn = shown[0][0].axes[0].get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == 7
    assert len({line.get_color() for line in drawn[:4]}) == 4


def test_pictures_are_as_bright_as_their_numbers(shown):
    digit = np.zeros((2, 4, 4), np.uint8)
    digit[0, 1, 1] = 200
    latent = torch.zeros(2, 4, 4)
    latent[0, 0, 0], latent[1, 0, 0] = -1, 3
    figures.images({"digits": digit, "latents": latent}, "caption")
    pictures = [axis.get_images()[0] for axis in shown[0][0].axes]
    assert [picture.get_clim() for picture in pictures] == [(0, 255)] * 2 + [(-1, 3)] * 2
    assert pictures[0].to_rgba(200)[0] > pictures[0].to_rgba(0)[0] == 0
    figures.images({"digits": digit}, "caption", span=(100, 200))
    assert shown[1][0].axes[0].get_images()[0].get_clim() == (100, 200)


def test_all_kinds_are_labelled_and_described(shown):
    x, plane = torch.linspace(0, 1, 9), torch.randn(20, 2)
    figures.lines({"noise": (x, x)}, "steps", "loss", "caption", log="y", ticks=[0, 1])
    figures.curves({"one": (x, x), "two": (x, x)}, "scale", "caption")
    figures.densities({"uniform": (x, x, torch.ones(9))}, "t", "caption")
    figures.clouds({"noise": plane, "data": plane}, "caption")
    figures.ways(torch.stack([plane, -plane]), "caption")
    table = torch.rand(3, 2)
    figures.maps({"m": table}, "x", "y", "caption", "%", ["a", "b"], [1, 2, 3], 1, (0, None))
    for figure, caption, description in shown:
        assert caption == "caption" and len(description) > 20
        for axis in figure.axes[:1]:
            assert axis.get_xlabel() and axis.get_ylabel()
    assert [t.get_text() for t in shown[-1][0].axes[0].get_xticklabels()] == ["a", "b"]
    assert shown[-1][0].axes[0].get_images()[0].get_clim()[0] == 0


def tick_labels(axis, limits) -> list[str]:
    """Of a logarithmic y axis between two limits, those that are seen."""
    axis.set_ylim(*limits)
    axis.figure.draw_without_rendering()
    ticks = axis.yaxis.get_major_ticks() + axis.yaxis.get_minor_ticks()
    seen = [tick for tick in ticks if limits[0] <= tick.get_loc() <= limits[1]]
    return [text for tick in seen if (text := tick.label1.get_text())]


def test_logarithmic_axes_have_labels_of_one_style(shown):
    """Where the ticks of x are given, too."""
    figures.lines({"": ([1, 4], [0.1, 0.2])}, "x", "y", "caption", "xy", [1, 4])
    axis = shown[0][0].axes[0]
    assert tick_labels(axis, (0.0004, 0.3)) == ["0.001", "0.01", "0.1"]
    assert {"0.06", "0.1", "0.2"} <= {*tick_labels(axis, (0.055, 0.26))}
    assert all("10^" in label for label in tick_labels(axis, (1e-7, 0.3)))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "4"]
    assert not axis.xaxis.get_minor_ticks()


def test_without_a_notebook_a_figure_is_shown(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: calls.append(1))
    calls: list[int] = []
    figure, _ = figures.panels(1)
    figures.finish(figure, "words " * 40)
    assert calls == [1] and "\n" in figure.get_supxlabel()
    plt.close("all")


def test_lines_of_captions_are_of_about_one_length():
    """No word is left alone in the last line, and no line is longer than asked."""
    words = "The same for every evaluation in the run of nine"
    assert figures.even_lines(words, 40) == ["The same for every evaluation", "in the run of nine"]
    assert figures.even_lines(words, 60) == [words] and figures.even_lines("", 60) == []
    assert [len(line) for line in figures.even_lines("x" * 50, 20)] == [20, 20, 10]


def test_descriptions_are_sentences():
    """A curve without a name is not named."""
    assert figures.in_words("Plot of y against x: ", "Seven.") == "Plot of y against x. Seven."
    assert figures.in_words("", "Two, a and b") == "Two, a and b."


def test_labels_of_rows_break_at_colons_and_commas():
    for label, lines in {
        "CLIPs only: 100% correct": "CLIPs only: 100% correct",
        "steps = 2, shift = 0.3: read 3333333333": "steps = 2, shift = 0.3:\nread 3333333333",
        "a bold 3: weight 21.8, cosine 1.00": "a bold 3: weight 21.8,\ncosine 1.00",
        "a label without any of these signs": "a label without\nany of these signs",
    }.items():
        assert figures.label_lines(label) == lines


def test_no_two_curves_look_alike(shown):
    """More curves than colours: the dashes differ."""
    figures.lines({f"curve {i}": (range(30), range(30)) for i in range(8)}, "x", "y", "caption")
    curves = shown[-1][0].axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 8
