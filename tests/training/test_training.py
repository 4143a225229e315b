"""Training any config on digits or on a folder of images, and fine-tuning."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_mnist
from nanosd3 import config as configs
from nanosd3 import generate, train, weights
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS, Recipe, Sampling, official
from nanosd3.data import sources
from nanosd3.data.image_folder import read_folder
from nanosd3.data.mnist import load_images
from nanosd3.flow import shift
from nanosd3.measure import memory_check
from nanosd3.mmdit import MMDiT
from nanosd3.official import own_runs
from nanosd3.official.own_runs import open_run_transformer
from nanosd3.pipeline import Pipeline
from nanosd3.storage.files import read_tensors
from nanosd3.storage.run import Run
from nanosd3.training import cached_features, loop, optimizer, train_flow

TINY = CONFIGS["tiny"]
QUICK = replace(
    TINY.training,
    autoencoder=Recipe(4, 2, 1e-3, 1, 0.0),
    flow=Recipe(6, 4, 1e-3, 1, 0.0),
    evaluate=20,
)
COLOUR = replace(  # tiny, for colour images
    TINY,
    name="colour",
    padding=0,
    vae=replace(TINY.vae, image_channels=3),
    mmdit=replace(TINY.mmdit, grid=8),
    training=replace(QUICK, flow=Recipe(12, 4, 1e-3, 1, 0.0)),
)
STAND_IN = replace(  # like the official configs: no recipe, wide text, 16 latent channels
    official("stand-in", replace(TINY.mmdit, latent_channels=16, context_dim=160, pooled_dim=112),
             Sampling(4, 3.0, 3.0, "euler"), 64),
    vae=replace(TINY.vae, image_channels=3, latent_channels=16, channels=(8, 8, 16, 16)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_configs(monkeypatch):
    monkeypatch.setitem(CONFIGS, "colour", COLOUR)
    monkeypatch.setitem(CONFIGS, "stand-in", STAND_IN)
    large = replace(QUICK, train_images=300, test_images=100)
    monkeypatch.setattr(configs, "LARGE_TRAINING", large)
    monkeypatch.setattr(sources, "SHARE_HELD_OUT", 0.2)


def paint(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    pixels = np.full((*size, 3), colour, np.uint8)
    pixels[: size[0] // 2, : size[1] // 2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty images, wide, tall and square, a broken one and one without a caption."""
    root = tmp_path / "pictures"
    for i in range(20):
        name, colour = [("red", (200, 0, 0)), ("green", (0, 200, 0))][i % 2]
        paint(root / f"{i}.png", [(40, 40), (30, 60), (50, 26)][i % 3], (*colour[:2], i))
        (root / f"{i}.txt").write_text(f"a {name} square\nthe picture {i} is {name}\n")
    (root / "broken.png").write_bytes((root / "1.png").read_bytes()[:50])
    (root / "broken.txt").write_text("broken")
    paint(root / "silent.png", (32, 32), (1, 2, 3))
    return root


def run(*arguments: object) -> int:
    return run_main(lambda: train.main([*map(str, arguments), "--config", "colour"]))


def test_a_folder_of_pictures(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--data", folder, "--out", out, "--prompt", "a red square") == 0
    printed = capsys.readouterr()
    assert "16 images" in printed.out and "4 more held out, 2 skipped" in printed.out
    assert "broken.png" in printed.err and "silent.png" in printed.err
    assert printed.out.count("x32") >= 1 and "buckets" in printed.out
    log = Run.read(out).read_log()
    assert [len(e["skipped_files"]) for e in log if "skipped_files" in e] == [2]
    for name in ("samples.png", "loss.png", "metrics.json", "preview-00000012.png"):
        assert (out / name).stat().st_size > 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["validation_ema"]) == train_flow.VALIDATION_TIMES
    assert "found" in metrics["stages"]["clip"]
    picture = tmp_path / "x.png"
    for size in ((), ("--height", "24", "--width", "40")):
        command = ["a red square", "--run", str(out), "--count", "1", "--out", str(picture)]
        assert run_main(lambda c=(*command, *size): generate.main(list(c))) == 0
    assert Image.open(picture).mode == "RGB"
    assert run("--data", folder, "--out", out) == 0 and "is finished" in capsys.readouterr().out


def test_batches_have_one_size_and_all_sizes_are_drawn(folder):
    source = sources.Pictures(read_folder(folder), COLOUR)
    sizes = {source.pixels(source.draw(4, loop.rng(step))).shape[2:] for step in range(20)}
    assert len(sizes) == 3
    assert sources.Pictures(read_folder(folder), COLOUR).fingerprint == source.fingerprint
    drawn = torch.cat([source.draw(4, loop.rng(step)) for step in range(60)])
    assert set(drawn.tolist()) == set(
        range(source.trained)
    )  # all training images, no validation images
    texts = {source.texts[i] for u in (0.1, 0.9)
             for i in source.captions(drawn, torch.full((240,), u)).tolist()}  # fmt: skip
    own = {text for picture in source.pictures[: source.trained] for text in picture.captions}
    assert texts == own


