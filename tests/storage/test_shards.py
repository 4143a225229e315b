"""Shards: exact rows, nothing lost or computed twice, little memory."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from nanosd3.errors import InputError
from nanosd3.storage.shards import Shards, fill_shards

KEYS = [f"image {i}" for i in range(10)]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def row(key: str) -> dict[str, torch.Tensor]:
    """The row of a key: three types, three shapes, distinct numbers."""
    x = torch.arange(6.0).view(2, 3) + 100 * int(key.split()[-1])
    return {"latent": x, "context": x.flatten().bfloat16(), "scale": x.sum().half()}


def expected(keys) -> dict[str, torch.Tensor]:
    rows = [row(key) for key in keys]
    return {name: torch.stack([r[name] for r in rows]) for name in rows[0]}


class Compute:
    """`expected`, recording its calls, with an optional error at one of them."""

    def __init__(self, stop_at: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.calls, self.stop_at, self.error = [], stop_at, error

    def __call__(self, keys):
        if len(self.calls) == self.stop_at:
            raise self.error
        self.calls.append(keys)
        return expected(keys)


def filled(folder: Path, at_once: int = 4) -> Shards:
    shards = Shards(folder)
    fill_shards(shards, KEYS, expected, at_once, "rows")
    return shards


def equal(rows: dict, keys) -> bool:
    """Whether these are the rows of the keys, bit for bit."""
    right = expected(keys)
    return rows.keys() == right.keys() and all(
        rows[name].dtype == right[name].dtype and torch.equal(rows[name], right[name])
        for name in right
    )


# --- rows ---------------------------------------------------------------------------------------


def test_rows_come_in_the_requested_order(tmp_path):
    shards = filled(tmp_path / "new" / "folder")
    for keys in (KEYS, KEYS[::-1], ["image 9"], ["image 5", "image 1", "image 5", "image 0"]):
        assert equal(shards.rows(keys), keys)
        assert equal(Shards(shards.folder).rows(keys), keys)
    with pytest.raises(KeyError):
        shards.rows(["image 10"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_types_bit_for_bit(tmp_path, dtype):
    x = torch.randn(3, 2, 5).mul(1000).to(dtype)
    Shards(tmp_path).add(["a", "b", "c"], {"x": x, "transposed": x.transpose(1, 2)})
    rows = Shards(tmp_path).rows(["c", "a"])
    assert rows["x"].dtype == dtype and torch.equal(rows["x"], x[[2, 0]])
    assert torch.equal(rows["transposed"], x.transpose(1, 2)[[2, 0]])


def test_rows_are_copies(tmp_path):
    """Modifying them changes neither the file nor later reads."""
    shards = filled(tmp_path)
    shards.rows(KEYS)["latent"].zero_()
    assert equal(shards.rows(KEYS), KEYS) and equal(Shards(tmp_path).rows(KEYS), KEYS)


def test_rows_are_detached(tmp_path):
    Shards(tmp_path).add(["a"], {"x": torch.ones(1, 2, requires_grad=True)})
    assert not Shards(tmp_path).rows(["a"])["x"].requires_grad


def test_missing(tmp_path):
    shards = Shards(tmp_path / "none")
    assert shards.missing(["b", "a", "b", "c", "a"]) == ["b", "a", "c"]
    assert not (tmp_path / "none").exists()  # opening writes nothing
    shards.add(["c", "b"], {"x": torch.zeros(2, 1)})
    for opened in (shards, Shards(tmp_path / "none")):
        assert opened.missing(["b", "a", "b", "d", "a", "c"]) == ["a", "d"]


def test_files_on_disk(tmp_path):
    filled(tmp_path)
    files = ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "manifest.json"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [manifest["shards"][file]["keys"] for file in files] == [KEYS[:4], KEYS[4:8], KEYS[8:]]


@pytest.mark.parametrize(
    ("keys", "count"),
    [(["a", "a"], 2), (["image 3"], 1), (["new", "image 3"], 2), (["a", "b"], 1), (["a"], 2)],
)
def test_invalid_rows_are_refused(tmp_path, keys, count):
    shards = filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"duplicate key|tensors of"):
        shards.add(keys, {"latent": torch.zeros(count, 2, 3)})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- filling ------------------------------------------------------------------------------------


def test_fill_computes_missing_rows_once(tmp_path):
    compute = Compute()
    shards = Shards(tmp_path)
    shards.add(["image 2"], expected(["image 2"]))
    fill_shards(shards, [*KEYS, "image 0"], compute, 4, "rows")
    rest = [key for key in KEYS if key != "image 2"]
    assert compute.calls == [rest[:4], rest[4:8], rest[8:]]
    fill_shards(shards, KEYS, compute, 4, "rows")
    fill_shards(Shards(tmp_path), KEYS, compute, 4, "rows")
    assert len(compute.calls) == 3
    assert equal(shards.rows(KEYS), KEYS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_fill_resumes(tmp_path, error):
    first, second = Compute(stop_at=2, error=error), Compute()
    with pytest.raises(error):
        fill_shards(Shards(tmp_path), KEYS, first, 3, "rows")
    fill_shards(Shards(tmp_path), KEYS, second, 3, "rows")
    assert first.calls + second.calls == [KEYS[:3], KEYS[3:6], KEYS[6:9], KEYS[9:]]
    assert equal(Shards(tmp_path).rows(KEYS), KEYS)


def stopping_before(write: int, function, monkeypatch):
    """Raise before the write of this number. (A shard takes two: itself and the manifest.)"""
    count = iter(range(10**9))

    def write_or_stop(*arguments):
        if next(count) == write:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(os, "replace", write_or_stop)


@pytest.mark.parametrize("write", range(6))
def test_killed_at_each_write(tmp_path, monkeypatch, capsys, write):
    """At most one shard is recomputed, and nothing is ever left damaged."""
    first, second = Compute(), Compute()
    with monkeypatch.context() as patch:
        stopping_before(write, os.replace, patch)
        with pytest.raises(KeyboardInterrupt):
            fill_shards(Shards(tmp_path), KEYS, first, 4, "rows")
    (tmp_path / ".00001.safetensors.77.tmp").write_bytes(b"half a sh")  # as left by a kill
    capsys.readouterr()
    fill_shards(Shards(tmp_path), KEYS, second, 4, "rows")
    assert "warning" not in capsys.readouterr().out
    assert len(first.calls) == write // 2 + 1 and len(second.calls) == 3 - write // 2
    assert equal(Shards(tmp_path).rows(KEYS), KEYS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # unlisted ones are overwritten


def test_full_disk_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    shards = filled(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"00003\.safetensors: cannot be written"):
        shards.add(["new 1"], expected(["new 1"]))
    for after in (shards, Shards(tmp_path)):
        assert after.missing([*KEYS, "new 1"]) == ["new 1"]


# --- damage -------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in the last tensor
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def clear(path: Path) -> None:
    path.write_bytes(b"")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((spoil, "damaged (checksum mismatch)") for spoil in (flip, cut, clear)),
        (Path.unlink, "cannot be read (No such file or directory)"),
        (to_folder, "cannot be read (Is a directory)"),
    ],
)
def test_a_damaged_shard_is_named_and_recomputed(tmp_path, capsys, damage, message):
    filled(tmp_path)
    bad = tmp_path / "00001.safetensors"
    damage(bad)
    capsys.readouterr()
    shards, compute = Shards(tmp_path), Compute()
    warning = f"  warning: {bad}: {message}; its 4 rows will be recomputed\n"
    assert capsys.readouterr().out == warning
    assert shards.missing(KEYS) == KEYS[4:8]
    assert equal(shards.rows(KEYS[:4] + KEYS[8:]), KEYS[:4] + KEYS[8:])
    if bad.is_dir():  # not ours: writing would fail with an error
        bad.rmdir()
    fill_shards(shards, KEYS, compute, 4, "rows")
    assert compute.calls == [KEYS[4:8]]
    assert equal(Shards(tmp_path).rows(KEYS), KEYS)
    assert capsys.readouterr().out == ""


ENTRY = {"sha256": "0" * 64, "keys": ["a"]}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"shards": []}'),
        json.dumps({"shards": {"../x.safetensors": ENTRY}}).encode(),
        json.dumps({"shards": {"x": {**ENTRY, "keys": "a"}}}).encode(),
        json.dumps({"shards": {"x": {**ENTRY, "keys": [1]}}}).encode(),
        json.dumps({"shards": {"x": {"keys": ["a"]}}}).encode(),
        json.dumps({"shards": {"x": "a"}}).encode(),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, capsys, content):
    filled(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    capsys.readouterr()
    shards, compute = Shards(tmp_path), Compute()
    line = capsys.readouterr().out
    assert line.startswith(f"  warning: {tmp_path / 'manifest.json'}: ") and line.count("\n") == 1
    assert line.endswith("; all rows will be recomputed\n")
    fill_shards(shards, KEYS, compute, 4, "rows")
    assert len(compute.calls) == 3 and equal(Shards(tmp_path).rows(KEYS), KEYS)


def test_a_shard_that_disappears_while_open(tmp_path):
    """Mapped shards stay readable; others give one clear error."""
    shards = filled(tmp_path)
    shards.rows(KEYS[:1])
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert equal(shards.rows(KEYS[:4]), KEYS[:4])
    with pytest.raises(InputError, match=r"00001\.safetensors: cannot be read .* rerun"):
        shards.rows(KEYS[4:5])


# --- memory -------------------------------------------------------------------------------------


def own_memory() -> int:
    """Anonymous memory of this process in bytes, which excludes pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@linux
def test_rows_are_read_through_memory_maps(tmp_path):
    """Reading 64 MB row by row grows this process by less than a quarter of that."""
    keys = [f"{i}" for i in range(64)]
    shards = Shards(tmp_path)
    fill_shards(shards, keys, lambda chunk: {"x": torch.randn(len(chunk), 2**18)}, 16, "rows")
    opened = Shards(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # opened lazily
    before = own_memory()
    total = sum(opened.rows([key])["x"].double().sum().item() for key in keys)
    assert total != 0 and own_memory() - before < 16e6
    assert all(f"{i:05d}.safetensors" in Path("/proc/self/maps").read_text() for i in range(4))
    tensor = opened.opened["00000.safetensors"]["x"]
    address = tensor.data_ptr()
    ranges = re.findall(r"(\w+)-(\w+) .*00000\.safetensors", Path("/proc/self/maps").read_text())
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)
