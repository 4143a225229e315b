"""x-sd3-24gb: its arithmetic against other counts, and its rule."""

import json

import pytest

from nanosd3.claims import __main__ as command
from nanosd3.claims.sd3_card import CARD, PAPER, activation_bytes, card_costs, part_bytes
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.measure.costs import parameters

LARGE = CONFIGS["sd3.5-large"]


def test_bytes():
    """The published model has 8.06 billion parameters, T5 4.76; positions are stored beside."""
    positions = LARGE.mmdit.grid**2 * LARGE.mmdit.width
    assert part_bytes(LARGE, "mmdit") == 2 * (parameters(LARGE.mmdit) + positions)
    assert part_bytes(LARGE, "mmdit") == pytest.approx(2 * 8.1e9, rel=0.01)
    assert part_bytes(LARGE, "t5") == pytest.approx(2 * 4.76e9, rel=0.01)


def test_costs():
    """A step of 62 TFLOP; the peak that was measured on a GPU, 17.1 GB."""
    costs = card_costs(LARGE)
    assert costs["least"] * 165.2 / 50 == pytest.approx(62, rel=0.01)
    assert costs["likely"] == pytest.approx(costs["least"] / 0.6)
    assert costs["staged"] == pytest.approx(17.1e9, rel=0.01)
    assert costs["staged"] == costs["transformer"] + activation_bytes(LARGE) < costs["all"]
    small = card_costs(CONFIGS["sd3-d15"])
    assert small["staged"] == part_bytes(CONFIGS["sd3-d15"], "t5")  # the largest part


@pytest.mark.parametrize(
    ("staged", "least", "likely", "word"),
    [
        (23.9e9, 20.0, 33.9, "supported"),
        (23.9e9, 20.0, 34.1, "undecided"),
        (24.1e9, 20.0, 33.9, "refuted"),
        (23.9e9, 34.1, 57.0, "refuted"),
    ],
)
def test_rule(staged, least, likely, word):
    costs = {PAPER: {"staged": staged, "least": least, "likely": likely}}
    assert CARD.decide({"costs": costs}) == word


def test_runs(tiny_run, tmp_path):
    words = ["x-sd3-24gb", "--fast", "--seeds", "1", "--run", str(tiny_run), "--out", str(tmp_path)]
    assert run_main(lambda: command.main(words)) == 0
    record = json.loads((tmp_path / "fast/x-sd3-24gb.json").read_text())
    assert len(record["results"]["table"]["rows"]) == 6
    assert (tmp_path / "fast/x-sd3-24gb.png").stat().st_size > 4000