def test_only_what_changed_is_encoded_again(folder, tmp_path, unobserved, monkeypatch, capsys):
    """The cache survives --fresh, and content that did not change is read from it."""
    encoders = tmp_path / "encoders"
    assert run("--data", folder, "--out", encoders) == 0
    seen = {"images": 0, "texts": 0}
    posterior = Pipeline.posterior

    def counted(self, x):
        seen["images"] += len(x)
        return posterior(self, x)

    original = weights.Pipeline.__init__

    def init(self, *arguments):
        original(self, *arguments)
        encode = self.text.encode
        self.text.encode = lambda texts, *more: (
            seen.update(texts=seen["texts"] + len(texts)), encode(texts, *more)
        )[1]  # fmt: skip

    monkeypatch.setattr(Pipeline, "posterior", counted)
    monkeypatch.setattr(Pipeline, "__init__", init)
    options = ["--data", folder, "--out", tmp_path / "run", "--weights", encoders]
    prompt = ["--prompt", "a red square"]
    assert run(*options, *prompt) == 0
    assert seen["images"] == 20 and seen["texts"] == 23  # captions, and the empty one
    seen.update(images=0, texts=0)
    paint(folder / "3.png", (44, 44), (9, 9, 99))
    (folder / "4.txt").write_text("something new\n")
    assert run(*options, *prompt) == 2
    line = capsys.readouterr().err
    assert "holds a run with different data: 1 with other pixels (3.png), " in line
    assert "1 with other captions (4.png)" in line
    assert run(*options, *prompt, "--fresh") == 0
    assert seen == {"images": 1, "texts": 1}


def test_killed_while_encoding(folder, tmp_path, unobserved, monkeypatch):
    """Finished shards are not computed again."""
    monkeypatch.setattr(cached_features, "SHARD", 4)
    calls = []
    add = cached_features.Shards.add

    def counted(self, keys, rows):
        calls.append(len(keys))
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, keys, rows)

    monkeypatch.setattr(cached_features.Shards, "add", counted)
    assert run("--data", folder, "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "samples.png").exists() and len(calls) == 9
    assert run("--data", folder, "--out", tmp_path / "run") == 0
    assert sum(calls) - calls[8] == 20 + 23  # each once, except the interrupted shard


def test_any_config_learns_digits(tmp_path, unobserved, capsys):
    """Like the full-size configs: digits enlarged, in three channels, with their own autoencoder
    and small text encoders padded with zeros."""
    out = tmp_path / "run"
    assert train_mnist.main(["--config", "stand-in", "--out", str(out)]) == 0
    pipeline = Pipeline.load(out)
    assert pipeline(["the digit 3"]).shape == (1, 64, 64, 3)
    context, pooled = pipeline.encode_text("the digit 3")
    text = pipeline.config.text
    assert context.shape[2] == 160 and pooled.shape[1] == 112
    widths = [text.clip_l.width + text.clip_g.width, text.t5.width]
    assert context[:, : text.clip_l.length, widths[0] :].abs().max() == 0
    assert context[:, text.clip_l.length :, widths[1] :].abs().max() == 0
    assert context[:, text.clip_l.length :, : widths[1]].abs().min() > 0
    assert "match their prompt" in capsys.readouterr().out


def test_digits_are_enlarged():
    images = load_images().first(300, 100)
    source = sources.Digits(images, STAND_IN)
    x = source.pixels(torch.tensor([0, 1]))
    assert x.shape == (2, 3, 64, 64) and x[:, 0].equal(x[:, 2])
    small = sources.Digits(images, TINY).pixels(torch.tensor([0, 1]))
    shrunk = torch.nn.functional.avg_pool2d(x[:, :1], 2)
    assert (shrunk - small).abs().mean() < 0.1


def test_shift_depends_on_the_number_of_pixels(monkeypatch):
    """The config's shift at the config's size; half of it at half the side (eq. 23)."""
    config = replace(STAND_IN, image_size=64)  # latents are 8 times smaller
    assert train_flow.time_shift(config, (8, 8)) == 3.0
    assert train_flow.time_shift(config, (4, 4)) == 1.5
    assert train_flow.time_shift(config, (4, 16)) == 3.0
    t = torch.rand(100)
    assert shift(t, train_flow.time_shift(CONFIGS["mnist"], (8, 8))).equal(t)


# --- fine-tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["run", "single", "diffusers"])
def test_fine_tuning_starts_from_the_given_weights(tiny_run, tmp_path, unobserved, form):
    """With a tiny learning rate the weights stay as they are, and the encoders are used too."""
    path = tiny_run
    if form != "run":
        path = tmp_path / ("model.safetensors" if form == "single" else "model")
        command = ["export", str(tiny_run), "--layout", form, "--out", str(path)]
        assert weights.main(command) == 0
    out = tmp_path / "tuned"
    command = ["--config", "tiny", "--init", str(path), "--out", str(out), "--lr", "1e-9"]
    assert train_mnist.main([*command, "--steps", "3"]) == 0
    ours, theirs = (read_tensors(f / "flow.safetensors") for f in (out, tiny_run))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
    assert not (out / "autoencoder.safetensors").exists()
    again = weights.load(out)
    assert np.abs(again(["7"]).astype(int) - weights.load(tiny_run)(["7"])).max() <= 1
    exported = tmp_path / "tuned.safetensors"
    assert weights.main(["export", str(out), "--layout", "single", "--out", str(exported)]) == 0
    assert np.array_equal(weights.load(exported)(["7"]), again(["7"]))
    command = ["7", "--run", str(out), "--out", str(tmp_path / "7.png")]
    assert run_main(lambda: generate.main(command)) == 0


def test_unfinished_run_can_be_exported_and_sampled(run_before_flow, tmp_path, monkeypatch):
    def rng(seed, stage, step, *row):
        if (stage, step, *row) == ("flow", 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(seed, stage, step, *row)

    original = loop.rng
    out, file = tmp_path / "run", tmp_path / "so_far.safetensors"
    shutil.copytree(run_before_flow, out)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "rng", rng)
        command = ["--config", "tiny", "--out", str(out)]
        assert run_main(lambda: train_mnist.main(command)) == 0
    assert "flow" not in Run.read(out).stages
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "__init__", None)  # no network is made to read one
        state = open_run_transformer(Run.read(out))[1]
    buffer = read_tensors(run_before_flow / "flow.safetensors")["pos_embed"]
    assert torch.equal(state["pos_embed"].read(), buffer)
    assert weights.main(["export", str(out), "--layout", "single", "--out", str(file)]) == 0
    assert weights.load(file)(["7"]).shape == (1, 28, 28)


