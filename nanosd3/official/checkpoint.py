"""Open a checkpoint: a single file, a diffusers folder, a run, or something exported from here.

`open_checkpoint` reads names and shapes and little else. The components are found in find_parts.py,
and the config is derived from their shapes.

Whether every tensor is there is checked in missing_keys.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanosd3.arguments import path_of
from nanosd3.components import COMPONENTS
from nanosd3.config_types import Config
from nanosd3.errors import InputError, options_of
from nanosd3.official import own_runs
from nanosd3.official.detect import config_of, file_of, refuse_scaled
from nanosd3.official.find_parts import (
    open_component,
    open_diffusers,
    open_single,
    outline,
    refuse_unclear_encoders,
)
from nanosd3.official.folder_settings import with_folder_settings
from nanosd3.official.key_names import T5_EMBEDDING, T5_SHARED
from nanosd3.official.tensor_files import read_file_metadata
from nanosd3.official.tensors import State, fingerprint, some_values
from nanosd3.storage.files import read_json
from nanosd3.storage.run import WEIGHTS, Run
from nanosd3.text import ENCODERS, Tokenizers

# Config and tokenizers of an exported model: a file in the folder, or a key in the file's header.
METADATA_FILE, METADATA_KEY = "nanosd3.json", "nanosd3"


@dataclass(frozen=True)
class Checkpoint:
    """A file or folder of weights, opened but not read: tensors under our names, and the config."""

    path: Path
    config: Config
    parts: dict[str, State]  # by component; an absent one has no entry
    tokenizers: Tokenizers
    detected_by: str  # how the model was recognised, for the user
    unassigned: list[str]  # tensors of a single file that belong to no component

    @property
    def encoders(self) -> dict[str, State]:
        """Text encoders and autoencoder."""
        return {name: state for name, state in self.parts.items() if name != "mmdit"}


def open_checkpoint(
    path: Path, files: Mapping[str, Path | None] | None = None, weights: Path | None = None
) -> Checkpoint:
    """Open a checkpoint, with components in `files` (clip_l, clip_g, t5, vae) replacing its own.
    `weights` says where to find the encoders that a run was trained on.

    Reads names, shapes and little else. Raises InputError if it is not Stable Diffusion 3.
    """
    replacements = {
        name: path_of(name, file) for name, file in (files or {}).items() if file is not None
    }
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    unassigned: list[str] = []
    if (path / "run.json").exists():
        if replacements:
            given = options_of(replacements)
            raise InputError(f"{path}: a run has all its components; omit {given}")
        return open_run(path, weights)
    if weights:
        raise InputError(f"{path}: is not a training run; omit --weights")
    if path.is_dir():
        parts = open_diffusers(path, replacements)
        index = path / METADATA_FILE
        metadata: object = read_json(index) if index.exists() else None
    else:
        parts, unassigned = open_single(path)
        metadata = own_runs.parse_metadata(read_file_metadata(path).get(METADATA_KEY), path)
    for name, file in replacements.items():
        parts[name] = open_component(name, file)
    for name, title in (("mmdit", "transformer"), ("vae", "autoencoder (name its file: --vae)")):
        if name not in parts:
            rest = f" and {outline(unassigned)}" if unassigned else ""
            raise InputError(f"{path}: holds no {title}; found {', '.join(parts)}{rest}")
    absent = [name for name in ENCODERS if name not in parts]
    refuse_unclear_encoders(absent, [*unassigned, *parts["mmdit"]], path)
    for part in parts.values():
        refuse_scaled(list(part), file_of(part))
    if "t5" in parts:
        parts["t5"] = with_t5_embedding(parts["t5"])
    if metadata is not None:
        config, tokenizers = own_runs.config_from_metadata(metadata, path)
        detected_by = "exported by nanosd3"
        absent = [name for name in COMPONENTS if name not in parts]
        if absent and tokenizers.words:
            raise InputError(
                f"{path}: holds no {', '.join(absent)}, required by its transformer; "
                f"name the file ({options_of(absent)}) or export the model again"
            )
    else:
        own_runs.refuse_own(parts, path)
        config, detected_by = config_of(parts, path)
        if path.is_dir():
            config = with_folder_settings(config, path, parts)
        tokenizers = Tokenizers.official()
    return Checkpoint(path, config, parts, tokenizers, detected_by, unassigned)


def open_run(folder: Path, weights: Path | None = None) -> Checkpoint:
    """A training run, with the encoders it was trained on; `weights` says where they are, if they
    are another model's."""
    run = Run.read(folder)
    config, mmdit = own_runs.open_run_transformer(run)
    if WEIGHTS in run.identity:
        base = open_base(run, weights)
        parts = base.parts | {"mmdit": mmdit}
        return replace(base, path=folder, config=config, parts=parts, detected_by="a training run")
    if weights:
        raise InputError(f"{folder}: has trained its own encoders; omit --weights")
    parts = {"mmdit": mmdit, **own_runs.open_run_encoders(run, config)}
    tokenizers = own_runs.read_tokenizers(folder / "tokenizers.json", config)
    return Checkpoint(folder, config, parts, tokenizers, "a training run", [])


def open_base(run: Run, weights: Path | None) -> Checkpoint:
    """The model whose encoders a run was trained on, recognised by their fingerprint: at `weights`,
    if given; otherwise where it was then, beside the run, or in it.

    Raises InputError naming the places where it was looked for.
    """
    problems = [run.identity[WEIGHTS]] if weights else []
    stored = run.identity.get("encoders")
    for path in [weights] if weights else own_runs.base_places(run):
        try:
            base = open_checkpoint(path)
            if fingerprint(base.encoders, like=stored) == stored:
                return base
            problems.append(f"{path}: holds other encoders")
        except InputError as error:
            problems.append(str(error))
    raise InputError(
        f"{run.folder}: was trained on the encoders of {'; '.join(problems)}; put the file or "
        "folder beside the run, or name it where the command has --weights PATH"
    )


def open_transformer(path: Path) -> State:
    """The transformer in a file, a diffusers folder or a run; the rest may be missing."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / "run.json").exists():
        return own_runs.open_run_transformer(Run.read(path))[1]
    others = [name for name in COMPONENTS if name != "mmdit"]
    parts = open_diffusers(path, others) if path.is_dir() else open_single(path)[0]
    return parts["mmdit"]


def with_t5_embedding(state: State) -> State:
    """T5 with its embedding under our name; files use either of two names, or both. Raises
    InputError if the two differ: other programs would read the other one."""
    ours, theirs = state.get(T5_EMBEDDING), state.get(T5_SHARED)
    if ours is None or theirs is None:
        return state if theirs is None else state | {T5_EMBEDDING: theirs}
    if ours.shape != theirs.shape or not torch.equal(some_values(ours), some_values(theirs)):
        raise InputError(
            f"{ours.file}: T5 has two embeddings, {ours.name} and {theirs.name}, which differ; "
            "remove the wrong one"
        )
    return state
