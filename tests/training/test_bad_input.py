"""Bad input: a one-line error and exit status 2; nothing is executed, written or lost."""

import errno
import hashlib
import io
import os
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save, save_file
from support.commands import refused

import train_mnist
from nanosd3 import config as configs
from nanosd3 import generate, train
from nanosd3.config import CONFIGS, trainable
from nanosd3.errors import InputError
from nanosd3.machine.distributed import Compute
from nanosd3.measure import memory_check
from nanosd3.mmdit import MMDiT
from nanosd3.storage import files, training_state
from nanosd3.storage.run import Run
from nanosd3.training import ema, loop, optimizer, options


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run, to damage."""
    return shutil.copytree(tiny_run, tmp_path / "run")


# --- command lines --------------------------------------------------------------------------------


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
        (["--config", "tiny", "--steps", "0"], "must be at least 1, got 0"),
        (["--config", "tiny", "--batch", "1.5"], "expected a whole number, got '1.5'"),
        (["--config", "tiny", "--lr", "0"], "--lr must be a number above 0, got 0.0"),
        (["--config", "tiny", "--lr", "nan"], "--lr must be a number above 0, got nan"),
        (["--config", "tiny", "--lr", "inf"], "--lr must be a number above 0, got inf"),
        (["--config", "tiny", "--lr", "fast"], "invalid float value: 'fast'"),
        (["--config", "tiny", "--decay", "linear"], "linear"),
        (["--config", "tiny", "--precision", "float16"], "float16"),
        (["--config", "tiny", "--accumulate", "0"], "must be at least 1, got 0"),
        (["--config", "tiny", "--accumulate", "5"], "a batch of 32 cannot be divided among 1 "
         "processes x 5 microbatches; use a multiple of 5"),
        (["--config", "tiny", "--parallel", "ddp"], "start with `torchrun"),
        (["--config", "tiny", "--parallel", "fsdp"], "start with `torchrun"),
        (["--config", "tiny", "--parallel", "tensor"], "tensor"),
        (["--config", "tiny", "--weights", "/no/such"], "/no/such: no such file or folder"),
        (["--config", "tiny", "--init", "/no/such"], "/no/such: no such file or folder"),
        (["--config", "tiny", "--weights", __file__], "test_bad_input.py"),
        (["--config", "tiny", "--init", __file__], "test_bad_input.py"),
    ],
)  # fmt: skip
def test_train(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, train_mnist.main, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --data"),
        (["--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--data", __file__], "test_bad_input.py: is a file, expected a folder of images"),
        (["--data", "."], "no images in it"),
        (["--data", ".", "--prompts", "x"], "--prompts"),
        (["--data", ".", "--config", "huge"], "huge"),
    ],
)
def test_train_on_a_folder(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, train.main, *arguments)
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_the_config(capsys, tmp_path, monkeypatch, tiny_run, official_file):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--config", "mnist", "--init", tiny_run], "its transformer does not fit config mnist: "),
        (["--config", "tiny", "--init", official_file],
         "its transformer does not fit config tiny: "),
        (["--config", "tiny", "--weights", official_file],
         "its latents have 16 channels, config tiny needs 4"),
    ):  # fmt: skip
        line = refused(capsys, train_mnist.main, *arguments)
        assert message in line and str(arguments[-1]) in line
    plain = replace(CONFIGS["tiny"].mmdit, qk_norm=False)
    monkeypatch.setitem(CONFIGS, "plain", replace(CONFIGS["tiny"], name="plain", mmdit=plain))
    line = refused(capsys, train_mnist.main, "--config", "plain", "--init", tiny_run)
    assert "does not fit config plain: mmdit of this size has no joint_blocks.0." in line
    assert not list(tmp_path.iterdir())
    wider = SimpleNamespace(path="wider", config=CONFIGS["mnist"])
    message = "wider: its text features are 128 and 96 wide; config tiny takes at most 48 and 32"
    with pytest.raises(InputError, match=message):
        options.with_parts_of(CONFIGS["tiny"], wider)


def test_full_size_needs_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory_check, "memory_found", lambda: (8.0, "free"))
    few = replace(configs.LARGE_TRAINING, train_images=300, test_images=100)
    monkeypatch.setattr(configs, "LARGE_TRAINING", few)
    line = refused(capsys, train_mnist.main, "--config", "sd3-medium")
    assert "2.0B parameters needs 635 GB" in line and "found 8 GB free: not enough" in line
    assert "--checkpointing" in line and "--accumulate" in line and "fsdp" in line
    for name in CONFIGS:
        if CONFIGS[name].training is None:
            refused(capsys, train_mnist.main, "--config", name)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(memory_check, "memory_found", lambda: (39.0, "free"))
    one = "--config", "sd3-medium", "--accumulate", "64", "--checkpointing"
    line = refused(capsys, train_mnist.main, *one)
    assert "training 2.0B parameters needs" in line
    monkeypatch.setattr(options, "refuse_too_large", lambda *_: None)
    line = refused(capsys, train_mnist.main, *one)
    assert "the autoencoder on 1024x1024 pixels needs 40 GB of memory, found 39 GB free" in line
    assert "--weights PATH" in line and "--accumulate" not in line
    assert not list(tmp_path.iterdir())


def test_sharded_size_needs_memory(monkeypatch):
    monkeypatch.setattr(memory_check, "memory_found", lambda: (8.0, "free"))
    eight = trainable(CONFIGS["sd3-medium"]), 8, Compute(checkpointing=True, accumulate=8)
    memory_check.refuse_too_large(*eight, sharded=True)  # each process holds an eighth
    with pytest.raises(InputError, match="not enough"):
        memory_check.refuse_too_large(*eight, sharded=False)  # each process holds everything


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
        (["--negative", "3", "--guidance", "1"], "no effect without guidance"),
        (["--shift", "1e9"], "makes consecutive times of"),
        (["--run", "x" * 300], "file name too long"),
    ],
)
def test_generate(capsys, tiny_run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, generate.main, "7", "--run", tiny_run, *arguments).replace(
        "File", "file"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--run", "--weights", "--out", "--decoder", "--init-image"])
@pytest.mark.parametrize("path", ["x" * 100_000, "x/" * 50_000])
def test_the_end_of_a_long_message_is_read(capsys, tiny_run, tmp_path, option, path):
    """What is wrong with a path, not the path."""
    run = [] if option == "--weights" else ["--run", tiny_run]
    line = refused(capsys, generate.main, "7", *run, option, tmp_path / path)
    assert 2000 < len(line) < 2100 and not line.endswith("xxx")


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
    missing = "none: no such file or folder"
    assert missing in refused(capsys, generate.main, "7", "--run", tmp_path / "none")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "no run.json" in refused(capsys, generate.main, "7", "--run", tmp_path)
    for more in ([], ["--fresh"]):
        line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", tmp_path, *more)
        assert "is not empty and has no run.json" in line
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_fresh_deletes_only_runs(capsys, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text('{"mine": 1}')
    (other / "thesis.txt").write_text("years of work")
    before = snapshot(other)
    command = ["--config", "tiny", "--fresh", "--out"]
    assert "damaged: no config" in refused(capsys, train_mnist.main, *command, other)
    assert snapshot(other) == before
    (run / "notes.txt").write_text("mine")
    training_state.save_state(run, "flow", 3, {"x": torch.ones(3)})
    (run / "speed.jsonl").write_text("{}")
    Run.open(run, {"config": {"name": "tiny"}}, fresh=True)
    assert {path.name for path in run.iterdir()} == {"run.json", "notes.txt"}


def test_run_of_another_config_data_or_seed(capsys, run):
    before = snapshot(run)
    line = refused(capsys, train_mnist.main, "--config", "mnist", "--out", run)
    assert "holds a run of config tiny, not mnist" in line and "--fresh" in line
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run, "--seed", 9)
    assert "with seed 0, not 9" in line
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run, "--steps", 13)
    assert "with config.training.flow.steps 12, not 13; choose another folder" in line
    for option in ("init", "weights"):
        line = refused(
            capsys, train_mnist.main, "--config", "tiny", "--out", run, f"--{option}", run
        )
        assert f"holds a run without {option};" in line
    assert snapshot(run) == before


def test_run_started_from_other_weights(capsys, run):
    """Without its --init, the command would not resume that run but start a different one."""
    edit_index(run, lambda c: c.update(init="0123"))
    before = snapshot(run)
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run)
    assert "holds a run with init; choose another folder" in line
    assert snapshot(run) == before


def edit_index(run, change):
    content = files.read_json(run / "run.json")
    change(content)
    files.write_json(run / "run.json", content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["stages"].pop("flow"), "unfinished (no flow yet); rerun"),
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


def test_run_of_an_older_version(capsys, run, tmp_path):
    """Its config lacks a field with a default: it can generate but not resume training."""
    command = ["a seven", "--run", str(run), "--out"]
    assert generate.main([*command, str(tmp_path / "now.npy")]) == 0
    edit_index(run, lambda c: [c["config"]["training"][stage].pop("decay")
                               for stage in ("judge", "autoencoder", "clip", "t5", "flow")]
               )  # fmt: skip
    assert generate.main([*command, str(tmp_path / "before.npy")]) == 0
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npy") for name in ("now", "before")))
    line = refused(capsys, train_mnist.main, "--config", "tiny", "--out", run)
    assert "holds a run without config.training.judge.decay; choose another folder" in line


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


@pytest.fixture
def unfinished(run_before_flow, tmp_path):
    return shutil.copytree(run_before_flow, tmp_path / "unfinished")


def flow_state() -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of the flow stage."""
    config = CONFIGS["tiny"]
    model = MMDiT(config.mmdit)
    optimizers = optimizer.make_optimizers(model, config.training.flow)
    return loop.state_tensors(model, optimizers, ema.make_ema(model))


