"""x-cm-4: edits of pixels by a model that is told nothing; what its rules say, and that it runs."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import consistency_pixels
from nanosd3.claims.consistency_edits import (
    CLEANED,
    EDIT_STEPS,
    MEAN_IMAGE,
    MORE_EDIT_STEPS,
    NOISY,
    ZERO_SHOT,
    cleaned_of_noise,
)
from nanosd3.claims.consistency_pixels import pixel_model
from nanosd3.claims.data_sets import HalvedPixels, open_pixel_data
from nanosd3.claims.edit_tasks import Edited, constant_model, tasks
from nanosd3.claims.experiment import Conditions
from nanosd3.cli import run_main

Y = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
POINT = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("edits")


@pytest.fixture(scope="module")
def data(tiny_run, out) -> HalvedPixels:
    return open_pixel_data(Conditions((0,), True, tiny_run, out))


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", EDIT_STEPS)
def test_the_upper_half_stays(steps):
    """And the lower half is the model's, after any number of steps."""
    task = tasks(12)["repainted"]
    x = task.edit(constant_model(POINT), Y, steps, 0)
    assert x[:, :, :6].equal(Y[:, :, :6])
    torch.testing.assert_close(x[:, :, 6:], POINT[:, :, 6:].expand(3, -1, -1, -1))
    assert task.largest_error(x, Y) == 0 and task.largest_error(Y - 0.5, Y) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", EDIT_STEPS)
def test_means_of_blocks_stay(steps):
    """And what differs within a block is the model's."""
    task = tasks(12)["enlarged"]
    x = task.edit(constant_model(POINT), Y, steps, 0)

    def blocks(image):
        return image.unfold(2, 2, 2).unfold(3, 2, 2)

    means = blocks(x).mean((4, 5), keepdim=True)
    torch.testing.assert_close(means, blocks(Y).mean((4, 5), keepdim=True))
    point = blocks(POINT)
    within = (point - point.mean((4, 5), keepdim=True)).expand(3, -1, -1, -1, -1, -1)
    torch.testing.assert_close(blocks(x) - means, within, atol=1e-5, rtol=1e-5)
    assert task.largest_error(x, Y) < 1e-5 < 0.9 < task.largest_error(Y - 0.5, Y)


def test_noise_of_edits_is_the_seeds():
    """One seed, one edit; the steps are as many as asked for, from noise alone to the image."""
    seen = []

    def watched(z, t):
        seen.append(float(t))
        return torch.cos(z)

    task = tasks(12)["repainted"]
    first, same, other = (task.edit(watched, Y, 2, seed) for seed in (0, 0, 1))
    assert first.equal(same) and not first.equal(other)
    assert seen == [1.0, 0.5] * 3


def test_scores(data):
    """The digits themselves are at the distance of 1; nothing is read of their mean."""
    edited = Edited(data, torch.arange(40))
    read, ratio, decibels = edited.scores(edited.y)
    assert ratio == pytest.approx(1) and decibels > 70 and 0 <= read <= 1
    flat = edited.scores(torch.zeros_like(edited.y))
    assert flat[1] > 1 and flat[2] < 20
    torch.testing.assert_close(
        edited.y, data.normalised(data.pixels[data.finished.source.trained :][:40])
    )


def test_noise_to_clean(data):
    """A quarter of the way from black to white, shown to the model at the time of that noise."""
    edited, seen = Edited(data, torch.arange(40)), []
    y = edited.y

    class Knowing:
        def velocity(self, z, t):
            seen.append((z, t))
            return (z - y) / t

    noisy, cleaned = cleaned_of_noise(Knowing(), data, y, 0)
    torch.testing.assert_close(cleaned, y, atol=1e-5, rtol=1e-5)
    _, std = data.mean_and_std
    assert ((noisy - y) * std).std().item() == pytest.approx(0.25, rel=0.05)
    ((z, t),) = seen
    torch.testing.assert_close(z, (1 - t) * y + t * (noisy - y) * std / 0.25)
    again, _ = cleaned_of_noise(Knowing(), data, y, 0)
    other, _ = cleaned_of_noise(Knowing(), data, y, 1)
    assert noisy.equal(again) and not noisy.equal(other)


# --- the model ------------------------------------------------------------------------------------


def test_a_model_is_trained_once(data, monkeypatch):
    first = pixel_model(data, 3)
    monkeypatch.setattr(consistency_pixels, "fit_average", lambda *_: pytest.fail("again"))
    second, z = pixel_model(data, 3), torch.randn(2, 1, 12, 12)
    answers = [model.velocity(z, torch.tensor(0.5)) for model in (first, second)]
    assert answers[0].equal(answers[1]) and answers[0].abs().sum() > 0
    told = torch.zeros(2, 1, 1, 1)
    assert answers[0].equal(first.network(z, torch.tensor(0.5), told))
    assert first.seconds == second.seconds and not answers[0].requires_grad


