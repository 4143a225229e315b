"""Flow Matching's experiments: each runs, and its rule can come out in all three ways."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import data_sets, fm_likelihood, fm_networks
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.fm_identity import worst
from nanosd3.claims.fm_sampling import steps_to_reach
from nanosd3.claims.fm_straightness import even_times, length_over_chord
from nanosd3.cli import run_main

FAMILY = [name for name in EXPERIMENTS if name.startswith("x-fm-")]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("claims")


@pytest.mark.parametrize("name", FAMILY)
def test_runs_fast(name, tiny_run, out, capsys):
    words = [name, "--fast", "--seeds", "2", "--run", str(tiny_run), "--out", str(out)]
    assert run_main(lambda: command.main(words)) == 0
    record = json.loads((out / "fast" / f"{name}.json").read_text())
    assert record["verdict"] in ("supported", "refuted", "undecided")
    table = record["results"]["table"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"]) and table["rows"]
    assert (out / "fast" / f"{name}.png").stat().st_size > 5000
    trains = name in ("x-fm-1", "x-fm-2", "x-fm-4", "x-fm-5", "x-fm-5-order")
    assert ("training_seconds" in record["results"]) == trains


@pytest.mark.parametrize("name", ["x-fm-1", "x-fm-2", "x-fm-5", "x-fm-5-order"])
def test_needs_a_finished_run(name, out, capsys):
    words = [name, "--run", str(out / "nowhere"), "--out", str(out / "other"), "--threads", "1"]
    assert run_main(lambda: command.main(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "nowhere: no such run folder" in said
    assert len(said.splitlines()) == 1 and not list((out / "other").glob("*.json"))


# --- rules on made-up numbers -------------------------------------------------------------------

GOOD, BAD = [1.0, 1.1, 1.2], [2.0, 2.2, 2.4]  # over seeds
EQUAL, WORSE = [1.1, 1.2, 1.0], [3.0, 3.1, 3.2]


def sampling(*vp: list[float]) -> dict:
    counts = [1, 2, 4, 8, 16, 32]
    return {"evaluations": counts, "ratios": {"ot": [GOOD] * 6, "vp": list(vp)}}


def training(ot: list[list[float]], vp: list[list[float]]) -> dict:
    return {"steps": [100, 300, 600], "ratios": {"ot": ot, "vp": vp}}


def identity(own: list[float], control: list[float]) -> dict:
    return {"scores": {"ot": own, "vp": [0.5] * 100, "control": control}}


def errors(ot: list[list[float]], vp: list[list[float]]) -> dict:
    return {"errors": {"ot": ot, "vp": vp}}


def lengths(ot: list[float], vp: list[float], cosine: list[float]) -> dict:
    return {"lengths": {"ot": ot, "vp": vp, "cosine": cosine}}


def taken(ot: list[list[int]], vp: list[list[int]]) -> dict:
    return {"taken": {"ot": ot, "vp": vp}}


def orders(euler: list[float], midpoint: list[float], rk4: list[float]) -> dict:
    return {"errors": {"Euler": [euler] * 3, "midpoint": [midpoint] * 3, "RK4": [rk4] * 3}}


def likelihoods(nats: list[float], bits: list[float]) -> dict:
    return {"nats": {"ot": GOOD, "vp": nats}, "bits": {"ot": BAD, "vp": bits}}


TINY, HALF = [0.0, 0.1, 0.2], [0.5, 0.55, 0.6]
CASES = {
    "x-fm-0": [
        (identity([0.5] * 100, [9.0]), "supported"),
        (identity([0.5] * 99 + [6.1], [9.0]), "refuted"),
        (identity([0.5] * 100, [2.0]), "undecided"),  # a test that cannot fail shows nothing
        (identity([3.5] * 100, [9.0]), "undecided"),
    ],
    "x-fm-1": [
        (sampling(*[BAD] * 6), "supported"),
        (sampling(TINY, *[BAD] * 5), "supported"),  # one evaluation decides nothing
        (sampling(BAD, BAD, BAD, HALF, BAD, BAD), "refuted"),
        (sampling(BAD, BAD, BAD, BAD, BAD, HALF), "undecided"),
        (sampling(*[BAD] * 5, EQUAL), "undecided"),
    ],
    "x-fm-2": [
        (training([BAD, GOOD, GOOD], [[9.0, 9.1, 9.2], BAD, BAD]), "supported"),
        (training([BAD, BAD, GOOD], [[9.0, 9.1, 9.2], [9.0, 9.1, 9.2], HALF]), "refuted"),
        (training([WORSE, [2.3, 2.4, 2.5], GOOD], [[9.0, 9.1, 9.2]] * 2 + [BAD]), "undecided"),
        (training([BAD, GOOD, GOOD], [EQUAL, BAD, BAD]), "undecided"),
    ],
    "x-fm-3": [
        (lengths([1.01, 1.02], [1.1, 1.1], [1.05, 1.2]), "supported"),
        (lengths([1.11, 1.12], [1.1, 1.1], [1.2, 1.2]), "refuted"),
        (lengths([1.01, 1.08], [1.1, 1.1], [1.2, 1.2]), "undecided"),
        (lengths([1.01, 1.12], [1.1, 1.1], [1.2, 1.2]), "undecided"),
    ],
    "x-fm-3-steps": [
        (errors([GOOD] * 6, [BAD] * 6), "supported"),
        (errors([GOOD] * 6, [BAD] * 5 + [HALF]), "refuted"),
        (errors([GOOD] * 6, [BAD] * 5 + [EQUAL]), "undecided"),
    ],
    "x-fm-4": [
        (likelihoods(BAD, [9.0, 9.1, 9.2]), "supported"),
        (likelihoods(BAD, GOOD), "refuted"),
        (likelihoods(TINY, [9.0, 9.1, 9.2]), "undecided"),
        (likelihoods(BAD, [2.1, 2.1, 2.5]), "undecided"),
    ],
    "x-fm-5": [
        (taken([[80, 80], [60, 80]], [[100, 100]] * 2), "supported"),
        (taken([[80, 80], [100, 101]], [[100, 100]] * 2), "refuted"),
        (taken([[80, 81], [60, 80]], [[100, 100]] * 2), "undecided"),
        (taken([[80, 80], [60, 101]], [[100, 100]] * 2), "undecided"),
    ],
    "x-fm-5-order": [
        (orders(BAD, GOOD, TINY), "supported"),
        (orders(GOOD, BAD, TINY), "refuted"),
        (orders(BAD, GOOD, [2.1, 2.1, 2.5]), "undecided"),
    ],
}


@pytest.mark.parametrize("name", FAMILY)
def test_rules(name):
    experiment, cases = EXPERIMENTS[name], CASES[name]
    for results, expected in cases:
        assert experiment.decide(results) == expected, (results, expected)
    assert {expected for _, expected in cases} == {"supported", "refuted", "undecided"}


# --- what is measured ---------------------------------------------------------------------------


def test_worst_is_of_either_sign():
    assert worst([1.0, -3.0, 2.0]) == 3.0


def test_steps_to_reach():
    assert steps_to_reach([1, 2, 3], [[9.0], [4.0, 6.0], [1.0]], 5.0) == 2
    assert steps_to_reach([1, 2], [[9.0], [8.0]], 5.0) == float("inf")


def test_length_over_chord():
    """A line; and a half turn at constant speed, pi / 2 longer than its diameter."""
    line = lambda z, t: torch.ones_like(z)  # noqa: E731
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    end, ratio = length_over_chord(line, z, even_times(10, 0.0))
    torch.testing.assert_close(end, z - 1)
    assert ratio == pytest.approx(1)

    def turn(z, t):
        return torch.pi * torch.stack([-z[:, 1], z[:, 0]], dim=1)

    _, ratio = length_over_chord(turn, z, even_times(200, 0.0))
    assert ratio == pytest.approx(torch.pi / 2, rel=1e-3)


def test_moons():
    points = fm_likelihood.moons(4000, torch.Generator().manual_seed(0))
    assert points.shape == (4000, 2) and points.mean(0).abs().max() < 0.03
    to_upper = ((points + torch.tensor([0.5, 0.25])).norm(dim=1) - 1).abs()
    to_lower = ((points + torch.tensor([-0.5, -0.25])).norm(dim=1) - 1).abs()
    assert torch.minimum(to_upper, to_lower).max() < 0.3
    assert 0.4 < (to_upper < to_lower).float().mean() < 0.6


def test_both_start_from_the_same_weights():
    a, b = (fm_likelihood.seeded(fm_likelihood.PixelNet, 3).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_networks_are_trained_once_and_differ_by_path(tiny_run, out, capsys):
    conditions = Conditions((0, 1), True, tiny_run, out)
    data = data_sets.open_latents(conditions)
    weights = {}
    for name in ("ot", "vp"):
        _, model = fm_networks.trained_path(data, name, 0)
        weights[name] = model.final_layer.linear.weight
        job, again = fm_networks.trained_path(data, name, 0)
        assert torch.equal(again.final_layer.linear.weight, weights[name])
        kept = fm_networks.kept_networks(data, name, 0)
        assert list(kept) == list(fm_networks.FAST_KEPT_STEPS)
        early = kept[fm_networks.FAST_KEPT_STEPS[0]].final_layer.linear.weight
        assert not torch.equal(early, weights[name])
        assert len(job.run.read_log("flow")) == fm_networks.FAST_RECIPE.steps
    assert not torch.equal(weights["ot"], weights["vp"])
