"""x-cm-2, x-cm-3: consistency training alone. What is switched, what the rules say, and that both
run."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import consistency_variants
from nanosd3.claims.consistency_alone import (
    ALL_CHANGES,
    ALONE_AT_ALL,
    CHANGES,
    CONSISTENCY_ONE,
    CONSISTENCY_VARIANTS,
    EACH_CHANGE,
    FLOW_ONE,
    IMPROVED,
    ORIGINAL,
    scores_of_times,
)
from nanosd3.claims.consistency_variants import (
    TOP,
    ConsistencyVariant,
    trained_consistency,
    variant_loss,
)
from nanosd3.claims.dit_networks import DiTTrainer
from nanosd3.claims.experiment import Conditions
from nanosd3.cli import run_main
from nanosd3.related.consistency import huber_constant, pseudo_huber
from nanosd3.related.dit import DiT
from nanosd3.storage.run import Run
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job, training_of


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def trainer(tiny_run, out) -> DiTTrainer:
    return DiTTrainer(Conditions((0,), True, tiny_run, out))


# --- the switches ---------------------------------------------------------------------------------


def test_each_change_is_made_alone():
    names = [field.name for field in fields(ConsistencyVariant)]
    alone = [[n for n in names if getattr(variant, n)] for variant in CHANGES.values()]
    assert sorted(alone) == sorted([name] for name in names)
    assert (
        CONSISTENCY_VARIANTS[ORIGINAL] == ConsistencyVariant()
        and CONSISTENCY_VARIANTS[ORIGINAL].name == "original"
    )
    assert all(getattr(CONSISTENCY_VARIANTS[ALL_CHANGES], name) for name in names)
    assert (
        len({variant.name for variant in CONSISTENCY_VARIANTS.values()})
        == len(CONSISTENCY_VARIANTS)
        == 7
    )


@pytest.fixture
def step_inputs(trainer, tmp_path, monkeypatch):
    """A function of a variant and a step: the inputs of consistency_loss, and the losses of 64
    pairs whose loss is 1."""
    config = trainer.finished.config
    recipe = replace(training_of(config).flow, steps=30, batch=64)
    config = replace(config, training=replace(training_of(config), flow=recipe))
    job = Job(Run(tmp_path, {}, {}), config, trainer.finished.source, torch.device("cpu"), 0)
    network, average = (DiT(trainer.config(learned_variance=False)) for _ in range(2))
    asked = {}

    def watched(network, z_t, t, z_s, s, *given, **options):
        asked.update(network=network, z_t=z_t, t=t, z_s=z_s, s=s, given=given, **options)
        return torch.ones(len(t))

    monkeypatch.setattr(consistency_variants, "consistency_loss", watched)

    def inputs_of(variant: ConsistencyVariant, step: int) -> tuple[dict, torch.Tensor]:
        loss_of = variant_loss(job, trainer, network, average, variant)
        losses, _ = loss_of(StepRNG((0, "consistency", step), range(64)))
        return asked | {"is_network": asked["network"] is network, "average": average}, losses

    return inputs_of


def test_pairs_are_of_one_path(step_inputs, trainer):
    """The same latents and noise, at neighbouring levels, the last of which is nearly noise; the
    label is told."""
    asked, losses = step_inputs(ConsistencyVariant(), 0)
    t, s = (asked[key].view(-1, 1, 1, 1) for key in ("t", "s"))
    noise = (asked["z_t"] * (1 - s) - asked["z_s"] * (1 - t)) / (t - s)
    assert 0.9 < noise.std() < 1.1
    torch.testing.assert_close(t - s, torch.full_like(t, TOP / 8))
    assert asked["t"].max().item() == pytest.approx(TOP) == pytest.approx(80 / 81)
    assert asked["s"].min() == 0 and asked["is_network"]
    (y,) = asked["given"]
    assert y.shape == (64,) and len(set(y.tolist())) == 10 and losses.equal(torch.ones(64))


def test_the_target(step_inputs):
    asked, _ = step_inputs(ConsistencyVariant(), 0)
    assert asked["target_network"] is asked["average"]
    assert step_inputs(ConsistencyVariant(itself=True), 0)[0]["target_network"] is None


def test_the_distance(step_inputs):
    a, b = torch.randn(2, 5, 4, 8, 8).unbind()
    asked, _ = step_inputs(ConsistencyVariant(), 0)
    torch.testing.assert_close(asked["distance"](a, b), (a - b).square().sum((1, 2, 3)))
    assert step_inputs(ConsistencyVariant(huber=True), 0)[0]["distance"] is None
    assert pseudo_huber(a, b, huber_constant(256)).max() < 100


def test_the_number_of_levels(step_inputs):
    """2, 4 and 8 in three stages, or 8 throughout."""
    for step, count in ((0, 2), (9, 2), (10, 4), (20, 8), (29, 8)):
        asked, _ = step_inputs(ConsistencyVariant(doubled=True), step)
        torch.testing.assert_close(asked["t"] - asked["s"], torch.full((64,), TOP / count))
        asked, _ = step_inputs(ConsistencyVariant(), step)
        torch.testing.assert_close(asked["t"] - asked["s"], torch.full((64,), TOP / 8))


def test_how_often_levels_are_drawn(step_inputs):
    """Lognormal: two thirds of the pairs are in the lower half of the levels."""

    def low(variant):
        levels = torch.cat([step_inputs(variant, step)[0]["t"] for step in range(20)])
        return float((levels < 0.55).float().mean())

    assert low(ConsistencyVariant()) == pytest.approx(0.5, abs=0.05)
    assert low(ConsistencyVariant(lognormal=True)) == pytest.approx(0.71, abs=0.05)


def test_the_weight(step_inputs):
    asked, losses = step_inputs(ConsistencyVariant(weighted=True), 0)
    t, s = asked["t"], asked["s"]
    torch.testing.assert_close(losses, 1 / (t / (1 - t) - s / (1 - s)))


def test_a_way_is_trained_once(trainer, monkeypatch):
    variant = ConsistencyVariant(huber=True)
    first = trained_consistency(trainer, variant, 5, 4, 8e-3)
    monkeypatch.setattr(consistency_variants, "fit_average", lambda *_, **__: pytest.fail("again"))
    second = trained_consistency(trainer, variant, 5, 4, 8e-3)
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert a.equal(b) and not a.requires_grad
    assert first.seconds == second.seconds


def test_all_switches_count(trainer):
    """Each variant ends with other weights."""
    ends = {
        name: trained_consistency(trainer, variant, 0, 4, 8e-3).network.final_layer.linear.weight
        for name, variant in CONSISTENCY_VARIANTS.items()
    }
    assert len({tuple(weight.flatten().tolist()) for weight in ends.values()}) == 7


# --- samples --------------------------------------------------------------------------------------


def test_samples_start_at_the_first_time(trainer):
    """Noise as strong as its time; one step to 0 is z - t F."""
    network, seen = DiT(trainer.config(learned_variance=False)), []

    def watched(z, t, y):
        seen.append((z, float(t), y))
        return network(z, t, y)

    for times in ([0.5, 0.0], [1.0, 0.5, 0.0]):
        accuracy, ratio = scores_of_times(trainer, watched, 0, times)
        assert 0 <= accuracy <= 1 and ratio > 0
    (half, t, y), (whole, _, same), (_, last, _) = seen
    assert (t, last) == (0.5, 0.5) and y.equal(same) and half.std() < 0.6 < whole.std()
    torch.testing.assert_close(half, whole / 2)


# --- rules ----------------------------------------------------------------------------------------


def scored(**ratios: list[float]) -> dict:
    """Results of two seeds; every variant is at 9 but for changes."""
    found = {name: [9.0, 9.0] for name in (*CONSISTENCY_VARIANTS, FLOW_ONE, CONSISTENCY_ONE)}
    return {"scores": {name: [(0.9, r) for r in ratios.get(name.split()[0], each)]
                       for name, each in found.items()}}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "read", "word"),
    [
        ([5.0, 6.0], 0.9, "supported"),
        ([5.0, 13.0], 0.9, "undecided"),
        ([13.0, 14.0], 0.9, "refuted"),
        ([5.0, 6.0], 0.4, "refuted"),  # nothing to be read
        ([5.0], 0.9, "undecided"),
    ],
)
def test_rule_of_training_alone(ours, read, word):
    scores = {CONSISTENCY_ONE: [(read, r) for r in ours], FLOW_ONE: [(1.0, 12.0) for _ in ours]}
    assert ALONE_AT_ALL.decide({"scores": scores}) == word


@pytest.mark.parametrize(
    ("ratios", "word"),
    [([5.0, 6.0], "supported"), ([8.0, 9.5], "undecided"), ([12.0, 13.0], "refuted")],
)
def test_rule_of_the_improved_training(ratios, word):
    assert IMPROVED.decide(scored(all=ratios)) == word


HELPED = {name.split()[0]: [5.0, 6.0] for name in CHANGES}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (HELPED, "supported"),
        (HELPED | {"levels": [8.0, 9.5]}, "undecided"),
        (HELPED | {"weight": [12.0, 13.0]}, "refuted"),
    ],
)
def test_rule_of_each_change(changes, word):
    assert EACH_CHANGE.decide(scored(**changes)) == word


def test_all_run(tiny_run, out):
    found = {}
    for name in ("x-cm-2", "x-cm-3", "x-cm-3-each"):
        words = [name, "--fast", "--seeds", "2", "--run", str(tiny_run), "--out", str(out)]
        assert run_main(lambda words=words: command.main(words)) == 0
        record = json.loads((out / "fast" / f"{name}.json").read_text())
        table = record["results"]["table"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert record["results"]["training_seconds"] >= 0
        found[name] = record["results"]["scores"]
    assert found["x-cm-3"] == found["x-cm-3-each"] and len(found["x-cm-3"]) == 7
    assert len(found["x-cm-2"]) == 3
    for scores in found.values():
        assert all(len(each) == 2 and each[0] != each[1] for each in scores.values())