def test_training_pairs_are_of_one_path(data, monkeypatch):
    """The same image with the same noise at two neighbouring levels, and nothing else; the levels
    double."""
    pairs = []

    def watched(network, z_t, t, z_s, s, *given):
        pairs.append((z_t, t, z_s, s, *given))
        return network(z_t, t, *given).flatten(1).sum(1)

    monkeypatch.setattr(consistency_pixels, "consistency_loss", watched)
    pixel_model(data, 4)
    assert len(pairs) == 4
    for step, (z_t, t, z_s, s, told) in enumerate(pairs):
        t, s = (x.view(-1, 1, 1, 1) for x in (t, s))
        noise = (z_t * (1 - s) - z_s * (1 - t)) / (t - s)
        x0 = (z_s * t - z_t * s) / (t - s)
        assert 0.8 < noise.std() < 1.2 and abs(float(noise.mean())) < 0.2
        distance = (x0[:, None] - data.normalised(data.pixels)[None]).abs().amax((2, 3, 4))
        assert distance.min(1).values.max() < 1e-4
        torch.testing.assert_close(t - s, torch.full_like(t, 1 / (2, 4, 8, 8)[step]))
        assert told.abs().sum() == 0 and len(told) == len(z_t)


# --- rules ----------------------------------------------------------------------------------------


def scores(*values: tuple[float, float]) -> list[list[float]]:
    """Read as they were, and distances, of each seed."""
    return [[read, ratio, 20.0] for read, ratio in values]


def edits(off: float = 0.0, **changes: list[list[float]]) -> dict:
    """Results of two seeds in which all is well, but for changes such as repainted_10."""
    good, bad = scores((0.9, 2.0), (0.9, 2.0)), scores((0.5, 9.0), (0.5, 9.0))
    made = {str(n): scores((0.9, 20.0 / n), (0.9, 20.0 / n)) for n in EDIT_STEPS}
    found: dict = {name: {MEAN_IMAGE: bad} | made for name in ("repainted", "enlarged")}
    found["cleaning"] = {NOISY: bad, CLEANED: good}
    for key, value in changes.items():
        task, _, way = key.partition("_")
        found[task] = found[task] | {{"mean": MEAN_IMAGE, "cleaned": CLEANED}.get(way, way): value}
    return {"edits": found, "off": off}


WORSE = scores((0.9, 2.0), (0.9, 10.0))  # in the second seed
WORSE_IN_BOTH = scores((0.9, 9.0), (0.9, 10.0))


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (edits(), "supported"),
        (edits(off=0.01), "undecided"),
        (edits(repainted_10=WORSE), "undecided"),
        (edits(enlarged_10=WORSE), "undecided"),
        (edits(cleaning_cleaned=WORSE), "undecided"),
        (edits(repainted_mean=scores((0.91, 9.0), (0.5, 9.0))), "undecided"),  # read better
        (edits(enlarged_10=WORSE_IN_BOTH), "refuted"),
        (edits(enlarged_10=WORSE, repainted_10=WORSE[::-1]), "refuted"),
    ],
)
def test_rule_of_edits(results, word):
    assert ZERO_SHOT.decide(results) == word


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (edits(), "supported"),
        (edits(repainted_5=scores((0.9, 4.0), (0.9, 1.0))), "undecided"),
        (edits(enlarged_1=scores((0.9, 4.0), (0.9, 9.0))), "undecided"),
        (edits(enlarged_10=scores((0.9, 2.0), (0.9, 11.0))), "undecided"),
        (edits(enlarged_10=scores((0.9, 10.0), (0.9, 11.0))), "refuted"),
    ],
)
def test_rule_of_steps(results, word):
    assert MORE_EDIT_STEPS.decide(results) == word


def test_one_seed_decides_nothing():
    results = edits()
    for ways in results["edits"].values():
        for way in ways:
            ways[way] = ways[way][:1]
    assert {e.decide(results) for e in (ZERO_SHOT, MORE_EDIT_STEPS)} == {"undecided"}


def test_both_run_from_the_same_networks(tiny_run, out):
    found = []
    for name in ("x-cm-4", "x-cm-4-steps"):
        words = [name, "--fast", "--seeds", "2", "--run", str(tiny_run), "--out", str(out)]
        assert run_main(lambda words=words: command.main(words)) == 0
        found.append(json.loads((out / "fast" / f"{name}.json").read_text())["results"])
    first, second = found
    assert first == second and first["off"] < 1e-4 and first["training_seconds"] > 0
    assert set(first["edits"]["repainted"]) == {MEAN_IMAGE, "1", "2", "5", "10"}
    for ways in first["edits"].values():
        assert all(len(each) == 2 and each[0] != each[1] for each in ways.values())
    assert len(first["table"]["rows"]) == 12
    assert all(len(row) == len(first["table"]["columns"]) for row in first["table"]["rows"])
