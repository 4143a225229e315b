"""The command of the cascade: three stages on a finished Muse, stopped and resumed; drawing."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3.cli import run_main
from nanosd3.related import __main__ as related
from nanosd3.related import cascade_system as module
from nanosd3.related import command as related_command
from nanosd3.related import muse_editing, train_muse
from nanosd3.related import train_cascade as training
from nanosd3.related.muse import MASK
from nanosd3.related.muse_editing import VQPipeline
from nanosd3.storage.files import read_tensors, save_tensors
from nanosd3.storage.run import Run

STAGES = ("tokens", "super_resolution", "larger_decoder")


def main(words: list[str]) -> int:
    return related.main(["muse-cascade", *words])


command = partial(status, main)


@pytest.fixture(scope="module")
def muse(tiny_run, tmp_path_factory):
    """A tiny Muse, with weights as large as after a long training, so that text has an effect."""
    folder = tmp_path_factory.mktemp("muse") / "run"
    words = ["muse", "--run", str(tiny_run), "--out", str(folder)]
    assert run_main(lambda: related.main(words)) == 0
    return enlivened(folder, "muse")


def enlivened(folder, *names):
    generator = torch.Generator().manual_seed(0)
    for name in names:
        tensors = read_tensors(folder / f"{name}.safetensors")
        tensors = {
            key: x if "pos_embed" in key else 0.2 * torch.randn(x.shape, generator=generator)
            for key, x in tensors.items()
        }
        save_tensors(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def cascade(tiny_run, muse, tmp_path_factory):
    """Stopped in the second stage and resumed."""
    out = tmp_path_factory.mktemp("cascade") / "run"
    words = ("--run", tiny_run, "--muse", muse, "--out", out)
    with interrupted_after(2):
        assert command(*words) == 130
    assert (out / "tokens.safetensors").exists()
    assert not (out / "super_resolution.safetensors").exists()
    assert command(*words) == 0
    return out


def weights(folder):
    return [(folder / f"{name}.safetensors").read_bytes() for name in STAGES]


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing but the training."""
    scores = {"evaluations": 1, "prompt_accuracy": 0.0, "frechet_ratio_to_real": 0.0}
    monkeypatch.setattr(module, "score_samples", lambda *_: scores)
    monkeypatch.setattr(module, "reconstruction", lambda *_: {})
    picture = Image.new("L", (8, 8))
    monkeypatch.setattr(module, "grid_of_prompts", lambda *_: picture)


def test_resumed_byte_for_byte(cascade, tiny_run, muse, tmp_path, unmeasured):
    words = ("--run", tiny_run, "--muse", muse)
    assert command(*words, "--out", tmp_path / "whole") == 0
    assert weights(tmp_path / "whole") == weights(cascade)
    stopped = tmp_path / "stopped"
    shutil.copytree(cascade, stopped)  # as if stopped after the second stage
    content = json.loads((stopped / "run.json").read_text())
    for name in ("samples", "larger_decoder"):
        del content["stages"][name]
    (stopped / "run.json").write_text(json.dumps(content))
    (stopped / "larger_decoder.safetensors").unlink()
    assert command(*words, "--out", stopped) == 0
    assert weights(stopped) == weights(cascade)


