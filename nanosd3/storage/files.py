"""Files that are written atomically and read without running code.

Every file is written under a temporary name, flushed to disk and then renamed, so a crash or a full
disk leaves either the old file or none, never half of one. Weights are safetensors, which,
unlike pickles, cannot execute code when they are read.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from nanosd3.errors import InputError
from nanosd3.torch_settings import usual_settings

# No permission, a failing disk, a lost connection: errors that say nothing about the content.
UNKNOWN = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
Module = TypeVar("Module", bound=nn.Module)
JSON_DEPTH = 32  # levels; files that this program and others write have four or five


class Unreadable(InputError):
    """A file that cannot be read, at least not now: nothing is known about its content."""


def unreadable(path: Path, error: OSError | ValueError) -> InputError:
    """The error to raise for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file")
    kind = Unreadable if getattr(error, "errno", None) in UNKNOWN else InputError
    reason = getattr(error, "strerror", None) or error
    return kind(f"{path}: cannot be read ({reason})")


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which this thread writes it. Long names are hashed: file systems
    allow some 255 bytes."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` for a file or folder, which replaces `path` on success
    and is removed after a failure or Ctrl-C. Raises InputError if it cannot be written."""
    temporary = temporary_name(path)
    try:
        yield temporary
        rename(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def rename(temporary: Path, path: Path) -> None:
    """Give a file or folder its final name, durably."""
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot flush folders
        flush(path.parent)


def remove(path: Path) -> None:
    """Delete a file or folder.

    A folder is renamed first, so that a kill halfway leaves only a temporary name behind.
    """
    if path.is_dir() and not path.name.startswith("."):
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        path = path.replace(temporary)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def discard(folder: Path) -> None:
    """Delete a folder that is no longer needed, and warn if that fails: Windows and NFS do not let
    go of a file that some process has mapped."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        reason = error.strerror or error
        print(f"  warning: {folder}: cannot be deleted ({reason}); nothing needs it any more")


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises InputError if it cannot be written."""
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        flush(temporary)


def check_writable(path: Path) -> None:
    """Raise InputError if a file cannot be written, before its content is computed."""
    temporary = temporary_name(path)
    try:
        path.is_file()  # raises OSError for a name that is too long
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically. Raises InputError if it cannot be written."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, (text + "\n").encode())


def read_regular(path: Path) -> bytes:
    """The content of a regular file. Raises InputError: Unreadable if its content is unknown."""
    try:
        if path.is_file() or not path.exists():  # reading a pipe or device might never end
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError for a NUL in the name
        raise unreadable(path, error) from None
    raise InputError(f"{path}: is not a file")


def parse_json(text: str | bytes, place: str | Path) -> object:
    """The content of JSON text from anywhere, no deeper than JSON_DEPTH and printable as UTF-8.

    Raises InputError beginning with `place`, its file or line.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        content = json.loads(text)
        if r"\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error})") from None
    level = [content]
    for _ in range(JSON_DEPTH):
        level = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise InputError(f"{place}: not valid JSON (more than {JSON_DEPTH} levels deep)")
    return content


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError naming the file."""
    content = parse_json(read_regular(path), f"{path}: cannot be read")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically. Raises InputError if it cannot be written."""
    cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(cpu, temporary)


def write_safetensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file and flush it to disk. The same content gives the same bytes."""
    path.touch()
    mode = path.stat().st_mode  # the umask's; safetensors creates files for their owner alone
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # such as a full disk
        raise OSError(str(error)) from None
    if metadata:
        sort_metadata(path)
    path.chmod(stat.S_IMODE(mode))
    flush(path)


def sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header, which the library writes in random order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # the rest is padding
        file.seek(8)
        file.write(text.ljust(size))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, sorted by name, since the library returns them
    in a different order in every process. Raises InputError naming the file."""
    try:
        return dict(sorted(load_safetensors(read_regular(path)).items()))
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state dictionary to a safetensors file."""
    save_tensors(module.state_dict(), path)


class Shaped(Protocol):
    """A tensor, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_state(path: Path, shapes: Mapping[str, Sequence[int]], got: Mapping[str, Shaped]) -> None:
    """Raise InputError naming the first key that is missing, unexpected or not of its shape."""
    for key, shape in shapes.items():
        if key not in got:
            raise InputError(f"{path}: tensor {key} is missing")
        if tuple(got[key].shape) != tuple(shape):
            raise InputError(
                f"{path}: tensor {key} has shape {tuple(got[key].shape)}, expected {tuple(shape)}"
            )
    for key in got:
        if key not in shapes:
            raise InputError(f"{path}: unexpected tensor {key}")


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module, with exactly its keys and shapes.

    Raises InputError naming the file.
    """
    state = read_tensors(path)
    check_state(path, {key: t.shape for key, t in module.state_dict().items()}, state)
    module.load_state_dict(state)


def read_module(make: Callable[[], Module], path: Path) -> Module:
    """A module with the weights in a file, frozen. Drawing its initial weights in `make` leaves the
    caller's random state unchanged.

    Raises InputError naming the file.
    """
    with usual_settings(), torch.random.fork_rng(devices=[]):
        module = make()
        load_weights(module, path)
    module.requires_grad_(False).eval()
    return module
