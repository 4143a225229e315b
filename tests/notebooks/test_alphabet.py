"""Notebook 14's drawings show what they are given, and its judge counts what does not fit."""

import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import alphabet
import lab


def test_each_number_stands_in_its_cell(monkeypatch):
    seen = []
    monkeypatch.setattr(alphabet, "finish", lambda *args: seen.append(args))
    tokens = torch.arange(12).view(2, 2, 3)
    alphabet.written(np.zeros((2, 8, 12), np.uint8), tokens, "caption")
    figure, caption, description = seen[0]
    assert caption == "caption" and description
    for which in (0, 1):
        image, text = figure.axes[2 * which : 2 * which + 2]
        found = {t.get_position(): t.get_text() for t in text.texts}
        assert found == {(j, i): str(int(tokens[which, i, j])) for i in range(2) for j in range(3)}
        assert text.get_ylim()[0] > text.get_ylim()[1]  # the first row is on top
        down = {line.get_xdata()[0] for line in image.get_lines() if line.get_xdata()[0] > 0}
        assert {3.5, 7.5} <= down
    plt.close("all")


def test_a_code_is_what_its_positions_show(monkeypatch):
    seen = []
    monkeypatch.setattr(alphabet, "finish", lambda *args: seen.append(args))
    pictures = np.zeros((1, 4, 4), np.uint8)
    pictures[0, 0, 2:], pictures[0, 3] = 80, 40  # above on the right, and below
    alphabet.codebook(pictures, torch.tensor([[[6, 5], [5, 5]]]), 8, "caption")
    commonest, other = (axis.get_images()[0].get_array() for axis in seen[0][0].axes[:2])
    assert commonest.shape == (6, 6)
    assert commonest[2, 2:4].tolist() == [80 / 3, 80 / 3]  # the frame is in the middle
    assert commonest[3, 2:4].tolist() == [80 / 3, 80 / 3]
    assert other[2:4, 2:4].max() == 0 and other[2, 4:].tolist() == [80, 80]
    plt.close("all")


def test_only_what_is_hidden_is_covered():
    pictures, hidden = np.full((2, 4, 6), 7, np.uint8), torch.zeros(2, 2, 3, dtype=torch.bool)
    hidden[1, 0, 2] = True
    found = alphabet.covered(pictures, hidden)
    assert found.dtype == np.uint8 and (pictures == 7).all()
    expected = pictures.copy()
    expected[1, :2, 4:] = alphabet.UNKNOWN
    assert (found == expected).all()


@pytest.fixture
def judge():
    """One that knows a single training image, whose tokens are these."""
    sample = torch.tensor([[[0, 1, 2], [3, 0, 1]]])
    features = lambda x: x.flatten(1)[:, :3].double()  # noqa: E731

    class OneImage(lab.Lesson):
        images = SimpleNamespace(
            train_images=torch.zeros(1, 28, 28, dtype=torch.uint8),
            test_images=torch.randint(256, (50, 28, 28), dtype=torch.uint8),
        )

        def classify(self, pictures):
            return [int(p[0, 0]) for p in pictures]

    lesson = OneImage(None, None, SimpleNamespace(features=features), None, None)
    pipeline = SimpleNamespace(
        vq=SimpleNamespace(config=SimpleNamespace(codes=5)),
        tokens=lambda x: sample.expand(len(x), -1, -1),
        images=lambda t: np.full((len(t), 28, 28), 3, np.uint8),
    )
    return alphabet.Judge(lesson, pipeline)


def test_pairs_are_ordered_and_of_two_kinds(judge):
    t = torch.tensor([[[0, 1], [3, 0]]])
    pairs = judge.pairs(t).tolist()
    assert sorted(pairs) == sorted([0 * 5 + 1, 3 * 5 + 0, 25 + 0 * 5 + 3, 25 + 1 * 5 + 0])
    assert not judge.rare[judge.pairs(t)].any()
    turned = judge.rare[judge.pairs(torch.tensor([[[1, 0], [0, 3]]]))]
    assert turned.tolist() == [True, True, False, False]  # only one above the other


def test_scores_in_words(judge):
    words = judge.scores(torch.tensor([[[0, 1, 2], [3, 0, 2]]] * 2), [3, 8])  # two pairs of seven
    assert words.startswith("28.6% rare pairs, 50% read as asked, distance ")
    assert judge.right(np.full((4, 28, 28), 3, np.uint8), [3, 3, 3, 1]) == 0.75
