"""Files: written whole or not at all, read without running code, and the folder of a run.

Every file is first written under a temporary name, flushed to disk and then renamed, so that a
crash or a full disk leaves the old file or none, never half of one. Weights are safetensors;
the state of an unfinished stage is a torch file behind its checksum, read with
`weights_only=True`. Neither can execute code when it is read.

A run folder holds
    run.json                what it is (config, data, seed) and which stages are finished
    *.safetensors           weights of the finished stages
    tokenizers.json         the vocabularies trained for it
    state-STEP.pt           the unfinished stage: step, weights, optimizer, EMA; the last two
    latents.safetensors     the encoded images, until the flow has been trained on them
    log.jsonl               one object a line: stage, step, loss, ...
and, once finished, the pictures and metrics.json.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from nanosd3.runtime import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

STATES_KEPT = 2
WEIGHTS = ("judge", "autoencoder", "clip", "t5", "text", "flow", "latents")
PICTURES = ("samples.png", "trajectory.gif", "loss.png", "samplers.png")
RUN_FILES = (  # all that a run writes, beside run.json and state.pt
    *(f"{name}.safetensors" for name in WEIGHTS),
    *PICTURES,
    *("tokenizers.json", "metrics.json", "log.jsonl"),
)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or folder under, which is then renamed to it; what was
    begun is removed after a failure or Ctrl-C. Raises InputError where writing is not possible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename. Raises InputError where that is not possible."""
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


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
    cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_file(path, save_safetensors(cpu))


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
    """A run folder: its identity, what is finished, and the state of what is not."""

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
            cls.read(folder)  # refuses what is not recognisably a run
            run = cls(folder, identity, {})
            run.forget_states()
            run.write()
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
            return run
        if index.exists():
            run = cls.read(folder)
            for key, value in identity.items():
                if run.identity.get(key) != value:
                    what = differs(key, run.identity, identity)
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

    def write(self) -> None:
        write_json(self.folder / "run.json", {**self.identity, "stages": self.stages})

    def finish(self, stage: str, results: dict) -> None:
        """Mark a stage as finished, with what it measured; its state is no longer needed."""
        self.stages[stage] = results
        self.write()
        self.forget_states()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While open, no other process may train in this folder. Raises InputError if one does.
        (The lock is the operating system's: it ends with the process, however that ends.)"""
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
            yield
        finally:
            os.close(folder)

    # --- the unfinished stage ---

    def states(self) -> list[Path]:
        """Files of saved states, the newest first."""
        return sorted(self.folder.glob("state-*.pt"), reverse=True)

    def forget_states(self) -> None:
        for path in self.states():
            path.unlink(missing_ok=True)

    def save_state(self, stage: str, step: int, state: dict) -> None:
        """Save a state after `step` steps, and keep the one before in case this one is damaged."""
        buffer = io.BytesIO()
        torch.save({"stage": stage, "step": step, **state}, buffer)
        content = buffer.getvalue()
        path = self.folder / f"state-{step:08d}.pt"
        write_file(path, hashlib.sha256(content).digest() + content)
        for old in self.states()[STATES_KEPT:]:
            old.unlink(missing_ok=True)

    def load_state(self, stage: str) -> tuple[Path, dict] | None:
        """The newest sound state saved for `stage` and its file, or None if there is none; damaged
        ones are named. Raises InputError if all are damaged."""
        damaged = []
        for path in self.states():
            try:
                state = read_state(path)
            except InputError as error:
                damaged.append(str(error))
                continue
            for line in damaged:
                print(f"  warning: {line}; using the one before, {path.name}")
            return (path, state) if state["stage"] == stage else None
        if damaged:
            raise InputError(f"{damaged[0]}; delete it to repeat the unfinished stage")
        return None

    # --- the log ---

    def log(self, **entry: object) -> None:
        """Append one line to log.jsonl."""
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None

    def read_log(self, stage: str | None = None) -> list[dict]:
        """The entries of log.jsonl: all, or those of one stage that are of no skipped step. A line
        cut by a crash is left out."""
        path = self.folder / "log.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        return [e for e in entries if stage is None or (e["stage"] == stage and "skipped" not in e)]

    def rewind_log(self, stage: str, step: int) -> None:
        """Drop what `stage` logged from `step` on, which will be written again."""
        kept = [e for e in self.read_log() if e["stage"] != stage or e["step"] < step]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_file(self.folder / "log.jsonl", lines.encode())


def read_state(path: Path) -> dict:
    """A state as `Run.save_state` wrote it. Raises InputError naming the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        raise InputError(f"{path}: damaged (its checksum differs)")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:  # whatever a foreign file makes of the parser
        state = None
    if not isinstance(state, dict) or not {"stage", "step"} <= state.keys():
        raise InputError(f"{path}: not a state of this program")
    return state


def differs(key: str, had: dict, wanted: dict) -> str:
    """What is different between two identities, in words."""
    if key == "config":
        old, new = had["config"], wanted["config"]
        old_name = old.get("name") if isinstance(old, dict) else old
        if old_name != new["name"]:
            return f"of config {old_name}, not {new['name']}"
        return f"of config {new['name']} with other numbers (an earlier version's)"
    return f"with {key} {had.get(key)}, not {wanted[key]}"
