"""DPO on the finished model: what is preferred, how a model is tuned, the rules, and that
the experiments run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_dpo, sd3_preferences
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import open_encoded
from nanosd3.claims.sd3_dpo import ALL_ARMS, add_scores, deciding, rise
from nanosd3.claims.sd3_preferences import (
    Pairs,
    ScoredSamples,
    attributes_shown,
    preferred_pairs,
    sample_and_score,
)
from nanosd3.cli import run_main
from nanosd3.training.evaluation import Draw, draw_prompts
from nanosd3.training.loop import StepRNG
from nanosd3.training.metrics import frechet_distance

# --- rules on made-up numbers ---------------------------------------------------------------------


def tuned(rate=(0.6, 0.65, 0.7), before=(2.0, 2.0, 2.2), after=(2.0, 2.1, 2.2)) -> dict:
    """Results of models tuned on preferences; those tuned on winners are very good."""
    arms = {arm: {"rate": [1.0] * 3, "ratio": [0.1] * 3} for arm in ALL_ARMS}
    arms["before"]["ratio"] = list(before)
    arms["preferences"] = {"rate": list(rate), "ratio": list(after)}
    return {"arms": arms}


CASES = {
    "x-sd3-dpo": [
        (tuned(), "supported"),
        (tuned((0.5, 0.6, 0.7)), "undecided"),  # exactly its spread
        (tuned((0.51, 0.6, 0.7)), "supported"),
        (tuned((0.45, 0.55, 0.6)), "undecided"),
        (tuned((0.4, 0.35, 0.3)), "refuted"),
        (tuned((0.45, 0.55, 0.4)), "undecided"),
        (tuned((0.9,)), "undecided"),
        (tuned((0.1,)), "undecided"),
    ],
    "x-sd3-dpo-distance": [
        (tuned(), "supported"),
        (tuned(after=(1.0, 1.1, 1.2)), "supported"),
        (tuned(after=(2.1, 2.2, 2.42)), "undecided"),  # up to a tenth, and the spread
        (tuned(after=(2.4, 2.5, 2.3)), "undecided"),
        (tuned(after=(2.5, 2.5, 2.8)), "refuted"),
        (tuned(before=(2.0,), after=(2.0,)), "undecided"),
        (tuned(before=(2.0,), after=(9.0,)), "undecided"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


def test_scores_of_a_seed():
    one: dict[str, list[float]] = {k: [] for k in ("right", "wins", "losses", "rate", "ratio")}
    before = {"right": [True, True, False, False, False], "ratio": 2.0}
    add_scores(one, {"right": [True, False, True, True, False], "ratio": 3.0}, before)
    assert [one[key][0] for key in one] == [0.6, 2, 1, pytest.approx(2 / 3), 3.0]
    add_scores(one, before, before)
    assert one["rate"][1] == 0.5 and deciding(one) == [3, 0]
    assert rise(tuned(), "preferences") == [0.0, pytest.approx(0.05), 0.0]


# --- what is preferred ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tiny_run, tmp_path_factory):
    conditions = Conditions((0,), True, Path(tiny_run), tmp_path_factory.mktemp("preferences"))
    return conditions, *open_encoded(conditions, images=False)


def test_text_alone_is_encoded(material):
    _, finished, features = material
    assert finished.source.texts[0] in features
    assert not list(features.folder.glob("latents/*"))


def test_what_is_as_asked(material):
    """Real digits are, where their own captions are the prompts; with another third's they are
    not."""
    _, finished, _ = material
    source = finished.source
    draw = draw_prompts(source, 200, 3)
    digits = source.images.train_images[draw.chosen]
    assert attributes_shown(finished, draw, digits).all()
    weight, slant = (x[draw.chosen] for x in (source.described.weight, source.described.slant))
    strokes, slants = {"thin": 0, "bold": 2}, {"leaning left": 0, "upright": 1, "leaning right": 2}
    for words, third in ((strokes, weight), (slants, slant)):
        for word, meant in words.items():
            asking = Draw(draw.chosen, draw.labels, [f"a {word} digit"] * len(digits))
            assert attributes_shown(finished, asking, digits).equal(third == meant)


class Drawn:
    """In place of a pipeline: latents whose first number is the index, and real digits."""

    def __init__(self, images: torch.Tensor):
        self.images, self.calls = images, []

    def __call__(self, prompts, **asked):
        self.calls.append(asked)
        return torch.arange(len(prompts), dtype=torch.float32)[:, None, None, None]

    def decode(self, latents):
        return self.images[latents[:, 0, 0, 0].long()].numpy()


def test_judged(material):
    _, finished, _ = material
    source = finished.source
    draw = draw_prompts(source, 100, 4)
    digits = source.images.train_images[draw.chosen]
    pipeline = Drawn(digits)
    found = sample_and_score(finished, pipeline, draw, 7)
    assert pipeline.calls == [
        {"seed": 7, "steps": 5, "guidance": 1.0, "sampler": "heun", "output": "latent"}
    ]
    read = finished.scorer.read(finished.scorer.features(digits))
    assert found.right.equal(read == draw.labels) and 0 < found.right.sum() < 100
    bold = sample_and_score(finished, pipeline, replace(draw, prompts=["a bold 1"] * 100), 7).right
    assert bold.equal(found.right & (source.described.weight[draw.chosen] == 2)) and bold.any()
    assert not bold.equal(found.right)
    accuracy, distance = finished.scorer.score(digits, draw)
    assert found.right.float().mean().item() == pytest.approx(accuracy)
    assert frechet_distance(found.features, finished.scorer.test) == pytest.approx(distance)


def test_pairs(material, monkeypatch):
    """Only those of which one is as asked, the winner first."""
    _, finished, features = material
    right = {208: [True, True, False, False], 308: [True, False, True, False]}

    def fake(finished, pipeline, draw, seed):
        latents = torch.full((4, 1, 2, 2), float(seed)) + torch.arange(4.0)[:, None, None, None]
        return ScoredSamples(latents, torch.zeros(4, 1), torch.tensor(right[seed]))

    prompts = finished.source.texts[:4]
    monkeypatch.setattr(sd3_preferences, "sample_and_score", fake)
    draw = Draw(torch.arange(4), torch.arange(4), prompts)
    monkeypatch.setattr(sd3_preferences, "draw_prompts", lambda *_: draw)
    pairs = preferred_pairs(finished, features, 8, 4)
    assert pairs.winners[:, 0, 0, 0].tolist() == [209, 310]
    assert pairs.losers[:, 0, 0, 0].tolist() == [309, 210]
    for i, prompt in enumerate(prompts[1:3]):
        assert pairs.text[0][i].equal(features[prompt][0])
        assert pairs.text[1][i].equal(features[prompt][1])


# --- the training step ----------------------------------------------------------------------------


def test_a_step(material):
    """Before the first step a model is its reference: log 2 for preferences, and for winners alone
    the reference's error."""
    _, finished, features = material
    model = finished.pipeline.mmdit
    size = model.config.latent_channels, 8, 8
    g = torch.Generator().manual_seed(0)
    winners, losers = torch.randn(2, 5, *size, generator=g)
    text = tuple(x[None].expand(5, *x.shape) for x in features[finished.source.texts[0]])
    pairs = Pairs(winners, losers, text)
    job = replace_job(finished)
    rows = StepRNG((0, "flow", 3), range(12))
    for what, expected in (("preferences", [math.log(2)] * 12), ("winners alone", None)):
        losses, _ = sd3_preferences.tuning_loss(job, model, model, pairs, what, rows)
        assert losses.shape == (12,)
        if expected:
            assert losses.tolist() == pytest.approx(expected)
    with_others = Pairs(winners, winners, text)
    again, _ = sd3_preferences.tuning_loss(job, model, model, with_others, "winners alone", rows)
    assert again.equal(losses)  # losers have no effect


