"""States of unfinished stages: exact, whole or not at all, and two of them."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanosd3 import states
from nanosd3.runtime import InputError

ROOT = Path(__file__).parent.parent


def draw(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of every kind that a stage may hold."""
    g = torch.Generator().manual_seed(seed)
    plain = torch.randn(5, 7, generator=g)
    plain[0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-42])
    kernel = torch.randn(2, 3, 4, 5, generator=g)
    return {
        "step": torch.tensor(float(seed)),  # without dimensions, as AdamW's
        "weight.plain": plain,
        "weight.kernel": kernel.to(memory_format=torch.channels_last),
        "weight.columns": torch.randn(4, 6, generator=g)[:, 1:3],
        "weight.turned": torch.randn(4, 6, generator=g).T,
        "weight.none": torch.zeros(0, 3),
        "ema.plain": plain + 1,
        "double": torch.randn(3, generator=g, dtype=torch.float64),
        "half": torch.randn(3, generator=g).to(torch.bfloat16),
        "count": torch.tensor([2**60 + seed]),
    }


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {k: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for k, t in tensors.items()}  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- there and back -----------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """Bit by bit, into the memory that is there, whatever its layout, and nowhere else."""
    saved, tensors = draw(1), draw(2)
    around = torch.zeros(4, 6)
    tensors["weight.columns"] = around[:, 1:3]
    before = {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}
    states.save(tmp_path, "flow", 7, saved, skipped=2)
    assert states.load(tmp_path, "flow", tensors) == {"stage": "flow", "step": 7, "skipped": 2}
    assert bits(tensors) == bits(saved)
    assert before == {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}
    assert around[:, 0].eq(0).all() and around[:, 3:].eq(0).all()


def test_parameters_are_filled(tmp_path):
    """As in training: what an optimizer and a module hold, not copies."""
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    states.save(tmp_path, "x", 1, tensors)
    weight = module.weight.clone()
    with torch.no_grad():
        module.weight.zero_()
    states.load(tmp_path, "x", tensors)
    assert torch.equal(module.weight, weight) and module.weight.requires_grad


def test_what_is_saved_does_not_change_what_is_held(tmp_path):
    tensors = draw()
    before = {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}, bits(tensors)
    states.save(tmp_path, "x", 1, tensors)
    after = {key: (t.data_ptr(), t.stride()) for key, t in tensors.items()}, bits(tensors)
    assert before == after


