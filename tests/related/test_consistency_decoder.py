"""The Consistency Decoder: the published constants, its network, decoding in steps, its command."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3 import generate
from nanosd3.cli import run_main
from nanosd3.flow import interpolate
from nanosd3.pipeline import Pipeline
from nanosd3.related import __main__ as related
from nanosd3.related.consistency import edm_form
from nanosd3.related.consistency_decoder import (
    DECODING_TIMES,
    PUBLISHED_LEVELS,
    ConsistencyDecoder,
    decode_in_steps,
    published_alpha_bar,
    published_latents,
    published_scalings,
    rectified_time,
)
from nanosd3.related.train_consistency_decoder import open_decoder

F64 = torch.float64


def test_published_schedule():
    """sigma 43.8 and 1.015 at the two levels, which are t = 0.978 and 0.504."""
    alpha_bar = published_alpha_bar()
    assert len(alpha_bar) == 1024 and (alpha_bar.diff() < 0).all() and (alpha_bar > 0).all()
    at = alpha_bar[list(PUBLISHED_LEVELS)]
    sigma = (1 / at - 1).sqrt()
    assert sigma.tolist() == [pytest.approx(43.8, abs=0.3), pytest.approx(1.015, abs=0.003)]
    times = rectified_time(at).tolist()
    assert times == [pytest.approx(t, abs=5e-4) for t in DECODING_TIMES[:2]]


def test_published_scalings_are_edms():
    """The same answer as EDM's form of rectified flow, for the same image and the same noise."""
    alpha_bar = published_alpha_bar()[[1008, 512, 10]]
    x0, noise = torch.randn(2, 3, 5, dtype=F64).unbind(0)
    network = torch.sin
    x = alpha_bar.sqrt()[:, None] * x0 + (1 - alpha_bar).sqrt()[:, None] * noise
    c_skip, c_out, c_in = (c[:, None] for c in published_scalings(alpha_bar))
    theirs = c_skip * x + c_out * network(c_in * x)
    t = rectified_time(alpha_bar)
    z = interpolate(x0, noise, t)
    skip, out, inside = (c[:, None] for c in edm_form(t))
    torch.testing.assert_close(theirs, skip * z + out * network(inside * z))


def test_published_latents():
    latents = torch.ones(1, 4, 2, 2)
    seen = published_latents(latents)[0, :, 0, 0]
    mean, std = (0.3886, 0.0225, 0.0738, -0.0171), (0.9654, 1.0440, 0.7615, 0.7702)
    expected = [(0.18215 - m) / s for m, s in zip(mean, std, strict=True)]
    torch.testing.assert_close(seen, torch.tensor(expected))


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    net = ConsistencyDecoder(1, 4, (8, 16, 16))
    assert not net(torch.randn(2, 1, 16, 16), torch.rand(2), torch.randn(2, 4, 4, 4)).any()
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    return net


def test_everything_reaches_the_answer(decoder):
    z, t, latents = torch.randn(2, 1, 16, 16), torch.rand(2), torch.randn(2, 4, 4, 4)
    out = decoder(z, t, latents)
    assert out.shape == z.shape
    for other in ((z + 1, t, latents), (z, t / 2, latents), (z, t, latents + 1)):
        assert (decoder(*other) - out).abs().max() > 1e-4
    out.square().sum().backward()
    for block in decoder.up_blocks:
        half = block.conv1.in_channels // 2  # from there on: the skip across the U
        assert block.conv1.weight.grad[:, half:].abs().max() > 0
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())
    torch.testing.assert_close(decoder(z, t[0], latents)[0], out[0])


def test_steps(decoder):
    """From nothing: the first step sees noise of 0.978, the second its answer and new noise."""
    latents, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 1, 16, 16)
    seen = []

    def watched(z, t, latents):
        seen.append((z, float(t)))
        return decoder(z, t, latents)

    x = decode_in_steps(watched, latents, noise)
    (first, t1), (second, t2) = seen
    assert (t1, t2) == (pytest.approx(0.978), pytest.approx(0.504))
    torch.testing.assert_close(first, 0.978 * noise[0])
    x0 = (first - 0.978 * decoder(first, torch.tensor(0.978), latents)).clamp(-1, 1)
    torch.testing.assert_close(second, (1 - 0.504) * x0 + 0.504 * noise[1])
    end = (second - 0.504 * decoder(second, torch.tensor(0.504), latents)).clamp(-1, 1)
    torch.testing.assert_close(x, end)
    assert float(x.detach().abs().max()) <= 1
    with pytest.raises(ValueError, match="zip"):
        decode_in_steps(decoder, latents, noise, ts=(1.0, 0.0))


