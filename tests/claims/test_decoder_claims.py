"""Experiments on the Consistency Decoder: what the rules say of results made up, and that each
runs."""

import json

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import decoder_price
from nanosd3.claims.decoder_price import AUTOENCODERS, PRICE, millions_of, time_ratio
from nanosd3.claims.decoder_price import ways_to_decode as ways_of
from nanosd3.cli import run_main


def price(little: list[float], strong: list[float], millions: float = 120.0) -> dict:
    """Times of two steps in each seed, over those of a decoder of 20 million multiply-adds."""
    counted = {"0": 20.0, "1": millions / 2, "2": millions}
    return {
        "decoders": {
            name: {"millions": counted, "times": {"1": [1.0] * len(times), "2": times}}
            for name, times in (("little", little), ("strong", strong))
        }
    }


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (price([5.0, 9.0], [6.0, 7.0]), "supported"),
        (price([5.0, 9.0], [6.0, 4.9]), "undecided"),
        (price([5.0, 9.0], [6.0, 7.0], millions=99.0), "undecided"),
        (price([1.9, 2.0], [1.0, 2.1], millions=40.0), "refuted"),  # by one of the two
        (price([1.9, 2.1], [1.0, 2.1], millions=40.0), "undecided"),
        (price([1.9, 2.0], [1.0, 1.0], millions=41.0), "undecided"),
        (price([9.0], [9.0]), "undecided"),
    ],
)
def test_rule_of_the_price(results, word):
    assert PRICE.decide(results) == word


def test_what_is_priced():
    """Two steps are two calls; the layers at full size alone give a lower bound."""
    for config in AUTOENCODERS.values():
        cost = millions_of(config)
        assert cost[2] == 2 * cost[1] > cost[0] > 0
        first = 9 * (1 + config.latent_channels) * 16 * 32 * 32
        assert cost[1] > (first + 2 * 9 * 16 * 16 * 32 * 32) / 1e6


def test_all_ways_decode_the_same_latents():
    for config in AUTOENCODERS.values():
        ways = ways_of(config, 2, 0)
        images = {steps: way() for steps, way in ways.items()}
        assert {x.shape for x in images.values()} == {(2, 1, 32, 32)}
        again, other = (ways_of(config, 2, seed) for seed in (0, 1))
        assert torch.equal(images[0], again[0]()) and not torch.equal(images[0], other[0]())
        assert not any(x.requires_grad for x in images.values())


def test_times_are_measured_in_turn(monkeypatch):
    """The middle of the ratios; the first calls do not count."""
    seconds, calls = iter([1.0, 3.0, 1.0, 8.0, 2.0, 8.0]), []
    monkeypatch.setattr(decoder_price, "seconds_taken", lambda way: way() or next(seconds))
    own, other = (lambda: calls.append("own")), (lambda: calls.append("other"))
    assert time_ratio(own, other, 3) == 4.0
    assert calls == ["own", "other"] * 4


def test_price_runs(tiny_run, tmp_path):
    words = ["x-cdec-2", "--run", str(tiny_run), "--out", str(tmp_path), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    results = json.loads((tmp_path / "fast" / "x-cdec-2.json").read_text())["results"]
    assert (tmp_path / "fast" / "x-cdec-2.png").exists() and len(results["table"]["rows"]) == 6
    for one in results["decoders"].values():
        assert all(len(times) == 2 and min(times) > 0 for times in one["times"].values())