def test_two_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for step in (2, 4, 9, 10, 100):
        states.save(tmp_path, "x", step, draw(step))
    assert names(tmp_path) == ["notes.txt", "state-00000010", "state-00000100"]
    assert [path.name for path in states.saved(tmp_path)] == ["state-00000100", "state-00000010"]
    tensors = draw()
    assert states.load(tmp_path, "x", tensors)["step"] == 100
    assert bits(tensors) == bits(draw(100))
    states.forget(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_saved_again_after_the_same_step(tmp_path):
    states.save(tmp_path, "x", 2, draw(1))
    states.save(tmp_path, "x", 2, draw(3))
    tensors = draw()
    states.load(tmp_path, "x", tensors)
    assert names(tmp_path) == ["state-00000002"] and bits(tensors) == bits(draw(3))


def test_nothing_to_load(tmp_path):
    tensors = draw()
    for folder in (tmp_path, tmp_path / "none"):
        assert states.load(folder, "x", tensors) is None
        assert states.averages(folder, "x") is None


def test_another_stage(tmp_path):
    states.save(tmp_path, "judge", 3, draw(1))
    tensors = draw(2)
    assert states.load(tmp_path, "flow", tensors) is None
    assert states.averages(tmp_path, "flow") is None
    assert bits(tensors) == bits(draw(2)) and names(tmp_path) == ["state-00000003"]


def test_averages(tmp_path):
    """Of a stage that is still being trained, without knowing its network."""
    states.save(tmp_path, "flow", 3, draw(1))
    states.save(tmp_path, "flow", 5, draw(2))
    found = states.averages(tmp_path, "flow")
    assert bits(found) == bits({"plain": draw(2)["ema.plain"]})
    damage_shard(states.saved(tmp_path)[0])
    found = states.averages(tmp_path, "flow")
    assert bits(found) == bits({"plain": draw(1)["ema.plain"]})
    damage_shard(states.saved(tmp_path)[1])
    with pytest.raises(InputError, match="state-00000005: damaged"):
        states.averages(tmp_path, "flow")


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
    "one shard more": (lambda s: shutil.copy(shard(s), s / "more.safetensors"), "more.safetensors"),
    "another state's shard": (
        lambda s: shutil.copy(shard(s.with_name("state-00000002")), shard(s)), "shard-00001"
    ),
    "a number in the index": (replace_number, "state.json"),
    "the index cut": (lambda s: os.truncate(s / "state.json", 200), "state.json"),
    "the index empty": (lambda s: (s / "state.json").write_text(""), "state.json"),
    "the index missing": (lambda s: (s / "state.json").unlink(), "state.json"),
    "the index of others": (lambda s: (s / "state.json").write_text('{"mine": 1}'), "state.json"),
    "the index a list": (lambda s: (s / "state.json").write_text("[1]"), "state.json"),
    "the index no text": (lambda s: (s / "state.json").write_bytes(b"\xff" * 9), "state.json"),
    "all files missing": (lambda s: [path.unlink() for path in s.iterdir()], "state.json"),
    "a file in its place": (replace_folder, "state-00000004"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states(tmp_path, capsys, damage):
    """The newest is named and the one before is used; if that is damaged too, one line says so."""
    spoil, named = DAMAGES[damage]
    for step in (2, 4):
        states.save(tmp_path, "x", step, draw(step))
    newest, before = states.saved(tmp_path)
    spoil(newest)
    tensors = draw()
    assert states.load(tmp_path, "x", tensors)["step"] == 2
    assert bits(tensors) == bits(draw(2))
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"  warning: {newest}") and named in said
    assert said.endswith(f"; using the one before, {before.name}")

    damage_shard(before)
    tensors = draw()
    with pytest.raises(InputError) as error:
        states.load(tmp_path, "x", tensors)
    assert str(newest) in one_line(error) and named in str(error.value)
    assert str(error.value).endswith("; delete it to repeat the unfinished stage")
    assert bits(tensors) == bits(draw()) and states.saved(tmp_path) == [newest, before]

    states.save(tmp_path, "x", 4, draw(4))  # where the damaged one was
    assert states.load(tmp_path, "x", tensors)["step"] == 4 and bits(tensors) == bits(draw(4))


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
    states.save(tmp_path, "x", 2, draw(1))
    states.save(tmp_path, "x", 4, change(draw(1), **changes))
    tensors = draw(2)
    with pytest.raises(InputError) as error:
        states.load(tmp_path, "x", tensors)
    path = tmp_path / "state-00000004"
    assert one_line(error) == f"{path}: {message}; delete it to repeat the stage"
    assert bits(tensors) == bits(draw(2)) and path.exists()


# --- writing fails ------------------------------------------------------------------------------


@pytest.fixture
def one_saved(tmp_path) -> Path:
    states.save(tmp_path, "x", 2, draw(2))
    return tmp_path


def only_the_old_one(folder: Path) -> None:
    tensors = draw()
    assert names(folder) == ["state-00000002"]
    assert states.load(folder, "x", tensors)["step"] == 2 and bits(tensors) == bits(draw(2))


@pytest.mark.parametrize("files", [0, 1, 2])
def test_full_disk(one_saved, monkeypatch, files):
    """While the shard, the index or their folder is flushed."""
    flushed = []

    def full(descriptor):
        flushed.append(descriptor)
        if len(flushed) > files:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError) as error:
            states.save(one_saved, "x", 4, draw(4))
    line = one_line(error)
    assert str(one_saved) in line and "state-00000004" in line
    assert line.endswith("cannot be written (No space left on device)")
    only_the_old_one(one_saved)
    states.save(one_saved, "x", 4, draw(4))
    assert states.load(one_saved, "x", draw())["step"] == 4


