"""Safetensors files of any size: opened by their header, tensors mapped one by one.

A private writable mapping counts as memory before anything is read: mapping a checkpoint of 28 GB
in one piece failed on a machine with 24 GB. So opening reads only names, shapes and offsets, and
reading a tensor maps the part of the file around it, whose pages are loaded as they are used.

The tensors of one network share its mappings. Two networks share nothing, even if a file is opened
twice or read again: changing the weights of one in place leaves the next as the file has it.
"""

import math
import mmap
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanosd3.errors import InputError, shortened, shown
from nanosd3.storage.files import parse_json, unreadable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

PART = 2**30  # bytes mapped together, so that a thousand tensors do not hold a thousand files open


class Parts(weakref.WeakValueDictionary[tuple, mmap.mmap]):
    """The parts of a file that are mapped, while some tensor lies in them."""

    file: tuple[int, ...] | None = None  # its identity when it was opened

    def check(self, path: Path, status: os.stat_result) -> None:
        """Raise InputError if this is not the file that was opened."""
        now = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if self.file not in (None, now):
            raise InputError(f"{path}: has changed since it was opened; open it again")
        self.file = now


@dataclass(frozen=True)
class Place:
    """Where the numbers of a tensor are in a file."""

    file: Path
    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Parts = field(repr=False, compare=False)  # shared with other tensors of the file

    def read(self) -> Tensor:
        """The tensor, memory-mapped; writing to it leaves the file unchanged.

        Raises InputError if it cannot be mapped, or the file is not the one that was opened.
        """
        size = math.prod(self.shape) * self.dtype.itemsize
        if not size:
            return torch.empty(self.shape, dtype=self.dtype)
        part, offset = self.part(size)
        numbers = torch.frombuffer(part, dtype=torch.uint8, count=size, offset=offset)
        if self.start % self.dtype.itemsize:  # allowed in files, not in memory
            numbers = numbers.clone()
        return numbers.view(self.dtype).view(self.shape)

    def part(self, size: int) -> tuple[mmap.mmap, int]:
        """The mapped part of the file that holds `size` bytes from `start`, and where they begin
        in it."""
        begin = self.start // PART * PART
        try:
            with open(self.file, "rb") as file:
                status = os.fstat(file.fileno())
                end = min(math.ceil((self.start + size) / PART) * PART, status.st_size)
                if end < self.start + size:
                    raise InputError(f"{self.file}: has become shorter since it was opened")
                self.parts.check(self.file, status)
                if (part := self.parts.get((begin, end))) is None:
                    length, access = end - begin, mmap.ACCESS_COPY
                    part = mmap.mmap(file.fileno(), length, access=access, offset=begin)
                    self.parts[begin, end] = part
        except FileNotFoundError:
            raise InputError(
                f"{self.file}: is no longer there, but was opened to be read when it is needed; "
                "load the model with staged=False to have all of it in memory"
            ) from None
        except (OSError, MemoryError, OverflowError) as error:
            raise InputError(f"{self.file}: {cannot_map(error)}") from None
        return part, self.start - begin


def cannot_map(error: BaseException) -> str:
    """Why a file could not be mapped, in words."""
    reason = getattr(error, "strerror", None) or error
    return f"cannot be mapped into memory ({reason}); see `ulimit -v` and the memory left"


def places(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file, by name. Raises InputError if it is not one."""
    try:
        with safe_open(path, framework="np") as file:  # checks the header; maps to read only
            del file
        with open(path, "rb") as content:
            parts = Parts()
            parts.check(path, os.fstat(content.fileno()))
            header = content.read(int.from_bytes(content.read(8), "little"))
            begin = content.tell()
    except MemoryError as error:
        raise InputError(f"{path}: {cannot_map(error)}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except SafetensorError as error:
        reason = shortened(str(error), 200)
        raise InputError(f"{path}: damaged or not a safetensors file ({reason})") from None
    entries = parse_json(header, path)
    assert isinstance(entries, dict)  # the library has checked it
    found = {}
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: tensor {shown(key)} has unsupported dtype {entry['dtype']}")
        start, dtype = begin + entry["data_offsets"][0], DTYPES[entry["dtype"]]
        found[key] = Place(path, start, tuple(entry["shape"]), dtype, parts)
    return found