def test_what_a_run_leaves(cascade, muse):
    metrics = json.loads((cascade / "metrics.json").read_text())
    assert metrics["system"] == "muse-cascade" and metrics["evaluations"] == 30
    assert metrics["main_model"]["evaluations"] == 15  # the Muse alone
    by_decoder = metrics["reconstructions"]
    assert list(by_decoder) == ["smaller", "larger", "base"]
    ratios = [scores["frechet_ratio_to_real"] for scores in by_decoder.values()]
    assert len(set(ratios)) == 3
    total = sum(metrics["stages"][name]["seconds"] for name in STAGES)
    assert metrics["training_seconds"] == pytest.approx(total)
    assert Image.open(cascade / "samples.png").width > 500
    for name, copy in module.COPIES.items():
        content = (muse / f"{name}.safetensors").read_bytes()
        assert (cascade / f"{copy}.safetensors").read_bytes() == content
    log = [json.loads(line) for line in (cascade / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in log} == set(STAGES)
    first = next(entry for entry in log if entry["stage"] == "super_resolution")
    assert first["loss"] == pytest.approx(np.log(64), abs=1e-4)


def test_the_larger_decoder_keeps_the_tokens(cascade):
    small, large = (
        read_tensors(cascade / f"{name}.safetensors") for name in (STAGES[0], STAGES[2])
    )
    same = [name for name in small if not name.startswith("decoder.")]
    assert same and all(small[name].equal(large[name]) for name in same)
    sizes = [tensors["decoder.conv_in.weight"].shape[0] for tensors in (small, large)]
    assert sizes[1] == 2 * sizes[0]


def test_every_option_counts(cascade, tiny_run, muse, tmp_path, unmeasured):
    found = {"default": weights(cascade)}
    for name, value in {"seed": 1, "lr": 1e-3, "steps": 2, "batch": 8}.items():
        out = tmp_path / name
        words = ("--run", tiny_run, "--muse", muse, "--out", out, f"--{name}", value)
        assert command(*words) == 0
        found[name] = weights(out)
        for i in (0, 2):
            assert (found[name][i] != found["default"][i]) == (name == "seed")
    assert len({w[1] for w in found.values()}) == len(found)


def test_what_it_learns_from(tiny_run, muse, tmp_path, monkeypatch, unmeasured):
    """The base tokens of the images whose fine tokens are hidden."""
    seen, images = [], []

    class Watched(training.SuperResolution):
        def forward(self, *inputs):
            seen.append(inputs)
            return super().forward(*inputs)

    original = train_muse.unpadded
    monkeypatch.setattr(training, "SuperResolution", Watched)
    monkeypatch.setattr(
        train_muse, "unpadded", lambda x, p: images.append(original(x, p)) or images[-1]
    )
    out = tmp_path / "x"
    assert command("--run", tiny_run, "--muse", muse, "--out", out, "--steps", 1) == 0
    finished = related_command.open_finished_run(tiny_run, None, torch.device("cpu"))
    pipeline = module.open_cascade(Run.read(out), finished)
    tokens, base, *_ = seen[0]
    x = images[-1]  # of the step, the tokeniser's own are before it
    assert base.equal(pipeline.base.tokens(x)) and len(base.unique()) > 1
    known = tokens != MASK
    assert tokens[known].equal(pipeline.tokens(x)[known])


def test_samples(cascade, tiny_run, tmp_path):
    """Each option of sampling changes the images; the Muse that it was trained on is not needed."""
    folder = tmp_path / "lively"
    shutil.copytree(cascade, folder)
    enlivened(folder, "super_resolution")
    out, found = tmp_path / "x.npy", []
    common = ("--run", tiny_run, "--model", folder, "--out", out)
    options = [("--seed", 1), ("--steps", 3), ("--guidance", 5), ("--temperature", 0)]
    for words in [(), *options, ("--negative", "4", "--guidance", 5)]:
        assert command(*common, "--sample", "a bold 3", *words) == 0
        found.append(np.load(out).tobytes())
        assert np.load(out).shape == (8, 28, 28)
    assert command(*common, "--sample", "8") == 0
    found.append(np.load(out).tobytes())
    assert len(set(found)) == len(found)
    assert command(*common, "--sample", "a bold 3") == 0
    assert np.load(out).tobytes() == found[0]


def test_what_fine_tokens_are_guessed_from(cascade, tiny_run, monkeypatch):
    """The base tokens of the same image, in both halves of guidance, and its prompt in one."""
    finished = related_command.open_finished_run(tiny_run, None, torch.device("cpu"))
    pipeline, given = module.open_cascade(Run.read(cascade), finished), []
    assert isinstance(pipeline, VQPipeline) and pipeline.vq.config.factor == 2
    monkeypatch.setattr(muse_editing, "TOKENS_AT_ONCE", 2)
    original = pipeline.network.forward
    pipeline.network.forward = lambda *inputs: given.append(inputs) or original(*inputs)
    prompts = ["3", "a bold seven", "8"]
    base = torch.arange(3)[:, None, None].expand(3, 7, 7)
    fine = pipeline.refine(base, prompts, 0, 2, 1.5, 8.0)
    assert fine.shape == (3, 14, 14) and MASK < fine.min() and fine.max() < 64
    (context, pooled), (nothing, _) = pipeline.texts(prompts, "")
    assert len(given) == 4  # two steps, two parts
    for inputs, rows in zip(given, ([0, 1], [0, 1], [2], [2]), strict=True):
        n = len(rows)
        halves = len(inputs[0]) // n  # the first step has no guidance yet
        assert inputs[1].equal(base[rows].repeat(halves, 1, 1))
        torch.testing.assert_close(inputs[2][:n], context[rows])
        torch.testing.assert_close(inputs[3][:n], pooled[rows])
        torch.testing.assert_close(inputs[2][n:], nothing[rows].repeat(halves - 1, 1, 1))
    assert [len(inputs[0]) for inputs in given] == [2, 4, 1, 2]


def test_bad_input(cascade, tiny_run, muse, tmp_path, capsys):
    out = tmp_path / "out"

    def line(*words):
        return refused(capsys, main, "--run", tiny_run, "--out", out, *words)

    none = line("--muse", tmp_path)
    assert f"--muse {tmp_path}: has no run; `python -m nanosd3.related muse` trains one" in none
    assert "is not a run of `python -m nanosd3.related muse`" in line("--muse", cascade)
    assert "is not of the size mnist; see --config" in line("--muse", muse, "--config", "mnist")
    words = ("--run", tiny_run, "--sample", "3", "--out", tmp_path / "x.png")
    assert "is not a run of" in refused(capsys, main, *words, "--model", muse)
    assert not out.exists() and not (tmp_path / "x.png").exists()
