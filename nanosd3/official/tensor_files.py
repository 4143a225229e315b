"""Opening weight files without reading them: safetensors, PyTorch checkpoints, indexed shards.

`open_weights` returns the name, shape and dtype of each tensor in a file; the data stay on disk
until `StoredTensor.read` maps them. The safetensors library checks that the header describes the
file. The pickles of checkpoints are parsed, not executed (pickles.py).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanosd3.errors import InputError, shortened
from nanosd3.official.archives import is_other_tensor, read_archive
from nanosd3.official.pickles import Call, PickledTensor
from nanosd3.official.tensors import State, StoredTensor
from nanosd3.storage.files import read_json, unreadable
from nanosd3.storage.mapped import places

NAME_LENGTH = 500  # characters; official ones have up to 100
MAX_NESTING = 3  # how deep dictionaries may be nested in a checkpoint's


def open_weights(path: Path, pickles: bool = True) -> State:
    """The tensors of one file, by name; without `pickles` only safetensors are accepted.

    Raises InputError if it is not a weight file.
    """
    if path.exists() and not path.is_file():  # opening a pipe might never end
        raise InputError(
            f"{path}: is {'a folder' if path.is_dir() else 'a pipe or device'}; "
            "expected a file of weights"
        )
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
    pickled = start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{"
    return open_pickle(path) if pickled and pickles else open_safetensors(path)


def check_names(names: Iterable[str], path: Path) -> None:
    """Raise InputError unless the names, which will be printed, are plain."""
    for name in names:
        if not name.isprintable() or len(name) > NAME_LENGTH:
            raise InputError(
                f"{path}: a tensor has a name of {len(name)} characters, some perhaps invisible: "
                f"{name[:60]!a}; expected a plain name"
            )


def open_safetensors(path: Path) -> State:
    """The tensors of a safetensors file, by name."""
    found = places(path)
    check_names(found, path)
    return {
        name: StoredTensor(name, path, place.shape, place.dtype, place.read, place.parts)
        for name, place in found.items()
    }


def read_file_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors header; empty for other files."""
    try:
        with safe_open(path, framework="np") as file:  # maps the file read-only
            return file.metadata() or {}
    except (OSError, MemoryError, SafetensorError):
        return {}


def open_pickle(path: Path) -> State:
    """The tensors of a PyTorch checkpoint: a dictionary, possibly of dictionaries."""
    archive = read_archive(path)
    if not isinstance(archive.content, dict):
        kind = type(archive.content).__name__
        kind = {"PickledTensor": "tensor", "Call": "Python object"}.get(kind, kind)
        raise InputError(f"{path}: holds a {kind}, not named tensors")
    found = dict(named_tensors(archive.content))
    check_names(found, path)
    if not found:
        keys = ", ".join(shortened(str(key)) for key in list(archive.content)[:5]) or "nothing"
        raise InputError(f"{path}: holds no named tensors; found {keys}")
    return {name: archive.stored(name, value) for name, value in found.items()}


def named_tensors(content: dict) -> Iterator[tuple[str, PickledTensor | Call]]:
    """Tensors of any kind in dictionaries, at most four deep, with dotted names. Each dictionary
    counts once, so that one stored under two keys is not two models."""
    todo, seen = [("", content, 0)], set()
    for prefix, part, depth in todo:  # grows during the loop
        if id(part) in seen or depth > MAX_NESTING:
            continue
        seen.add(id(part))
        for key, value in part.items():
            if isinstance(key, str | bytes):
                key = key[: NAME_LENGTH + 1]  # a long one could be repeated in any number of names
            if isinstance(value, PickledTensor) or is_other_tensor(value):
                yield f"{prefix}{key}", value
            elif isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value, depth + 1))


def open_shards(index: Path) -> State:
    """The tensors of all shards listed in an index."""
    try:
        weight_map = read_json(index)["weight_map"]
        shards = sorted(set(weight_map.values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: damaged ({type(error).__name__}: {error})") from None
    if not inside:
        raise InputError(f"{index}: lists shards outside its folder")
    opened = {}
    for shard in shards:
        if not (index.parent / shard).is_file():
            missing = shortened(str(index.parent / shard), 4096)
            raise InputError(f"{missing}: shard is missing (listed in {index.name})")
        opened[shard] = open_weights(index.parent / shard)
    for key, shard in weight_map.items():
        if key not in opened[shard]:
            place = index.parent / shard
            raise InputError(
                f"{place}: tensor {shortened(key)} is missing (listed in {index.name})"
            )
    return {key: opened[shard][key] for key, shard in weight_map.items()}