# --- the command ----------------------------------------------------------------------------------


command = partial(status, related.main, "consistency-decoder")


@pytest.fixture(scope="module")
def decoder_run(tiny_run, tmp_path_factory):
    """For the tiny run, interrupted after its second step and resumed."""
    out = tmp_path_factory.mktemp("decoder") / "run"
    with interrupted_after(1):
        assert command("--run", tiny_run, "--out", out) == 130
    assert command("--run", tiny_run, "--out", out) == 0
    return out


def test_resumed_byte_for_byte(decoder_run, tiny_run, tmp_path):
    assert command("--run", tiny_run, "--out", tmp_path / "b") == 0
    file = "decoder.safetensors"
    assert (tmp_path / "b" / file).read_bytes() == (decoder_run / file).read_bytes()
    assert command("--run", tiny_run, "--out", tmp_path / "c", "--seed", 1) == 0
    assert (tmp_path / "c" / file).read_bytes() != (decoder_run / file).read_bytes()


def test_what_it_measures(decoder_run, tiny_run, tmp_path):
    metrics = json.loads((decoder_run / "metrics.json").read_text())
    assert metrics["evaluations"] == 8 == metrics["main_model"]["evaluations"]
    assert len(metrics["decoded"]) == 3 and (decoder_run / "samples.png").exists()
    for scores in metrics["decoded"].values():
        assert scores["psnr"] > 0 and scores["sharpness"] > 0
        assert scores["images_per_second"] > 0
    assert command("--run", tiny_run, "--out", tmp_path / "strong", "--compress") == 0
    strong = json.loads((tmp_path / "strong" / "metrics.json").read_text())
    assert strong["evaluations"] == 2 and strong["main_model"]["evaluations"] == 1
    assert strong["stages"].keys() >= {"autoencoder", "decoder"}
    assert strong["decoded"].keys() == metrics["decoded"].keys()
    own, _, two = strong["decoded"].values()
    assert strong["main_model"]["psnr"] == own["psnr"] and strong["psnr"] == two["psnr"]


def test_generate_decodes_with_it(decoder_run, tiny_run, tmp_path):
    """The same latents; another decoder, with the same noise for every image."""
    out = tmp_path / "x.npy"
    words = ["3", "--run", str(tiny_run), "--out", str(out), "--count", "2"]
    assert run_main(lambda: generate.main(words)) == 0
    usual = np.load(out)
    assert run_main(lambda: generate.main([*words, "--decoder", str(decoder_run)])) == 0
    assert (np.load(out) != usual).any()
    pipeline = Pipeline.load(tiny_run)
    pipeline.decoder = open_decoder(decoder_run, tiny_run, torch.device("cpu"))
    assert (pipeline(["3"] * 2) == np.load(out)).all()
    latents = pipeline(["3", "4"], output="latent")
    x = pipeline.decoder(latents)
    assert x.shape == (2, 1, 32, 32) and float(x.abs().max()) <= 1
    torch.testing.assert_close(pipeline.decoder(latents[1:]), x[1:], atol=1e-5, rtol=0)


def test_it_is_no_model_by_itself(decoder_run, tmp_path, capsys):
    words = ("3", "--run", decoder_run, "--out", tmp_path / "x.png")
    assert "is a finished run of `python -m nanosd3.related consistency-decoder`" in refused(
        capsys, generate.main, *words)  # fmt: skip


def test_refused_decoders(decoder_run, tiny_run, tmp_path, capsys):
    def line(run, decoder):
        words = ("3", "--run", run, "--out", tmp_path / "x.png", "--decoder", decoder)
        return refused(capsys, generate.main, *words)

    assert "no such run folder" in line(tiny_run, tmp_path / "nothing")
    assert "holds no finished decoder; `python -m nanosd3.related" in line(tiny_run, tiny_run)
    other = tmp_path / "other"
    assert command("--run", tiny_run, "--out", other, "--compress") == 0
    assert "is for an autoencoder of its own (--compress)" in line(tiny_run, other)
    content = json.loads((other / "run.json").read_text())
    content |= {"compress": False, "autoencoder": "0" * 64}
    (other / "run.json").write_text(json.dumps(content))
    assert "is for the latents of another autoencoder than that of" in line(tiny_run, other)
    assert not (tmp_path / "x.png").exists()
