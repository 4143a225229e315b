"""A file is as large as it is: opening one needs no memory, reading a tensor only its own."""

import mmap
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import checkpoints
from support.commands import refused

from nanosd3 import weights
from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.missing_keys import check, report
from nanosd3.official.tensor_files import open_weights
from nanosd3.storage import mapped
from nanosd3.storage.files import read_tensors
from nanosd3.storage.mapped import Place

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
LARGE = 2**36  # numbers, far more than any machine here has memory for


@pytest.fixture
def no_writable_map(monkeypatch):
    """Mappings that count as memory are refused."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a copy-on-write mapping")

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)


@pytest.fixture(scope="module")
def released_file(tmp_path_factory):
    """sd3-medium with everything, in float32: 31 GB."""
    path = tmp_path_factory.mktemp("sparse") / "sd3_medium.safetensors"
    yield checkpoints.sparse_file(checkpoints.released("sd3-medium", path), path)
    path.unlink()


@linux
def test_a_checkpoint_larger_than_memory_opens(released_file, no_writable_map):
    assert released_file.stat().st_size > 30e9
    checkpoint = open_checkpoint(released_file)
    check(checkpoint)
    assert checkpoint.config == CONFIGS["sd3-medium"]
    assert ": sd3-medium (depth 24, without QK-norm)" in report(checkpoint)
    assert str(released_file) not in Path("/proc/self/maps").read_text()


@linux
def test_one_tensor_of_it_is_mapped(released_file):
    """And no more than the part of the file around it."""
    state = open_checkpoint(released_file).parts["t5"]
    norm = state["encoder.final_layer_norm.weight"].read()
    assert norm.shape == (4096,) and not norm.any()
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(released_file) in line]
    assert 0 < sum(int(high, 16) - int(low, 16) for low, high in spans) <= mapped.PART


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_separate_part_larger_than_memory_opens(tmp_path, no_writable_map, suffix):
    path = tmp_path / f"t5.{suffix}"
    content = {"a": checkpoints.dense(checkpoints.Storage("0", LARGE), LARGE)}
    if suffix == "ckpt":
        checkpoints.legacy_checkpoint(path, content, "0", LARGE)
    else:
        header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (LARGE, 4 * LARGE)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 4 * LARGE)
    assert open_weights(path)["a"].shape == (LARGE,)
    path.unlink()


@linux
def test_a_failing_map_is_one_line(released_file, capsys, monkeypatch):
    """With little address space, as `ulimit -v` gives."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    tensor = open_checkpoint(released_file).parts["t5"]["encoder.embed_tokens.weight"]
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    try:
        line = refused(capsys, weights.main, "report", released_file)
        with pytest.raises(InputError, match=r"cannot be mapped into memory \(Cannot allocate"):
            tensor.read()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert f"{released_file}: cannot be mapped into memory (" in line


def test_a_file_that_has_become_shorter(tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "m.safetensors")
    tensor = open_weights(tmp_path / "m.safetensors")["a"]
    (tmp_path / "m.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="has become shorter since it was opened"):
        tensor.read()


def test_parts_of_a_file(tmp_path, monkeypatch):
    """Tensors across the borders of parts, unaligned and empty; files are not held open; what is
    written to a tensor stays out of the file."""
    monkeypatch.setattr(mapped, "PART", mmap.ALLOCATIONGRANULARITY)
    numbers = torch.arange(3 * mmap.ALLOCATIONGRANULARITY, dtype=torch.int32)
    path = tmp_path / "numbers"
    path.write_bytes(b"x" + numbers.numpy().tobytes())
    parts = mapped.Parts()
    whole = Place(path, 1, (*numbers.shape,), torch.int32, parts).read()
    assert torch.equal(whole, numbers)
    for start in (0, 1, 1000, mmap.ALLOCATIONGRANULARITY // 4 - 2, len(numbers) - 4):
        part = Place(path, 1 + 4 * start, (2, 2), torch.int32, parts).read()
        assert torch.equal(part.flatten(), numbers[start : start + 4])
    assert Place(path, 1, (0, 3), torch.int32, parts).read().shape == (0, 3)
    whole = Place(path, 0, (8,), torch.uint8, parts).read()
    whole.zero_()
    assert path.read_bytes()[:1] == b"x"
    del whole, part
    assert not parts
    shared = [Place(path, n, (1,), torch.uint8, parts).read() for n in range(99)]
    assert len(shared) == 99 and len(parts) == 1


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_openings_share_nothing(tmp_path, form):
    """Who changes a tensor in place changes it for nobody else who opens the file."""
    path = tmp_path / f"m.{form}"
    (save_file if form == "safetensors" else torch.save)({"a": torch.zeros(3)}, path)
    mine = open_weights(path)["a"].read()
    mine += 1
    assert open_weights(path)["a"].read().tolist() == [0, 0, 0]


def test_a_file_replaced_by_another(tmp_path):
    """The old numbers stay with who holds them; who reads gets the new."""
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    old = open_weights(path)["a"].read()
    save_file({"a": torch.ones(3)}, tmp_path / "new")
    shutil.move(tmp_path / "new", path)
    assert open_weights(path)["a"].read().sum() == 3 and old.sum() == 0


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_file_that_is_no_longer_what_was_opened(tmp_path, form):
    """Networks are read when they are used: none of a new file among those of the old one."""
    path, save = tmp_path / f"m.{form}", save_file if form == "safetensors" else torch.save
    save({"a": torch.zeros(3)}, path)
    opened = open_weights(path)["a"]
    kept = open_weights(path)["a"].read()
    save({"a": torch.ones(3)}, tmp_path / "new")
    shutil.move(tmp_path / "new", path)
    with pytest.raises(InputError, match=r"has changed since it was opened; open it again$"):
        opened.read()
    path.unlink()
    with pytest.raises(InputError, match="is no longer there, but was opened"):
        opened.read()
    assert kept.tolist() == [0, 0, 0]


def test_report_of_a_pipe_or_a_folder(capsys, tmp_path):
    """A pipe is not opened, which would wait forever."""
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "is a pipe or device" in refused(capsys, weights.main, "report", tmp_path / "pipe")
        with pytest.raises(InputError, match="pipe: is not a file"):
            read_tensors(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a folder"):
        open_weights(tmp_path)
