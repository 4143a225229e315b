"""Opening weight files without reading them: safetensors, PyTorch checkpoints, indexed shards.

`open_weights` returns the name, shape and dtype of each tensor in a file; the numbers stay on disk,
memory-mapped, until `StoredTensor.read` asks for them. The safetensors library checks that the
header describes the file. Pickled checkpoints are loaded with `weights_only=True`, which refuses
anything that would run code.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanosd3.errors import InputError
from nanosd3.official.tensors import State, StoredTensor, in_memory
from nanosd3.storage.files import unreadable

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


MAX_NESTING = 3  # dictionaries in dictionaries of a checkpoint


def open_weights(path: Path) -> State:
    """The tensors of one file, by name. Raises InputError if it is not a weight file."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise unreadable(path, error) from None
    if not start:
        raise InputError(f"{path}: is empty, so damaged or never downloaded")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer; fetch the weights with `git lfs pull`")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(
            f"{path}: is a web page, not weights; accept the licence and log in before downloading"
        )
    if start.startswith(b"GGUF"):
        raise InputError(f"{path}: is a GGUF file, which is not supported; use .safetensors")
    # Pickles start with 0x80, but so may the header length at the start of a safetensors file.
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        return open_pickle(path)
    return open_safetensors(path)


def open_safetensors(path: Path) -> State:
    """The tensors of a safetensors file, by name."""

    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            try:  # reopened for each tensor, so that its pages are freed with it
                with safe_open(path, framework="pt") as file:
                    return file.get_tensor(key)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: tensor {key} cannot be read ({error})") from None

        return read

    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                entry = file.get_slice(key)
                kind = entry.get_dtype()
                if kind not in DTYPES:
                    raise InputError(f"{path}: tensor {key} has unsupported dtype {kind}")
                shape = tuple(entry.get_shape())
                state[key] = StoredTensor(key, path, shape, DTYPES[kind], reader(key))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None
    return state


def read_file_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors header; empty for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def open_pickle(path: Path) -> State:
    """The tensors of a PyTorch checkpoint: a dictionary, possibly of dictionaries."""
    try:
        mapped = zipfile.is_zipfile(path)  # files from before PyTorch 1.6 cannot be mapped
        with warnings.catch_warnings():  # about pickle protocols
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        message = str(error).lower()  # "unsupported operand": truncated, or no pickle at all
        if "weights_only" in message and "unsupported operand" not in message:
            raise InputError(
                f"{path}: holds pickled Python objects, which could run code; use a .safetensors "
                "file, or re-save the tensors alone if you trust it"
            ) from None
        raise InputError(f"{path}: damaged or not a checkpoint") from None
    except Exception as error:  # a damaged file can raise anything in the parser
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"{path}: damaged or not a checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not named tensors")
    named = {name: in_memory(name, tensor, path) for name, tensor in named_tensors(content)}
    if not named:
        keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
        raise InputError(f"{path}: holds no named tensors; found {keys}")
    return named


def named_tensors(content: dict) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dictionaries, at most four deep, with dotted names. Each dictionary counts once,
    so that one which stands under two keys is not two models."""
    todo, seen = [("", content, 0)], set()
    for prefix, part, depth in todo:  # which grows
        if id(part) in seen or depth > MAX_NESTING:
            continue
        seen.add(id(part))
        for key, value in part.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            elif isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value, depth + 1))


def open_shards(index: Path) -> State:
    """The tensors of all shards listed in an index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except OSError as error:
        raise unreadable(index, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: damaged ({type(error).__name__}: {error})") from None
    if not inside:
        raise InputError(f"{index}: lists shards outside its folder")
    opened = {}
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise InputError(f"{index.parent / shard}: shard is missing (listed in {index.name})")
        opened[shard] = open_weights(index.parent / shard)
    for key, shard in weight_map.items():
        if key not in opened[shard]:
            raise InputError(
                f"{index.parent / shard}: tensor {key} is missing (listed in {index.name})"
            )
    return {key: opened[shard][key] for key, shard in weight_map.items()}
