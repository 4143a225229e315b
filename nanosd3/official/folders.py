"""Weights in a folder, under the names that diffusers and transformers give them.

`model.safetensors` may be `pytorch_model.bin`; it may have a variant (`model.fp16.safetensors`) and
may be split into shards (`model-00001-of-00002.safetensors`), usually with an index of what is
where (`model.safetensors.index.json`). A folder with weights under other names is refused, not
treated as empty.
"""

import os
import re
from collections.abc import Iterable
from itertools import count as count_from
from itertools import islice
from pathlib import Path

from nanosd3.errors import InputError
from nanosd3.official.tensor_files import open_shards, open_weights
from nanosd3.official.tensors import State

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
FILE_TYPES = ("safetensors", "bin")  # preferred first
SHARD_NUMBER = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")

# Files usually found beside weights; any other file may hold weights, in whatever format.
TEXT_SUFFIXES = frozenset(
    ".csv .db .gif .html .ini .jinja .jpeg .jpg .json .jsonl .lock .log .md .model .pdf .png .py "
    ".rst .sh .svg .toml .tsv .txt .vocab .webp .xml .yaml .yml".split()
)
TEXT_NAMES = frozenset(("license", "licence", "notice", "readme"))

WHOLE, INDEX, NUMBERED = range(3)  # forms of the weights, preferred first


def parse_file_name(name: str) -> tuple[str, int, int] | None:
    """Variant, form and file type of a usual name, or None. The variant may be in several places:
    model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors,
    model.safetensors.index.fp16.json, model.safetensors.fp16.index.json."""
    stem, *rest = SHARD_NUMBER.sub("", name).split(".")
    form = WHOLE if SHARD_NUMBER.search(name) is None else NUMBERED
    if rest[-1:] == ["json"] and "index" in rest:
        rest, form = [field for field in rest if field not in ("index", "json")], INDEX
        kinds = [field for field in rest if field in FILE_TYPES]
    else:
        kinds = [field for field in rest[-1:] if field in FILE_TYPES]
    if stem not in STEMS or len(kinds) != 1:
        return None
    rest.remove(kinds[0])
    return ".".join(rest), form, FILE_TYPES.index(kinds[0])


def open_folder(folder: Path, stem: str) -> State:
    """The weights in a folder of one component; empty if there are none.

    Raises InputError if there are weights but none is understood.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    if name := choose_file(names, stem, folder):
        return open_file(folder / name)
    if others := weight_like_files(folder, "**/*"):
        raise InputError(
            f"{folder}: holds no {stem}.safetensors or .bin, whole or in shards, but "
            f"{first_few(others)}; rename the weights, or name their file with its own option"
        )
    return {}


def choose_file(names: list[str], stem: str, folder: Path) -> str | None:
    """The file to open: of the unnamed variant, else of fp16, else of the only one; of that variant
    a whole file, else an index, else a shard; .safetensors before .bin."""
    usual = [(name, *parsed) for name in names if (parsed := parse_file_name(name))]
    numbered = {variant for _, variant, form, _ in usual if form == NUMBERED}
    # an index may have been downloaded without its shards
    usual = [u for u in usual if u[2] != INDEX or u[1] in numbered] or usual
    variants = sorted({variant for _, variant, _, _ in usual})
    if not variants:
        return None
    chosen = next((variant for variant in ("", "fp16") if variant in variants), variants[0])
    if len(variants) > 1 and chosen not in ("", "fp16"):
        raise InputError(f"{folder}: holds the variants {first_few(variants)}; keep one of them")
    *_, best = min(
        (form, kind, not name.startswith(f"{stem}."), name)
        for name, variant, form, kind in usual
        if variant == chosen
    )
    return best


def model_names(path: Path) -> list[str]:
    """The names of a file and its folder, or of a folder, before and after following links; in the
    Hub's cache (models--OWNER--NAME/snapshots/...) also the repository's."""
    names = []
    for whole in (path.absolute(), path.resolve()):
        names += [whole.name] if whole.is_dir() else [whole.name, whole.parent.name]
        names += [name for name in whole.parts if name.startswith("models--")]
    return names


def weight_like_files(folder: Path, *patterns: str) -> list[str]:
    """The files in a folder, hidden ones aside, that may hold weights or say where they are."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()}
    names = sorted(str(path.relative_to(folder)) for path in found)
    return [name for name in names if is_weight_like(name) and not name.startswith(".")]


def is_weight_like(name: str) -> bool:
    """Whether a file may hold weights or part of them, or say where they are."""
    path = Path(name.lower())
    known = path.suffix in TEXT_SUFFIXES or path.stem in TEXT_NAMES
    return not known or ".index." in path.name


def open_file(path: Path) -> State:
    """The tensors of a weight file; of all shards, if it is one of them or their index."""
    if path.name.endswith(".json") and ".index." in path.name:
        return open_shards(path)
    if SHARD_NUMBER.search(path.name) and path.is_file():
        return open_numbered(path)
    return open_weights(path)


def open_numbered(path: Path) -> State:
    """The tensors of a shard and of all others beside it, found by their numbers."""

    def split(name: str) -> tuple[str, ...]:
        """What all shards have in common, then the shard's own number."""
        matched = SHARD_NUMBER.search(name)
        if matched is None:
            return ()
        return name[: matched.start()], name[matched.end() :], matched[2], matched[1]

    *common, _ = split(path.name)
    shards = {}
    for other in path.parent.iterdir():
        if split(other.name)[:-1] == tuple(common):
            shards[int(split(other.name)[-1])] = other
    missing = next(number for number in count_from(1) if number not in shards)
    if missing <= int(common[-1]):
        raise InputError(f"{path}: shard {missing} of {int(common[-1])} is missing beside it")
    state: State = {}
    for _, shard in sorted(shards.items()):
        state |= open_weights(shard)
    return state


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message: the first ones, and how many more there are."""
    rest = iter(names)
    shown = ", ".join(islice(rest, limit))
    more = sum(1 for _ in rest)
    return f"{shown} and {more} more" if more else shown
