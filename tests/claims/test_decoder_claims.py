"""Experiments on the Consistency Decoder: what the rules say of results made up, and that each
runs."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import decoder_networks, decoder_price
from nanosd3.claims.decoder_drop_in import (
    BY_ANOTHER,
    BY_ITS_OWN,
    DROP_IN,
    consistent_pipeline,
)
from nanosd3.claims.decoder_networks import LONGER, compressing_autoencoder, two_decoders
from nanosd3.claims.decoder_price import AUTOENCODERS_PRICED, PRICE, millions_of, time_ratio
from nanosd3.claims.decoder_price import ways_to_decode as ways_of
from nanosd3.claims.decoder_quality import (
    BETTER_DECODING,
    ONE_STEP,
    OWN,
    SECOND_STEP,
    TRAINED_ON,
    TWO_STEPS,
    by_itself,
)
from nanosd3.claims.experiment import Conditions
from nanosd3.cli import run_main
from nanosd3.related.consistency_decoder import ConsistencyDecoder
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.training.loop import StepRNG


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
    """Two steps are two calls; a call's multiply-adds are those of its convolutions and linear
    layers, counted here by what they give."""
    for config in AUTOENCODERS_PRICED.values():
        cost = millions_of(config)
        assert cost[2] == 2 * cost[1] > cost[0] > 0
        network, counted = ConsistencyDecoder(1, config.latent_channels, (16, 32, 64)), []

        def count(layer, inputs, output, counted=counted):
            counted.append(output.numel() * layer.weight[0].numel())

        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                layer.register_forward_hook(count)
        side = 32 // config.factor
        latents = torch.randn(1, config.latent_channels, side, side)
        network(torch.randn(1, 1, 32, 32), torch.tensor(0.5), latents)
        assert cost[1] == pytest.approx(sum(counted) / 1e6, rel=1e-6)


def test_all_ways_decode_the_same_latents():
    for config in AUTOENCODERS_PRICED.values():
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


# --- x-cdec-1 -------------------------------------------------------------------------------------


def decoders(edges: dict[str, list[float]] | None = None, **ratios: list[float]) -> dict:
    """Distances and edges of two seeds; well for two steps, but for changes."""
    found = {OWN: [2.4, 2.4], TRAINED_ON: [2.2, 2.2], ONE_STEP: [1.8, 1.9], TWO_STEPS: [1.6, 1.6]}
    found |= {{"longer": TRAINED_ON, "one": ONE_STEP, "two": TWO_STEPS, "own": OWN}[k]: v
              for k, v in ratios.items()}  # fmt: skip
    sharp = {OWN: [0.6, 0.6], TRAINED_ON: [0.7, 0.7], ONE_STEP: [0.8, 0.8], TWO_STEPS: [1.1, 0.9]}
    sharp |= edges or {}
    return {
        "decoders": {
            name: {"frechet_ratio_to_real": ratio, "sharpness": sharp[name]}
            for name, ratio in found.items()
        }
    }


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (decoders(), "supported"),
        (decoders(two=[1.6, 2.3]), "undecided"),  # not below the one trained on
        (decoders(own=[1.5, 1.5]), "undecided"),
        (decoders({TWO_STEPS: [1.4, 0.9]}), "undecided"),  # sharper than real ones, by as much
        (decoders(two=[2.2, 2.3]), "refuted"),
        (decoders(two=[1.6]), "undecided"),
    ],
)
def test_rule_of_decoding(results, word):
    if results["decoders"][TWO_STEPS]["frechet_ratio_to_real"] == [1.6]:
        for one in results["decoders"].values():
            one["frechet_ratio_to_real"] = one["frechet_ratio_to_real"][:1]
    assert BETTER_DECODING.decide(results) == word


@pytest.mark.parametrize(
    ("one", "two", "word"),
    [
        ([1.8, 1.9], [1.6, 1.6], "supported"),
        ([1.6, 1.6], [1.8, 1.9], "refuted"),
        ([1.8, 1.6], [1.7, 1.6], "undecided"),
    ],
)
def test_rule_of_the_second_step(one, two, word):
    assert SECOND_STEP.decide(decoders(one=one, two=two)) == word


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("decoder-claims")


@pytest.fixture(scope="module")
def finished(tiny_run) -> FinishedRun:
    return open_finished_run(tiny_run, None, torch.device("cpu"))


def test_two_decoders_of_one_autoencoder(tiny_run, out, finished, monkeypatch):
    """The encoder and the autoencoder's own decoder stay; a second call trains nothing."""
    conditions = Conditions((0,), True, tiny_run, out)
    vae, seconds = compressing_autoencoder(conditions, finished)
    assert seconds > 0 and vae.config.scale != 1
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    made = two_decoders(conditions, finished, vae, 0)
    assert all(p.equal(before[name]) for name, p in vae.state_dict().items())
    for name, p in made.longer.state_dict().items():
        if name.startswith("encoder."):
            assert p.equal(before[name])
    latents = torch.randn(2, 2, 4, 4)
    own, longer = by_itself(vae)(latents), by_itself(made.longer)(latents)
    assert own.shape == (2, 1, 32, 32) and not own.equal(longer)
    torch.testing.assert_close(own, vae.decode(latents / vae.config.scale + vae.config.shift))
    assert not longer.requires_grad and min(made.seconds) >= 0
    monkeypatch.setattr(decoder_networks, "fit_average", lambda *_: pytest.fail("again"))
    assert by_itself(two_decoders(conditions, finished, vae, 0).longer)(latents).equal(longer)