def resume_error(capsys, run) -> str:
    """The error line when a run cannot be resumed."""
    return refused(capsys, train_mnist.main, "--config", "tiny", "--out", run)


def test_pickled_code_is_never_executed(capsys, unfinished, tmp_path, unobserved):
    """Neither from a shard with a valid checksum, nor from PyTorch's usual index, a pickle."""
    run, exploded = unfinished, tmp_path / "exploded"
    training_state.save_state(run, "flow", 3, flow_state(), skipped=0)
    state = run / "state-00000003"
    (shard,) = state.glob("*.safetensors")
    good = shard.read_bytes(), (state / "state.json").read_bytes()
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(exploded)}, buffer)
    for bomb in (pickle.dumps(Bomb(exploded)), buffer.getvalue()):
        shard.write_bytes(bomb)
        index = files.read_json(state / "state.json")
        index["sums"][shard.name] = hashlib.sha256(bomb).hexdigest()
        index.pop("sum")
        files.write_json(state / "state.json", index | {"sum": training_state.index_sum(index)})
        line = resume_error(capsys, run)
        assert f"{state.name}: not a state" in line and "delete it" in line
    (run / "flow.safetensors").write_bytes(shard.read_bytes())
    edit_index(run, lambda c: c["stages"].update(flow={"loss": 1.0}))
    assert "flow.safetensors: damaged" in refused(capsys, generate.main, "7", "--run", run)

    edit_index(run, lambda c: c["stages"].pop("flow"))
    shard.write_bytes(good[0])
    (state / "state.json").write_bytes(good[1])
    (state / ".metadata").write_bytes(pickle.dumps(Bomb(exploded)))
    assert train_mnist.main(["--config", "tiny", "--out", str(run)]) == 0
    assert "resuming from step 3" in capsys.readouterr().out
    assert not exploded.exists()


