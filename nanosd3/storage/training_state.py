"""Saved states of an unfinished stage, from which training resumes with any number of processes.

A state is a folder inside the run folder:

    state-00000500/
        shard-00001-*.safetensors   each process's rows of every tensor
        state.json                  stage, step and other numbers; shapes; SHA-256 of each shard

The shards are written by torch.distributed.checkpoint in its safetensors format (its default format
has a pickled index, which could execute code when read). A tensor is identified by its name and the
position of its rows, so a state saved by four processes loads in one or two, and one saved under
FSDP loads in a single process.

A state is written under a temporary name, flushed and renamed, and the previous one is kept. If the
newest is truncated or altered, a warning names it and the previous one is used.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypedDict, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nanosd3.errors import InputError
from nanosd3.machine.device import out_of_memory
from nanosd3.machine.distributed import SINGLE_PROCESS, ProcessGroup
from nanosd3.storage.files import (
    Unreadable,
    read_json,
    remove,
    rename,
    sha256,
    unreadable,
    write_json,
)

KEPT = 2  # states
INDEX = "state.json"
ADVICE = "delete it to repeat the stage"
AVERAGE = "ema."  # prefix of the names of averaged weights

Numbers = dict[str, int | str]


class Index(TypedDict):
    """The content of state.json, apart from its own checksum."""

    numbers: Numbers  # "stage", "step" and anything else saved with them
    shapes: dict[str, list[int]]  # by tensor
    sums: dict[str, str]  # SHA-256 by shard


def saved(folder: Path) -> list[Path]:
    """The states in a run folder, newest first."""
    return sorted(folder.glob("state-*"), reverse=True)


def forget(folder: Path, keep: int = 0) -> None:
    """Delete all but the newest `keep` states, and the partial states of killed processes."""
    for path in (*partial_states(folder), *saved(folder)[keep:]):
        remove(path)


# --- saving -------------------------------------------------------------------------------------


def save_state(
    folder: Path,
    stage: str,
    step: int,
    tensors: dict[str, Tensor],
    group: ProcessGroup = SINGLE_PROCESS,
    **more: int,
) -> None:
    """Save the state after `step` steps, and keep the previous one in case this one is damaged.

    All processes of the group call it together. Raises InputError if it cannot be written.
    """
    path = folder / f"state-{step:08d}"
    numbers: Numbers = {"stage": stage, "step": step, **more}
    if group.is_main:  # also a damaged state of the same step, left from before falling back
        for old in (*partial_states(folder), *folder.glob(path.name)):
            remove(old)
    group.barrier()
    try:
        write_files(temporary(path), numbers, tensors, group)
        if group.is_main:
            rename(temporary(path), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if group.is_main:
            shutil.rmtree(temporary(path), ignore_errors=True)
    if group.is_main:
        forget(folder, KEPT)
    group.barrier()


def write_files(
    path: Path, numbers: Numbers, tensors: dict[str, Tensor], group: ProcessGroup
) -> None:
    """Write the shards and the index of a state, flushed to disk."""
    with checkpoint_library() as dcp:
        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        dcp.save(contiguous, storage_writer=writer, no_dist=group.size == 1)
    sums = shard_sums(path, group)
    if group.is_main:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        index = {"numbers": numbers, "shapes": shapes, "sums": sums}
        write_json(path / INDEX, index | {"sum": index_sum(index)})


def temporary(path: Path) -> Path:
    """The name under which a state is written, the same in all processes."""
    return path.with_name(f".{path.name}.tmp")


def partial_states(folder: Path) -> list[Path]:
    """The states that killed processes left half written."""
    return list(folder.glob(temporary(folder / "state-*").name))


@contextmanager
def checkpoint_library() -> Iterator[ModuleType]:
    """torch.distributed.checkpoint, without its warning that there is only one process. In place of
    its errors, their cause is raised, whichever process it came from.

    It is imported here because that takes a second, and few commands save or load a state.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore"):
            yield dcp
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


# --- loading ------------------------------------------------------------------------------------


