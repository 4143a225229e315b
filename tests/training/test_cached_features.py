"""Latents and text features on disk: how they are deleted."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_mnist
from nanosd3.config import CONFIGS
from nanosd3.data.mnist import load_images
from nanosd3.data.sources import Digits, caption_key
from nanosd3.mmdit import MMDiT
from nanosd3.official import load_networks
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.pipeline import Pipeline, open_pipeline
from nanosd3.related.command import Study, conclude
from nanosd3.storage import files
from nanosd3.storage.run import Run
from nanosd3.training import cached_features, report, train_flow
from nanosd3.training.cached_features import (
    Encoders,
    Features,
    collected,
    end_job,
    fill_cache,
    latent_bytes,
    rows_in_shard,
    text_bytes,
)


def in_use(path: Path, **_) -> None:
    """As where a file of the folder is still mapped: on Windows, or on NFS with its .nfs files."""
    raise OSError(39, "Directory not empty", str(path))


@pytest.fixture
def features(tmp_path) -> Features:
    """One caption's features, mapped."""
    made = Features(tmp_path / "cache", None, Encoders(CONFIGS["tiny"], "these", None))
    rows = {"context": torch.randn(1, 3, 8), "pooled": torch.randn(1, 4)}
    made.text_rows.add([caption_key("a 3")], rows)
    assert len(made["a 3"]) == 2 and made.text_rows.opened
    return made


def test_forgotten(features, monkeypatch):
    """Nothing is mapped any more when the files are deleted."""
    original = files.shutil.rmtree

    def rmtree(path: Path) -> None:
        assert not features.text_rows.opened
        original(path)

    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    features.forget()
    assert not features.folder.parent.exists()
    features.forget()  # nothing is left to delete


def test_files_in_use_are_left_with_a_warning(features, monkeypatch, capsys):
    monkeypatch.setattr(files.shutil, "rmtree", in_use)
    features.forget()
    line = capsys.readouterr().out
    assert line.startswith(f"  warning: {features.folder.parent}: cannot be deleted (Directory")
    assert line.count("\n") == 1 and features.folder.exists()


def test_a_run_ends_although_its_cache_cannot_be_deleted(
    tmp_path, one_step, unobserved, monkeypatch, capsys
):
    out, original = tmp_path / "run", files.shutil.rmtree
    monkeypatch.setattr(
        files.shutil, "rmtree", lambda p, **k: (in_use if p.name == "cache" else original)(p, **k)
    )
    assert train_mnist.main(["--config", "tiny", "--no-turbo", "--out", str(out)]) == 0
    assert "cannot be deleted" in capsys.readouterr().out and (out / "cache").exists()
    assert "samples" in Run.read(out).stages


def test_a_job_is_finished_before_its_cache_is_deleted(tmp_path):
    run = Run.open(tmp_path / "run", {"config": {}})
    stages: list[str] = []
    cache = SimpleNamespace(forget=lambda: stages.extend(Run.read(run.folder).stages))
    end_job(SimpleNamespace(run=run), cache)
    assert stages == ["samples"]


def test_a_neighbour_is_finished_before_its_cache_is_deleted(features, tmp_path, monkeypatch):
    run = Run.open(tmp_path / "run", {"config": {}})
    (run.folder / "cache").mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", in_use)
    study = Study(SimpleNamespace(run=run, device=torch.device("cpu")), None, None)
    conclude(study, {})
    assert "samples" in Run.read(run.folder).stages and (run.folder / "cache").exists()
    monkeypatch.undo()
    conclude(study, {})
    assert not (run.folder / "cache").exists()
    study = Study(study.job, None, None)
    vars(study)["features"] = features
    conclude(study, {})
    assert not features.text_rows.opened and not features.folder.exists()


# --- encoders of another model --------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The networks that are read from another model's files, as they are read."""
    names: list[str] = []
    fill = load_networks.fill

    def counted(module, *more):
        names.append(type(module).__name__)
        return fill(module, *more)

    monkeypatch.setattr(load_networks, "fill", counted)
    return names


ONCE = ["AutoencoderKL", "CLIPText", "CLIPText", "T5Encoder"]


