"""Files: their modes, what may not be read, long names, what cannot be written."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from nanosd3.config import CONFIGS
from nanosd3.data.mnist import read_idx
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import LAYOUTS, export
from nanosd3.official.own_runs import read_tokenizers
from nanosd3.official.tensor_files import open_shards, open_weights
from nanosd3.storage import files, training_state
from nanosd3.storage.mapped import places
from nanosd3.storage.run import Run
from nanosd3.storage.shards import Shards

TENSORS = {"x": torch.ones(3)}


@pytest.fixture
def umask():
    """A umask that no default has."""
    before = os.umask(0o026)
    yield 0o026
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """The mode of every file and folder, by name."""
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
            for path in folder.rglob("*")}  # fmt: skip


def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, tiny_run):
    """Weights like any other: of a run, of a saved state, of a cache, exported."""
    run = Run.open(tmp_path / "run", {"config": {"name": "x"}})
    run.log(stage="x")
    files.save_tensors(TENSORS, run.folder / "flow.safetensors")
    files.write_file(run.folder / "samples.png", b"x")
    training_state.save_state(run.folder, "x", 3, TENSORS)
    Shards(run.folder / "cache").add(["a", "b", "c"], TENSORS)
    for layout in LAYOUTS:
        export(open_checkpoint(tiny_run), layout, tmp_path / f"{layout}.safetensors")
    found = modes(tmp_path)
    assert sum(name.endswith(".safetensors") for name in found) >= 8
    for name, mode in found.items():
        whole = 0o777 if (tmp_path / name).is_dir() else 0o666
        assert mode == whole & ~umask, (name, oct(mode))


def test_two_threads_that_write_a_file(tmp_path):
    """Each has a temporary name of its own, so none publishes half of what the other writes."""
    path = tmp_path / "x"
    with ThreadPoolExecutor(1) as pool, files.replacing(path) as temporary:
        temporary.write_text("mine")
        pool.submit(files.write_file, path, b"the other's").result()
        assert temporary.read_text() == "mine" and path.read_text() == "the other's"
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Whichever kind of file it is, the message is that of the system."""
    path = tmp_path / "file"
    path.write_bytes(b"{}")

    def locked(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, locked)
    monkeypatch.setattr("builtins.open", locked)
    for read in (
        files.read_tensors,
        files.read_json,
        open_weights,
        open_shards,
        lambda path: read_tokenizers(path, CONFIGS["tiny"]),
        lambda path: read_idx(path, 3),
    ):
        with pytest.raises(InputError) as refusal:
            read(path)
        assert str(refusal.value) == f"{path}: cannot be read (Permission denied)"


def test_a_missing_file_is_missing(tmp_path):
    for read in (files.read_tensors, files.read_json, open_weights, open_shards):
        with pytest.raises(InputError, match=r"none: no such file$"):
            read(tmp_path / "none")


def test_only_regular_files_are_read(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}: is not a file$"):
        files.read_regular(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=rf"^{tmp_path}/pipe: is not a file$"):
        files.read_regular(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"cannot be read \(embedded null byte\)$"):
        files.read_regular(tmp_path / "a\0b")


def test_a_state_that_may_not_be_read_is_not_skipped(tmp_path, monkeypatch):
    """It may well be intact; going on from the one before would end in deleting it."""
    for step in (2, 4):
        training_state.save_state(tmp_path, "x", step, TENSORS)
    newest = training_state.saved(tmp_path)[0] / "state.json"
    read_bytes = Path.read_bytes

    def locked(self, *arguments, **named):
        if self == newest:
            raise PermissionError(13, "Permission denied", str(self))
        return read_bytes(self, *arguments, **named)

    monkeypatch.setattr(Path, "read_bytes", locked)
    with pytest.raises(InputError) as refusal:
        training_state.load_state(tmp_path, "x", dict(TENSORS))
    assert str(refusal.value) == f"{newest}: cannot be read (Permission denied)"


@pytest.mark.parametrize("length", [100, 254, 255])
def test_long_names_work(tmp_path, length):
    """The temporary name is no longer than the file's own."""
    for letter in ("x", "é"):
        path = tmp_path / (letter * (length // len(letter.encode())))
        for write in (
            lambda p: files.write_file(p, b"x"),
            lambda p: files.save_tensors(TENSORS, p),
        ):
            files.check_writable(path)
            write(path)
            assert [each.name for each in tmp_path.iterdir()] == [path.name]
            path.unlink()


def test_what_cannot_be_written_is_known_before(tmp_path):
    for path in (tmp_path / ("x" * 256), tmp_path / "none" / "x", Path("/proc/x")):
        with pytest.raises(InputError, match=r": cannot be written \(.+\)$"):
            files.check_writable(path)
    kept = tmp_path / "kept"
    kept.write_bytes(b"mine")
    files.check_writable(kept)
    assert kept.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [kept]


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path, monkeypatch):
    """Of which the library tells in an exception of its own."""

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    files.save_tensors({"x": torch.zeros(3)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(InputError, match=r"x: cannot be written \(I/O error: No space left"):
        files.save_tensors(TENSORS, tmp_path / "x")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("dtype", ["C64", "Q" * 100_000])
def test_messages_about_tensors_of_long_names_are_short(tmp_path, dtype):
    path, name = tmp_path / "x.safetensors", "é" * 100_000
    header = json.dumps({name: {"dtype": dtype, "shape": [1], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError) as error:
        places(path)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_tensors_are_read_in_the_order_of_their_names(tmp_path):
    """In every process; the library's own order depends on a hash with a random seed."""
    names = [f"blocks.{i}.weight" for i in range(20)]
    files.save_tensors({name: torch.zeros(1) for name in reversed(names)}, tmp_path / "x")
    for _ in range(20):
        assert list(files.read_tensors(tmp_path / "x")) == sorted(names)
