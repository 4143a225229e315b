"""Saving a state: failures to write, interruptions and kills leave the previous one intact."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.tensors import bits, draw

from nanosd3.errors import InputError
from nanosd3.storage import training_state

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def one_saved(tmp_path) -> Path:
    training_state.save_state(tmp_path, "x", 2, draw(2))
    return tmp_path


def assert_only_the_old_state(folder: Path) -> None:
    tensors = draw()
    assert names(folder) == ["state-00000002"]
    assert training_state.load_state(folder, "x", tensors)["step"] == 2
    assert bits(tensors) == bits(draw(2))


@pytest.mark.parametrize("files", [0, 1, 2])
def test_full_disk(one_saved, monkeypatch, files):
    """The disk is full while the shard, the index or their folder is flushed."""
    flushed = []

    def full(descriptor):
        flushed.append(descriptor)
        if len(flushed) > files:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError) as error:
            training_state.save_state(one_saved, "x", 4, draw(4))
    line = one_line(error)
    assert str(one_saved) in line and "state-00000004" in line
    assert line.endswith("cannot be written (No space left on device)")
    assert_only_the_old_state(one_saved)
    training_state.save_state(one_saved, "x", 4, draw(4))
    assert training_state.load_state(one_saved, "x", draw())["step"] == 4


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX file size limits")
def test_file_size_limit(one_saved):
    """A real failure of the operating system, halfway through a file."""
    code = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from nanosd3.storage import training_state; from nanosd3.cli import run_main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "tensors = {'x': torch.zeros(10000)}\n"
        "sys.exit(run_main(lambda: training_state.save_state(Path(sys.argv[1]), 'x', 4, tensors)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, one_saved], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    path = one_saved / "state-00000004"
    assert done.stderr == f"error: {path}: cannot be written (File too large)\n"
    assert_only_the_old_state(one_saved)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError) as error:
        training_state.save_state(tmp_path / "file", "x", 4, draw())
    assert "state-00000004: cannot be written (Not a directory)" in one_line(error)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("files", [0, 1])
def test_interrupted(one_saved, monkeypatch, kind, files):
    """Only errors of the disk become InputErrors: Ctrl-C remains Ctrl-C."""
    flushed = []

    def interrupt(descriptor):
        flushed.append(descriptor)
        if len(flushed) > files:
            raise kind

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(kind):
            training_state.save_state(one_saved, "x", 4, draw(4))
    assert_only_the_old_state(one_saved)


# --- killed -------------------------------------------------------------------------------------

CHILD = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from nanosd3.storage import training_state
from support.killer import counted, events
from support.tensors import draw

os.rmdir, os.mkdir = map(counted, (os.rmdir, os.mkdir))
training_state.save_state(Path(sys.argv[1]), "x", 6, draw(6))
print(events())
"""


def save_until(folder: Path, event: int) -> subprocess.CompletedProcess:
    """Save the state after step 6 in a process that kills itself before the event of this number:
    a folder made, a file flushed, renamed or deleted."""
    command = [sys.executable, "-c", CHILD, str(folder), str(event)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def check_after_kill(folder: Path, capsys) -> None:
    """The newest intact state is used without a warning, and the next save cleans up."""
    tensors = draw()
    step = training_state.load_state(folder, "x", tensors)["step"]
    assert step in (4, 6) and bits(tensors) == bits(draw(step))
    assert len(training_state.saved(folder)) >= 2 and capsys.readouterr().out == ""
    training_state.save_state(folder, "x", 8, draw(8))
    assert names(folder) == [f"state-{step:08d}", "state-00000008"]


def two_saved(folder: Path) -> Path:
    for step in (2, 4):
        training_state.save_state(folder, "x", step, draw(step))
    return folder


def test_killed_while_saving(tmp_path, capsys):
    """Between the shard and the index."""
    done = save_until(two_saved(tmp_path), 3)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(tmp_path) == [".state-00000006.tmp", "state-00000002", "state-00000004"]
    check_after_kill(tmp_path, capsys)


@pytest.mark.slow
def test_killed_at_every_event(tmp_path, capsys):
    whole = save_until(two_saved(tmp_path / "whole"), 10**9)
    assert whole.returncode == 0, whole.stderr
    for event in range(1, int(whole.stdout) + 1):
        folder = two_saved(tmp_path / str(event))
        assert save_until(folder, event).returncode == -signal.SIGKILL
        check_after_kill(folder, capsys)


def test_partial_states_of_killed_processes(one_saved):
    """Half a state under its temporary name is neither loaded nor counted, and is deleted by the
    next save or at the end of the stage."""
    for step in (2, 3):
        half = one_saved / f".state-{step:08d}.tmp"
        half.mkdir()
        (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert training_state.load_state(one_saved, "x", draw())["step"] == 2
    training_state.save_state(one_saved, "x", 4, draw(4))
    assert names(one_saved) == ["state-00000002", "state-00000004"]
    half.mkdir()
    training_state.forget(one_saved)
    assert names(one_saved) == []