def test_what_training_on_asks(tiny_run, out, finished):
    """The squared error of an image, of the latents that the encoder has drawn."""
    conditions = Conditions((0,), True, tiny_run, out)
    vae, _ = compressing_autoencoder(conditions, finished)
    job = decoder_networks.decoder_job(conditions, finished, "asked", 0)
    losses, _ = decoder_networks.longer_loss(job, vae)(StepRNG((0, LONGER, 0), range(8)))
    index = finished.source.draw(8, StepRNG((0, LONGER, 0), range(8)).generator())
    x = finished.source.pixels(index)
    with torch.no_grad():
        best = vae.decode(vae.encode(x)[0])
    assert losses.shape == (8,)
    torch.testing.assert_close(losses, (best - x).square().sum((1, 2, 3)), rtol=0.2, atol=5)


def test_decoders_run(tiny_run, out):
    found = []
    for name in ("x-cdec-1", "x-cdec-1-steps"):
        words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "2", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / "fast" / f"{name}.png").exists()
        found.append(json.loads((out / "fast" / f"{name}.json").read_text())["results"])
    assert found[0] == found[1] and found[0]["training_seconds"] > 0
    scores = found[0]["decoders"]
    assert list(scores) == [OWN, TRAINED_ON, ONE_STEP, TWO_STEPS]
    assert len(set(scores[OWN]["psnr"])) == 1 and len(set(scores[TWO_STEPS]["psnr"])) == 2
    assert scores[ONE_STEP] != scores[TWO_STEPS] and scores[OWN] != scores[TRAINED_ON]
    assert all(len(row) == len(found[0]["table"]["columns"]) for row in found[0]["table"]["rows"])


# --- x-cdec-3 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "word"),
    [
        ([2.4, 2.4], [2.4, 2.3], "supported"),
        ([2.4, 2.4], [2.5, 2.3], "undecided"),
        ([2.4, 2.4], [2.5, 2.41], "refuted"),
        ([2.4], [2.3], "undecided"),
    ],
)
def test_rule_of_the_drop_in(own, other, word):
    found = {BY_ITS_OWN: [[0.99, r] for r in own], BY_ANOTHER: [[0.981, r] for r in other]}
    assert DROP_IN.decide({"decoded": found}) == word
    worse = {name: [[0.97, r] for _, r in each] for name, each in found.items()}
    unread = DROP_IN.decide({"decoded": found | {BY_ANOTHER: worse[BY_ANOTHER]}})
    assert unread == ("refuted" if word == "refuted" else "undecided")


def test_only_the_decoder_is_another(tiny_run, out, finished):
    conditions = Conditions((0,), True, tiny_run, out)
    other, seconds = consistent_pipeline(conditions, finished, 0)
    again, _ = consistent_pipeline(conditions, finished, 0)
    seeds_own, _ = consistent_pipeline(conditions, finished, 1)
    own = finished.pipeline
    assert own.decoder is None and other.mmdit is own.mmdit and other.vae is own.vae
    latents = own(["a bold seven"], output="latent")
    assert (other.decode(latents) == again.decode(latents)).all() and seconds >= 0
    assert (other.decode(latents) != own.decode(latents)).any()
    assert (other.decode(latents) != seeds_own.decode(latents)).any()


def test_drop_in_runs(tiny_run, out):
    words = ["x-cdec-3", "--run", str(tiny_run), "--out", str(out), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    results = json.loads((out / "fast" / "x-cdec-3.json").read_text())["results"]
    assert (out / "fast" / "x-cdec-3.png").exists() and results["training_seconds"] > 0
    own, other = results["decoded"].values()
    assert len(own) == len(other) == 2 and own != other and own[0] != own[1]
