"""HDiT's experiments: what the rules say of results made up for them, and that each runs."""

import json
import math

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims.hdit_costs import COST_MARKS, COSTS, hourglass_for, multiply_adds_of, slope
from nanosd3.claims.hdit_detail import DETAIL, UNGUIDED, decibels, signal_to_noise
from nanosd3.cli import run_main
from nanosd3.related.hdit import HDiT, hdit_multiply_adds


def costs(ours: float, timed: float, theirs: float, times_faster: float) -> dict:
    """Costs that grow with these slopes, and how much faster HDiT is at 256 pixels."""
    sides = [16, 32, 64, 128, 256]

    def growing(by: float, last: float) -> list[float]:
        return [last * (side / 256) ** (2 * by) for side in sides]

    counted = {"HDiT": growing(ours, 1.0), "flat DiT": growing(theirs, 9.0), "U-Net": [1.0] * 5}
    seconds = {"HDiT": growing(timed, 1.0), "flat DiT": growing(1.5, times_faster)}
    return {
        "sides": sides,
        "multiply_adds": counted,
        "seconds": {name: [[0.9 * x, 1.1 * x] for x in each] for name, each in seconds.items()},
    }


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (costs(0.99, 1.09, 1.61, 10.1), "supported"),
        (costs(1.01, 1.0, 1.8, 20), "undecided"),
        (costs(0.9, 1.11, 1.8, 20), "undecided"),
        (costs(0.9, 1.0, 1.59, 20), "undecided"),
        (costs(0.9, 1.0, 1.8, 9.9), "undecided"),
        (costs(1.11, 1.0, 1.8, 20), "refuted"),
        (costs(0.9, 1.0, 1.8, 0.99), "refuted"),
    ],
)
def test_rule_of_costs(results, word):
    assert COSTS.decide(results) == word


def test_slope():
    assert slope([16, 64, 256], [7.0, 2.0, 32.0], 64, 256) == pytest.approx(1)
    assert slope([64, 128, 256], [1.0, 5.0, 256.0], 64, 256) == pytest.approx(2)


def test_what_is_counted():
    """The middle stays as it is; each doubling adds a level."""
    assert [len(hourglass_for(side).levels) for side in (16, 32, 64, 256)] == [1, 2, 3, 5]
    assert {hourglass_for(side).multiple * 8 for side in (16, 64)} == {16, 64}
    config = hourglass_for(64)
    assert multiply_adds_of("HDiT", 64) == hdit_multiply_adds(config, 64, 64) / 1e6
    assert HDiT(config).inward[0][0].attn.window == 5
    assert multiply_adds_of("flat DiT", 32) > 2 * multiply_adds_of("flat DiT", 16)


def test_costs_run(tiny_run, tmp_path):
    words = ["x-hd-1", "--run", str(tiny_run), "--out", str(tmp_path), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    assert (tmp_path / "fast" / "x-hd-1.png").exists()
    record = json.loads((tmp_path / "fast" / "x-hd-1.json").read_text())
    results = record["results"]
    assert record["verdict"] == "undecided" and len(results["table"]["rows"]) == 6
    for name in COST_MARKS:
        assert len(results["seconds"][name]) == 3 and len(results["seconds"][name][0]) == 2
        assert all(s > 0 for each in results["seconds"][name] for s in each)
        small, *_, large = results["multiply_adds"][name]
        assert 0 < small < large


# --- x-hd-3 -------------------------------------------------------------------------------------


def detail(lost: float, generated: list[float], thin: float = 20.0) -> dict:
    """The samples with guidance are far off, and decide nothing."""
    ways = {UNGUIDED: generated, "with the main job's": [99.0] * len(generated)}
    return {"lost": lost, "generated": ways, "signal_to_noise": [thin, 21.0, 22.0]}


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (detail(0.3, [2.9, 2.99, 2.5]), "supported"),
        (detail(0.3, [2.9, 3.1, 2.5]), "undecided"),
        (detail(0.3, [2.9, 2.99, 2.5], thin=22.1), "undecided"),
        (detail(0.2, [2.9, 3.0, 2.5]), "refuted"),
        (detail(0.3, [2.9]), "undecided"),
        (detail(0.2, [2.9]), "undecided"),
    ],
)
def test_rule_of_detail(results, word):
    assert DETAIL.decide(results) == word


def test_decibels():
    white, grey = torch.full((2, 4, 4), 255).byte(), torch.full((2, 4, 4), 204).byte()
    torch.testing.assert_close(decibels(white, grey), torch.full((2,), 13.9794).double())
    assert (decibels(white, white) > 70).all()
    torch.testing.assert_close(signal_to_noise(white, grey), decibels(white, grey))
    half = torch.full((2, 4, 4), 102).byte(), torch.full((2, 4, 4), 51).byte()
    torch.testing.assert_close(decibels(*half), decibels(white, grey))
    lower = torch.full((2,), 20 * math.log10(0.4)).double()
    torch.testing.assert_close(signal_to_noise(*half) - decibels(*half), lower)


def test_detail_runs(tiny_run, tmp_path):
    words = ["x-hd-3", "--run", str(tiny_run), "--out", str(tmp_path), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    assert (tmp_path / "fast" / "x-hd-3.png").exists()
    results = json.loads((tmp_path / "fast" / "x-hd-3.json").read_text())["results"]
    plain, guided = results["generated"].values()
    assert results["lost"] > 0 and len(plain) == len(guided) == 2 and plain != guided
    assert len(results["signal_to_noise"]) == 3
    assert all(-5 < each < 30 for each in results["signal_to_noise"])