def test_positions_of_an_unfinished_run(tmp_path, monkeypatch):
    """No state holds them; they are those of the network, whatever its grid."""
    mmdit = replace(CONFIGS["tiny"].mmdit, grid=6, grid_sample=4, grid_span=8)
    monkeypatch.setattr(own_runs, "finished_config", lambda *_, **__: SimpleNamespace(mmdit=mmdit))
    monkeypatch.setattr(own_runs.training_state, "averages", lambda *_: {})
    state = open_run_transformer(SimpleNamespace(folder=tmp_path, stages={}))[1]
    assert torch.equal(state["pos_embed"].read(), MMDiT(mmdit).pos_embed)


def fails(capsys, main, *arguments: object) -> str:
    """The error line of a command that must fail."""
    assert run_main(lambda: main([str(a) for a in arguments])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_bad_requests(tiny_run, folder, tmp_path, capsys):
    out = tmp_path / "none"
    mnist = (capsys, train_mnist.main, "--out", out, "--config")
    assert "does not fit config mnist: mmdit pos_embed: " in fails(
        *mnist, "mnist", "--init", tiny_run
    )
    assert "no such file or folder" in fails(*mnist, "tiny", "--weights", tmp_path / "x")
    assert "no such file or folder" in fails(*mnist, "tiny", "--init", tmp_path / "x")
    assert "latents have 4 channels, config stand-in needs 16" in fails(
        *mnist, "stand-in", "--weights", tiny_run
    )
    assert "cannot be divided among 1 processes x 3" in fails(*mnist, "tiny", "--accumulate", 3)
    assert "--lr must be a number above 0" in fails(*mnist, "tiny", "--lr", "nan")
    assert "start with `torchrun" in fails(*mnist, "tiny", "--parallel", "ddp")
    if not torch.cuda.is_available():
        assert "is for GPUs" in fails(*mnist, "tiny", "--precision", "bfloat16")
    own = (capsys, train.main, "--out", out, "--config", "colour", "--data")
    (tmp_path / "empty").mkdir()
    assert "no images" in fails(*own, tmp_path / "empty")
    for text in folder.glob("*.txt"):
        text.unlink()
    assert "caption" in fails(*own, folder)
    assert not out.exists()


def test_every_option_of_training_reaches_the_run(tmp_path, one_step, unobserved):
    """Steps, batch, learning rate, decay and optimizer are written to the run's config."""
    options = ["--steps", "5", "--batch", "6", "--lr", "0.002", "--decay", "constant"]
    options += ["--optimizer", "muon"]
    out = tmp_path / "run"
    assert train_mnist.main(["--config", "tiny", "--out", str(out), *options]) == 0
    recipe = Run.read(out).identity["config"]["training"]["flow"]
    asked = {"steps": 5, "batch": 6, "lr": 0.002, "decay": "constant", "optimizer": "muon"}
    assert {key: recipe[key] for key in (*asked, "warmup")} == asked | {"warmup": 1}
    assert len(Run.read(out).read_log("flow")) == 5
    constant = Recipe(100, 1, 0.1, 10, 0.0, "constant")
    assert [optimizer.learning_rate(s, constant) for s in (0, 9, 10, 99)] == [0.01, 0.1, 0.1, 0.1]


def test_memory_is_checked_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_check, "memory_found", lambda: (0.001, "free here"))
    command = ["--config", "tiny", "--out", str(tmp_path / "run")]
    assert run_main(lambda: train_mnist.main(command)) == 2
    assert "found 0 GB free here: not enough" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
