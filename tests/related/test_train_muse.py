"""The command of Muse: a run of two stages, stopped and resumed; drawing and editing with it."""

import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3.data.mnist import from_uint8
from nanosd3.related import __main__ as related
from nanosd3.related import command as related_command
from nanosd3.related import muse_system as module
from nanosd3.related import train_muse as training
from nanosd3.related.edit_command import image_of
from nanosd3.related.muse import MASK, Muse
from nanosd3.related.muse_editing import edit_freely, passes, repaint, unpadded
from nanosd3.storage.files import load_weights, read_tensors
from nanosd3.storage.run import Run


def main(words: list[str]) -> int:
    return related.main(["muse", *words])


command = partial(status, main)


@pytest.fixture(scope="module")
def muse_run(tiny_run, tmp_path_factory):
    """A tiny Muse; stopped in the second stage and resumed."""
    out = tmp_path_factory.mktemp("muse") / "run"
    with interrupted_after(2):
        assert command("--run", tiny_run, "--out", out) == 130
    assert (out / "tokens.safetensors").exists() and not (out / "muse.safetensors").exists()
    assert command("--run", tiny_run, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def lively(muse_run, tmp_path_factory):
    """The same, with weights as large as after a long training, so that text has an effect."""
    folder = tmp_path_factory.mktemp("lively") / "run"
    shutil.copytree(muse_run, folder)
    tensors, generator = read_tensors(folder / "muse.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name != "pos_embed":
            tensors[name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "muse.safetensors")
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing but the training."""
    scores = {"evaluations": 1, "prompt_accuracy": 0.0, "frechet_ratio_to_real": 0.0}
    monkeypatch.setattr(module, "score_samples", lambda *_: scores)
    monkeypatch.setattr(related_command, "pipeline_scores", lambda *_: scores)
    for name in ("grid_of_prompts", "save_beside_main"):
        monkeypatch.setattr(module, name, lambda *_: None)


def weights(folder):
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("tokens", "muse")]


# --- training -------------------------------------------------------------------------------------


def test_resumed_byte_for_byte(muse_run, tiny_run, tmp_path, monkeypatch, unmeasured):
    """From a stop in the first stage too, after codes have restarted."""
    out, calls, original = tmp_path / "stopped", [], training.quantising_loss

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "quantising_loss", stop_at_the_second)
        assert command("--run", tiny_run, "--out", out) == 130
        assert not (out / "tokens.safetensors").exists()
        assert command("--run", tiny_run, "--out", out) == 0
    assert len(calls) == 4
    assert weights(out) == weights(muse_run)


def test_what_a_run_leaves(muse_run):
    metrics = json.loads((muse_run / "metrics.json").read_text())
    assert metrics["system"] == "muse" and metrics["evaluations"] == 15
    assert metrics["main_model"]["samples"] == metrics["samples"]
    assert set(metrics["reconstructions"]) == {"accuracy", "frechet_ratio_to_real", "perplexity"}
    assert 1 <= metrics["reconstructions"]["perplexity"] <= 64
    stages = metrics["stages"]
    total = stages["tokens"]["seconds"] + stages["muse"]["seconds"]
    assert metrics["training_seconds"] == pytest.approx(total)
    assert Image.open(muse_run / "samples.png").width > 500
    assert not (muse_run / "cache").exists()
    log = [json.loads(line) for line in (muse_run / "log.jsonl").read_text().splitlines()]
    tokens = [entry for entry in log if entry["stage"] == "tokens"]
    assert len(tokens) == 4 and all(1 <= entry["perplexity"] <= 64 for entry in tokens)
    assert tokens[0]["restarted"] > 0 == tokens[1]["restarted"] == tokens[3]["restarted"]
    first = next(entry for entry in log if entry["stage"] == "muse")
    assert first["loss"] == pytest.approx(np.log(64), abs=1e-4)


def test_every_option_counts(muse_run, tiny_run, tmp_path, unmeasured):
    found = {"default": weights(muse_run)[1]}
    for name, value in {"seed": 1, "lr": 1e-3, "steps": 2, "batch": 8}.items():
        out = tmp_path / name
        assert command("--run", tiny_run, "--out", out, f"--{name}", value) == 0
        found[name] = weights(out)[1]
        assert (weights(out)[0] != weights(muse_run)[0]) == (name == "seed")
    assert len(set(found.values())) == len(found)


def test_sampling_options_count(muse_run, tiny_run, tmp_path, monkeypatch):
    """They change the samples, not the weights."""
    scores = {"evaluations": 1, "prompt_accuracy": 0.0, "frechet_ratio_to_real": 0.0}
    monkeypatch.setattr(related_command, "pipeline_scores", lambda *_: scores)
    for name in ("grid_of_prompts", "save_beside_main"):
        monkeypatch.setattr(module, name, lambda *_: None)
    distances = [json.loads((muse_run / "metrics.json").read_text())["frechet_distance"]]
    for name, value in {"guidance": 4, "temperature": 0}.items():
        out = tmp_path / name
        shutil.copytree(muse_run, out)
        content = json.loads((out / "run.json").read_text())
        content[name] = value
        del content["stages"]["samples"]
        (out / "run.json").write_text(json.dumps(content))
        assert command("--run", tiny_run, "--out", out, f"--{name}", value) == 0
        distances.append(json.loads((out / "metrics.json").read_text())["frechet_distance"])
        assert weights(out) == weights(muse_run)
    assert len(set(distances)) == 3
    assert passes(8, 1.0) == 8 and passes(8, 1.5) == 15


def test_what_the_transformer_learns_from(tiny_run, tmp_path, monkeypatch, unmeasured):
    """Tokens of unpadded images with the captions of the same images, a tenth without; shares by
    the cosine, more than half of the tokens on average."""
    seen = []

    class Watched(Muse):
        def forward(self, tokens, context, pooled):
            seen.append((tokens, context, pooled))
            return super().forward(tokens, context, pooled)

    images, original = [], training.unpadded
    monkeypatch.setattr(training, "Muse", Watched)
    monkeypatch.setattr(training, "unpadded", lambda x, p: images.append(x) or original(x, p))
    words = ("--run", tiny_run, "--out", tmp_path / "x", "--batch", 128, "--steps", 4)
    asked = []
    captions = training.Digits.captions
    monkeypatch.setattr(
        training.Digits, "captions",
        lambda self, index, u: asked.append(captions(self, index, u)) or asked[-1])  # fmt: skip
    assert command(*words) == 0
    finished = related_command.open_finished_run(tiny_run, None, torch.device("cpu"))
    texts = finished.pipeline.text.encode(finished.source.texts)
    hidden, dropped = [], []
    asked = [a for a in asked if len(a) == 128]
    for (tokens, context, pooled), caption in zip(seen, asked, strict=False):
        if len(tokens) != 128:
            continue
        assert tokens.shape[1:] == (7, 7)
        hidden.append((tokens == MASK).float().mean())
        without = ~pooled.any(1)
        dropped.append(without.float().mean())
        assert not context[without].any()
        torch.testing.assert_close(pooled[~without], texts[1][caption][~without])
        torch.testing.assert_close(context[~without], texts[0][caption][~without])
    assert len(hidden) == 4
    assert float(sum(hidden) / 4) == pytest.approx(2 / np.pi, abs=0.02)
    assert 0.06 < float(sum(dropped) / 4) < 0.14
    assert images[0].shape[2:] == (32, 32)
    assert torch.equal(unpadded(images[0], 2), images[0][:, :, 2:30, 2:30])
    assert unpadded(images[0], 0).equal(images[0])


def test_the_encoder_learns_from_images(tiny_run, tmp_path, monkeypatch, unmeasured):
    """Past the codes: also without the loss that ties it to them."""
    start, original = {}, training.build

    def watched(job, name, make):
        built = original(job, name, make)
        start[name] = built.encoder.conv_in.weight.detach().clone() if name == "tokens" else None
        return built

    monkeypatch.setattr(training, "build", watched)
    monkeypatch.setattr(training, "quantising_loss", lambda z, e: z.new_zeros(len(z)))
    out = tmp_path / "x"
    assert command("--run", tiny_run, "--out", out, "--steps", 1) == 0
    saved = read_tensors(out / "tokens.safetensors")["encoder.conv_in.weight"]
    assert not saved.equal(start["tokens"])


def test_what_is_kept_is_the_average(tiny_run, tmp_path, monkeypatch, unmeasured):
    from nanosd3.training import stages

    kept, original = [], stages.make_ema
    monkeypatch.setattr(stages, "make_ema", lambda m: kept.append(original(m)) or kept[-1])
    out = tmp_path / "x"
    assert command("--run", tiny_run, "--out", out) == 0
    saved, average = read_tensors(out / "muse.safetensors"), kept[0].state_dict()
    assert saved.keys() == average.keys()
    assert all(saved[name].equal(average[name]) for name in saved)


# --- drawing and editing --------------------------------------------------------------------------


def pipeline_of(lively, tiny_run):
    finished = related_command.open_finished_run(tiny_run, None, torch.device("cpu"))
    run = Run.read(lively)
    return module.open_muse_pipeline(run, finished), *module.muse_sampling(None, None, run.identity)


def digit(tmp_path, name="digit.png"):
    pixels = np.zeros((28, 28), np.uint8)
    pixels[6:22, 12:16] = 255
    Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path / name


def test_a_finished_muse_is_what_was_trained(lively, tiny_run):
    pipeline, guidance, temperature = pipeline_of(lively, tiny_run)
    assert (guidance, temperature) == (module.MUSE_GUIDANCE, module.MUSE_TEMPERATURE)
    again = Muse(pipeline.muse.config)
    load_weights(again, lively / "muse.safetensors")
    tokens = pipeline.draw(["3", "a bold seven"], 5)
    assert tokens.shape == (2, 7, 7) and tokens.min() >= 0
    assert pipeline.draw(["3", "a bold seven"], 5).equal(tokens)
    context, pooled = pipeline.main.text.encode(["3", "a bold seven"])
    hidden = torch.full((2, 7, 7), MASK)
    with torch.no_grad():
        expected = again(hidden, context, pooled)
    found = pipeline.logits(["3", "a bold seven"])(hidden, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_samples(lively, tiny_run, tmp_path):
    """Each option of sampling changes the images; the same ones give the same."""
    out, found = tmp_path / "x.npy", []
    common = ("--run", tiny_run, "--model", lively, "--out", out)
    options = [("--seed", 1), ("--steps", 3), ("--guidance", 5), ("--temperature", 0)]
    for words in [(), (), *options, ("--negative", "4", "--guidance", 5)]:
        assert command(*common, "--sample", "a bold 3", *words) == 0
        found.append(np.load(out))
        assert found[-1].shape == (8, 28, 28) and found[-1].dtype == np.uint8
    assert (found[0] == found[1]).all()
    assert command(*common, "--sample", "8") == 0
    found.append(np.load(out))
    for i in range(1, len(found)):
        for j in range(i):
            assert (i, j) == (1, 0) or (found[i] != found[j]).any(), (i, j)
    picture = tmp_path / "x.png"
    assert command(*common[:-1], picture, "--sample", "a bold 3") == 0
    assert Image.open(picture).width > 300


def test_repainting_keeps_the_rest(lively, tiny_run, tmp_path, capsys):
    """Tokens outside of the mask are the same, bit by bit."""
    pipeline, _, _ = pipeline_of(lively, tiny_run)
    tokens = pipeline.tokens(image_of(digit(tmp_path), pipeline)).expand(8, -1, -1)
    marked = torch.zeros(7, 7, dtype=torch.bool)
    marked[4:] = True
    logits = pipeline.logits(["8"] * 8)
    new = repaint(logits, tokens, marked, 8, 1.5, 8.0, torch.Generator().manual_seed(0))
    assert new[:, :4].equal(tokens[:, :4]) and not new[:, 4:].equal(tokens[:, 4:])
    mask = np.zeros((28, 28), np.uint8)
    mask[17:, ::3] = 255  # tokens from the fifth row on
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "e.npy"
    words = ("--run", tiny_run, "--model", lively, "--edit", tmp_path / "digit.png", "--prompt",
             "8", "--mask", tmp_path / "mask.png")  # fmt: skip
    found = []
    for more in ((), ("--seed", 1), ("--steps", 1), ("--temperature", 0), ("--guidance", 9)):
        capsys.readouterr()
        assert command(*words, "--out", out, *more) == 0
        found.append(np.load(out).tobytes())
        said = capsys.readouterr().out
        kept = int(said.split("%")[0].split()[-1])
        assert kept >= round(100 * 28 / 49) and "8 images" in said
    assert len(set(found)) == 5
    assert command(*words, "--out", tmp_path / "e.png") == 0
    assert Image.open(tmp_path / "e.png").height > 50


def test_free_editing(lively, tiny_run, tmp_path):
    """A share of the tokens each round, 4 of 49; of the likeliest only."""
    pipeline, _, _ = pipeline_of(lively, tiny_run)
    tokens = pipeline.tokens(from_uint8(torch.zeros(6, 1, 28, 28, dtype=torch.uint8)))
    seen = []

    def logits(hidden, scale):
        seen.append((hidden, scale))
        return torch.arange(64.0).expand(6, 7, 7, 64)

    generator = torch.Generator().manual_seed(0)
    new = edit_freely(logits, tokens, 3, 5.0, generator)
    assert [scale for _, scale in seen] == [5.0] * 3
    assert all((hidden == MASK).flatten(1).sum(1).tolist() == [4] * 6 for hidden, _ in seen)
    ever = torch.stack([hidden == MASK for hidden, _ in seen]).any(0)
    assert new[~ever].equal(tokens[~ever]) and set(new[ever].tolist()) <= {61, 62, 63}
    assert seen[1][0][~(seen[1][0] == MASK) & (seen[0][0] == MASK)].min() >= 61  # kept on
    out = tmp_path / "f.npy"
    words = ("--run", tiny_run, "--model", lively, "--out", out, "--edit", digit(tmp_path))
    found = []
    for more in ((), ("--seed", 1), ("--guidance", 1), ("--negative", "1")):
        assert command(*words, "--prompt", "8", "--steps", 5, *more) == 0
        found.append(np.load(out).tobytes())
    assert command(*words, "--prompt", "8") == 0
    found.append(np.load(out).tobytes())
    assert len(set(found)) == 5


def test_bad_input(muse_run, tiny_run, tmp_path, capsys):
    out = tmp_path / "out"

    def line(*words):
        return refused(capsys, main, "--run", tiny_run, "--out", out, *words)

    assert "--guidance must be a number from 1 up, got 0.5" in line("--guidance", 0.5)
    assert "--temperature must be a number from 0 up, got -1" in line("--temperature", -1)
    assert "--temperature must be a number from 0 up, got nan" in line("--temperature", "nan")
    assert "--lr must be a number above 0" in line("--lr", 0)
    for name in ("prompt", "mask", "negative", "model"):
        assert f"--{name}" in line(f"--{name}", "3")
    assert not out.exists()
    assert f"with temperature {module.MUSE_TEMPERATURE}, not 2.0" in refused(
        capsys, main, "--run", tiny_run, "--out", muse_run, "--temperature", 2)  # fmt: skip


def test_bad_use(muse_run, tiny_run, tmp_path, capsys):
    out, image = tmp_path / "out.png", digit(tmp_path)

    def line(*words, run=tiny_run, model=muse_run, out=out):
        return refused(capsys, main, "--run", run, "--model", model, "--out", out, *words)

    edit = ("--edit", image, "--prompt", "8")
    assert "--edit" in line("--sample", "3", *edit)
    assert "--prompt" in line("--edit", image)
    for name, value in (("lr", 1), ("batch", 3), ("config", "tiny")):
        assert f"--{name}" in line("--sample", "3", f"--{name}", value)
    assert "--fresh" in line(*edit, "--fresh")
    assert "--mask" in line("--sample", "3", "--mask", image)
    assert "--prompt" in line("--sample", "3", "--prompt", "4")
    assert "--temperature has no effect without --mask" in line(*edit, "--temperature", 1)
    for words in (("--sample", "3"), edit):
        assert "--guidance must be" in line(*words, "--guidance", "nan")
    assert "must end in .png or .npy" in line("--sample", "3", out=tmp_path / "x.gif")
    assert "must be a file in a folder that exists" in line(
        "--sample", "3", out=tmp_path / "no" / "x.png")  # fmt: skip
    (tmp_path / "f.png").mkdir()
    assert "must be a file" in line("--sample", "3", out=tmp_path / "f.png")
    assert "is not a run of `python -m nanosd3.related muse`" in line(
        "--sample", "3", model=tiny_run)  # fmt: skip
    for folder in (tmp_path, tmp_path / "no"):
        assert "has no run; `python -m nanosd3.related muse` trains one" in line(
            *edit, model=folder)  # fmt: skip
    assert "no such run folder" in line("--sample", "3", run=tmp_path / "no")
    Image.new("L", (30, 28)).save(tmp_path / "wide.png")
    assert "is 28x30 (height x width), this Muse is for 28x28" in line(
        "--edit", tmp_path / "wide.png", "--prompt", "8")  # fmt: skip
    assert "mask: is 28x30" in line(*edit, "--mask", tmp_path / "wide.png")
    assert "nothing is marked" in line(*edit, "--mask", muse_black(tmp_path))
    assert "no.png" in line("--edit", tmp_path / "no.png", "--prompt", "8")
    said = refused(capsys, related.main, "hdit", "--edit", image, "--prompt", "8")
    assert "--edit: hdit has none; muse has" in said
    assert not out.exists()


def muse_black(tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    return tmp_path / "black.png"


def test_another_finished_run_is_refused(muse_run, tiny_run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    tensors = read_tensors(other / "text.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, other / "text.safetensors")
    words = ("--run", other, "--model", muse_run, "--sample", "3", "--out", tmp_path / "x.png")
    assert "was trained on another finished run than that of --run" in refused(capsys, main, *words)
    assert not (tmp_path / "x.png").exists()
