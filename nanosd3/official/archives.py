"""PyTorch checkpoints (.ckpt, .pt, .bin), opened without loading them.

Two layouts are known: a zip archive with a file for each storage (since PyTorch 1.6), and a few
pickles in a row, followed by the storages. The pickles are parsed, not executed (pickles.py).
"""

import contextlib
import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeGuard

from torch import Tensor

from nanosd3.errors import InputError, shortened, shown
from nanosd3.official.pickles import DENSE, Call, NotData, PickledTensor, Storage, follow
from nanosd3.official.tensors import StoredTensor
from nanosd3.storage.mapped import Parts, Place

LARGEST_PICKLE = 2**24  # bytes; that of the largest released model is a thirtieth of this
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_qtensor": "quantised",
    "_rebuild_meta_tensor_no_storage": "without numbers (on the meta device)",
    **dict.fromkeys(DENSE, "conjugated or negated by a flag"),
}


@dataclass
class Archive:
    """A checkpoint: its content, where PickledTensor stands for tensors and Call for anything
    else that is not plain data, and each storage's offset and size in bytes."""

    path: Path
    content: object = None
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts, repr=False)

    def stored(self, name: str, tensor: PickledTensor | Call) -> StoredTensor:
        """A tensor, to be read on demand. Raises InputError if it is not dense, or if some of its
        numbers are missing."""
        if isinstance(tensor, Call):
            kind = OTHER_TENSORS[tensor.function]
            raise InputError(f"{self.path}: tensor {shown(name)} is {kind}; expected a dense one")
        shape, stride, offset, dtype = tensor.shape, tensor.stride, tensor.offset, tensor.dtype
        plain = all(type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *stride))
        if not plain or len(shape) != len(stride) or len(shape) > 64:
            raise InputError(f"{self.path}: tensor {shown(name)} has an impossible shape or stride")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        used = 0 if 0 in shape else last + 1
        start, size = self.places.get(tensor.storage.key, (0, 0))
        if max(used * dtype.itemsize, tensor.storage.nbytes) > size:
            raise InputError(
                f"{self.path}: tensor {shown(name)} is cut short (its storage has {size} bytes)"
            )
        place = Place(self.path, start, (used,), dtype, self.parts)

        def read() -> Tensor:
            return place.read().as_strided(shape, stride, offset if used else 0)

        return StoredTensor(name, self.path, shape, dtype, read, self.parts)


def is_other_tensor(value: object) -> TypeGuard[Call]:
    """Whether this is a tensor that is not dense."""
    return isinstance(value, Call) and value.function in OTHER_TENSORS


def read_archive(path: Path) -> Archive:
    """Open a checkpoint. Raises InputError if it is damaged or holds more than data."""
    try:
        with open(path, "rb") as file:
            archive = (read_zip if file.read(2) == b"PK" else read_legacy)(path, file)
            archive.parts.check(path, os.fstat(file.fileno()))
            return archive
    except InputError:
        raise
    except NotData as error:
        raise InputError(
            f"{path}: holds pickled Python objects, which could run code ({str(error)[:80]!a}); "
            "use a .safetensors file, or re-save the tensors alone if you trust it"
        ) from None
    except Exception as error:  # a damaged file can raise anything in the parsers
        reason = shortened(str(error), 100) or type(error).__name__
        raise InputError(f"{path}: damaged or not a checkpoint ({reason})") from None


def read_zip(path: Path, file: BinaryIO) -> Archive:
    """A zip archive: NAME/data.pkl and storages NAME/data/KEY, uncompressed."""
    archive = Archive(path)
    with zipfile.ZipFile(file) as members:
        entries = {entry.filename: entry for entry in members.infolist()}
        index = next((name for name in entries if name.endswith("/data.pkl")), None)
        if index is None:
            raise ValueError("a zip archive without a data.pkl")
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise InputError(f"{path}: is compressed, as PyTorch never does; use another file")
        if entries[index].file_size > LARGEST_PICKLE:
            raise InputError(f"{path}: {too_large(entries[index].file_size)}")
        folder = index.removesuffix("data.pkl")
        order = folder + "byteorder"
        if order in entries and members.read(order) != b"little":
            raise InputError(f"{path}: holds big-endian numbers; expected little-endian ones")
        archive.content = follow(io.BytesIO(members.read(index)))
        end = file.seek(0, io.SEEK_END)
    for name, entry in entries.items():
        if name.startswith(folder + "data/"):
            file.seek(entry.header_offset + 26)  # lengths of the name and of an extra field
            lengths = file.read(4)
            start = entry.header_offset + 30
            start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            place = (start, min(entry.file_size, end - start))
            archive.places[name.removeprefix(folder + "data/")] = place
    return archive


def read_legacy(path: Path, file: BinaryIO) -> Archive:
    """Pickles of a magic number, a version, the system, the content and the storages' keys, then
    the storages, each preceded by its number of elements."""
    file.seek(0)
    head = io.BytesIO(file.read(LARGEST_PICKLE))
    archive = Archive(path)
    storages: dict[str, Storage] = {}
    with contextlib.suppress(NotData):  # any other pickle
        archive.content = (follow(head), follow(head))
    if archive.content != (LEGACY_MAGIC, 1001):
        raise ValueError("no magic number")
    system = follow(head)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError(f"{path}: holds big-endian numbers; expected little-endian ones")
    archive.content = follow(head, storages)
    keys = follow(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of its storages")
    start, end = head.tell(), file.seek(0, io.SEEK_END)
    for key in keys:
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        size = count * storages[key].dtype.itemsize
        start += 8
        archive.places[key] = (start, min(size, end - start))
        start += size
    return archive


def too_large(size: int) -> str:
    return f"its table of tensors has {size / 1e6:.0f} MB, more than any model's"
