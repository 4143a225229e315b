"""Config and tokenizers of a training run of this project."""

from dataclasses import replace
from pathlib import Path

from nanosd3.cli import command_line
from nanosd3.config_types import Config, config_from_dict
from nanosd3.errors import InputError
from nanosd3.storage.files import read_json
from nanosd3.storage.run import Run
from nanosd3.text import Tokenizers


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
    own = () if "weights" in run.identity else ("autoencoder", "clip", "t5")
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
