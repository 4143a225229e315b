"""States of unfinished stages: exact round trips, and detection of damage."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.tensors import bits, draw

from nanosd3.errors import InputError
from nanosd3.storage import training_state
from nanosd3.storage.files import Unreadable


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- round trips --------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """Bit for bit, into existing memory of any layout, touching nothing around it."""
    saved, tensors = draw(1), draw(2)
    around = torch.zeros(4, 6)
    tensors["weight.columns"] = around[:, 1:3]
    before = {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}
    training_state.save_state(tmp_path, "flow", 7, saved, skipped=2)
    numbers = training_state.load_state(tmp_path, "flow", tensors)
    assert numbers == {"stage": "flow", "step": 7, "skipped": 2}
    assert bits(tensors) == bits(saved)
    assert before == {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}
    assert around[:, 0].eq(0).all() and around[:, 3:].eq(0).all()


def test_parameters_are_filled(tmp_path):
    """As in training: the tensors of a module and its optimizer, not copies."""
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    training_state.save_state(tmp_path, "x", 1, tensors)
    weight = module.weight.clone()
    with torch.no_grad():
        module.weight.zero_()
    training_state.load_state(tmp_path, "x", tensors)
    assert torch.equal(module.weight, weight) and module.weight.requires_grad


def test_saving_does_not_modify_tensors(tmp_path):
    tensors = draw()
    before = {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}, bits(tensors)
    training_state.save_state(tmp_path, "x", 1, tensors)
    after = {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}, bits(tensors)
    assert before == after


def test_two_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for step in (2, 4, 9, 10, 100):
        training_state.save_state(tmp_path, "x", step, draw(step))
    assert names(tmp_path) == ["notes.txt", "state-00000010", "state-00000100"]
    saved = [path.name for path in training_state.saved(tmp_path)]
    assert saved == ["state-00000100", "state-00000010"]
    tensors = draw()
    assert training_state.load_state(tmp_path, "x", tensors)["step"] == 100
    assert bits(tensors) == bits(draw(100))
    training_state.forget(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_saved_again_after_the_same_step(tmp_path):
    training_state.save_state(tmp_path, "x", 2, draw(1))
    training_state.save_state(tmp_path, "x", 2, draw(3))
    tensors = draw()
    training_state.load_state(tmp_path, "x", tensors)
    assert names(tmp_path) == ["state-00000002"] and bits(tensors) == bits(draw(3))


def test_nothing_to_load(tmp_path):
    tensors = draw()
    for folder in (tmp_path, tmp_path / "none"):
        assert training_state.load_state(folder, "x", tensors) is None
        assert training_state.averages(folder, "x") is None


def test_another_stage(tmp_path):
    training_state.save_state(tmp_path, "judge", 3, draw(1))
    tensors = draw(2)
    assert training_state.load_state(tmp_path, "flow", tensors) is None
    assert training_state.averages(tmp_path, "flow") is None
    assert bits(tensors) == bits(draw(2)) and names(tmp_path) == ["state-00000003"]


def test_averages(tmp_path):
    """Averages of an unfinished stage load without knowing its network."""
    training_state.save_state(tmp_path, "flow", 3, draw(1))
    training_state.save_state(tmp_path, "flow", 5, draw(2))
    averages = training_state.averages(tmp_path, "flow")
    assert bits(averages) == bits({"plain": draw(2)["ema.plain"]})
    damage_shard(training_state.saved(tmp_path)[0])
    averages = training_state.averages(tmp_path, "flow")
    assert bits(averages) == bits({"plain": draw(1)["ema.plain"]})
    damage_shard(training_state.saved(tmp_path)[1])
    with pytest.raises(InputError, match="state-00000005: damaged"):
        training_state.averages(tmp_path, "flow")


def test_index_is_plain(tmp_path):
    """Plain JSON: no floats, no code; the names and shapes of all tensors."""
    training_state.save_state(tmp_path, "x", 2, draw(2))
    index = json.loads((tmp_path / "state-00000002" / "state.json").read_text())
    assert index["numbers"] == {"stage": "x", "step": 2}
    assert index["shapes"] == {key: list(tensor.shape) for key, tensor in draw().items()}
    assert list(index["sums"]) == ["shard-00001-model-00001-of-00001.safetensors"]


# --- damage -------------------------------------------------------------------------------------


def shard(state: Path) -> Path:
    (path,) = state.glob("*.safetensors")
    return path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def damage_shard(state: Path) -> None:
    flip(shard(state), -5)


def replace_number(state: Path) -> None:
    path = state / "state.json"
    text = path.read_text()
    assert text.count('"step": 4') == 1
    path.write_text(text.replace('"step": 4', '"step": 5'))


def replace_folder(state: Path) -> None:
    shutil.rmtree(state)
    state.write_bytes(b"x")


DAMAGES = {
    "a number in the shard": (damage_shard, "shard-00001"),
    "the shard's header": (lambda s: flip(shard(s), 20), "shard-00001"),
    "the shard cut": (lambda s: os.truncate(shard(s), 900), "shard-00001"),
    "the shard empty": (lambda s: shard(s).write_bytes(b""), "shard-00001"),
    "the shard missing": (lambda s: shard(s).unlink(), "is missing"),
    "the shard longer": (lambda s: shard(s).write_bytes(shard(s).read_bytes() + b"x"), "shard-00"),
    "an extra shard": (lambda s: shutil.copy(shard(s), s / "more.safetensors"), "more.safetensors"),
    "another state's shard": (
        lambda s: shutil.copy(shard(s.with_name("state-00000002")), shard(s)), "shard-00001"
    ),
    "a number in the index": (replace_number, "state.json"),
    "the index cut": (lambda s: os.truncate(s / "state.json", 200), "state.json"),
    "the index empty": (lambda s: (s / "state.json").write_text(""), "state.json"),
    "the index missing": (lambda s: (s / "state.json").unlink(), "state.json"),
    "a foreign index": (lambda s: (s / "state.json").write_text('{"mine": 1}'), "state.json"),
    "the index a list": (lambda s: (s / "state.json").write_text("[1]"), "state.json"),
    "the index not text": (lambda s: (s / "state.json").write_bytes(b"\xff" * 9), "state.json"),
    "all files missing": (lambda s: [path.unlink() for path in s.iterdir()], "state.json"),
    "a file in its place": (replace_folder, "state-00000004"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states(tmp_path, capsys, damage):
    """A warning names the newest and the previous one is used; if both are damaged, one error."""
    spoil, named = DAMAGES[damage]
    for step in (2, 4):
        training_state.save_state(tmp_path, "x", step, draw(step))
    newest, before = training_state.saved(tmp_path)
    spoil(newest)
    tensors = draw()
    assert training_state.load_state(tmp_path, "x", tensors)["step"] == 2
    assert bits(tensors) == bits(draw(2))
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"  warning: {newest}") and named in warning
    assert warning.endswith(f"; using the one before, {before.name}")

    damage_shard(before)
    tensors = draw()
    with pytest.raises(InputError) as error:
        training_state.load_state(tmp_path, "x", tensors)
    assert str(newest) in one_line(error) and named in str(error.value)
    assert str(error.value).endswith("; delete it to repeat the unfinished stage")
    assert bits(tensors) == bits(draw()) and training_state.saved(tmp_path) == [newest, before]

    training_state.save_state(tmp_path, "x", 4, draw(4))  # replaces the damaged one
    assert training_state.load_state(tmp_path, "x", tensors)["step"] == 4
    assert bits(tensors) == bits(draw(4))


def change(tensors: dict, **changes: torch.Tensor | None) -> dict:
    return {k: t for k, t in (tensors | changes).items() if t is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": None}, "tensor step is missing"),
        ({"ema.plain": None}, "tensor ema.plain is missing"),
        ({"more": torch.zeros(2)}, "unexpected tensor more"),
        ({"step": torch.zeros(1)}, "tensor step has shape (1,), expected ()"),
        ({"double": torch.tensor(1.0)}, "tensor double has shape (), expected (3,)"),
        ({"weight.plain": torch.zeros(7, 5)},
         "tensor weight.plain has shape (7, 5), expected (5, 7)"),
        ({"weight.plain": torch.zeros(35)}, "tensor weight.plain has shape (35,), expected (5, 7)"),
    ],
)  # fmt: skip
def test_state_of_another_network(tmp_path, changes, message):
    training_state.save_state(tmp_path, "x", 2, draw(1))
    training_state.save_state(tmp_path, "x", 4, change(draw(1), **changes))
    tensors = draw(2)
    with pytest.raises(InputError) as error:
        training_state.load_state(tmp_path, "x", tensors)
    path = tmp_path / "state-00000004"
    assert one_line(error) == f"{path}: {message}; delete it to repeat the stage"
    assert bits(tensors) == bits(draw(2)) and path.exists()


# --- trouble that is not the state's ------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (RuntimeError("[enforce fail] can't allocate memory"), "can't allocate memory"),
        (OSError(errno.EIO, "Input/output error"), "00000002: cannot be read (Input/output error)"),
        (ValueError("no such key"), "00000002: not a state written by nanosd3; delete it to"),
    ],
)
def test_an_intact_state_is_not_blamed(tmp_path, monkeypatch, error, message):
    """Out of memory, or a disk that cannot be read: nobody is told to delete the state."""
    training_state.save_state(tmp_path, "x", 2, draw(1))

    def load(*_, **__):
        raise error

    monkeypatch.setattr("torch.distributed.checkpoint.load", load)
    kind = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind, match=re.escape(message)) as raised:
        training_state.load_state(tmp_path, "x", draw(2))
    assert ("delete" in str(raised.value)) == isinstance(error, ValueError)


def test_an_index_that_cannot_be_read_now(tmp_path, monkeypatch):
    """It is not skipped as damaged: training on from the one before would delete it."""
    for step in (2, 4):
        training_state.save_state(tmp_path, "x", step, draw(step))

    def read(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(Unreadable, match=r"state.json: cannot be read \(Input"):
        training_state.load_state(tmp_path, "x", draw())
