"""SD3's claims on backbones: rules, networks with and without the pooled text, and one fast run."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_backbone_networks as networks
from nanosd3.claims import sd3_backbones
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import open_encoded
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.related.backbones import UViT
from nanosd3.training import train_flow

TINY = CONFIGS["tiny"].mmdit
NAMES = ("x-sd3-backbones", "x-sd3-backbones-equal", "x-sd3-backbones-third")


def arms(seeds=3, wobble=0.01, **losses: float) -> dict:
    """Results whose last losses are those given, by the first letters of arms (MMDiT: m, three
    sets: t, deeper ones: cd, dd), in the first seed; those of others differ, no lead like
    another's. Those of before say the opposite."""
    given = {"m": 1.0, "c": 1.1, "u": 1.2, "d": 1.3, "t": 1.0, "cd": 1.1, "dd": 1.2} | losses
    names = dict(zip(given, ("MMDiT", "CrossDiT", "UViT", "DiT", "MMDiT, three sets",
                             "CrossDiT, deeper", "DiT, deeper"), strict=True))  # fmt: skip
    found = {}
    for i, (key, loss) in enumerate(given.items()):
        moves = [wobble * k * (i + 1) for k in range(seeds)]
        found[names[key]] = {"losses": [[9 - loss, loss + move] for move in moves]}
    return {"tokens": found, "pooled": {name: {"losses": [[1.0, 1.0]]} for name in found}}


