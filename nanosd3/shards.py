"""Rows of tensors, computed once and kept on disk: what frozen networks make of each image.

Encoding an image or a caption costs far more than reading the result, so it is done once, before
training. The rows lie in shards, safetensors files of some hundred rows each, and a manifest says
which row is where:

    manifest.json       {"shards": {"00000.safetensors": {"sha256": ..., "keys": [...]}, ...}}
    00000.safetensors   tensors (n, ...), a row for each of the n keys, in their order

A shard is written first, then the manifest that names it, each whole or not at all. Whatever
kills the program costs at most the shard in work. What does not match its checksum is forgotten
and computed again.

Reading goes through memory maps: a row's pages are fetched from disk when it is asked for, and
the system may drop them again. So the memory of this process does not grow with the data.
"""

import hashlib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from nanosd3.checkpoint import read_json, write_file, write_json
from nanosd3.runtime import InputError


class Shards:
    """The rows in a folder, by key. Each has the same names, types and shapes."""

    def __init__(self, folder: Path):
        """Open what is there. Shards that are missing or damaged are named and forgotten."""
        self.folder = folder
        self.manifest = folder / "manifest.json"
        self.shards: dict[str, dict] = {}  # by file name: sha256 and keys
        self.places: dict[str, tuple[str, int]] = {}  # by key: file name and row
        self.opened: dict[str, dict[str, Tensor]] = {}  # by file name: its tensors, mapped
        for name, entry in self.read_manifest().items():
            wrong = self.fault(name, entry["sha256"])
            if wrong:
                count = len(entry["keys"])
                print(f"  warning: {folder / name}: {wrong}; its {count} rows are computed again")
            else:
                self.remember(name, entry)

    def read_manifest(self) -> dict[str, dict]:
        """The entries of the manifest, none if there is no manifest or it is damaged."""
        if not self.manifest.exists():
            return {}
        try:
            shards = read_json(self.manifest).get("shards")
            if not is_manifest(shards):
                raise InputError(f"{self.manifest}: damaged: no table of shards")
            return shards
        except InputError as error:
            print(f"  warning: {error}; all rows are computed again")
            return {}

    def fault(self, name: str, digest: str) -> str | None:
        """What is wrong with the file of a shard, if anything."""
        try:
            with open(self.folder / name, "rb") as file:  # hashed piece by piece
                sound = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if sound else "damaged (its checksum differs)"

    def remember(self, name: str, entry: dict) -> None:
        self.shards[name] = entry
        self.places |= {key: (name, row) for row, key in enumerate(entry["keys"])}

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that have no row yet, in order, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self.places]

    def add(self, keys: Sequence[str], rows: dict[str, Tensor]) -> None:
        """Write one shard: tensors (n, ...) with a row for each of n new keys."""
        if self.missing(keys) != list(keys):
            raise ValueError("a key is given twice, or has a row already")
        if any(len(tensor) != len(keys) for tensor in rows.values()):
            raise ValueError(f"expected tensors of {len(keys)} rows")
        names = (f"{number:05d}.safetensors" for number in itertools.count())
        name = next(name for name in names if name not in self.shards)
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in rows.items()})
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "keys": list(keys)}
        write_file(self.folder / name, content)
        write_json(self.manifest, {"shards": {**self.shards, name: entry}})
        self.remember(name, entry)

    def rows(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The rows of these keys, stacked in their order."""
        places = [self.places[key] for key in keys]
        found = [(self.open(name), row) for name, row in places]
        names = found[0][0]  # the same in all shards
        return {name: torch.stack([shard[name][row] for shard, row in found]) for name in names}

    def open(self, name: str) -> dict[str, Tensor]:
        """The tensors of a shard, as memory maps. They stay open: to map is not to read."""
        if name not in self.opened:
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    self.opened[name] = {key: file.get_tensor(key) for key in file.keys()}
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: cannot be read ({error}); start again, and its rows "
                                 "are computed again") from None  # fmt: skip
        return self.opened[name]


def is_manifest(shards: object) -> bool:
    """Whether this is a table of file names without folders, each with its checksum and keys."""
    return isinstance(shards, dict) and all(
        Path(name).name == name
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("keys"), list)
        and all(isinstance(key, str) for key in entry["keys"])
        for name, entry in shards.items()
    )


def fill(
    shards: Shards,
    keys: Sequence[str],
    compute: Callable[[list[str]], dict[str, Tensor]],
    at_once: int,
    label: str,
) -> None:
    """Compute the rows of all keys that have none, in shards of `at_once` rows.

    Whatever stops it (Ctrl-C, a crash), the finished shards stay, and the same call goes on after
    them. `compute` may of course work in smaller batches inside.
    """
    missing = shards.missing(keys)
    done = len(set(keys)) - len(missing)
    interval = 0.2 if sys.stderr.isatty() else 10
    with tqdm(desc=label, total=done + len(missing), leave=False, mininterval=interval) as bar:
        bar.update(done)
        for start in range(0, len(missing), at_once):
            chunk = missing[start : start + at_once]
            shards.add(chunk, compute(chunk))
            bar.update(len(chunk))
