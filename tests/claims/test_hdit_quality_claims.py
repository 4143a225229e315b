"""HDiT's experiments that train: rules on made-up numbers, how networks are trained and measured,
and that each experiment runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import hdit_networks
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.hdit_networks import LOSS_CHECKPOINTS, HDiTTrainer, TrainedHDiT
from nanosd3.claims.hdit_quality import HOURGLASS, SHAPES_TRIED
from nanosd3.claims.hdit_weighting import UNWEIGHTED, WEIGHTED, WEIGHTINGS
from nanosd3.cli import run_main
from nanosd3.flow import flow_loss, interpolate
from nanosd3.random_streams import rng
from nanosd3.related.hdit import hdit_loss
from nanosd3.related.train_hdit import MIDDLE_NOISE, SIGMA_DATA, hdit_step, noisy_times
from nanosd3.storage.run import Run
from nanosd3.training.evaluation import draw_prompts
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job

# --- rules on made-up numbers -------------------------------------------------------------------


def shapes(loss=(1.0, 1.2, 1.2), accuracy=(0.8, 0.6, 0.6), wobble=0.05, seeds=3) -> dict:
    """Results of the hourglass and two flat networks; seeds differ, to and fro between networks."""
    found = {}
    for i, name in enumerate(SHAPES_TRIED):
        moves = [wobble * k * (-1) ** (min(i, 1) + k) for k in range(seeds)]
        found[name] = {
            "losses": [[9.0, loss[i] + move] for move in moves],
            "accuracy": [accuracy[i] + move for move in moves],
        }
    return {"shapes": found}


def weighted(ours=(5.0, 5.1, 5.2), theirs=(6.0, 6.3, 6.2)) -> dict:
    return {"weightings": {WEIGHTED: {"ratio": list(ours)}, UNWEIGHTED: {"ratio": list(theirs)}}}


CASES = {
    "x-hd-2": [
        (shapes(wobble=0.01), "supported"),
        (shapes(loss=(1.0, 1.2, 1.0), wobble=0.01), "undecided"),  # one of the two is as good
        (shapes(loss=(1.0, 1.2, 1.02)), "undecided"),  # within the spread
        (shapes(accuracy=(0.8, 0.9, 0.6), wobble=0.01), "undecided"),  # loss and digits disagree
        (shapes(accuracy=(0.8, 0.6, 0.8), wobble=0.01), "undecided"),
        (shapes(loss=(1.0, 1.2, 0.7), wobble=0.01), "refuted"),
        (shapes(loss=(1.0, 0.7, 1.2), accuracy=(0.8, 0.1, 0.1), wobble=0.01), "refuted"),
        (shapes(seeds=1), "undecided"),
        (shapes(loss=(1.0, 0.7, 0.7), seeds=1), "undecided"),
    ],
    "x-hd-4": [
        (weighted(), "supported"),
        (weighted((6.0, 6.3, 6.2), (5.0, 5.1, 5.2)), "refuted"),
        (weighted((5.0, 6.5, 5.2)), "undecided"),
        (weighted((5.0,), (6.0,)), "undecided"),
        (weighted((6.0,), (5.0,)), "undecided"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rules_of_trained_networks(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


# --- how networks are trained and measured ------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tiny_run, tmp_path_factory) -> HDiTTrainer:
    out = tmp_path_factory.mktemp("trainer")
    return HDiTTrainer(Conditions((0,), True, Path(tiny_run), out))


class Answers:
    """A network that answers 1 everywhere, and notes what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, z, t, text):
        self.asked.append((z, t, text))
        return torch.ones_like(z)


def test_shapes_cost_alike(trainer):
    """In multiply-adds of a pass, so that equal steps are equal compute."""
    costs = [trainer.multiply_adds(net) for net in SHAPES_TRIED.values()]
    assert max(costs) < 1.1 * min(costs)
    assert len({net.lr for net in WEIGHTINGS.values()}) == 1
    hourglass, *flat = (trainer.sizes(net) for net in SHAPES_TRIED.values())
    assert len(hourglass.levels) == 2 and all(len(one.levels) == 1 for one in flat)
    assert [one.patch_size // hourglass.patch_size for one in flat] == [1, 2]


def test_noise_to_look_at():
    t = noisy_times(torch.tensor([0.158655, 0.5, 0.841345]))
    noise = t / (1 - t)
    expected = torch.tensor([MIDDLE_NOISE / 2.71828, MIDDLE_NOISE, MIDDLE_NOISE * 2.71828])
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=0)


