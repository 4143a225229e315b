"""A training run of this project: config, tokenizers and weights; the metadata of its exports."""

from dataclasses import replace
from pathlib import Path, PureWindowsPath

from nanosd3.cli import command_line
from nanosd3.components import shapes
from nanosd3.config import CONFIGS
from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.official.limits import check_fields, limited_config, limited_tokenizers
from nanosd3.official.tensor_files import open_weights
from nanosd3.official.tensors import State, in_memory
from nanosd3.patchify import sincos_positions
from nanosd3.storage import training_state
from nanosd3.storage.files import check_state, parse_json, read_json
from nanosd3.storage.run import WEIGHTS, Run
from nanosd3.text import ENCODERS, Tokenizers


def read_tokenizers(path: Path, config: Config) -> Tokenizers:
    """Read tokenizers.json. Raises InputError if it is damaged, or does not fit the config."""
    return limited_tokenizers(read_json(path), config, path)


def finished_config(run: Run, allow_unfinished_flow: bool = False) -> Config:
    """The run's config, with the measured shift and scale of its latents.

    Raises InputError if a stage is not finished; `allow_unfinished_flow` exempts the last one.
    """
    index = run.folder / "run.json"
    config = limited_config(run.identity["config"], index)
    own = () if WEIGHTS in run.identity else ("autoencoder", "clip", "t5")
    for stage in own if allow_unfinished_flow else (*own, "flow"):
        if stage not in run.stages:
            words: tuple = ("train_mnist.py", "--config", config.name)
            if system := run.identity.get("system"):
                if "samples" in run.stages:
                    raise InputError(
                        f"{run.folder}: is a finished run of `python -m nanosd3.related {system}`, "
                        "which cannot be opened as a model; see its samples.png"
                    )
                words = ("-m", "nanosd3.related", system)
            command = command_line("python", *words, "--out", run.folder)
            raise InputError(
                f"{run.folder}: unfinished (no {stage} yet); rerun `{command} ...` to resume"
            )
    if not own:
        return config
    measured = run.stages["autoencoder"]
    measured = measured if isinstance(measured, dict) else {}
    shift, scale = measured.get("shift"), measured.get("scale")
    if not (isinstance(shift, float) and isinstance(scale, float)):
        raise InputError(f"{index}: damaged: no shift and scale")
    vae = replace(config.vae, shift=shift, scale=scale)
    check_fields(vae, "stages.autoencoder", index)
    return replace(config, vae=vae)


def open_run_transformer(run: Run) -> tuple[Config, State]:
    """The config of a run and its transformer: while that is still being trained, the moving
    averages of the newest state."""
    folder = run.folder
    averages = None if "flow" in run.stages else training_state.averages(folder, "flow")
    config = finished_config(run, allow_unfinished_flow=averages is not None)
    if averages is None:
        return config, open_run_weights(folder / "flow.safetensors", config, {"mmdit": ""})
    width, grid = config.mmdit.width, config.mmdit.grid
    positions = sincos_positions(width, grid, config.mmdit.grid_sample, config.mmdit.grid_span)
    averages["pos_embed"] = positions  # a buffer, which no state holds
    return config, {
        name: replace(in_memory(name, tensor, folder), read=tensor.clone)  # a copy for each network
        for name, tensor in averages.items()
    }


def open_run_encoders(run: Run, config: Config) -> dict[str, State]:
    """The autoencoder and the text encoders that a run has trained."""
    vae = open_run_weights(run.folder / "autoencoder.safetensors", config, {"vae": ""})
    prefixes = {name: f"{name}." for name in ENCODERS}
    text = open_run_weights(run.folder / "text.safetensors", config, prefixes)
    parts = {"vae": vae}
    for name, prefix in prefixes.items():
        parts[name] = {k.removeprefix(prefix): t for k, t in text.items() if k.startswith(prefix)}
    return parts


def open_run_weights(path: Path, config: Config, prefixes: dict[str, str]) -> State:
    """A file of a run, which holds exactly the tensors of some networks, each under its prefix.

    Raises InputError naming the first tensor that is missing, unexpected or misshapen.
    """
    state = open_weights(path, pickles=False)
    expected = {
        prefix + key: shape
        for name, prefix in prefixes.items()
        for key, shape in shapes(config, name).items()
    }
    check_state(path, expected, state)
    return state


def uses_other_encoders(folder: Path) -> bool:
    """Whether a folder is a run that was trained on the encoders of another model."""
    return (folder / "run.json").exists() and WEIGHTS in Run.read(folder).identity


def base_places(run: Run) -> list[Path]:
    """Where to look for the model whose encoders a run was trained on: where it was then, beside
    the run, in the run, and for a run inside another (turbo) beside that one. The stored path may
    be from a machine with other separators."""
    stored = run.identity[WEIGHTS]
    name = PureWindowsPath(stored).name if "\\" in stored else Path(stored).name
    around = (run.folder.parent, run.folder, run.folder.resolve().parent.parent)
    return list(dict.fromkeys([Path(stored), *(folder / name for folder in around)]))


def parse_metadata(text: str | None, path: Path) -> object:
    """The metadata that `export` writes into a single file's header; None if there is none."""
    return None if text is None else parse_json(text, f"{path}: its nanosd3 metadata is damaged")


def config_from_metadata(content: object, path: Path) -> tuple[Config, Tokenizers]:
    """The config and tokenizers that `export` wrote with a model."""
    if not isinstance(content, dict) or "config" not in content:
        raise InputError(f"{path}: its nanosd3 metadata is damaged (no config)")
    config = limited_config(content["config"], path)
    if "tokenizers" not in content:
        raise InputError(f"{path}: its nanosd3 metadata is damaged (no tokenizers)")
    if content["tokenizers"] is None:
        return config, Tokenizers.official()
    return config, limited_tokenizers(content["tokenizers"], config, path)


def refuse_own(parts: dict[str, State], path: Path) -> None:
    """Raise InputError if the text encoders have the vocabulary of a model trained here: another
    program has saved that model, and left out what shapes do not tell."""
    clip = parts.get("clip_l") or parts.get("clip_g") or {}
    tables = (f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
    found = tuple(clip[name].shape[0] for name in tables if name in clip and clip[name].shape)
    for config in CONFIGS.values():
        if config.training and found == (config.text.clip_l.vocab, config.text.clip_l.length):
            raise InputError(
                f"{path}: has the vocabulary of a model trained with nanosd3, but its config and "
                "tokenizers are missing: copy nanosd3.json from the folder that nanosd3 exported, "
                "or use the file it exported"
            )
