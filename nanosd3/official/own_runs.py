"""A training run of this project: its config, tokenizers and weights."""

from dataclasses import replace
from pathlib import Path, PureWindowsPath

from nanosd3.cli import command_line
from nanosd3.components import on_meta
from nanosd3.config_types import Config, config_from_dict
from nanosd3.errors import InputError
from nanosd3.mmdit import MMDiT
from nanosd3.official.tensor_files import open_weights
from nanosd3.official.tensors import State, in_memory
from nanosd3.storage import training_state
from nanosd3.storage.files import check_state, read_json
from nanosd3.storage.run import WEIGHTS, Run
from nanosd3.text import ENCODERS, Tokenizers


def read_tokenizers(path: Path) -> Tokenizers:
    """Read tokenizers.json. Raises InputError if it is damaged."""
    try:
        return Tokenizers.from_json(read_json(path))
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def finished_config(run: Run, allow_unfinished_flow: bool = False) -> Config:
    """The run's config, with the measured shift and scale of its latents.

    Raises InputError if a stage is not finished; `allow_unfinished_flow` exempts the last one.
    """
    config = config_from_dict(run.identity["config"], run.folder / "run.json")
    own = () if WEIGHTS in run.identity else ("autoencoder", "clip", "t5")
    for stage in own if allow_unfinished_flow else (*own, "flow"):
        if stage not in run.stages:
            options = ("--config", config.name, "--out", run.folder)
            raise InputError(
                f"{run.folder}: unfinished (no {stage} yet); rerun "
                f"`{command_line('python', 'train_mnist.py', *options)} ...` to resume"
            )
    if not own:
        return config
    try:
        measured = run.stages["autoencoder"]
        vae = replace(config.vae, shift=measured["shift"], scale=measured["scale"])
    except (KeyError, TypeError):
        raise InputError(f"{run.folder / 'run.json'}: damaged: no shift and scale") from None
    return replace(config, vae=vae)


def open_run_transformer(run: Run) -> tuple[Config, State]:
    """The config of a run and its transformer: while that is still being trained, the moving
    averages of the newest state."""
    folder = run.folder
    averages = None if "flow" in run.stages else training_state.averages(folder, "flow")
    config = finished_config(run, allow_unfinished_flow=averages is not None)
    if averages is None:
        return config, open_run_weights(folder / "flow.safetensors", config, {"mmdit": ""})
    averages |= dict(MMDiT(config.mmdit).named_buffers())
    return config, {name: in_memory(name, tensor, folder) for name, tensor in averages.items()}


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
    state = open_weights(path)
    expected = {
        prefix + key: tensor
        for name, prefix in prefixes.items()
        for key, tensor in on_meta(config, name).state_dict().items()
    }
    check_state(path, expected, state)
    return state


def uses_other_encoders(folder: Path) -> bool:
    """Whether a folder is a run that was trained on the encoders of another model."""
    return (folder / "run.json").exists() and WEIGHTS in Run.read(folder).identity


def base_places(run: Run) -> list[Path]:
    """Where to look for the model whose encoders a run was trained on: where it was then, beside
    the run, in the run. It may have come from a machine with other separators."""
    stored = run.identity[WEIGHTS]
    name = PureWindowsPath(stored).name if "\\" in stored else Path(stored).name
    return list(dict.fromkeys([Path(stored), run.folder.parent / name, run.folder / name]))
