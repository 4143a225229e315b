"""Bad input: one clear line, exit status 2, nothing executed, written or lost."""

import errno
import hashlib
import io
import os
import shutil

import pytest
import torch
from safetensors.torch import load, save_file

import train_mnist
from nanosd3 import checkpoint, generate
from nanosd3.checkpoint import Run
from nanosd3.config import CONFIGS
from nanosd3.runtime import InputError, run_main


def refused(capsys, main, *arguments: object) -> str:
    """The one line with which a command line is refused."""
    assert run_main(lambda: main([str(a) for a in arguments])) == 2
    err = capsys.readouterr().err.replace("\r", "\n")
    assert "Traceback" not in err and err.count("error: ") == 1, err
    line = err.splitlines()[-1].strip()  # behind progress bars, if it went that far
    assert line.startswith("error: "), err
    return line


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(tiny_run, tmp_path / "run")


# --- the command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "huge"], "huge"),
        (["--confg", "tiny"], "--confg"),
        (["--config", "tiny", "--threads", "0"], "must be at least 1, got 0"),
        (["--config", "tiny", "--threads", "two"], "expected a whole number, got 'two'"),
        (["--config", "tiny", "--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--config", "tiny", "--out", "/proc/nanosd3/run"], "/proc/nanosd3/run"),
        (["--config", "tiny", "--out", __file__], "is a file"),
    ],
)
def test_train(capsys, arguments, message):
    assert message in refused(capsys, train_mnist.main, *arguments)


def test_full_size_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(train_mnist, "memory_found", lambda: (8.0, "free"))
    line = refused(capsys, train_mnist.main, "--config", "sd3-medium")
    assert "2.0B parameters" in line and "52 GB" in line and "found 8 GB free: not enough" in line
    for name in CONFIGS:
        if CONFIGS[name].training is None:
            refused(capsys, train_mnist.main, "--config", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "ddim"], "ddim"),
        (["--drop", "bert"], "bert"),
        (["--count", "0"], "must be at least 1"),
        (["--count", "-2"], "must be at least 1"),
        (["--steps", "0"], "must be at least 1"),
        (["--steps", "1.5"], "whole number"),
        (["--guidance", "-1"], "guidance must be a number from 0 up"),
        (["--guidance", "nan"], "guidance must be"),
        (["--shift", "0"], "shift must be a number above 0"),
        (["--out", "x.jpg"], "must end in .png or .npy"),
        (["--out", "no/such/folder/x.png"], "does not exist"),
        (["--seeed", "3"], "--seeed"),
        (["--see", "3"], "--see"),
        (["--negative", "3", "--guidance", "1"], "no effect at guidance 1"),
        (["--shift", "1e9"], "leaves no room"),
        (["--run", "x" * 300], "file name too long"),
    ],
)
def test_generate(capsys, tiny_run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, generate.main, "7", "--run", tiny_run, *arguments).replace(
        "File", "file"
    )
    assert not list(tmp_path.iterdir())


def test_no_prompt(capsys, tiny_run):
    assert "PROMPT" in refused(capsys, generate.main, "--run", tiny_run)


def test_output_cannot_be_written(capsys, tiny_run, tmp_path):
    (tmp_path / "x.png").mkdir()
    line = refused(capsys, generate.main, "7", "--run", tiny_run, "--out", tmp_path / "x.png")
    assert "is a folder" in line
    line = refused(capsys, generate.main, "7", "--run", tiny_run, "--out", "/proc/x.png")
    assert "/proc/x.png: cannot be written" in line


# --- run folders ----------------------------------------------------------------------------------


def test_missing_and_foreign_folders(capsys, tmp_path):
    assert "no such run folder" in refused(capsys, generate.main, "7", "--run", tmp_path / "none")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "no run.json" in refused(capsys, generate.main, "7", "--run", tmp_path)
    for more in ([], ["--fresh"]):
        line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", tmp_path, *more)
        assert "is not empty and holds no run.json" in line
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_fresh_deletes_nothing_but_a_run(capsys, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text('{"mine": 1}')
    (other / "thesis.txt").write_text("years of work")
    before = snapshot(other)
    command = ["--config", "tiny", "--fresh", "--out"]
    assert "damaged: no config" in refused(capsys, train_mnist.main, *command, other)
    assert snapshot(other) == before
    (run / "notes.txt").write_text("mine")
    Run.open(run, {"config": {"name": "tiny"}}, fresh=True)
    assert {path.name for path in run.iterdir()} == {"run.json", "notes.txt"}


def test_run_of_another_config_data_or_seed(capsys, run):
    before = snapshot(run)
    line = refused(capsys, train_mnist.main, "--config", "mnist", "--out", run)
    assert "holds a run of config tiny, not mnist" in line and "--fresh" in line
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run, "--seed", 9)
    assert "with seed 0, not 9" in line
    assert snapshot(run) == before


