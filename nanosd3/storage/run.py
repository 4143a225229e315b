"""The folder of a training run.

    run.json                identity (config, data, seed) and the finished stages
    data.json               names and checksums of the data, to say what has changed
    *.safetensors           weights of the finished stages
    tokenizers.json         the vocabularies trained for this run
    state-STEP/             the last two saved states of the unfinished stage, see training_state.py
    cache/                  encoded images and captions, see training/cached_features.py
    log.jsonl               one JSON object per line: stage, step, loss, ...
    speed.jsonl             throughput and memory
    turbo/                  the model distilled to one step, a run folder of its own

and, once the run is finished, its images and metrics.json.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

from nanosd3.errors import InputError, listed
from nanosd3.storage.files import (
    parse_json,
    read_json,
    read_regular,
    remove,
    write_file,
    write_json,
)

WEIGHT_FILES = (
    *("judge", "autoencoder", "clip", "t5", "text", "flow"),
    *("decoder", "dit", "hdit", "tokens", "muse", "video"),  # of related systems
)
RUN_FILES = (  # everything a run writes, except run.json and cache/, whose entries name their data
    *(f"{name}.safetensors" for name in WEIGHT_FILES),
    *("samples.png", "trajectory.gif", "loss.png", "samplers.png", "preview-*.png"),
    *("tokenizers.json", "metrics.json", "log.jsonl", "speed.jsonl", "state-*", "data.json"),
    *("turbo", "turbo.png"),
)
WEIGHTS = "weights"  # in the identity: a path, which says where they are, not what they are


class Contents(TypedDict):
    """What a data set is made of."""

    columns: list[str]  # what each checksum covers
    rows: dict[str, list[str]]  # by name, such as a file's: a checksum for each column


class Run:
    """A run folder: its identity, its finished stages and its log."""

    def __init__(self, folder: Path, identity: dict, stages: dict):
        self.folder, self.identity, self.stages = folder, identity, stages

    @classmethod
    def open(
        cls, folder: Path, identity: dict, fresh: bool = False, contents: Contents | None = None
    ) -> "Run":
        """Start a run in an empty or new folder, or resume the run with the same identity in it.

        With `fresh`, delete the run in the folder first. Raises InputError if the folder holds
        anything else, or a run with another identity; if only the data differ and their `contents`
        are given, the message says how.
        """
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; choose another folder with --out")
        identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
        index = folder / "run.json"
        if index.exists() and fresh:
            run = cls.read(folder)  # raises unless the folder is recognisably a run
            with run.alone():
                run.stages = {}
                run.write()
                run.delete(RUN_FILES)
                run.identity = identity
                run.write()
            return run
        if index.exists():
            run = cls.read(folder)
            if reason := difference(run.identity, identity):
                if reason == OTHER_DATA and contents:
                    reason += run.changes(contents)
                raise InputError(
                    f"{folder}: holds a run {reason}; choose another folder "
                    "with --out, or start over with --fresh"
                )
            return run
        # Killed processes and file managers leave hidden entries.
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(
                f"{folder}: is not empty and has no run.json, so it is not a run folder; "
                "choose another folder with --out"
            )
        run = cls(folder, identity, {})
        run.write()
        return run

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Open an existing run. Raises InputError if there is none or its run.json is damaged."""
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such run folder; `python train_mnist.py` creates runs/mnist"
            )
        if not (folder / "run.json").exists():
            raise InputError(f"{folder}: has no run.json, so it is not a run folder")
        content = read_json(folder / "run.json")
        stages = content.pop("stages", None)
        if not isinstance(stages, dict) or "config" not in content:
            raise InputError(f"{folder / 'run.json'}: damaged: no config or stages")
        return cls(folder, content, stages)

    def remember(self, identity: dict, contents: Contents) -> None:
        """Record the current path of the run's weights and the checksums of its data."""
        stored = Run.read(self.folder)
        if stored.identity.get(WEIGHTS) != identity.get(WEIGHTS):
            self.stages, self.identity = stored.stages, stored.identity | identity
            self.write()
        if not (self.folder / "data.json").exists():
            write_json(self.folder / "data.json", {**contents})

    def changes(self, now: Contents) -> str:
        """How data differ from those of this run, in words: what was added, removed, changed."""
        if not (self.folder / "data.json").exists():  # a run from an earlier version
            return ""
        before = read_json(self.folder / "data.json")["rows"]
        both = [name for name in now["rows"] if name in before]
        found = {
            "added": [name for name in now["rows"] if name not in before],
            "missing": [name for name in before if name not in now["rows"]],
        }
        for i, column in enumerate(now["columns"]):
            changed = [name for name in both if before[name][i] != now["rows"][name][i]]
            found[f"with other {column}"] = changed
        words = [f"{len(names):,} {how} ({listed(names)})" for how, names in found.items() if names]
        return f": {', '.join(words)}"

    def delete(self, patterns: Iterable[str]) -> None:
        """Delete the files and folders that match these glob patterns."""
        for path in (path for pattern in patterns for path in self.folder.glob(pattern)):
            remove(path)

    def write(self) -> None:
        """Write run.json."""
        write_json(self.folder / "run.json", {**self.identity, "stages": self.stages})

    def finish(self, stage: str, results: dict) -> None:
        """Mark a stage as finished, with its measurements."""
        self.stages[stage] = results
        self.write()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder against other training processes while open, and delete the partial
        files of killed ones.

        Raises InputError if another process holds the lock; the operating system releases it when
        that process ends. Where there are no locks, on Windows and some file systems, it warns.
        """
        warning = (
            f"{self.folder}: cannot be locked on this system; do not train in it twice at once"
        )
        try:
            import fcntl
        except ImportError:  # Windows
            print(warning)
            yield
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise InputError(
                f"{self.folder}: another process is training in this folder; wait for it, or "
                "choose another folder with --out"
            ) from None
        except OSError:  # a file system without locks
            print(warning)
        try:
            self.delete(f".{name}.*tmp" for name in ("run.json", *RUN_FILES))
            yield
        finally:
            os.close(folder)

    # --- log ---

    def log(self, file: str = "log.jsonl", **entry: object) -> None:
        """Append one line to log.jsonl, or to another JSON Lines file."""
        path = self.folder / file
        try:
            with open(path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None

    def read_log(self, stage: str | None = None) -> list[dict]:
        """All entries of log.jsonl, or the training steps of one stage, without skipped ones.

        A line truncated by a crash is ignored, and so is any other that `log` did not write.
        """
        path = self.folder / "log.jsonl"
        entries: list[dict] = []
        for line in read_regular(path).splitlines() if path.exists() else ():
            with contextlib.suppress(InputError):
                entry = parse_json(line, path)
                entries += [entry] if isinstance(entry, dict) and "stage" in entry else []
        return [e for e in entries if stage is None or (e["stage"] == stage and "loss" in e)]

    def rewind_log(self, stage: str, step: int) -> None:
        """Drop the entries of `stage` from `step` on, which will be logged again."""
        kept = [e for e in self.read_log() if e["stage"] != stage or e["step"] < step]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_file(self.folder / "log.jsonl", lines.encode())


OTHER_DATA = "with different data"
FINGERPRINTS = {
    "data": OTHER_DATA,
    "encoders": "with other encoders than those of --weights",
    "finished": "made from a finished run other than that of --run",
    "init": "started from a transformer other than that of --init",
}


def difference(old: dict, new: dict) -> str | None:
    """The first difference between two identities, in words; None if they are equal."""
    before, after = flatten(old), flatten(new)
    if before.get("config.name") != after["config.name"]:
        return f"of config {before.get('config.name')}, not {after['config.name']}"
    keys = sorted({**before, **after}, key=lambda key: key.startswith("config."))  # config last
    for key in keys:
        if key not in before or key not in after:
            return f"with{'out' if key in after else ''} {key}"
        if before[key] != after[key] and key != WEIGHTS:
            if key in FINGERPRINTS:
                return FINGERPRINTS[key]
            return f"with {key} {before[key]}, not {after[key]}"
    return None


def flatten(content: dict, prefix: str = "") -> dict[str, object]:
    """The leaves of nested dictionaries, by dotted path."""
    leaves: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