@pytest.mark.parametrize("file", ["shard", "index"])
@pytest.mark.parametrize("damage", ["truncated", "a bit", "garbage", "empty", "foreign", "missing"])
def test_damaged_checkpoint(capsys, unfinished, damage, file):
    training_state.save_state(unfinished, "flow", 3, flow_state(), skipped=0)
    state = unfinished / "state-00000003"
    path = state / "state.json" if file == "index" else next(state.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes({
        "truncated": content[:-200],
        "a bit": content[:-20] + bytes([content[-20] ^ 1]) + content[-19:],
        "garbage": b"\x80" + content[1:][::-1],
        "foreign": b'{"mine": [1]}' if file == "index" else save({"x": torch.zeros(3)}),
    }.get(damage, b""))  # fmt: skip
    if damage == "missing":
        path.unlink()
    before = snapshot(state)
    line = resume_error(capsys, unfinished)
    assert str(state) in line and path.name in line and "delete it to repeat" in line
    assert snapshot(state) == before  # deleting it is up to the user
    shutil.rmtree(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "progress", lambda steps, *_: pytest.fail(f"from step {steps.start}"))
        with pytest.raises(pytest.fail.Exception, match="from step 0"):
            train_mnist.main(["--config", "tiny", "--out", str(unfinished)])


@pytest.mark.parametrize("content", [b"old", None], ids=["file", "folder"])
def test_something_else_named_like_a_checkpoint(capsys, unfinished, content):
    state = unfinished / "state-00000003.pt"  # as written by older versions
    state.write_bytes(content) if content else state.mkdir()
    line = resume_error(capsys, unfinished)
    assert str(state) in line and "delete it to repeat" in line and state.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("exp_avg.x_embedder.proj.weight"),
         "tensor exp_avg.x_embedder.proj.weight is missing"),
        (lambda s: s.pop("ema.x_embedder.proj.bias"), "tensor ema.x_embedder.proj.bias is missing"),
        (lambda s: s.update({"exp_avg_sq.x_embedder.proj.bias": torch.zeros(3, 5)}),
         "tensor exp_avg_sq.x_embedder.proj.bias has shape (3, 5), expected (128,)"),
        (lambda s: s.update({"step.x_embedder.proj.bias": torch.zeros(1)}),
         "tensor step.x_embedder.proj.bias has shape (1,), expected ()"),
        (lambda s: s.update(extra=torch.zeros(3)), "unexpected tensor extra"),
    ],
)  # fmt: skip
def test_checkpoint_that_does_not_fit(capsys, unfinished, change, message):
    tensors = flow_state()
    change(tensors)
    training_state.save_state(unfinished, "flow", 3, tensors, skipped=0)
    line = resume_error(capsys, unfinished)
    assert f"state-00000003: {message}; delete it to repeat the stage" in line
    assert (unfinished / "state-00000003").exists()


# --- writing --------------------------------------------------------------------------------------


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    files.write_file(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"weights: cannot be written \(No space left on device\)"):
        files.write_file(path, b"new")
    assert snapshot(tmp_path) == {path: b"old"}


@pytest.mark.parametrize("files", [*range(14), 20, 30])
def test_full_disk_in_training(capsys, tmp_path, monkeypatch, one_step, unobserved, files):
    """The error names the file; finished stages are kept, and the same command resumes there."""
    written, run, original = [], tmp_path / "run", os.fsync

    def full_after_some(descriptor):
        written.append(descriptor)
        if len(written) > files:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_some)
        line = resume_error(capsys, run)
    assert f"{run}" in line and "cannot be written (No space left on device)" in line
    assert not [path for path in run.rglob("*") if path.suffix == ".tmp"]
    stages_done = Run.read(run).stages if (run / "run.json").exists() else {}
    assert all((run / f"{stage}.safetensors").exists() for stage in stages_done)
    monkeypatch.setattr(loop, "progress", None)
    with pytest.raises(TypeError):  # at the first unfinished stage
        train_mnist.main(["--config", "tiny", "--out", str(run)])


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_file(tmp_path / "x", b"new")
    assert not list(tmp_path.iterdir())
