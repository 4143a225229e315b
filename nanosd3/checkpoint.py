"""Files: written whole or not at all, read without running code, and the folder of a run.

Every file is first written under a temporary name, flushed to disk and then renamed, so that a
crash or a full disk leaves the old file or none, never half of one. Weights are safetensors;
the state of an unfinished stage is a torch file, read with `weights_only=True`. Neither can
execute code when it is read.

A run folder holds
    run.json                what it is (config, data, seed) and which stages are finished
    *.safetensors           weights of the finished stages
    tokenizers.json         the vocabularies trained for it
    state.pt                the unfinished stage: step, weights, optimizer, EMA
    latents.safetensors     the encoded images, until the flow has been trained on them
    log.jsonl               one object a line: stage, step, loss, ...
and, once finished, the pictures and metrics.json.
"""

import contextlib
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
            (folder / "state.pt").unlink(missing_ok=True)
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
        (self.folder / "state.pt").unlink(missing_ok=True)

    # --- the unfinished stage ---

    def save_state(self, stage: str, state: dict) -> None:
        buffer = io.BytesIO()
        torch.save({"stage": stage, **state}, buffer)
        write_file(self.folder / "state.pt", buffer.getvalue())

    def load_state(self, stage: str) -> dict | None:
        """The state saved for `stage`, or None if there is none. Raises InputError if damaged."""
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        advice = "delete it to repeat the unfinished stage"
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever a damaged file makes of the parser
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise InputError(f"{path}: damaged or no state ({reason}); {advice}") from None
        if not isinstance(state, dict) or "stage" not in state:
            raise InputError(f"{path}: not a state of this program; {advice}")
        return state if state["stage"] == stage else None

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
        """The entries of log.jsonl, of one stage or all; a line cut by a crash is left out."""
        path = self.folder / "log.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        return [entry for entry in entries if stage in (None, entry["stage"])]

    def rewind_log(self, stage: str, step: int) -> None:
        """Drop what `stage` logged from `step` on, which will be written again."""
        kept = [e for e in self.read_log() if e["stage"] != stage or e["step"] < step]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_file(self.folder / "log.jsonl", lines.encode())


def differs(key: str, had: dict, wanted: dict) -> str:
    """What is different between two identities, in words."""
    if key == "config":
        old, new = had["config"], wanted["config"]
        old_name = old.get("name") if isinstance(old, dict) else old
        if old_name != new["name"]:
            return f"of config {old_name}, not {new['name']}"
        return f"of config {new['name']} with other numbers (an earlier version's)"
    return f"with {key} {had.get(key)}, not {wanted[key]}"
