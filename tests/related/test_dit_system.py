"""The command `python -m nanosd3.related dit`, on a tiny run."""

import json
import shutil
from functools import partial

import pytest
from PIL import Image
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3.related import __main__ as related
from nanosd3.related import command as related_command
from nanosd3.related import dit_system
from nanosd3.related.dit import BLOCKS

command = partial(status, related.main)


@pytest.fixture(scope="module")
def dit_run(tiny_run, tmp_path_factory):
    """A tiny DiT, interrupted after its second step and resumed."""
    out = tmp_path_factory.mktemp("related") / "dit"
    with interrupted_after(2):
        assert command("dit", "--run", tiny_run, "--out", out) == 130
    assert not (out / "dit.safetensors").exists() and list(out.glob("state-*"))
    assert command("dit", "--run", tiny_run, "--out", out) == 0
    return out


def test_resumed_byte_for_byte(dit_run, tiny_run, tmp_path, monkeypatch):
    quick(monkeypatch)
    assert command("dit", "--run", tiny_run, "--out", tmp_path / "b") == 0
    whole = (tmp_path / "b" / "dit.safetensors").read_bytes()
    assert whole == (dit_run / "dit.safetensors").read_bytes()


def test_what_a_run_leaves(dit_run):
    metrics = json.loads((dit_run / "metrics.json").read_text())
    assert metrics["system"] == "dit" and metrics["evaluations"] == 100  # 50, guided
    assert list(metrics["by_sampler"]) == ["DDIM 10", "DDIM 50", "ancestral 50"]
    assert metrics["by_sampler"]["DDIM 10"]["evaluations"] == 20
    for scores in (metrics, metrics["main_model"], *metrics["by_sampler"].values()):
        assert 0 <= scores["prompt_accuracy"] <= 1 and scores["frechet_ratio_to_real"] > 0
        assert scores["frechet_floor_real"] > 0 and scores["images_per_second"] > 0
    assert metrics["training_seconds"] > 0 and 0.5 < metrics["validation"] < 2
    distances = {s["frechet_distance"] for s in metrics["by_sampler"].values()}
    assert len(distances) == 3
    picture = Image.open(dit_run / "samples.png")
    assert picture.width > picture.height / 2 and not (dit_run / "cache").exists()


def quick(monkeypatch):
    """Leave scores and pictures out."""
    scores = {"evaluations": 1, "prompt_accuracy": 0.0, "frechet_ratio_to_real": 0.0}
    monkeypatch.setattr(related_command, "pipeline_scores", lambda *_: scores)
    monkeypatch.setattr(dit_system, "scores_of", lambda *_: scores)
    monkeypatch.setattr(dit_system, "draw_beside", lambda *_: None)


def test_every_option_counts(tiny_run, dit_run, tmp_path, monkeypatch):
    """Each option of the training gives other weights."""
    quick(monkeypatch)
    found = {"default": (dit_run / "dit.safetensors").read_bytes()}
    options = [("block", block) for block in BLOCKS if block != "adaln_zero"]
    options += [("loss", "flow"), ("seed", 1), ("lr", 1e-4), ("steps", 2), ("batch", 8)]
    for name, value in options:
        out = tmp_path / f"{name}-{value}"
        assert command("dit", "--run", tiny_run, "--out", out, f"--{name}", value) == 0
        found[name, value] = (out / "dit.safetensors").read_bytes()
    assert len(set(found.values())) == len(found)


def test_guidance_counts(tiny_run, dit_run, tmp_path, monkeypatch):
    """It changes no weights, but the samples and their evaluations."""
    monkeypatch.setattr(dit_system, "draw_beside", lambda *_: None)
    before = json.loads((dit_run / "metrics.json").read_text())
    out = tmp_path / "unguided"
    assert command("dit", "--run", tiny_run, "--out", out, "--guidance", 1) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["evaluations"] == 50
    assert metrics["frechet_distance"] != before["frechet_distance"]
    weights = [(folder / "dit.safetensors").read_bytes() for folder in (out, dit_run)]
    assert weights[0] == weights[1]


def test_fresh_leaves_nothing_behind(tiny_run, dit_run, tmp_path, monkeypatch):
    quick(monkeypatch)
    folder = tmp_path / "again"
    shutil.copytree(dit_run, folder)
    words = ("--run", tiny_run, "--out", folder, "--fresh", "--steps", 1)
    monkeypatch.setattr(dit_system, "train_dit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("dit", *words)
    assert not (folder / "dit.safetensors").exists()


def test_refused(tiny_run, dit_run, tmp_path, capsys):
    out = tmp_path / "out"

    def line(*words: object) -> str:
        return refused(capsys, related.main, *words)

    assert "no such run folder; `python train_mnist.py`" in line("dit", "--run", out)
    common = ("dit", "--run", tiny_run, "--out", out)
    unknown = line(*common, "--block", "unet")
    assert "--block" in unknown and "adaln_zero" in unknown
    assert "--loss" in line(*common, "--loss", "vlb")
    for scale in ("0.5", "nan", "inf"):
        assert "--guidance must be a number from 1 up" in line(*common, "--guidance", scale)
    assert "--lr must be a number above 0" in line(*common, "--lr", "nan")
    assert not out.exists()
    taken = ("dit", "--run", tiny_run, "--out", dit_run)
    assert "with loss ddpm, not flow" in line(*taken, "--loss", "flow")
    assert "adaln" in line(*taken, "--block", "adaln")
    assert "holds a run" in line("dit", "--run", tiny_run, "--out", tiny_run)


def test_a_dit_is_no_run_to_build_on(dit_run, tmp_path, capsys):
    assert "error: " in refused(capsys, related.main, "dit", "--run", dit_run, "--out", tmp_path)


def test_it_is_listed(capsys):
    assert command("list") == 0
    assert "arXiv 2212.09748" in capsys.readouterr().out