def test_the_loss_with_and_without_its_weight(trainer, tmp_path):
    """The same images, noise and times; the error of the velocity, weighted or as it is."""
    job = Job(
        Run(tmp_path, {}, {}), trainer.config, trainer.finished.source, torch.device("cpu"), 0
    )
    job = replace(job, config=replace(job.config, training=replace(
        job.training, flow=replace(job.training.flow, batch=8))))  # fmt: skip
    rows, found = StepRNG((0, "hdit", 3), range(8)), []
    for sigma_data in (SIGMA_DATA, None, 2.0):
        model = Answers()
        losses = hdit_step(job, trainer.pixels, trainer.pooled, model, rows, sigma_data)
        ((z, t, _),) = model.asked
        noise, s = rows.noise(z.shape[1:]), t.view(-1, 1, 1, 1)
        x0 = (z - s * noise) / (1 - s)
        plain = flow_loss(torch.ones_like(z), x0, noise)
        expected = plain if sigma_data is None else hdit_loss(
            torch.ones_like(z), x0, noise, t, sigma_data)  # fmt: skip
        torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
        found.append(losses)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_images_held_out(trainer):
    """The loss is of those, with their captions, and the same for whoever asks."""
    source = trainer.finished.source
    numbered = torch.arange(len(source.texts)).float()[:, None].expand(-1, 3)
    other = HDiTTrainer.__new__(HDiTTrainer)
    vars(other).update(vars(trainer) | {"pooled": numbered})
    model = Answers()
    loss = other.held_out_loss(model)
    assert loss == other.held_out_loss(Answers())
    z, t, text = (torch.cat(parts) for parts in zip(*model.asked, strict=True))
    images = torch.arange(source.trained, source.count).repeat(2)
    x0 = trainer.pixels[images]
    noise = torch.randn(x0.shape, generator=rng("pixels held out"))
    torch.testing.assert_close(z, interpolate(x0, noise, t))
    assert loss == pytest.approx(
        hdit_loss(torch.ones_like(z), x0, noise, t, SIGMA_DATA).mean().item(), rel=1e-4
    )
    assert (t / (1 - t)).median().item() == pytest.approx(MIDDLE_NOISE, rel=0.05)
    for i, label in zip(text[:, 0].int().tolist(), source.labels[images].tolist(), strict=True):
        assert any(f" {n} " in f" {source.texts[i]} " for n in source.images.names[label])


def test_real_digits_have_full_marks(trainer, tmp_path, monkeypatch):
    """In place of samples: at the distance of real images. They are scored once."""
    finished = trainer.finished
    run = Run.open(tmp_path / "run", {})
    job = Job(run, trainer.config, finished.source, torch.device("cpu"), 3)
    asked = []

    def real(model, pixels, pipeline, prompts, seed, way):
        asked.append((seed, way))
        draw = draw_prompts(finished.source, 40, seed)
        assert draw.prompts == prompts
        return np.asarray(finished.source.images.train_images[draw.chosen])

    monkeypatch.setattr(hdit_networks, "drawn_images", real)
    network = TrainedHDiT(None, job, trainer.pixels)
    accuracy, ratio = network.scores(finished, 40)
    assert ratio == pytest.approx(1.0) and 0 <= accuracy <= 1
    assert network.scores(finished, 40) == (accuracy, ratio)
    assert asked == [(103, trainer.config.sampling)]


# --- the experiments run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("pixels")
    found = {}
    for name in CASES:
        words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "1", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / "fast" / f"{name}.png").stat().st_size > 5000
        found[name] = json.loads((out / "fast" / f"{name}.json").read_text())["results"]
        table = found[name]["table"]
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    networks = sorted(path.name for path in (out / "fast" / "networks").iterdir())
    assert networks == sorted(
        f"{net.name}-0" for net in (*SHAPES_TRIED.values(), WEIGHTINGS[UNWEIGHTED])
    )  # the hourglass is trained once
    return found


def test_shapes_run(results):
    found = results["x-hd-2"]["shapes"]
    assert list(found) == list(SHAPES_TRIED)
    for one in found.values():
        assert one["images"] == [32, 64, 96, 128] and len(LOSS_CHECKPOINTS) == 4
        assert len(one["losses"][0]) == 4 and min(one["losses"][0]) > 0
        assert all(len(one[key]) == 1 for key in ("seconds", "accuracy", "ratio"))
    losses = [one["losses"][0][-1] for one in found.values()]
    assert len(set(losses)) == 3
    seconds = sum(one["seconds"][0] for one in found.values())
    assert results["x-hd-2"]["training_seconds"] == pytest.approx(seconds)


def test_weightings_run(results):
    found = results["x-hd-4"]["weightings"]
    assert WEIGHTINGS[WEIGHTED] is HOURGLASS and WEIGHTINGS[UNWEIGHTED].sigma_data is None
    same = results["x-hd-2"]["shapes"]["hourglass"]
    assert found[WEIGHTED]["ratio"] == same["ratio"]
    assert found[WEIGHTED]["loss"] == [same["losses"][0][-1]]
    assert found[UNWEIGHTED]["loss"] != found[WEIGHTED]["loss"]
    noise, weight = (torch.tensor(results["x-hd-4"][key]) for key in ("noise", "weight"))
    t = noise / (1 + noise)
    expected = t**2 * SIGMA_DATA**2 / (noise**2 + SIGMA_DATA**2)
    torch.testing.assert_close(weight, expected)
