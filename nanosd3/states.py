"""The state of an unfinished stage: saved by one process or many, continued by as many or others.

A state is a folder in the run's:

    state-00000500/
        shard-00001-*.safetensors   each process's rows of every tensor
        state.json                  stage, step and other numbers; shapes; SHA-256 of each file

written by torch.distributed.checkpoint in its safetensors form (its usual form has an index of
pickled objects, which could run code when read). A tensor is known by its name and the place of its
rows, so a state of four processes loads in one or two, and one of FSDP in a process alone.

It is written under a temporary name, flushed and renamed, and the one before is kept: a state that
is truncated or altered is named, and the one before is used.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from nanosd3.checkpoint import read_json, remove, rename, write_json
from nanosd3.parallel import ALONE, Team
from nanosd3.runtime import InputError

KEPT = 2
INDEX = "state.json"
ADVICE = "delete it to repeat the stage"
AVERAGE = "ema."  # how the names of averaged weights begin
Numbers = dict[str, int | str]


def saved(folder: Path) -> list[Path]:
    """The states in a run's folder, the newest first."""
    return sorted(folder.glob("state-*"), reverse=True)


def forget(folder: Path, keep: int = 0) -> None:
    """Delete all states but the newest so many, and what killed processes began."""
    for path in (*begun(folder), *saved(folder)[keep:]):
        remove(path)


def save(
    folder: Path, stage: str, step: int, tensors: dict[str, Tensor], team: Team = ALONE, **more: int
) -> None:
    """Save a state after `step` steps, and keep the one before in case this one is damaged."""
    path = folder / f"state-{step:08d}"
    numbers = {"stage": stage, "step": step, **more}
    if team.leads:  # what killed processes began, or a newer state that was found damaged
        for old in (*begun(folder), *folder.glob(path.name)):
            remove(old)
    team.wait()
    try:
        write(temporary(path), numbers, tensors, team)
        if team.leads:
            rename(temporary(path), path)
    except (CheckpointException, OSError) as error:
        reason = cause(error)
        if not isinstance(reason, OSError):
            raise reason from None
        raise InputError(f"{path}: cannot be written ({reason.strerror or reason})") from None
    finally:
        if team.leads:
            shutil.rmtree(temporary(path), ignore_errors=True)
    if team.leads:
        forget(folder, KEPT)
    team.wait()


def write(path: Path, numbers: Numbers, tensors: dict[str, Tensor], team: Team) -> None:
    """Write a state's files, flushed to the disk."""
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with warnings.catch_warnings(action="ignore"):  # that one process is one process
        dcp.save(plain, storage_writer=writer, no_dist=team.size == 1)
    sums = all_sums(path, team)
    if team.leads:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        index = {"numbers": numbers, "shapes": shapes, "sums": sums}
        write_json(path / INDEX, index | {"sum": index_sum(index)})


def temporary(path: Path) -> Path:
    """The name a state is written under; the same in all processes."""
    return path.with_name(f".{path.name}.tmp")


def begun(folder: Path) -> list[Path]:
    """What processes that were killed began to save."""
    return list(folder.glob(temporary(folder / "state-*").name))


def cause(error: BaseException) -> BaseException:
    """What went wrong, in whichever process, in a call of torch.distributed.checkpoint."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def load(
    folder: Path, stage: str, tensors: dict[str, Tensor], team: Team = ALONE
) -> Numbers | None:
    """Fill `tensors` in place from the newest sound state of `stage`; its numbers, or None if
    there is none. Damaged states are named. Raises InputError if all are damaged, or if this one
    is of another network."""
    path, index = newest(folder, stage, team)
    if path is None:
        return None
    same_shapes(path, tensors, index["shapes"])
    read(path, tensors, team)
    return index["numbers"]


def averages(folder: Path, stage: str) -> dict[str, Tensor] | None:
    """The averaged weights in the newest sound state of a stage, whole, by parameter; None without
    one. Raises InputError if all states are damaged."""
    path, index = newest(folder, stage, ALONE)
    if path is None:
        return None
    shapes = {n: s for n, s in index["shapes"].items() if n.startswith(AVERAGE)}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    read(path, tensors, ALONE)
    return {name.removeprefix(AVERAGE): tensor for name, tensor in tensors.items()}


def newest(folder: Path, stage: str, team: Team) -> tuple[Path, dict] | tuple[None, None]:
    """The newest sound state and its index, if it is of this stage. Damaged ones are named."""
    damaged = []
    for path in saved(folder):
        try:
            index = checked(path, team)
        except InputError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            print(f"  warning: {line}; using the one before, {path.name}")
        return (path, index) if index["numbers"]["stage"] == stage else (None, None)
    if damaged:
        raise InputError(f"{damaged[0]}; delete it to repeat the unfinished stage")
    return None, None


def read(path: Path, tensors: dict[str, Tensor], team: Team) -> None:
    """Fill tensors in place, whoever wrote which rows."""
    reader = HuggingFaceStorageReader(str(path))
    try:
        reader.read_metadata()  # or dcp.load logs a traceback of what is wrong
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=reader, no_dist=team.size == 1)
    except (Exception, CheckpointException) as error:  # checksums are right: somebody else's work
        reason = cause(error)
        if isinstance(reason, MemoryError) or not isinstance(reason, Exception):
            raise reason from None
        raise InputError(f"{path}: not a state of this program; {ADVICE}") from None


def checked(path: Path, team: Team) -> dict:
    """The index of a state whose files are as they were written. Raises InputError, in every
    process alike, if they are not."""
    index = read_json(path / INDEX)
    if index.pop("sum", None) != index_sum(index):
        raise InputError(f"{path}: damaged ({INDEX}: its checksum differs)")
    found, sums = all_sums(path, team), index["sums"]
    for name in sums | found:
        if found.get(name) != sums.get(name):
            state = "its checksum differs" if name in found else "is missing"
            raise InputError(f"{path}: damaged ({name}: {state})")
    return index


def index_sum(index: dict) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def all_sums(path: Path, team: Team) -> dict[str, str]:
    """SHA-256 of each shard in a folder; every process reads some of them."""
    files = sorted(path.glob("*.safetensors"))
    sums = {file.name: sha256(file) for file in files[team.rank :: team.size]}
    if team.size == 1:
        return sums
    parts: list[dict] = [{} for _ in range(team.size)]
    dist.all_gather_object(parts, sums)
    return {name: digest for part in parts for name, digest in part.items()}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_shapes(path: Path, tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    """Raises InputError naming the first tensor that is missing, unexpected or misshapen."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise InputError(f"{path}: tensor {name} is missing; {ADVICE}")
        if shapes[name] != list(tensor.shape):
            raise InputError(f"{path}: tensor {name} has shape {tuple(shapes[name])}, expected "
                             f"{tuple(tensor.shape)}; {ADVICE}")  # fmt: skip
    for name in shapes:
        if name not in tensors:
            raise InputError(f"{path}: unexpected tensor {name}; {ADVICE}")
