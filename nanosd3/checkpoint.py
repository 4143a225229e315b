"""Files: written whole or not at all, read without running code, and the folder of a run.

Every file is first written under a temporary name, flushed to disk and then renamed, so that a
crash or a full disk leaves the old file or none, never half of one. Weights are safetensors, which
cannot execute code when they are read.

A run folder holds
    run.json                what it is (config, data, seed) and which stages are finished
    *.safetensors           weights of the finished stages
    tokenizers.json         the vocabularies trained for it
    state-STEP/             the unfinished stage, see states.py; the last two
    cache/                  encoded images and captions, see features.py
    log.jsonl               one object a line: stage, step, loss, ...
    speed.jsonl             how fast, in how much memory
and, once finished, the pictures and metrics.json.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file as save_safetensors
from torch import Tensor, nn

from nanosd3.runtime import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

WEIGHTS = ("judge", "autoencoder", "clip", "t5", "text", "flow")
RUN_FILES = (  # all that a run writes, beside run.json and its cache, which tells what is in it
    *(f"{name}.safetensors" for name in WEIGHTS),
    *("samples.png", "trajectory.gif", "loss.png", "samplers.png", "preview-*.png"),
    *("tokenizers.json", "metrics.json", "log.jsonl", "speed.jsonl", "state-*"),
)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or folder under, which is then renamed to it; what was
    begun is removed after a failure or Ctrl-C. Raises InputError where writing is not possible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        rename(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def rename(temporary: Path, path: Path) -> None:
    """Give a file or folder its final name, and have the disk know of it."""
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere folders cannot be flushed
        flush(path.parent)


def remove(path: Path) -> None:
    """Delete a file or folder. What a kill leaves of it has a temporary name."""
    if path.is_dir() and not path.name.startswith("."):
        away = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(away, ignore_errors=True)
        path = path.replace(away)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename. Raises InputError where that is not possible."""
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        flush(temporary)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, (text + "\n").encode())


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(cpu, temporary)
        flush(temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError naming the file."""
    try:
        return load_safetensors(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None


def save_weights(module: nn.Module, path: Path) -> None:
    save_tensors(module.state_dict(), path)


def check_state(path: Path, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Raises InputError naming the first key that is missing, unexpected or misshapen."""
    for key in expected:
        if not isinstance(got.get(key), Tensor):
            raise InputError(f"{path}: tensor {key} is missing")
        if got[key].shape != expected[key].shape:
            raise InputError(f"{path}: tensor {key} has shape {tuple(got[key].shape)}, "
                             f"expected {tuple(expected[key].shape)}")  # fmt: skip
    for key in got:
        if key not in expected:
            raise InputError(f"{path}: unexpected tensor {key}")


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file, strictly. Raises InputError naming the file."""
    state = read_tensors(path)
    check_state(path, module.state_dict(), state)
    module.load_state_dict(state)


class Run:
    """A run folder: its identity, what is finished, and its log."""

    def __init__(self, folder: Path, identity: dict, stages: dict):
        self.folder, self.identity, self.stages = folder, identity, stages

    @classmethod
    def open(cls, folder: Path, identity: dict, fresh: bool = False) -> "Run":
        """Begin a run in an empty or new folder, or go on with one of the same identity.

        Raises InputError if the folder holds something else, or a run of another identity.
        """
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; choose another folder with --out")
        identity = json.loads(json.dumps(identity))  # as it will be read back: tuples are lists
        index = folder / "run.json"
        if index.exists() and fresh:
            run = cls.read(folder)  # refuses what is not recognisably a run
            with run.alone():
                run.stages = {}
                run.write()
                run.delete(RUN_FILES)
                run.identity = identity
                run.write()
            return run
        if index.exists():
            run = cls.read(folder)
            if what := difference(run.identity, identity):
                raise InputError(f"{folder}: holds a run {what}; choose another folder "
                                 "with --out, or start over with --fresh")  # fmt: skip
            return run
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty and holds no run.json, so it is no run; "
                             "choose another folder with --out")  # fmt: skip
        run = cls(folder, identity, {})
        run.write()
        return run

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Open an existing run. Raises InputError if there is none, or its index is damaged."""
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such run folder; `python train_mnist.py` makes runs/mnist"
            )
        if not (folder / "run.json").exists():
            raise InputError(f"{folder}: holds no run.json, so it is no run folder")
        content = read_json(folder / "run.json")
        stages = content.pop("stages", None)
        if not isinstance(stages, dict) or "config" not in content:
            raise InputError(f"{folder / 'run.json'}: damaged: no config or stages in it")
        return cls(folder, content, stages)

    def delete(self, names: Iterable[str]) -> None:
        """Remove what goes by these names in the folder."""
        for path in (path for name in names for path in self.folder.glob(name)):
            remove(path)

    def write(self) -> None:
        write_json(self.folder / "run.json", {**self.identity, "stages": self.stages})

    def finish(self, stage: str, results: dict) -> None:
        """Mark a stage as finished, with what it measured."""
        self.stages[stage] = results
        self.write()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While open, no other process may train in this folder, and what killed ones began to
        write is removed. Raises InputError if another one does train in it. (The lock is the
        operating system's: it ends with the process, however that ends.)"""
        if fcntl is None:
            yield
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise InputError(f"{self.folder}: another process is training in it; wait for it, or "
                             "choose another folder with --out") from None  # fmt: skip
        except OSError:  # a file system without locks
            pass
        try:
            self.delete(f".{name}.*tmp" for name in ("run.json", *RUN_FILES))
            yield
        finally:
            os.close(folder)

    # --- the log ---

    def log(self, file: str = "log.jsonl", **entry: object) -> None:
        """Append one line to log.jsonl, or to another file of such lines."""
        path = self.folder / file
        try:
            with open(path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None

    def read_log(self, stage: str | None = None) -> list[dict]:
        """The entries of log.jsonl: all, or those of one stage's steps that were made, with their
        loss. A line cut by a crash is left out."""
        path = self.folder / "log.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        return [e for e in entries if stage is None or (e["stage"] == stage and "loss" in e)]

    def rewind_log(self, stage: str, step: int) -> None:
        """Drop what `stage` logged from `step` on, which will be written again."""
        kept = [e for e in self.read_log() if e["stage"] != stage or e["step"] < step]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_file(self.folder / "log.jsonl", lines.encode())


def difference(had: dict, wanted: dict) -> str | None:
    """What is different between two identities, in words; None if nothing is."""
    old, new = flat(had), flat(wanted)
    if old.get("config.name") != new["config.name"]:
        return f"of config {old.get('config.name')}, not {new['config.name']}"
    for key in sorted({**old, **new}, key=lambda key: key.startswith("config.")):  # these last
        if key not in old or key not in new:
            return f"with{'out' if key in new else ''} {key}"
        if old[key] != new[key]:
            return f"with {key} {old[key]}, not {new[key]}"
    return None


def flat(content: dict, before: str = "") -> dict[str, object]:
    """The entries of objects in objects, by the path to each."""
    found = {}
    for key, value in content.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return found
