"""A cache on disk for what frozen networks compute from each image and caption.

Encoding an image or a caption costs far more than reading the result, so it is done once, before
training. Each key has one row of tensors. Rows are stored in shards, safetensors files of up to
a few thousand rows, and a manifest lists the keys of each shard:

    manifest.json       {"shards": {"00000.safetensors": {"sha256": ..., "keys": [...]}, ...}}
    00000.safetensors   tensors (n, ...), one row for each of the n keys, in the same order

A shard is written first, then the manifest that lists it, both atomically, so a kill costs at most
the shard being computed. A shard that does not match its checksum is dropped and recomputed.

Shards are memory-mapped: pages are read from disk when their rows are used, and the system may drop
them again, so memory use does not grow with the data.
"""

import hashlib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from nanosd3.errors import InputError
from nanosd3.storage.files import read_json, sha256, write_file, write_json
from nanosd3.storage.mapped import places


class Entry(TypedDict):
    """A shard in the manifest."""

    sha256: str
    keys: list[str]


class Shards:
    """The rows stored in a folder, by key. All rows have the same names, types and shapes."""

    def __init__(self, folder: Path):
        """Open a folder, which need not exist yet. Warns about missing or damaged shards and
        ignores them."""
        self.folder = folder
        self.manifest = folder / "manifest.json"
        self.shards: dict[str, Entry] = {}  # by file name
        self.places: dict[str, tuple[str, int]] = {}  # key -> file name, row
        self.opened: dict[str, dict[str, Tensor]] = {}  # file name -> memory-mapped tensors
        for name, entry in self.read_manifest().items():
            problem = self.fault(name, entry["sha256"])
            if problem:
                count = len(entry["keys"])
                print(f"  warning: {folder / name}: {problem}; its {count} rows will be recomputed")
            else:
                self.remember(name, entry)

    def read_manifest(self) -> dict[str, Entry]:
        """The manifest's entries; empty if there is no manifest, or it is damaged."""
        if not self.manifest.exists():
            return {}
        try:
            shards = read_json(self.manifest).get("shards")
            if not is_manifest(shards):
                raise InputError(f"{self.manifest}: damaged: no table of shards")
            return shards
        except InputError as error:
            print(f"  warning: {error}; all rows will be recomputed")
            return {}

    def fault(self, name: str, digest: str) -> str | None:
        """What is wrong with a shard's file, or None."""
        try:
            intact = sha256(self.folder / name) == digest
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if intact else "damaged (checksum mismatch)"

    def remember(self, name: str, entry: Entry) -> None:
        """Index a shard's keys."""
        self.shards[name] = entry
        self.places |= {key: (name, row) for row, key in enumerate(entry["keys"])}

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys that have no row yet, in order, without duplicates."""
        return [key for key in dict.fromkeys(keys) if key not in self.places]

    def add(self, keys: Sequence[str], rows: dict[str, Tensor]) -> None:
        """Write one shard: tensors (n, ...) with one row for each of n new keys."""
        if self.missing(keys) != list(keys):
            raise ValueError("duplicate key, or a key that has a row already")
        if any(len(tensor) != len(keys) for tensor in rows.values()):
            raise ValueError(f"expected tensors of {len(keys)} rows")
        names = (f"{number:05d}.safetensors" for number in itertools.count())
        name = next(name for name in names if name not in self.shards)
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in rows.items()})
        entry: Entry = {"sha256": hashlib.sha256(content).hexdigest(), "keys": list(keys)}
        write_file(self.folder / name, content)
        write_json(self.manifest, {"shards": {**self.shards, name: entry}})
        self.remember(name, entry)

    def rows(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The rows of these keys, stacked in order."""
        places = [self.places[key] for key in keys]
        rows = [(self.open(name), row) for name, row in places]
        names = rows[0][0]  # the same in all shards
        return {name: torch.stack([shard[name][row] for shard, row in rows]) for name in names}

    def open(self, name: str) -> dict[str, Tensor]:
        """The memory-mapped tensors of a shard, which stay open until `close`."""
        if name not in self.opened:
            path = self.folder / name
            try:
                found = places(path)
                self.opened[name] = {key: place.read() for key, place in found.items()}
            except InputError as error:
                reason = str(error).removeprefix(f"{path}: ")
                raise InputError(
                    f"{path}: cannot be read ({reason}); rerun the command to recompute its rows"
                ) from None
        return self.opened[name]

    def close(self) -> None:
        """Unmap all shards, until their rows are read again."""
        self.opened.clear()


def is_manifest(shards: object) -> TypeGuard[dict[str, Entry]]:
    """Whether this maps plain file names, without folders, to valid entries."""
    return isinstance(shards, dict) and all(
        Path(name).name == name
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("keys"), list)
        and all(isinstance(key, str) for key in entry["keys"])
        for name, entry in shards.items()
    )


def fill_shards(
    shards: Shards,
    keys: Sequence[str],
    compute: Callable[[list[str]], dict[str, Tensor]],
    at_once: int,
    label: str,
) -> None:
    """Compute the rows of all keys that have none, in shards of `at_once` rows.

    If it is interrupted, finished shards are kept, and calling it again resumes after them.
    `compute` may split a shard's keys into smaller batches.
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
