"""A path is not an identity: runs, and the models they were trained on, may be moved and copied."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import refused

import train_mnist
from nanosd3 import bench, generate, weights
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint, open_transformer
from nanosd3.official.own_runs import base_places
from nanosd3.official.tensors import fingerprint, in_memory
from nanosd3.storage import files
from nanosd3.storage.run import Run


@pytest.fixture
def base(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "models" / "base")


@pytest.fixture
def run(tiny_run, base, tmp_path) -> Path:
    """A run as `--weights BASE` leaves it: without encoders of its own."""
    folder = shutil.copytree(tiny_run, tmp_path / "runs" / "run")
    for name in ("autoencoder", "text", "clip", "t5"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    (folder / "tokenizers.json").unlink()
    opened = open_checkpoint(base)
    identity = {"config": asdict(opened.config), "encoders": fingerprint(opened.encoders)}
    edit(folder, weights=str(base), **identity)
    return folder


def edit(folder: Path, **changes: object) -> None:
    files.write_json(folder / "run.json", files.read_json(folder / "run.json") | changes)


def retrained(folder: Path) -> Path:
    """The same networks with other weights."""
    state = files.read_tensors(folder / "text.safetensors")
    state["t5.encoder.final_layer_norm.weight"] += 1
    files.save_tensors(state, folder / "text.safetensors")
    return folder


def drawn(run: Path, *options: object) -> np.ndarray:
    out = run.parent / "drawn.npy"
    command = ["7", "--model", run, "--count", 1, "--steps", 2, "--out", out, *options]
    assert generate.main([str(word) for word in command]) == 0
    return np.load(out)


def found(run: Path, place: Path | None = None) -> bool:
    """Whether the encoders of a run are those it was trained on."""
    opened, stored = open_checkpoint(run, weights=place), Run.read(run).identity["encoders"]
    return fingerprint(opened.encoders, like=stored) == stored


def move(path: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(path, to))


def test_it_draws_wherever_its_base_is(run, base, tmp_path):
    """Where it was; where the user says; beside the run; in the run."""
    expected = drawn(run)
    elsewhere = move(base, tmp_path / "else" / "where")
    assert np.array_equal(drawn(run, "--weights", elsewhere), expected)
    assert weights.load(run, weights=str(elsewhere)).config == open_checkpoint(elsewhere).config
    beside = move(elsewhere, run.parent / "base")
    assert found(run)
    move(beside, run / "base")
    assert found(run)


@pytest.mark.parametrize("by_version", ["now", "earlier"])
def test_it_resumes_wherever_its_base_is(by_version, run, base, tmp_path, monkeypatch):
    """And remembers where that is."""
    if by_version == "earlier":
        edit(run, encoders=fingerprint(open_checkpoint(base).encoders, like="0" * 64))
        assert found(run)
    elsewhere = move(base, tmp_path / "else" / "where")
    resumed = []
    monkeypatch.setattr(train_mnist, "train", lambda job, *_, **__: resumed.append(job))
    edit(run, stages={"judge": Run.read(run).stages["judge"]})
    command = ["--config", "tiny", "--out", str(run), "--weights", str(elsewhere)]
    assert train_mnist.main(command) == 0
    assert len(resumed) == 1 and set(resumed[0].run.stages) == {"judge"}
    assert Run.read(run).identity["weights"] == str(elsewhere)


def test_a_copy_on_another_machine(run, base, tmp_path):
    """The run alone and its base beside it, from a machine with other paths."""
    other = tmp_path / "other"
    for folder in (run, base):
        shutil.copytree(folder, other / folder.name)
        shutil.rmtree(folder)
    assert found(other / "run")
    for stored in ("C:\\Users\\x\\base", "\\\\server\\share\\base", "/no/such/base", "base"):
        edit(other / "run", weights=stored)
        assert other / "base" in base_places(Run.read(other / "run")), stored


def test_a_run_inside_another_moves_with_it(run, base, tmp_path):
    """A distilled model lies in the run it was made of, whose encoders are in the folder beside."""
    inner = shutil.copytree(run, run / "inner")
    assert found(inner)
    moved = tmp_path / "moved"
    for folder in (run, base):
        shutil.copytree(folder, moved / folder.name)
        shutil.rmtree(folder)
    assert found(moved / "run" / "inner")


def test_what_was_looked_for_is_said(capsys, run, base, tmp_path):
    shutil.rmtree(base)
    line = refused(capsys, generate.main, "7", "--run", run, "--out", tmp_path / "x.png")
    for place in base_places(Run.read(run)):
        assert f"{place}: no such file or folder" in line
    assert f"{run}: was trained on the encoders of {base}: " in line
    advice = "; put the file or folder beside the run, or name it where the command has --weights"
    assert advice in line
    line = refused(capsys, bench.main, "frontier", run)  # which has no such option
    assert advice in line
    none = tmp_path / "none"
    line = refused(capsys, generate.main, "7", "--run", run, "--weights", none,
                   "--out", tmp_path / "x.png")  # fmt: skip
    assert f"on the encoders of {base}; {none}: no such file or folder" in line


def test_another_model_in_its_place_is_not_taken(capsys, run, base, tmp_path):
    """Its fingerprint is not that of the encoders trained on, wherever it is found."""
    kept = shutil.copytree(base, tmp_path / "kept")
    retrained(base)
    for options in ([], ["--weights", base]):
        line = refused(capsys, generate.main, "7", "--run", run, *options,
                       "--out", tmp_path / "x.png")  # fmt: skip
        assert f"{base}: holds other encoders" in line
    move(kept, run.parent / "base")  # the right one is beside the run
    assert found(run)


def test_a_merged_lora_makes_other_encoders():
    """It changes matrices alone, a little everywhere."""
    draw = torch.Generator().manual_seed(0)
    vector, matrix = torch.ones(8), torch.randn(96, 64, generator=draw)
    change = 1e-3 * torch.randn(96, 1, generator=draw) @ torch.randn(1, 64, generator=draw)

    def of(matrix, vector, like=None):
        tensors = {"w": matrix, "b": vector}
        state = {name: in_memory(name, x, Path()) for name, x in tensors.items()}
        return fingerprint({"t5": state}, like)

    assert of(matrix, vector) == of(matrix.clone(), vector)
    assert of(matrix, vector) != of(matrix + change, vector)
    row = torch.zeros(96, 64).index_fill(0, torch.tensor(50), 1)
    assert of(matrix, vector) != of(matrix + row, vector)
    assert of(matrix[:4, :4], vector) != of(matrix[:4, :4] + change[:4, :4], vector)
    assert of(matrix, vector) == of(matrix.T.clone().T, vector)  # whatever its place in memory
    earlier = "e1eb07c5"
    assert of(matrix, vector, "0" * 64) == of(matrix + change, vector, "0" * 64)
    assert of(matrix, vector, "0" * 64).startswith(earlier)
    assert of(matrix, vector, "0" * 64) != of(matrix, 2 * vector, "0" * 64)
    assert of(matrix, vector, of(matrix, vector)) == of(matrix, vector)


def test_weights_that_have_no_meaning_are_refused(capsys, tiny_run, official_file, tmp_path):
    """Only a run that was trained with --weights has a base to look for."""
    out = ("--out", tmp_path / "x.png")
    for model in (tiny_run, official_file):
        line = refused(capsys, generate.main, "7", "--model", model, "--weights", tiny_run, *out)
        assert "--model, --run and --weights are one option: name one of them" in line
        with pytest.raises(InputError, match="omit --weights"):
            weights.load(model, weights=tiny_run)


def test_exporting_a_moved_run(run, base, tmp_path):
    elsewhere = move(base, tmp_path / "else" / "where")
    out = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="--weights PATH"):
        weights.main(["export", str(run), "--layout", "single", "--out", str(out)])
    command = ["export", run, "--layout", "single", "--out", out, "--weights", elsewhere]
    assert weights.main([str(word) for word in command]) == 0
    assert weights.load(out).config == open_checkpoint(run, weights=elsewhere).config


def test_the_transformer_alone_needs_no_base(run, base):
    """Which is what `--init` reads."""
    expected = set(open_transformer(run))
    shutil.rmtree(base)
    assert set(open_transformer(run)) == expected


def test_a_run_that_depends_on_one_that_depends_on_another(run, base, tmp_path):
    second = shutil.copytree(run, run.parent / "second")
    edit(second, weights=str(run))
    moved = move(run.parent, tmp_path / "moved")
    move(base, moved / "base")
    assert found(moved / "second")


def test_links_keep_their_names(tmp_path, tiny_run, monkeypatch):
    """A link is looked for by its own name, not by that of a blob in a cache."""
    (tmp_path / "model").symlink_to(tiny_run)
    args = train_mnist.parse(["--config", "tiny", "--weights", str(tmp_path / "model")])
    assert train_mnist.make_plan(args).identity["weights"] == str(tmp_path / "model")
    assert json.loads((tiny_run / "run.json").read_text()).get("weights") is None