def test_encoders_are_read_once(tmp_path, tiny_run, one_step, read, monkeypatch):
    """To fill the cache; from then on the autoencoder alone, for previews and report."""
    monkeypatch.setattr(train_flow, "validation_loss", lambda *_: [])
    monkeypatch.setattr(report, "draw_trajectory", lambda *_: None)
    monkeypatch.setattr(report, "solver_errors", lambda *_: {"euler": [(1, 0.5)]})
    run = ["--config", "tiny", "--steps", "3", "--weights", str(tiny_run), "--no-turbo"]
    assert train_mnist.main([*run, "--out", str(tmp_path / "run")]) == 0
    assert len(list((tmp_path / "run").glob("preview-*"))) == 3
    assert sorted(read) == sorted([*ONCE, "AutoencoderKL"])


def test_text_encoders_are_not_in_memory_beside_the_autoencoder(tiny_run, tmp_path, read):
    """Each is read where it is first needed, and free once all captions are encoded."""
    sources = open_checkpoint(tiny_run)
    opened = open_pipeline(sources, "cpu", None, staged=False)
    assert not opened.parts.ready and not read
    source = Digits(load_images().first(20, 1), sources.config)
    features = Features(tmp_path, source, Encoders(sources.config, "tiny", lambda: opened))
    fill_cache(features, ["a 3", ""], images=True)
    assert sorted(read) == ONCE and list(opened.parts.ready) == ["vae"]
    again = features.pipeline(MMDiT(sources.config.mmdit), torch.device("cpu"))
    again(["a 3", "a 3"], steps=1)
    again(["a 3"], steps=1)
    assert sorted(read) == ONCE


# --- shards ---------------------------------------------------------------------------------------


def test_shards_hold_some_hundred_megabytes():
    """Of T5-XXL's features and of latents of 1024x1024, and thousands of small rows."""
    large, tiny = CONFIGS["sd3.5-large"], CONFIGS["tiny"]
    assert text_bytes(large) == 4 * (333 * 4096 + 2048)
    assert latent_bytes(large, 1024**2) == 2 * 2 * 16 * 128**2
    for row in (text_bytes(large), latent_bytes(large, 1024**2)):
        assert 0.9 * 2**28 < rows_in_shard(row) * row <= 2**28
    assert rows_in_shard(text_bytes(tiny)) == rows_in_shard(latent_bytes(tiny, 32**2)) == 4096
    assert rows_in_shard(2**30) == 1


def test_what_shards_hold_is_what_the_sizes_say(tiny_run, tmp_path, monkeypatch):
    """As many rows as fit, and a batch leaves the device before the next one is computed."""
    opened = Pipeline.load(tiny_run)
    config = opened.config
    source = Digits(load_images().first(20, 4), config)
    features = Features(tmp_path, source, Encoders(config, "tiny", lambda: opened))
    monkeypatch.setattr(cached_features, "SHARD_BYTES", 7 * text_bytes(config))
    fill_cache(features, ["a 3"], images=True)
    sizes = [len(e["keys"]) for e in features.text_rows.shards.values()]
    assert set(sizes[:-1]) == {7}
    rows = features.text_rows.rows(features.text_rows.shards["00000.safetensors"]["keys"])
    assert sum(row.nbytes for row in rows.values()) == 7 * text_bytes(config)
    key = source.key(0)
    row = features.latent_rows.rows([key])
    assert sum(x.nbytes for x in row.values()) == latent_bytes(config, 32**2)
    assert len(features.latent_rows.missing([source.key(i) for i in range(24)])) == 0


class OnDevice:
    """A tensor that counts how many like it are on the device."""

    there = 0

    def __init__(self):
        assert OnDevice.there < 2
        OnDevice.there += 1

    def cpu(self) -> torch.Tensor:
        OnDevice.there -= 1
        return torch.ones(2, 3)


def test_parts_leave_the_device_at_once():
    rows = collected(("a", "b"), ((OnDevice(), OnDevice()) for _ in range(3)))
    assert {name: tuple(x.shape) for name, x in rows.items()} == {"a": (6, 3), "b": (6, 3)}