def load_state(
    folder: Path, stage: str, tensors: dict[str, Tensor], group: ProcessGroup = SINGLE_PROCESS
) -> Numbers | None:
    """Fill `tensors` in place from the newest intact state and return its numbers.

    Returns None if there is no state or the newest is of another stage. Damaged states are skipped
    with a warning. Raises InputError if all are damaged or the tensors do not match.
    """
    state = newest(folder, stage, group)
    if state is None:
        return None
    path, index = state
    check_shapes(path, tensors, index["shapes"])
    read_shards(path, tensors, group)
    return index["numbers"]


def averages(folder: Path, stage: str) -> dict[str, Tensor] | None:
    """The averaged weights in the newest intact state of a stage, unsharded, by parameter.

    None if there is no such state. Raises InputError if all states are damaged.
    """
    state = newest(folder, stage, SINGLE_PROCESS)
    if state is None:
        return None
    path, index = state
    tensors = {
        name: torch.empty(shape)
        for name, shape in index["shapes"].items()
        if name.startswith(AVERAGE)
    }
    read_shards(path, tensors, SINGLE_PROCESS)
    return {name.removeprefix(AVERAGE): tensor for name, tensor in tensors.items()}


def newest(folder: Path, stage: str, group: ProcessGroup) -> tuple[Path, Index] | None:
    """The newest intact state and its index, if it is of this stage; warns about damaged ones."""
    damaged = []
    for path in saved(folder):
        try:
            index = verified_index(path, group)
        except Unreadable:  # may be intact: continuing from the one before would delete it
            raise
        except InputError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            print(f"  warning: {line}; using the one before, {path.name}")
        return (path, index) if index["numbers"]["stage"] == stage else None
    if damaged:
        raise InputError(f"{damaged[0]}; delete it to repeat the unfinished stage")
    return None


def read_shards(path: Path, tensors: dict[str, Tensor], group: ProcessGroup) -> None:
    """Fill tensors in place, whichever processes wrote their rows."""
    try:
        with checkpoint_library() as dcp:
            reader = dcp.HuggingFaceStorageReader(str(path))
            reader.read_metadata()  # otherwise dcp.load would log a traceback for any error
            dcp.load(tensors, storage_reader=reader, no_dist=group.size == 1)
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception as error:
        if out_of_memory(error):
            raise
        # The checksums match, so the files are intact, but save_state did not write them.
        raise InputError(f"{path}: not a state written by nanosd3; {ADVICE}") from None


def verified_index(path: Path, group: ProcessGroup) -> Index:
    """The index of a state, once all files match their checksums.

    Raises InputError in all processes alike if they do not.
    """
    index = read_json(path / INDEX)
    if index.pop("sum", None) != index_sum(index):
        raise InputError(f"{path}: damaged ({INDEX}: checksum mismatch)")
    expected, actual = index["sums"], shard_sums(path, group)
    for name in expected | actual:
        if actual.get(name) != expected.get(name):
            problem = "checksum mismatch" if name in actual else "is missing"
            raise InputError(f"{path}: damaged ({name}: {problem})")
    return cast(Index, index)


def index_sum(index: Mapping[str, object]) -> str:
    """SHA-256 of the index itself."""
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def shard_sums(path: Path, group: ProcessGroup) -> dict[str, str]:
    """SHA-256 of each shard of a state; the processes divide the work."""
    files = sorted(path.glob("*.safetensors"))
    sums = {file.name: sha256(file) for file in files[group.rank :: group.size]}
    if group.size == 1:
        return sums
    parts: list[dict[str, str]] = [{} for _ in range(group.size)]
    dist.all_gather_object(parts, sums)
    return {name: digest for part in parts for name, digest in part.items()}


def check_shapes(path: Path, tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    """Raise InputError naming the first tensor that is missing, unexpected or of another shape."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise InputError(f"{path}: tensor {name} is missing; {ADVICE}")
        if shapes[name] != list(tensor.shape):
            raise InputError(
                f"{path}: tensor {name} has shape {tuple(shapes[name])}, "
                f"expected {tuple(tensor.shape)}; {ADVICE}"
            )
    for name in shapes:
        if name not in tensors:
            raise InputError(f"{path}: unexpected tensor {name}; {ADVICE}")