CASES = {
    "x-sd3-backbones": [
        (arms(), "supported"),
        (arms(m=1.04), "supported"),
        (arms(c=0.995), "undecided"),  # MMDiT's lead is within the spread
        (arms(c=1.225), "undecided"),  # second and third are exchanged, by little
        (arms(d=1.175), "undecided"),
        (arms(c=1.35), "refuted"),  # behind UViT by much, in each seed
        (arms(d=0.8), "refuted"),
        (arms(c=1.35, wobble=0.1), "undecided"),
        (arms(t=0.1, cd=0.1, dd=0.1), "supported"),  # other arms decide other rules
        (arms(seeds=1), "undecided"),
        (arms(seeds=1, d=0.5), "undecided"),
    ],
    "x-sd3-backbones-equal": [
        (arms(), "supported"),
        (arms(c=0.5, d=0.5, t=0.5), "supported"),
        (arms(cd=0.99), "undecided"),
        (arms(u=0.99), "undecided"),
        (arms(dd=0.86), "undecided"),
        (arms(dd=0.8), "refuted"),
        (arms(u=0.9), "refuted"),
        (arms(dd=0.8, seeds=1), "undecided"),
    ],
    "x-sd3-backbones-third": [
        (arms(wobble=0.0001), "supported"),
        (arms(wobble=0.0001, t=1.2), "supported"),  # it loses
        (arms(wobble=0.0001, t=0.995), "supported"),
        (arms(wobble=0.0001, t=0.985), "refuted"),
        (arms(wobble=0.0001, t=0.9898), "undecided"),
        (arms(wobble=0.01, t=0.98), "undecided"),
        (arms(wobble=0.01, t=0.9), "refuted"),
        (arms(seeds=1), "undecided"),
        (arms(seeds=1, t=0.5), "undecided"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results["tokens"], expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


def test_the_third_set_is_measured_by_the_loss_of_two():
    """In shares of it: 0.03 of 4 is less than one in a hundred."""
    assert sd3_backbones.decide_third(arms(wobble=0.0, m=4.0, t=3.97)) == "supported"
    assert sd3_backbones.decide_third(arms(wobble=0.0, m=2.0, t=1.97)) == "refuted"


# --- networks -------------------------------------------------------------------------------------


def told_apart(pooled: bool, kind: str) -> bool:
    """Whether the pooled text changes what a network answers, once it is trained a little."""
    torch.manual_seed(0)
    arm = networks.BackboneArm(kind)
    model = networks.make_backbone(arm, arm.config(TINY, 3), pooled)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, TINY.context_dim)
    text = torch.randn(2, TINY.pooled_dim)
    return not torch.equal(*(model(z, torch.tensor(0.5), context, p) for p in (text, 2 * text)))


@pytest.mark.parametrize("kind", ["mmdit", "uvit"])
@torch.no_grad()
def test_pooled_text_is_heard_or_not(kind):
    assert told_apart(True, kind) and not told_apart(False, kind)


def test_arms():
    """All as wide as each other; equal numbers of parameters are about equal."""
    mnist = CONFIGS["mnist"]
    sizes = {}
    for name, arm in sd3_backbones.BACKBONE_ARMS.items():
        config = arm.config(mnist.mmdit, mnist.text.clip_l.length)
        assert config.width == 64 and config.clip_tokens == 9 and config.dual_attention == ()
        with torch.device("meta"):
            model = networks.make_backbone(arm, config, pooled=False)
        assert len(model.joint_blocks) == arm.depth == (3 if "deeper" in name else 2)
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes["MMDiT, three sets"] > sizes["MMDiT"]
    assert networks.BackboneArm("mmdit3").lr == networks.BackboneArm("mmdit").lr
    ours = sizes["MMDiT"]
    shares = [round(sizes[name] / ours, 2) for name in sd3_backbones.AS_LARGE_BACKBONES]
    assert shares == [1.1, 1.0, 0.93]  # as the declaration says
    assert max(sizes[name] for name in ("DiT", "CrossDiT")) < 0.8 * ours


# --- the experiments run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory) -> dict[str, dict]:
    """Of all, in their fast form."""
    out, found = tmp_path_factory.mktemp("backbones"), {}
    quick = pytest.MonkeyPatch()
    quick.setattr(train_flow, "VALIDATION_TIMES", 1)  # which takes most of the time
    for name in NAMES:
        words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "1", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / "fast" / f"{name}.png").stat().st_size > 5000
        found[name] = json.loads((out / "fast" / f"{name}.json").read_text())["results"]
    trained = sorted(path.name for path in (out / "fast" / "networks").iterdir())
    assert len(trained) == 11  # seven by tokens, four with the pooled text; once each
    quick.undo()
    assert "uvit-2-tokens-0" in trained and "dit-3-tokens-0" in trained
    return found


def test_they_run(results):
    first = results[NAMES[0]]
    assert all(results[name] == first for name in NAMES)
    assert first["steps"] == [1, 2] and first["training_seconds"] > 0
    assert list(first["tokens"]) == list(sd3_backbones.BACKBONE_ARMS)
    assert list(first["pooled"]) == list(sd3_backbones.BACKBONES_RANKED)
    every = [*first["tokens"].values(), *first["pooled"].values()]
    assert all(len(one["losses"]) == 1 and len(one["losses"][0]) == 2 for one in every)
    final = [one["losses"][0][1] for one in every]
    assert min(final) > 0
    assert len(set(final)) == len(final) - 1  # UViT hears nothing in its first two steps
    for name, one in first["pooled"].items():
        heard, unheard = one["parameters"], first["tokens"][name]["parameters"]
        assert heard - unheard == (TINY.pooled_dim + 1) * 64 + 65 * 64  # the embedder


def test_the_table_is_of_the_results(results):
    table = results[NAMES[0]]["table"]
    assert len(table["rows"]) == 7 and all(len(row) == 5 for row in table["rows"])
    assert [row[4] == "" for row in table["rows"]] == [False] * 4 + [True] * 3
    first = results[NAMES[0]]["tokens"]["MMDiT"]
    assert table["rows"][0][1] == f"{first['parameters']:,}"
    assert table["rows"][0][3] == f"{first['losses'][0][1]:.3g}"


def test_a_network_is_what_its_arm_says(tiny_run, tmp_path, monkeypatch):
    """Its kind, depth, rate and hearing; and the same from the folder as from training."""
    conditions = Conditions((0,), True, Path(tiny_run), tmp_path)
    finished, features = open_encoded(conditions)
    monkeypatch.setitem(networks.BACKBONE_RATES, "uvit", 3e-3)
    arm = networks.BackboneArm("uvit", depth=1)
    first, again = (
        networks.trained_backbone(conditions, finished, features, arm, False, 0) for _ in "ab"
    )
    assert isinstance(first.model, UViT) and len(first.model.joint_blocks) == 1
    assert first.job.training.flow.lr == 3e-3 and first.job.training.ema_decay == 0.98
    assert isinstance(first.model.y_embedder, networks.ZeroEmbedder)
    for key, value in first.model.state_dict().items():
        assert value.equal(again.model.state_dict()[key]), key
    assert first.losses == again.losses and list(first.losses) == [1, 2]