def edit_index(run, change):
    content = checkpoint.read_json(run / "run.json")
    change(content)
    checkpoint.write_json(run / "run.json", content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["stages"].pop("flow"), "unfinished (no flow yet); go on with"),
        (lambda c: c.pop("stages"), "no config or stages"),
        (lambda c: c["config"].pop("vae"), "config.vae is missing"),
        (
            lambda c: c["config"]["mmdit"].update(depth="2"),
            "config.mmdit.depth should be of type int",
        ),
        (lambda c: c["config"]["mmdit"].update(wide=2), "config.mmdit.wide is unknown"),
        (lambda c: c["config"].update(text=[]), "config.text should be an object"),
    ],
)
def test_damaged_index(capsys, run, change, message):
    edit_index(run, change)
    assert message in refused(capsys, generate.main, "7", "--run", run)


def test_half_written_index(capsys, run):
    path = run / "run.json"
    path.write_text(path.read_text()[:100])
    assert "run.json: cannot be read" in refused(capsys, generate.main, "7", "--run", run)
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run)
    assert "run.json: cannot be read" in line


@pytest.mark.parametrize("name", ["flow", "autoencoder", "text"])
def test_damaged_weights(capsys, run, name):
    path = run / f"{name}.safetensors"
    content, state = path.read_bytes(), load(path.read_bytes())
    key = next(iter(state))

    def line_for(change):
        change()
        line = refused(capsys, generate.main, "7", "--run", run)
        assert str(path) in line
        path.write_bytes(content)
        return line

    assert "damaged" in line_for(lambda: path.write_bytes(content[:-100]))
    assert "damaged" in line_for(lambda: path.write_bytes(b"\xff" * 64 + content))
    assert "damaged" in line_for(lambda: path.write_bytes(b""))
    assert "no such file" in line_for(path.unlink)
    short = {k: v for k, v in state.items() if k != key}
    assert f"{key} is missing" in line_for(lambda: save_file(short, path))
    assert "unexpected tensor extra" in line_for(
        lambda: save_file({**state, "extra": torch.ones(2)}, path)
    )
    wrong = {**state, key: torch.zeros(3, 5)}
    assert "shape (3, 5), expected" in line_for(lambda: save_file(wrong, path))


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"clip_merges": ["a"], "clip_vocab": 9}'])
def test_damaged_tokenizers(capsys, run, content):
    (run / "tokenizers.json").write_text(content)
    assert "tokenizers.json: " in refused(capsys, generate.main, "7", "--run", run)


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def unfinished(run):
    """Make the run one whose flow stage has to be continued."""
    edit_index(run, lambda c: [c["stages"].pop(stage) for stage in ("flow", "samples")])
    return run / "state-00000003.pt"


def save_with_checksum(content, path):
    """As a state is saved, with something else in it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def test_pickled_code_is_never_executed(capsys, run, tmp_path):
    state = unfinished(run)
    bomb = {"stage": "flow", "step": 3, "module": Bomb(tmp_path / "exploded")}
    save_with_checksum(bomb, state)
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run)
    assert f"{state.name}: not a state" in line and "delete it" in line
    (run / "flow.safetensors").write_bytes(state.read_bytes())
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "foreign", "misshapen"])
def test_damaged_state(capsys, run, damage):
    state = unfinished(run)
    good = {"stage": "flow", "step": 3, "module": {"x": torch.zeros(3)}, "optimizer": {}, "ema": {}}
    save_with_checksum(["not", "a", "state"] if damage == "foreign" else good, state)
    if damage in ("truncated", "garbage", "empty"):
        content = state.read_bytes()
        cut = {"truncated": content[:-200], "garbage": b"\x80" + content[1:][::-1], "empty": b""}
        state.write_bytes(cut[damage])
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run)
    assert state.name in line
    assert state.exists()  # it is the user's to delete


# --- writing --------------------------------------------------------------------------------------


def test_optimizer_that_does_not_fit(capsys, run):
    weights = load((run / "flow.safetensors").read_bytes())
    state = {"stage": "flow", "step": 3, "module": weights, "ema": weights, "optimizer": {}}
    save_with_checksum(state | {"skipped": 0}, unfinished(run))
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run)
    assert "state-00000003.pt: its optimizer does not fit" in line


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    checkpoint.write_file(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"weights: cannot be written \(No space left on device\)"):
        checkpoint.write_file(path, b"new")
    assert snapshot(tmp_path) == {path: b"old"}


def test_full_disk_in_training(capsys, tmp_path, monkeypatch):
    """The line names the file; what was finished stays."""
    written = []

    def full_after_judge(descriptor):
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_after_judge)
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", tmp_path / "run")
    assert "No space left on device" in line
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_file(tmp_path / "x", b"new")
    assert not list(tmp_path.iterdir())
