"""SD3's claims on size, on the two ways of attention and on T5: rules, networks, and that each
experiment runs."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_scaling, sd3_two_way, sd3_variants, sd3_without_t5
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.sd3_one_way import OneWayMMDiT
from nanosd3.claims.sd3_variants import Variant
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.mmdit import MMDiT

CONFIG = CONFIGS["tiny"].mmdit  # dual attention too


# --- rules on made-up numbers ---------------------------------------------------------------------


def sizes(losses=(1.0, 0.8, 0.7, 0.6), accuracy=(0.7, 0.8, 0.9, 0.95), ratio=(9.0, 6.0, 4.0, 3.0),
          early=2.0, wobble=0.01, errors=(0.4, 0.3, 0.25, 0.2), seeds=3) -> dict:  # fmt: skip
    """Results by depth; seeds differ in the losses by `wobble` times their number, squared and to
    and fro, so that no lead is the same in all."""
    found = {}
    for i, depth in enumerate(sd3_scaling.SCALED_DEPTHS):
        moves = [wobble * k * (-1) ** (i + k) for k in range(seeds)]
        found[str(depth)] = {
            "losses": [[early, losses[i] + move] for move in moves],
            "accuracy": [accuracy[i] - move for move in moves],
            "ratio": [ratio[i] + move for move in moves],
            "errors": [[errors[i] + move / 10] * 3 for move in moves],
        }
    return {"depths": found}


def reading(both, text_blind, image_blind=(2.0, 2.0, 2.0)) -> dict:
    arms = zip(sd3_two_way.READING_VARIANTS, (both, text_blind, image_blind), strict=True)
    return {"arms": {name: {"trained": list(x), "cut": list(x)} for name, x in arms}}


def t5_results(digit=0.0, attributes=0.1, ratio=0.0, alone=0.5, seeds=3, wobble=0.001) -> dict:
    """What is lost without T5, by networks that had encoders left out; and of digits by the rest.
    (The Frechet ratio, of 5, rises.)"""
    moves = [wobble * k for k in range(seeds)]
    whole = {"digit": [0.9 + m for m in moves], "attributes": [0.8 + m for m in moves],
             "ratio": [5.0 + m for m in moves]}  # fmt: skip
    lost = {"digit": digit, "attributes": attributes, "ratio": -ratio}
    some = {key: [x - lost[key] for x in whole[key]] for key in whole}
    others = whole | {"digit": [x - alone - 2 * m for x, m in zip(whole["digit"], moves,
                                                                  strict=True)]}  # fmt: skip
    return {"scores": {"some left out": {"all three": whole, "without T5": some},
                       "all heard": {"all three": whole, "without T5": others}}}  # fmt: skip


CASES = {
    "x-sd3-scaling": [
        (sizes(), "supported"),
        (sizes(early=0.9), "undecided"),  # one network's loss does not fall
        (sizes(losses=(1.0, 0.8, 0.7, 0.7)), "undecided"),
        (sizes(losses=(1.0, 0.8, 0.7, 0.695)), "undecided"),  # less than the spread
        (sizes(losses=(1.0, 0.8, 0.7, 0.9)), "refuted"),
        (sizes(losses=(1.0, 1.2, 0.7, 0.6)), "refuted"),
        (sizes(seeds=1), "undecided"),
        (sizes(losses=(1.0, 1.2, 0.7, 0.6), seeds=1), "undecided"),
    ],
    "x-sd3-scaling-predicts": [
        (sizes(), "supported"),
        (sizes(accuracy=(0.8, 0.7, 0.9, 0.95)), "supported"),
        (sizes(accuracy=(0.7, 0.95, 0.8, 0.9)), "undecided"),
        (sizes(accuracy=(0.95, 0.9, 0.8, 0.7)), "refuted"),
        (sizes(ratio=(3.0, 4.0, 6.0, 9.0)), "refuted"),
        (sizes(accuracy=(0.8, 0.8, 0.8, 0.8), wobble=0.0), "refuted"),
    ],
    "x-sd3-scaling-steps": [
        (sizes(), "supported"),
        (sizes(errors=(0.4, 0.5, 0.5, 0.3)), "supported"),  # the ends alone are compared
        (sizes(errors=(0.2, 0.3, 0.3, 0.4)), "refuted"),
        (sizes(errors=(0.3, 0.3, 0.3, 0.3)), "undecided"),
        (sizes(seeds=1), "undecided"),
        (sizes(errors=(0.2, 0.3, 0.3, 0.4), seeds=1), "undecided"),
    ],
    "x-sd3-two-way": [
        (reading((1.0, 1.1, 0.9), (1.2, 1.3, 1.11)), "supported"),
        (reading((1.2, 1.3, 1.11), (1.0, 1.1, 0.9)), "refuted"),
        (reading((1.0, 1.1, 0.9), (1.3, 1.0, 0.9)), "undecided"),
        (reading((1.0,), (1.2,), (2.0,)), "undecided"),
    ],
    "x-sd3-two-way-cut": [
        (reading((1.0, 1.1), (1.02, 1.12), (2.0, 2.0)), "supported"),
        (reading((1.0, 1.1), (1.005, 1.1), (2.0, 2.0)), "refuted"),
        (reading((1.0, 1.1), (2.0, 2.0), (1.0, 1.1)), "refuted"),
        (reading((1.0, 1.1), (1.02, 1.1), (2.0, 2.0)), "undecided"),
        (reading((1.0,), (1.02,), (2.0,)), "undecided"),
        (reading((1.0,), (1.0,), (2.0,)), "undecided"),
    ],
    "x-sd3-t5": [
        (t5_results(), "supported"),
        (t5_results(digit=0.019, ratio=0.49), "supported"),
        (t5_results(digit=0.03), "undecided"),
        (t5_results(ratio=0.6), "undecided"),
        (t5_results(attributes=0.019), "undecided"),
        (t5_results(digit=0.019, attributes=0.0189), "undecided"),
        (t5_results(attributes=-0.01), "refuted"),
        (t5_results(digit=0.06, attributes=0.3), "refuted"),
        (t5_results(seeds=1), "undecided"),
        (t5_results(digit=0.06, seeds=1), "undecided"),
    ],
    "x-sd3-t5-dropout": [
        (t5_results(), "supported"),
        (t5_results(alone=0.03), "supported"),
        (t5_results(alone=0.01), "undecided"),  # two points, at least
        (t5_results(alone=0.1, wobble=-0.2), "undecided"),
        (t5_results(digit=0.2, alone=0.1), "refuted"),
        (t5_results(seeds=1), "undecided"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


# --- attention one way ----------------------------------------------------------------------------


def inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    sizes = (2, CONFIG.latent_channels, 8, 8), (2,), (2, 5, CONFIG.context_dim)
    z, t, context = (torch.randn(size, generator=g) for size in sizes)
    return z, t.sigmoid(), context, torch.randn(2, CONFIG.pooled_dim, generator=g)


def one_way(image_reads_text: bool, text_reads_image: bool) -> tuple[MMDiT, OneWayMMDiT]:
    """A plain MMDiT with random weights, and a cut one with the same."""
    torch.manual_seed(0)
    plain = MMDiT(CONFIG)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cut = OneWayMMDiT(CONFIG, image_reads_text, text_reads_image)
    cut.load_state_dict(plain.state_dict())
    return plain, cut


@torch.no_grad()
def test_both_ways_open_is_plain():
    plain, cut = one_way(True, True)
    torch.testing.assert_close(cut(*inputs()), plain(*inputs()))
    torch.manual_seed(3)
    fresh = MMDiT(CONFIG).state_dict()
    torch.manual_seed(3)
    for key, value in OneWayMMDiT(CONFIG, False, True).state_dict().items():
        assert value.equal(fresh[key]), key  # it begins as the plain one does


def test_what_reads_what():
    """By gradients: velocity by context; and the text after the first block by the image."""
    for image_reads, text_reads in ((True, False), (False, True), (True, True), (False, False)):
        _, cut = one_way(image_reads, text_reads)
        z, t, context, pooled = inputs()
        context.requires_grad_()
        (grad,) = torch.autograd.grad(cut(z, t, context, pooled).sum(), context, allow_unused=True)
        assert (grad is not None and bool(grad.abs().sum() > 0)) == image_reads
        x, y, c = torch.randn(2, 4, 128), torch.randn(2, 5, 128), torch.randn(2, 128)
        x.requires_grad_()
        after = cut.joint_blocks[0](x, y, c)[1]
        (grad,) = torch.autograd.grad(after.sum(), x, allow_unused=True)
        assert (grad is not None and bool(grad.abs().sum() > 0)) == text_reads


# --- the experiments run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory) -> dict[str, dict]:
    """Of all, in their fast form."""
    out = tmp_path_factory.mktemp("variants")
    found = {}
    few = pytest.MonkeyPatch()
    few.setattr(sd3_scaling, "FEW", (2, 3, 4))
    few.setattr(sd3_scaling, "MANY", 8)
    for name in CASES:
        words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "1", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / "fast" / f"{name}.png").stat().st_size > 5000
        found[name] = json.loads((out / "fast" / f"{name}.json").read_text())["results"]
        table = found[name]["table"]
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    networks = sorted(path.name for path in (out / "fast" / "networks").iterdir())
    assert len(networks) == 7  # four depths, two cuts, all heard; each trained once
    few.undo()
    return found


def test_scaling_runs(results):
    depths = results["x-sd3-scaling"]["depths"]
    assert list(depths) == ["1", "2", "3", "4"]
    parameters = [one["parameters"][0] for one in depths.values()]
    assert parameters == sorted(set(parameters))
    for one in depths.values():
        assert one["steps"] == [2, 3, 5]  # 0.3, 0.6 and all of 5
        assert all(len(losses) == 3 and min(losses) > 0 for losses in one["losses"])
        assert all(e[0] > e[2] > 0 for e in one["errors"])  # more steps are nearer to many
    assert results["x-sd3-scaling-steps"]["depths"] == depths


def test_cutting_changes_the_loss(results):
    arms = results["x-sd3-two-way"]["arms"]
    whole, text_blind, image_blind = (arms[name] for name in sd3_two_way.READING_VARIANTS)
    assert whole["cut"] == pytest.approx(whole["trained"], rel=1e-4)  # nothing is cut
    assert text_blind["cut"] != whole["cut"] and image_blind["cut"] != whole["cut"]
    assert text_blind["trained"] != text_blind["cut"]


def test_without_t5_runs(results):
    scores = results["x-sd3-t5"]["scores"]
    for one in scores.values():
        assert one["all three"]["ratio"] != one["without T5"]["ratio"]
        for heard_scores in one.values():
            assert all(0 <= x <= 1 for key in ("digit", "attributes") for x in heard_scores[key])
    assert scores["some left out"] != scores["all heard"]


def test_scores_are_of_what_was_asked(tiny_run, tmp_path, monkeypatch):
    """Real digits in place of samples: all right, and nearly at the floor."""
    from nanosd3.claims.experiment import Conditions
    from nanosd3.claims.runs import open_encoded
    from nanosd3.pipeline import Pipeline

    conditions = Conditions((0,), True, Path(tiny_run), tmp_path)
    finished, features = open_encoded(conditions)
    network = sd3_variants.trained_variant(conditions, finished, features, Variant(), 0)
    asked = []

    def real(self, prompts, seed, steps, drop):
        from nanosd3.training.evaluation import draw_prompts

        asked.append((seed, drop))
        draw = draw_prompts(finished.source, 40, seed)
        assert draw.prompts == prompts
        return finished.source.images.train_images[draw.chosen].numpy()

    monkeypatch.setattr(Pipeline, "__call__", real)
    scores = sd3_without_t5.scores_without_encoders(finished, network, 3, 40, ("t5",))
    assert asked == [(103, ("t5",))]
    assert scores["attributes"] == 1.0 and scores["ratio"] == pytest.approx(1.0)
