"""Opening weight files without reading them: safetensors, torch checkpoints, diffusers folders.

`open_weights` gives the name, shape and type of each tensor in a file; the numbers stay where
they are, memory-mapped, until `Stored.read` asks for them. The safetensors library checks that
the header tells the truth about the file. Checkpoints of pickled objects are read with
`weights_only=True`: tensors load, anything that would run code is refused.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanosd3.parts import State, Stored, stored
from nanosd3.runtime import InputError

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


def open_weights(path: Path) -> State:
    """The tensors of one file, by name. Raises InputError, naming the file, if it is none."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})") from None
    if not start:
        raise InputError(f"{path}: is empty")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a pointer to the weights (Git LFS), not the weights; fetch "
                         "them with `git lfs pull`")  # fmt: skip
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{path}: is a web page, not weights; was the licence accepted and the "
                         "download logged in?")  # fmt: skip
    if start.startswith(b"GGUF"):
        raise InputError(f"{path}: is a GGUF file, which is not supported; take .safetensors")
    # A pickle begins with 0x80, but so may the length at the head of a safetensors file.
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        return open_checkpoint(path)
    return open_safetensors(path)


def open_safetensors(path: Path) -> State:
    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            try:  # opened for each tensor, so that its pages can go when the tensor does
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
                if entry.get_dtype() not in DTYPES:
                    raise InputError(f"{path}: tensor {key} has the type {entry.get_dtype()}, "
                                     "which is not supported")  # fmt: skip
                dtype = DTYPES[entry.get_dtype()]
                state[key] = Stored(key, path, tuple(entry.get_shape()), dtype, reader(key))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None
    return state


def read_metadata(path: Path) -> dict[str, str]:
    """The text a safetensors file carries beside its tensors; empty for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def open_checkpoint(path: Path) -> State:
    """A torch checkpoint: a dictionary of tensors, perhaps under "state_dict"."""
    try:
        mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 cannot be mapped
        with warnings.catch_warnings():  # of protocols, which matter to nobody here
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise InputError(f"{path}: holds Python objects besides tensors, which could run code; "
                             "refused. Use a .safetensors file, or save the tensors alone "
                             "where you trust the file") from None  # fmt: skip
        raise InputError(f"{path}: damaged or no checkpoint") from None
    except Exception as error:  # whatever a damaged file makes of the parser
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"{path}: damaged or no checkpoint ({reason})") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not named tensors")
    return {
        str(key): stored(str(key), value, path)
        for key, value in content.items()
        if isinstance(value, Tensor)
    }


def open_folder(folder: Path, stem: str) -> State:
    """The weights in a folder of diffusers or transformers: `stem`.safetensors, in shards with
    an index, as fp16 variant, or .bin. Empty if there are none."""
    for variant in ("", ".fp16"):
        for name in (f"{stem}{variant}.safetensors", f"{stem}{variant}.bin",
                     f"pytorch_model{variant}.bin"):  # fmt: skip
            if (folder / name).is_file():
                return open_weights(folder / name)
        for suffix in ("safetensors", "bin"):
            index = folder / f"{stem}.{suffix}.index{variant}.json"
            if index.is_file():
                return open_shards(index)
    return {}


def open_shards(index: Path) -> State:
    """The tensors of all shards that an index names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: damaged ({type(error).__name__}: {error})") from None
    if not inside:
        raise InputError(f"{index}: names shards outside its folder")
    opened = {}
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise InputError(f"{index.parent / shard}: shard is missing ({index.name} names it)")
        opened[shard] = open_weights(index.parent / shard)
    for key, shard in places.items():
        if key not in opened[shard]:
            raise InputError(f"{index.parent / shard}: tensor {key} is not in it, though "
                             f"{index.name} says so")  # fmt: skip
    return {key: opened[shard][key] for key, shard in places.items()}
