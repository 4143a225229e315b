"""How many channels: the rules, autoencoders and transformers in their latents, and that the
experiments run."""

import json
import math
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_latents
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import open_main_run
from nanosd3.claims.sd3_channels import gains
from nanosd3.claims.sd3_latents import CHANNEL_DEPTHS, CHANNELS, some_digits, trained_latents
from nanosd3.cli import run_main

# --- rules on made-up numbers ---------------------------------------------------------------------


def rebuilt(psnr=(20.0, 22.0, 24.0), ratio=(2.0, 1.5, 1.2), wobble=0.1, seeds=3) -> dict:
    """Reconstructions; seeds differ by `wobble` times their number, to and fro."""
    found = {}
    for i, (channels, decibels, distance) in enumerate(zip(CHANNELS, psnr, ratio, strict=True)):
        moves = [wobble * k * (-1) ** (i + k) for k in range(seeds)]
        found[str(channels)] = {"psnr": [decibels + m for m in moves],
                                "ratio": [distance + m / 10 for m in moves]}  # fmt: skip
    return {"channels": found}


def drawn(shallow: list[float], deep: list[float]) -> dict:
    """Samples of each depth in latents of most channels, so many times better than of fewest."""
    found = {}
    for depth, times in zip(CHANNEL_DEPTHS, (shallow, deep), strict=True):
        better = [6.0 / x for x in times]
        found[str(depth)] = {"2": {"ratio": [6.0] * len(times)}, "8": {"ratio": better}}
    return {"depths": found}