@pytest.mark.skipif(os.name != "posix", reason="POSIX's limit of a file's size")
def test_file_that_becomes_too_large(one_saved):
    """A real failure in the middle of writing, from the system."""
    code = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from nanosd3 import states; from nanosd3.runtime import run_main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "tensors = {'x': torch.zeros(10000)}\n"
        "sys.exit(run_main(lambda: states.save(Path(sys.argv[1]), 'x', 4, tensors)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, one_saved], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    path = one_saved / "state-00000004"
    assert done.stderr == f"error: {path}: cannot be written (File too large)\n"
    only_the_old_one(one_saved)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError) as error:
        states.save(tmp_path / "file", "x", 4, draw())
    assert "state-00000004: cannot be written (Not a directory)" in one_line(error)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("files", [0, 1])
def test_interrupted(one_saved, monkeypatch, kind, files):
    """What is no failure of the disk is not taken for one: Ctrl-C remains Ctrl-C."""
    flushed = []

    def interrupt(descriptor):
        flushed.append(descriptor)
        if len(flushed) > files:
            raise kind

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(kind):
            states.save(one_saved, "x", 4, draw(4))
    only_the_old_one(one_saved)


# --- killed -------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from nanosd3 import states
from test_states import draw
left = int(sys.argv[2])

def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

os.fsync, os.replace, os.unlink = map(counted, (os.fsync, os.replace, os.unlink))
os.rmdir, os.mkdir = map(counted, (os.rmdir, os.mkdir))
states.save(Path(sys.argv[1]), "x", 6, draw(6))
print(int(sys.argv[2]) - left)
"""


def save_until(folder: Path, event: int) -> subprocess.CompletedProcess:
    """Save the state after step 6, in a process that kills itself before its event of this
    number: a file made, flushed, renamed or deleted."""
    return subprocess.run([sys.executable, "-c", CHILD, str(folder), str(event)], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip


def check_after_kill(folder: Path, capsys) -> None:
    """The newest of two sound states is used without a warning; the next one removes the rest."""
    tensors = draw()
    step = states.load(folder, "x", tensors)["step"]
    assert step in (4, 6) and bits(tensors) == bits(draw(step))
    assert len(states.saved(folder)) >= 2 and capsys.readouterr().out == ""
    states.save(folder, "x", 8, draw(8))
    kept = ["state-00000006", "state-00000008"] if step == 6 else ["state-00000004",
                                                                   "state-00000008"]  # fmt: skip
    assert names(folder) == kept


def two_saved(folder: Path) -> Path:
    for step in (2, 4):
        states.save(folder, "x", step, draw(step))
    return folder


def test_killed_while_saving(tmp_path, capsys):
    """Between the shard and the index."""
    done = save_until(two_saved(tmp_path), 3)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(tmp_path) == [".state-00000006.tmp", "state-00000002", "state-00000004"]
    check_after_kill(tmp_path, capsys)


@pytest.mark.slow
def test_killed_anywhere(tmp_path, capsys):
    whole = save_until(two_saved(tmp_path / "whole"), 10**9)
    assert whole.returncode == 0, whole.stderr
    for event in range(1, int(whole.stdout) + 1):
        folder = two_saved(tmp_path / str(event))
        assert save_until(folder, event).returncode == -signal.SIGKILL
        check_after_kill(folder, capsys)


def test_what_is_left_of_a_killed_process(one_saved):
    """Half a state by its temporary name: neither loaded nor counted, removed by who saves next
    or by the end of the stage."""
    for step in (2, 3):
        half = one_saved / f".state-{step:08d}.tmp"
        half.mkdir()
        (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert states.load(one_saved, "x", draw())["step"] == 2
    states.save(one_saved, "x", 4, draw(4))
    assert names(one_saved) == ["state-00000002", "state-00000004"]
    half.mkdir()
    states.forget(one_saved)
    assert names(one_saved) == []


def test_index_is_plain(one_saved):
    """To be read by anyone: no floats, no code, the names of all tensors with their shapes."""
    index = json.loads((one_saved / "state-00000002" / "state.json").read_text())
    assert index["numbers"] == {"stage": "x", "step": 2}
    assert index["shapes"] == {key: list(tensor.shape) for key, tensor in draw().items()}
    assert list(index["sums"]) == ["shard-00001-model-00001-of-00001.safetensors"]
