"""Checkpoints of any size without their numbers: shapes alone, holes, pickles by hand."""

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import torch

from nanosd3.components import COMPONENTS, shapes
from nanosd3.config import CONFIGS
from nanosd3.official.key_names import PREFIXES
from nanosd3.official.tensors import State, in_memory
from nanosd3.text import Tokenizers

official_tokenizers = cache(Tokenizers.official)  # reading them takes a third of a second
SHORT = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def released(name: str, path: Path, parts: tuple[str, ...] = COMPONENTS) -> dict[str, State]:
    """The components of a released model, of full shape, on the meta device."""
    return {
        part: {
            key: in_memory(key, torch.empty(shape, device="meta"), path)
            for key, shape in shapes(CONFIGS[name], part).items()
        }
        for part in parts
    }


def sparse_file(
    parts: dict[str, State],
    path: Path,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A single file of these shapes whose numbers are a hole: no memory and no disk."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for part, state in parts.items():
        for key, tensor in state.items():
            start, end = end, end + torch.Size(tensor.shape).numel() * dtype.itemsize
            entry = {"dtype": SHORT[dtype], "shape": tensor.shape, "data_offsets": [start, end]}
            header[PREFIXES[part] + key] = entry
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)
    return path


class Storage:
    """Stands for a storage in a pickle written by hand."""

    def __init__(self, key: str, count: int, kind: type = torch.FloatStorage):
        self.reference = ("storage", kind, key, "cpu", count)


class Rebuilt:
    """Is pickled as a tensor of PyTorch's: `function` of a storage and these arguments."""

    def __init__(self, *arguments: object, function: object = torch._utils._rebuild_tensor_v2):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def dense(storage: Storage, *shape: int) -> Rebuilt:
    """A contiguous tensor."""
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Rebuilt(storage, 0, shape, tuple(stride), False, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple | None:
        return obj.reference if isinstance(obj, Storage) else None


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def zip_checkpoint(
    path: Path, content: object, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """A checkpoint in today's layout. `content`: what is pickled, or the pickle itself."""
    program = content if isinstance(content, bytes) else pickled(content)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        for key, numbers in storages.items():
            file.writestr(f"archive/data/{key}", numbers)
    return path


def legacy_checkpoint(path: Path, content: object, key: str, count: int) -> Path:
    """A checkpoint in the layout before PyTorch 1.6, with one storage of float32, all of it a
    hole."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    programs = (0x1950A86A20F9469CFC6C, 1001, system, content, [key])
    with open(path, "wb") as file:
        file.write(b"".join(map(pickled, programs)) + struct.pack("<q", count))
        file.truncate(file.tell() + 4 * count)
    return path
