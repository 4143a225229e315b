"""The experiments on videos: they run, and their rules come out in all three ways."""

import json

import pytest

from nanosd3.claims import __main__ as command
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.video_clips import video_study
from nanosd3.cli import run_main

FAMILY = [name for name, one in EXPERIMENTS.items() if one.run is video_study]
FIRST = "8x32x32"


def test_all_run_fast(tiny_run, tmp_path):
    for name in FAMILY:
        words = [name, "--fast", "--seeds", "1", "--run", str(tiny_run), "--out", str(tmp_path)]
        assert run_main(lambda words=words: command.main(words)) == 0
    record = json.loads((tmp_path / "fast/x-sora-1.json").read_text())
    results = record["results"]
    assert all(len(row) == len(results["table"]["columns"]) for row in results["table"]["rows"])
    names = [FIRST, "8x24x40", "8x40x24", "4x32x32", "8x32x48", "8x48x32", "12x32x32", "16x32x32"]
    assert list(results["scores"]) == [*names, "frames by themselves"]
    assert results["first"] == FIRST and results["training_seconds"] > 0
    found = [json.dumps(scores) for scores in results["scores"].values()]
    assert len(set(found)) == len(found)
    for name in FAMILY:
        assert (tmp_path / f"fast/{name}.png").stat().st_size > 4000


def results(**ways):
    """Two seeds; the first size has 0.8 of frames and 1.0 of directions right."""
    scores = {
        way: {"prompt_accuracy": a, "direction": b} for way, (a, b) in {
            FIRST: ([0.8, 0.8], [1.0, 1.0]), **ways}.items()
    }  # fmt: skip
    return {"scores": scores, "first": FIRST}


GOOD, BAD = ([0.5, 0.6], [0.7, 0.9]), ([0.5, 0.5], [0.3, 0.1])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("x-sora-1", ("8x32x48", "8x48x32")), ("x-sora-1-length", ("12x32x32", "16x32x32"))],
)
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (GOOD, GOOD, "supported"),
        (GOOD, BAD, "refuted"),  # the worst of the sizes decides, and of the shares
        (BAD, GOOD, "refuted"),
        (GOOD, ([0.3, 0.6], [0.9, 0.9]), "undecided"),  # in one seed only
        (GOOD, ([0.5, 0.5], [0.5, 0.5]), "undecided"),  # between the limits
    ],
)
def test_kept(name, sizes, first, second, expected):
    found = results(**dict(zip(sizes, (first, second), strict=True)))
    assert EXPERIMENTS[name].decide(found) == expected


@pytest.mark.parametrize(
    ("together", "alone", "expected"),
    [
        ((0.9, 0.95), (0.1, 0.2), "supported"),
        ((0.9, 0.95), (0.1, 0.9), "undecided"),
        ((0.3, 0.5), (0.3, 0.6), "refuted"),
    ],
)
def test_coherence(together, alone, expected):
    ways = {FIRST: together, "frames by themselves": alone}
    scores = {
        way: {"same_digit_in_all_frames": [a, a], "line_r2": [b, b]} for way, (a, b) in ways.items()
    }
    assert EXPERIMENTS["x-sora-4"].decide({"scores": scores, "first": FIRST}) == expected
