"""Experiments on SD3's claims: each runs, and its rule can come out in all three ways."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_middle
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.cli import run_main
from nanosd3.training import train_flow

FAMILY = ["x-sd3-middle"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sd3-claims")


def quickly(name: str, out: Path, tiny_run: Path) -> dict:
    """The results of an experiment in its fast form."""
    words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    assert (out / "fast" / f"{name}.png").stat().st_size > 5000
    record = json.loads((out / "fast" / f"{name}.json").read_text())
    table = record["results"]["table"]
    assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    return record["results"]


# --- rules on made-up numbers -------------------------------------------------------------------


def left(*quarters: tuple[float, float, float]) -> dict:
    """What is left to learn in each seed: near data, in the middle, near noise."""
    return {"left_to_learn": [[d, d, m, m, m, m, n, n] for d, m, n in quarters]}


CASES = {
    "x-sd3-middle": [
        (left((0.1, 0.3, 0.2), (0.2, 0.3, 0.1)), "supported"),
        (left((0.1, 0.3, 0.4), (0.2, 0.3, 0.4)), "refuted"),
        (left((0.4, 0.3, 0.1), (0.4, 0.3, 0.1)), "refuted"),
        (left((0.1, 0.3, 0.4), (0.4, 0.3, 0.1)), "undecided"),  # now at this end, now at that
        (left((0.1, 0.3, 0.4), (0.2, 0.3, 0.1)), "undecided"),
        (left((0.1, 0.3, 0.2)), "undecided"),
        (left((0.1, 0.3, 0.4)), "undecided"),
    ],
}


@pytest.mark.parametrize("name", FAMILY)
def test_rules_of_sd3(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


# --- x-sd3-middle -------------------------------------------------------------------------------


def test_share_of_draws():
    """Against counting: logit-normal(0, 1) draws 72.8% from the middle half."""
    assert sd3_middle.share_of_draws(0.25, 0.75) == pytest.approx(0.7280, abs=1e-4)
    assert sd3_middle.share_of_draws(0.0, 1.0) == 1
    draws = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    counted = ((draws > 0.5) & (draws < 0.625)).float().mean().item()
    assert sd3_middle.share_of_draws(0.5, 0.625) == pytest.approx(counted, abs=0.005)


def test_regions():
    assert sd3_middle.regions([1, 3, 4, 4, 6, 6, 0, 8]) == (2, 5, 4)


def test_times_of_beginners_are_even():
    """A logit-normal density of deviation 1.7 is uniform to within a hundredth."""
    mean, std = sd3_middle.ALMOST_UNIFORM
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    t = torch.sigmoid(mean + std * torch.special.ndtri(u))
    assert (t - u).abs().max() < 0.01


def test_middle_runs(tiny_run, out, monkeypatch):
    monkeypatch.setattr(train_flow, "VALIDATION_TIMES", sd3_middle.VALIDATION_TIMES)
    results = quickly("x-sd3-middle", out, tiny_run)
    assert results["times"][0] == 1 / 16 and len(results["beginners"]) == 2
    assert sum(results["shares"]) == pytest.approx(1)
    for beginner, left_over in zip(results["beginners"], results["left_to_learn"], strict=True):
        assert left_over == pytest.approx(
            [b - k for b, k in zip(beginner, results["finished"], strict=True)]
        )
    assert results["training_seconds"] > 0
