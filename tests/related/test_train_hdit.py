"""The command `python -m nanosd3.related hdit`, on a tiny run, and its --sample."""

import json
import math
import shutil
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3.config import CONFIGS
from nanosd3.config_types import Sampling
from nanosd3.data.sources import enlarged
from nanosd3.flow import shift
from nanosd3.related import __main__ as related
from nanosd3.related import command as related_command
from nanosd3.related import hdit_system
from nanosd3.related.finished_run import open_finished_run
from nanosd3.related.hdit import HDiT, HDiTConfig, HDiTLevel, hdit_loss
from nanosd3.related.hdit_system import HDIT_RECIPES, HDiTSystem, hdit_config
from nanosd3.related.train_hdit import (
    MIDDLE_NOISE,
    SIGMA_DATA,
    Pixels,
    drawn_images,
    hdit_step,
    normalised_pixels,
    pooled_text,
    sample_pixels,
)
from nanosd3.request import seeded_noise
from nanosd3.storage.run import Run
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job

command = partial(status, related.main, "hdit")


@pytest.fixture(scope="module")
def finished(tiny_run):
    return open_finished_run(tiny_run, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def hdit_run(tiny_run, tmp_path_factory):
    """A tiny HDiT, interrupted after its second step and resumed."""
    out = tmp_path_factory.mktemp("related") / "hdit"
    with interrupted_after(2):
        assert command("--run", tiny_run, "--out", out) == 130
    assert not (out / "hdit.safetensors").exists() and list(out.glob("state-*"))
    assert command("--run", tiny_run, "--out", out) == 0
    return out


# --- pixels and text ----------------------------------------------------------------------------


@pytest.fixture
def pixels(finished, hdit_run) -> Pixels:
    return normalised_pixels(finished.source, config_of(hdit_run, finished))


def config_of(run, finished):
    args = related_command.parse(HDiTSystem(), ["--run", str(finished.run.folder)])
    return HDiTSystem().config(args, finished)


def test_pixels(pixels, finished):
    """Enlarged to the config's side, of mean 0 and deviation 1; and back without a loss."""
    assert pixels.config.image_size == 32
    index = torch.arange(finished.source.trained)
    x = pixels[index]
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-4 and pixels.mean < -0.5
    images = pixels.to_uint8(x)
    assert torch.equal(images[:, 2:-2, 2:-2], finished.source.all_images[index])
    larger = Pixels(finished.source, pixels.config.__class__(**vars(pixels.config) | {
        "image_size": 64}), 0.5, 2.0)  # fmt: skip
    expected = enlarged(finished.source.all_images[:2], larger.config)
    torch.testing.assert_close(larger[torch.arange(2)], (expected - 0.5) / 2)
    assert expected.shape == (2, 1, 64, 64)


def test_pooled_text(finished):
    texts = [*finished.source.texts[:70]]
    expected = finished.pipeline.encode_text(texts)[1]
    torch.testing.assert_close(pooled_text(finished.pipeline, texts), expected)


# --- a training step ----------------------------------------------------------------------------


class Recorder:
    """A network that answers 1 everywhere, and notes what it is asked."""

    def __init__(self):
        self.z, self.t, self.text = [], [], []

    def __call__(self, z, t, text):
        for noted, x in ((self.z, z), (self.t, t), (self.text, text)):
            noted.append(x)
        return torch.ones_like(z)


@pytest.fixture
def job(hdit_run, finished) -> Job:
    config = config_of(hdit_run, finished)
    return Job(Run.read(hdit_run), config, finished.source, torch.device("cpu"), 0)


def test_a_step(job, pixels, finished):
    """The loss is the weighted one of images, noise and times that belong together."""
    pooled = torch.arange(len(finished.source.texts)).float()[:, None].expand(-1, 3) + 1
    model, rows = Recorder(), StepRNG((0, "hdit", 3), range(8))
    found = hdit_step(job, pixels, pooled, model, rows)
    (z,), (t,), (text,) = model.z, model.t, model.text
    noise = rows.noise(z.shape[1:])
    x0 = (z - t.view(-1, 1, 1, 1) * noise) / (1 - t.view(-1, 1, 1, 1))
    expected = hdit_loss(torch.ones_like(z), x0, noise, t, SIGMA_DATA)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert found.shape == (8,)
    images = job.source.draw(8, rows.generator())
    torch.testing.assert_close(x0, pixels[images], rtol=0, atol=1e-3)
    labels = finished.source.labels[images]
    for i, label in zip((text[:, 0] - 1).int().tolist(), labels.tolist(), strict=True):
        names = finished.source.images.names[label]
        if i >= 0:  # not dropped
            assert any(f" {n} " in f" {finished.source.texts[i]} " for n in names)


def test_rows_of_a_microbatch(job, pixels, finished):
    pooled = torch.randn(len(finished.source.texts), 3)
    whole = hdit_step(job, pixels, pooled, Recorder(), StepRNG((0, "hdit", 3), range(8)))
    half = hdit_step(job, pixels, pooled, Recorder(), StepRNG((0, "hdit", 3), range(4, 8)))
    assert torch.equal(half, whole[4:])


def test_text_is_dropped_and_noise_is_spread(job, pixels, finished):
    """A tenth of the texts are zeros; the median of the noise is MIDDLE_NOISE, its spread a
    factor e."""
    pooled = torch.ones(len(finished.source.texts), 3)
    model = Recorder()
    for step in range(100):
        hdit_step(job, pixels, pooled, model, StepRNG((0, "hdit", step), range(8)))
    text, t = torch.cat(model.text), torch.cat(model.t)
    assert 0.05 < (text == 0).all(1).float().mean() < 0.16
    assert ((text == 0).all(1) | (text == 1).all(1)).all()
    noise = (t / (1 - t)).log()
    assert noise.median().item() == pytest.approx(math.log(MIDDLE_NOISE), abs=0.1)
    assert noise.std().item() == pytest.approx(1, abs=0.1)


# --- sampling -----------------------------------------------------------------------------------


def lively_hdit() -> HDiT:
    torch.manual_seed(0)
    model = HDiT(HDiTConfig(1, 4, (HDiTLevel(16, 1, 3), HDiTLevel(16, 1, None)), 8, 16, 1, 5))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_samples_follow_the_guided_velocity(monkeypatch):
    """Euler's steps at moved times, towards the text and away from zeros; in batches."""
    model, way = lively_hdit().double(), Sampling(4, 1.7, 2.5, "euler")
    noise, text = torch.randn(5, 1, 8, 8).double(), torch.randn(5, 5).double()
    z = noise
    times = shift(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), 2.5)
    for t, after in pairwise(times):
        told, untold = model(z, t, text), model(z, t, torch.zeros_like(text))
        z = z + (after - t) * (untold + 1.7 * (told - untold))
    torch.testing.assert_close(sample_pixels(model, noise, text, way), z, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("nanosd3.related.train_hdit.at_once", lambda _: 2)
    torch.testing.assert_close(sample_pixels(model, noise, text, way), z, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_drawn_images(finished, pixels):
    """Each prompt its text, each image its noise; from pixels of mean 0 to uint8."""
    seen = {}

    class Still:
        config = HDiTConfig(1, 8, (), 8, 8, 1, 5)

        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, z, t, text):
            seen.update(text=text)
            return torch.zeros_like(z)

    prompts = ["3", "a bold 7", "a bold 7"]
    way = Sampling(2, 1.0, 1.0, "euler")
    images = drawn_images(Still(), pixels, finished.pipeline, prompts, 4, way)
    assert torch.equal(torch.from_numpy(images), pixels.to_uint8(seeded_noise((3, 1, 32, 32), 4)))
    expected = finished.pipeline.encode_text(prompts)[1]
    torch.testing.assert_close(seen["text"], expected)


# --- training by the command --------------------------------------------------------------------


def quick(monkeypatch):
    """Leave scores and pictures out."""
    scores = {"evaluations": 1, "prompt_accuracy": 0.0, "frechet_ratio_to_real": 0.0}
    monkeypatch.setattr(related_command, "pipeline_scores", lambda *_: scores)
    monkeypatch.setattr(hdit_system, "score_samples", lambda *_: scores)
    for name in ("grid_of_prompts", "save_beside_main"):
        monkeypatch.setattr(hdit_system, name, lambda *_: None)


def test_resumed_byte_for_byte(hdit_run, tiny_run, tmp_path, monkeypatch):
    quick(monkeypatch)
    assert command("--run", tiny_run, "--out", tmp_path / "b") == 0
    whole = (tmp_path / "b" / "hdit.safetensors").read_bytes()
    assert whole == (hdit_run / "hdit.safetensors").read_bytes()


def test_what_a_run_leaves(hdit_run):
    metrics = json.loads((hdit_run / "metrics.json").read_text())
    assert metrics["system"] == "hdit" and metrics["evaluations"] == 20  # 10, guided
    for scores in (metrics, metrics["main_model"]):
        assert 0 <= scores["prompt_accuracy"] <= 1 and scores["frechet_ratio_to_real"] > 0
        assert scores["frechet_floor_real"] > 0 and scores["images_per_second"] > 0
    assert metrics["training_seconds"] > 0 and metrics["thread_seconds"] > 0
    assert metrics["multiply_adds"] > 1e5
    picture = Image.open(hdit_run / "samples.png")
    assert picture.width > picture.height / 2 and not (hdit_run / "cache").exists()


def test_every_option_counts(tiny_run, hdit_run, tmp_path, monkeypatch):
    """Each option of the training gives other weights."""
    quick(monkeypatch)
    found = {"default": (hdit_run / "hdit.safetensors").read_bytes()}
    options = [("flat",), ("seed", 1), ("lr", 1e-4), ("steps", 2), ("batch", 4)]
    for name, *value in options:
        out = tmp_path / name
        assert command("--run", tiny_run, "--out", out, f"--{name}", *value) == 0
        found[name] = (out / "hdit.safetensors").read_bytes()
    assert len(set(found.values())) == len(found)


def test_guidance_counts(tiny_run, hdit_run, tmp_path, monkeypatch):
    """It changes no weights, but the samples and their evaluations."""
    for name in ("grid_of_prompts", "save_beside_main"):
        monkeypatch.setattr(hdit_system, name, lambda *_: None)
    before = json.loads((hdit_run / "metrics.json").read_text())
    out = tmp_path / "unguided"
    assert command("--run", tiny_run, "--out", out, "--guidance", 1) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["evaluations"] == 10
    assert metrics["frechet_distance"] != before["frechet_distance"]
    weights = [(folder / "hdit.safetensors").read_bytes() for folder in (out, hdit_run)]
    assert weights[0] == weights[1]


def test_fresh_leaves_nothing_behind(tiny_run, hdit_run, tmp_path, monkeypatch):
    quick(monkeypatch)
    folder = tmp_path / "again"
    shutil.copytree(hdit_run, folder)
    monkeypatch.setattr(hdit_system, "trained_hdit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("--run", tiny_run, "--out", folder, "--fresh", "--steps", 1)
    assert not (folder / "hdit.safetensors").exists()


def test_sizes():
    """The hourglass of the recipe, and the flat one: one level without a window."""
    hourglass, flat = (hdit_config("mnist", flat, CONFIGS["mnist"]) for flat in (False, True))
    assert [level.window is None for level in hourglass.levels] == [False, True]
    assert len(flat.levels) == 1 and flat.levels[0].window is None
    assert 64 % hourglass.multiple == 0 and hourglass.patch_size == flat.patch_size
    assert (hourglass.channels, hourglass.pooled_dim) == (1, 96)
    assert hdit_config("mnist", False, CONFIGS["small"]).channels == 3
    assert set(HDIT_RECIPES) == {(s, f) for s in ("mnist", "tiny") for f in (False, True)}


def test_refused_training(tiny_run, hdit_run, tmp_path, capsys):
    out = tmp_path / "out"

    def line(*words: object) -> str:
        return refused(capsys, related.main, "hdit", *words)

    assert "no such run folder; `python train_mnist.py`" in line("--run", out)
    common = ("--run", tiny_run, "--out", out)
    for scale in ("0.5", "nan", "inf"):
        assert "--guidance must be a number from 1 up" in line(*common, "--guidance", scale)
    assert "--lr must be a number above 0" in line(*common, "--lr", "nan")
    assert "--steps" in line(*common, "--steps", "0")
    assert not out.exists()
    taken = ("--run", tiny_run, "--out", hdit_run)
    assert "with flat False, not True" in line(*taken, "--flat")
    assert command(*taken) == 0
    assert "is finished" in capsys.readouterr().out
    said = refused(capsys, related.main, "consistency", "--run", hdit_run, "--out", out)
    assert "is a finished run of `python -m nanosd3.related hdit`" in said


# --- --sample -----------------------------------------------------------------------------------


def sampled(hdit_run, tiny_run, out, *words: object) -> np.ndarray:
    where = ("--model", hdit_run, "--run", tiny_run, "--out", out)
    assert command("--sample", "a bold 3", "7", *where, *words) == 0
    return np.load(out)


def test_samples_are_those_of_the_run(hdit_run, tiny_run, finished, pixels, tmp_path, capsys):
    """The same as by its network, for each prompt as many as were asked for."""
    found = sampled(hdit_run, tiny_run, tmp_path / "x.npy", "--count", 2, "--seed", 5)
    told = capsys.readouterr()
    assert "4 images: " in told.out and "warning" not in told.err and found.shape == (4, 32, 32)
    sampled(hdit_run, tiny_run, tmp_path / "x.npy", "--count", 1, "--sample", "a quixotic 7")
    assert "warning: words that occur in no training caption" in capsys.readouterr().err
    model = HDiT(hdit_config("tiny", False, finished.config))
    model.load_state_dict(load_file(hdit_run / "hdit.safetensors"))
    way = config_of(hdit_run, finished).sampling
    prompts = ["a bold 3", "a bold 3", "7", "7"]
    expected = drawn_images(model, pixels, finished.pipeline, prompts, 5, way)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_every_option_of_sampling_counts(hdit_run, tiny_run, tmp_path):
    found = {(): sampled(hdit_run, tiny_run, tmp_path / "x.npy", "--count", 1).tobytes()}
    for words in (("--steps", 3), ("--guidance", 4), ("--seed", 1)):
        images = sampled(hdit_run, tiny_run, tmp_path / "x.npy", "--count", 1, *words)
        found[words] = images.tobytes()
    assert len(set(found.values())) == len(found)


def test_a_flat_run_draws_too(tiny_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        quick(patch)
        words = ("--run", tiny_run, "--out", tmp_path / "flat", "--flat", "--steps", 1)
        assert command(*words) == 0
    assert sampled(tmp_path / "flat", tiny_run, tmp_path / "x.npy").shape == (16, 32, 32)


def test_pictures(hdit_run, tiny_run, tmp_path):
    """One image as it is, several in a grid with a row for each prompt."""
    where = ("--model", hdit_run, "--run", tiny_run, "--count", 1)
    assert command("--sample", "3", *where, "--out", tmp_path / "one.png") == 0
    assert Image.open(tmp_path / "one.png").size == (32, 32)
    assert command("--sample=3", "7", *where, "--out", tmp_path / "two.png") == 2
    assert command("--sample", "3", "7", *where, "--out", tmp_path / "two.png") == 0
    assert Image.open(tmp_path / "two.png").width > 190


def test_refused_sampling(hdit_run, tiny_run, tmp_path, capsys):
    out = tmp_path / "x.png"

    def line(*words: object) -> str:
        return refused(capsys, related.main, "hdit", "--sample", "3", *words)

    common = ("--run", tiny_run, "--model", hdit_run, "--out", out)
    for option in (("--lr", "0.1"), ("--flat",), ("--fresh",), ("--batch", "8")):
        assert f"unrecognized arguments: {option[0]}" in line(*common, *option)
    assert "--guidance must be a number from 1 up, got nan" in line(*common, "--guidance", "nan")
    assert "--steps" in line(*common, "--steps", "0")
    for bad in ("x.gif", "none/x.png"):
        assert f"--out {tmp_path / bad}: must " in line(*common, "--out", tmp_path / bad)
    (tmp_path / "folder.png").mkdir()
    assert "must be a file in a folder that exists" in line(
        *common, "--out", tmp_path / "folder.png"
    )
    assert "--sample: expected at least one" in refused(capsys, related.main, "hdit", "--sample")
    models = ("--run", tiny_run, "--out", out, "--model")
    assert "has no run; `python -m nanosd3.related hdit` trains one" in line(*models, tmp_path)
    assert "is not a run of `python -m nanosd3.related hdit`" in line(*models, tiny_run)
    unfinished = shutil.copytree(hdit_run, tmp_path / "unfinished")
    change(unfinished, lambda content: content["stages"].pop("samples"))
    assert "unfinished; rerun `python -m nanosd3.related hdit ...`" in line(*models, unfinished)
    other = shutil.copytree(hdit_run, tmp_path / "other")
    change(other, lambda content: content.update(finished="another"))
    assert "was trained on another finished run than that of --run" in line(*models, other)
    damaged = shutil.copytree(hdit_run, tmp_path / "damaged")
    change(damaged, lambda content: content.update(size=[]))
    assert "run.json: damaged: no size of an HDiT" in line(*models, damaged)
    change(damaged, lambda content: content.update(size="tiny", flat=1))
    assert "run.json: damaged: no size of an HDiT" in line(*models, damaged)
    change(damaged, lambda content: content.update(size="mnist", flat=False))
    assert "hdit.safetensors" in line(*models, damaged)
    assert not out.exists()


def change(folder, edit):
    content = json.loads((folder / "run.json").read_text())
    edit(content)
    (folder / "run.json").write_text(json.dumps(content))


def test_systems_without_samples(tiny_run, capsys):
    said = refused(capsys, related.main, "dit", "--sample", "3")
    assert said.startswith("error: --sample: dit has none")


def test_help_says_how_to_sample(capsys):
    for words in (("--help",), ("--sample", "3", "--help")):
        with pytest.raises(SystemExit):
            related.main(["hdit", *words])
        assert "--sample PROMPT" in capsys.readouterr().out