CASES = {
    "x-sd3-channels": [
        (rebuilt(), "supported"),
        (rebuilt(psnr=(20.0, 22.0, 22.1)), "undecided"),
        (rebuilt(ratio=(2.0, 1.5, 1.49)), "undecided"),
        (rebuilt(psnr=(20.0, 22.0, 21.0)), "refuted"),
        (rebuilt(psnr=(23.0, 22.0, 24.0)), "refuted"),
        (rebuilt(ratio=(2.0, 1.5, 1.6)), "refuted"),
        (rebuilt(seeds=1), "undecided"),
        (rebuilt(psnr=(23.0, 22.0, 21.0), seeds=1), "undecided"),
    ],
    "x-sd3-channels-size": [
        (drawn([0.9, 1.0, 1.05], [1.2, 1.3, 1.4]), "supported"),
        (drawn([0.5, 0.6, 0.5], [1.2, 1.3, 1.4]), "supported"),
        (drawn([1.1, 1.12, 1.13], [1.2, 1.3, 1.4]), "undecided"),  # the shallower gains, too
        (drawn([0.9, 1.0, 1.05], [0.99, 1.3, 1.01]), "undecided"),
        (drawn([0.7, 0.7, 0.7], [0.95, 1.0, 1.05]), "undecided"),  # it does not lose
        (drawn([1.2, 1.3, 1.4], [1.0, 1.1, 1.15]), "refuted"),
        (drawn([0.7, 0.6, 0.5], [0.9, 0.8, 0.85]), "refuted"),
        (drawn([0.9], [1.3]), "undecided"),
        (drawn([1.3], [0.9]), "undecided"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


def test_gains():
    results = drawn([2.0, 0.5], [1.0, math.e])
    assert gains(results, 1) == pytest.approx([math.log(2), -math.log(2)])
    assert gains(results, 2) == pytest.approx([0.0, 1.0])


# --- latents --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tiny_run, tmp_path_factory):
    conditions = Conditions((0,), True, Path(tiny_run), tmp_path_factory.mktemp("channels"))
    finished = open_main_run(conditions)
    return conditions, finished, some_digits(finished)


def test_images(material, monkeypatch):
    """The first of the training images, and all that are held out."""
    _, finished, _ = material
    monkeypatch.setattr(sd3_latents, "IMAGES_USED", 100)
    source, whole = some_digits(finished), finished.source
    assert (source.trained, source.count) == (100, 100 + whole.count - whole.trained)
    assert source.pixels(torch.arange(100)).equal(whole.pixels(torch.arange(100)))
    assert source.texts == whole.texts


def test_latents(material):
    """Encoded by the autoencoder with these channels, normalised by what was measured of it."""
    conditions, finished, source = material
    latents = trained_latents(conditions, finished, source, 8, 0)
    index = torch.arange(20)
    mean, _ = latents.features.latents(index)
    assert mean.shape == (20, 8, 8, 8)
    expected, _ = latents.vae.encode(source.pixels(index))
    torch.testing.assert_close(mean, expected, atol=2e-3, rtol=2e-3)  # kept in half precision
    normed = latents.features.normalise(mean)
    torch.testing.assert_close(normed, latents.vae.normalise(mean))
    assert latents.seconds > 0
    mine, theirs = (x[source.texts[0]][0] for x in (latents.features, finished_text(finished)))
    torch.testing.assert_close(mine, theirs)  # the finished run's text


def finished_text(finished) -> dict:
    context, pooled = finished.pipeline.encode_text(finished.source.texts[:1])
    return {finished.source.texts[0]: (context[0], pooled[0])}


def test_reconstruction(material):
    """What is decoded is what was encoded: a perfect autoencoder has the real images' distance."""
    conditions, finished, source = material
    latents = trained_latents(conditions, finished, source, 4, 1)
    vae = latents.vae
    perfect = type("Perfect", (), {
        "encode": lambda self, x: (x, x), "normalise": lambda self, x: 3 * x + 1,
        "denormalise": lambda self, x: (x - 1) / 3, "decode": lambda self, x: x})()  # fmt: skip
    found = sd3_latents.reconstruction_of(
        conditions, finished, sd3_latents.TrainedLatents(perfect, latents.job, latents.features)
    )
    assert found["psnr"] > 40 and found["frechet_ratio_to_real"] == pytest.approx(1)
    again = sd3_latents.reconstruction_of(
        conditions, finished, sd3_latents.TrainedLatents(vae, latents.job, latents.features)
    )
    assert again == found  # measured once


def test_transformers(material):
    conditions, finished, source = material
    latents = trained_latents(conditions, finished, source, 2, 0)
    for depth in CHANNEL_DEPTHS:
        network = sd3_latents.transformer_in(conditions, finished, latents, depth)
        config = network.model.config
        assert (config.depth, config.latent_channels, config.patch_size) == (depth, 2, 2)
        images = network.features.pipeline(network.model, finished.device)(["1"], steps=2)
        assert images.shape == (1, 28, 28)
        vae = network.features.pipeline(network.model, finished.device).vae
        assert vae is latents.vae


# --- the experiments run --------------------------------------------------------------------------


def test_runs(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sd3_latents, "IMAGES_USED", 100)
    found = {}
    for name in CASES:
        words = [name, "--run", str(tiny_run), "--out", str(tmp_path), "--seeds", "1", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (tmp_path / "fast" / f"{name}.png").stat().st_size > 5000
        found[name] = json.loads((tmp_path / "fast" / f"{name}.json").read_text())["results"]
        table = found[name]["table"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    rebuilt_ones, samples = (found[name] for name in CASES)
    assert list(rebuilt_ones["channels"]) == ["2", "4", "8"]
    assert [row[1] for row in rebuilt_ones["table"]["rows"]] == ["128", "256", "512"]
    for channels, ratio in samples["bound"].items():
        assert ratio == rebuilt_ones["channels"][channels]["ratio"]
    assert len({one["psnr"][0] for one in rebuilt_ones["channels"].values()}) == 3
    ratios = [one["ratio"][0] for by in samples["depths"].values() for one in by.values()]
    assert len({*ratios}) == 4 and min(ratios) > 0
    networks = sorted(path.name for path in (tmp_path / "fast" / "networks").iterdir())
    assert networks == sorted(
        [f"autoencoder-{c}-0" for c in CHANNELS]
        + [f"channels-{c}-depth-{depth}-0" for c in (2, 8) for depth in CHANNEL_DEPTHS]
    )
