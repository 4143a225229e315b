"""The experiments on consistency models: they run, and their rules come out in all three ways."""

import json

import pytest

from nanosd3.claims import __main__ as command
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.cli import run_main

FAMILY = ("x-cm-0", "x-cm-1", "x-cm-1-steps")


def test_all_run_fast(tiny_run, tmp_path):
    """Two seeds, trained once for all three; the second seed is another student."""
    for name in FAMILY:
        words = [name, "--fast", "--seeds", "2", "--run", str(tiny_run), "--out", str(tmp_path)]
        assert run_main(lambda words=words: command.main(words)) == 0
    record = json.loads((tmp_path / "fast/x-cm-1.json").read_text())
    table, scores = record["results"]["table"], record["results"]["scores"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert scores["fresh"]["1"] == scores["kept"]["1"]  # one step draws no noise
    assert scores["fresh"]["4"] != scores["kept"]["4"]
    assert scores["fresh"]["1"][0] != scores["fresh"]["1"][1]
    assert record["results"]["training_seconds"] > 0
    spreads = record["results"]["spreads"]
    assert len(spreads["student"]) == 2 and spreads["student"] != spreads["teacher"]
    for name in FAMILY:
        assert (tmp_path / f"fast/{name}.png").stat().st_size > 4000
    networks = [tmp_path / f"consistency-fast-{i}/flow.safetensors" for i in (0, 1)]
    assert networks[0].read_bytes() != networks[1].read_bytes()


def scores(fresh, teacher=(12.0, 9.0)):
    """Two seeds with these ratios at 1, 2 and 4 steps, and Euler's at 1 and 2."""
    found = {str(n): [(0.9, r), (0.9, r + 0.1)] for n, r in zip((1, 2, 4), fresh, strict=True)}
    euler = {str(n): [(1.0, r), (1.0, r)] for n, r in zip((1, 2), teacher, strict=True)}
    return {"scores": {"fresh": found, "teacher": euler}}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (scores((2.0, 3.0, 4.0)), "supported"),
        (scores((6.0, 3.0, 4.0)), "undecided"),  # in one seed it is more than half
        (scores((7.0, 3.0, 4.0)), "refuted"),
        (scores((2.0, 9.0, 4.0)), "refuted"),  # two steps are not below Euler's
    ],
)
def test_distillation(results, expected):
    assert EXPERIMENTS["x-cm-1"].decide(results) == expected


@pytest.mark.parametrize(
    ("fresh", "expected"),
    [
        ((3.0, 2.0, 1.0), "supported"),
        ((1.0, 2.0, 3.0), "refuted"),
        ((2.0, 1.0, 3.0), "undecided"),
    ],
)
def test_more_steps(fresh, expected):
    assert EXPERIMENTS["x-cm-1-steps"].decide(scores(fresh)) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0.01, 0.02], [0.1, 0.2], "supported"),
        ([0.09, 0.15], [0.1, 0.2], "refuted"),
        ([0.01, 0.15], [0.1, 0.2], "undecided"),
    ],
)
def test_consistent(student, teacher, expected):
    results = {"spreads": {"student": student, "teacher": teacher}}
    assert EXPERIMENTS["x-cm-0"].decide(results) == expected