def replace_job(finished):
    from nanosd3.training.stages import Job, training_of

    training = training_of(finished.config)
    training = replace(training, flow=replace(training.flow, batch=12))
    config = replace(finished.config, training=training)
    return Job(finished.run, config, finished.source, finished.device, 0)


# --- the experiments run --------------------------------------------------------------------------


def test_runs(tiny_run, tmp_path):
    found = {}
    for name in CASES:
        words = [name, "--run", str(tiny_run), "--out", str(tmp_path), "--seeds", "2", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (tmp_path / "fast" / f"{name}.png").stat().st_size > 5000
        found[name] = json.loads((tmp_path / "fast" / f"{name}.json").read_text())["results"]
        table = found[name]["table"]
        assert len(table["rows"]) == 3
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert found["x-sd3-dpo"]["arms"] == found["x-sd3-dpo-distance"]["arms"]
    arms = found["x-sd3-dpo"]["arms"]
    assert list(arms) == list(ALL_ARMS) and arms["before"]["rate"] == [0.5, 0.5]
    for one in arms.values():
        assert all(0 <= x <= 1 for key in ("right", "rate") for x in one[key])
        assert all(x > 0 for x in one["ratio"])
    assert arms["preferences"]["ratio"] != arms["before"]["ratio"]
    assert arms["preferences"]["ratio"] != arms["winners alone"]["ratio"]
    assert all(0 < n <= 40 for n in found["x-sd3-dpo"]["pairs"])
    networks = sorted(path.name for path in (tmp_path / "fast" / "networks").iterdir())
    assert networks == [f"tuned-{what}-{seed}" for what in ("preferences", "winners-alone")
                        for seed in (0, 1)]  # fmt: skip


def test_pairs_are_drawn_once(tiny_run, tmp_path, monkeypatch):
    """For both ways to tune, and not at all if they are tuned already."""
    drawn = []
    original = sd3_dpo.preferred_pairs

    def counted(finished, features, seed, count):
        drawn.append((seed, count))
        return original(finished, features, seed, count)

    monkeypatch.setattr(sd3_dpo, "preferred_pairs", counted)
    conditions = Conditions((0,), True, Path(tiny_run), tmp_path)
    first = sd3_dpo.dpo_study(conditions)
    assert drawn == [(0, 40)]
    assert sd3_dpo.dpo_study(conditions) == first and drawn == [(0, 40)]
