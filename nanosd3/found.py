"""What a file or folder of weights holds: which parts, whose, and under which names.

`find` opens a single-file checkpoint, a diffusers folder, a folder of a run or one exported from
here, reads names and shapes and little else, and gives the parts under our names with the config
they amount to. What is not Stable Diffusion 3 is called by its name, if that is known.

Whether the parts are whole is the matter of audit.py.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanosd3 import states
from nanosd3.checkpoint import Run, read_json
from nanosd3.config import Config, config_from_dict
from nanosd3.layers import HEAD_DIM
from nanosd3.layouts import COMPONENTS, FOLDERS, PREFIXES, from_diffusers
from nanosd3.mmdit import MMDiT
from nanosd3.parts import State, stored
from nanosd3.pipeline import finished_config, read_tokenizers
from nanosd3.runtime import InputError
from nanosd3.sizes import config_of, file_of, refuse_foreign, refuse_scaled
from nanosd3.text import ENCODERS, Tokenizers
from nanosd3.weightfiles import open_folder, open_weights, read_metadata

OWN = "nanosd3.json"  # config and tokenizers, beside or inside what is exported from here
KNOWN_EXTRAS = r"(.*\.)?(position_ids|logit_scale|shared\.weight|loss\..*|model_ema\..*)"


@dataclass(frozen=True)
class Found:
    """What PATH holds, before any of it is read: our names, the config, and how it was told."""

    path: Path
    config: Config
    parts: dict[str, State]
    tokenizers: Tokenizers
    told: str
    outside: list[str]  # names in a single file that belong to no part


def find(path: Path, files: dict[str, Path] | None = None) -> Found:
    """Open PATH and, instead of the parts in it or beside them, `files` (clip_l, clip_g, t5, vae).

    Reads names, shapes and little else. Raises InputError if this is no Stable Diffusion 3.
    """
    files = {name: Path(file) for name, file in (files or {}).items() if file is not None}
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    own, outside = None, []
    if (path / "run.json").exists():
        if files:
            raise InputError(f"{path}: is a run, which has all its parts; name no files beside it")
        return find_run(path)
    if path.is_dir():
        parts = open_diffusers(path, list(files))
        own = read_json(path / OWN) if (path / OWN).exists() else None
    else:
        parts, outside = open_single(path)
        own = parse_own(read_metadata(path).get("nanosd3"), path)
    for name, file in files.items():
        parts[name] = open_part(name, file)
    for name in ("mmdit", "vae"):
        if name not in parts:
            what, flag = ("transformer", "") if name == "mmdit" else ("autoencoder", " (--vae)")
            raise InputError(f"{path}: holds no {what}{flag}; it has {', '.join(parts) or 'none'} "
                             "of SD3's parts")  # fmt: skip
    for part in parts.values():
        refuse_scaled(list(part), file_of(part))
    if "t5" in parts:
        parts["t5"] = settle_t5(parts["t5"])
    if own is not None:
        config, tokenizers = own_config(own, path)
        told = "as exported by nanosd3"
        absent = [name for name in COMPONENTS if name not in parts]
        if absent and tokenizers.words:
            raise InputError(f"{path}: holds no {', '.join(absent)}, without which a model trained "
                             "here cannot be used")  # fmt: skip
    else:
        config, told = config_of(parts, path)
        if path.is_dir():
            config = as_folder_says(config, path, parts)
        tokenizers = Tokenizers.official()
    return Found(path, config, parts, tokenizers, told, outside)


def open_single(path: Path) -> tuple[dict[str, State], list[str]]:
    """The parts of a single file, by the prefixes of their names, and the names without one."""
    state = open_weights(path)
    sign = "joint_blocks.0.x_block.attn.qkv.weight"
    if sign in state:  # a transformer alone
        return {"mmdit": state}, []
    parts: dict[str, State] = {}
    outside = []
    for name, tensor in state.items():
        part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if part:
            parts.setdefault(part, {})[name.removeprefix(PREFIXES[part])] = tensor
        elif not is_known_extra(name):
            outside.append(name)
    if sign not in parts.get("mmdit", {}):
        if "transformer_blocks.0.attn.to_q.weight" in state:
            raise InputError(f"{path}: is one part of a diffusers folder; name the folder that "
                             "holds transformer/, vae/ and the others")  # fmt: skip
        refuse_foreign(list(state), path)
        raise InputError(f"{path}: holds no transformer of Stable Diffusion 3 (none of its "
                         f"{len(state)} tensors is named like one; the first is "
                         f"{next(iter(state), 'missing')})")  # fmt: skip
    return parts, outside


def is_known_extra(name: str) -> bool:
    """Whether other programs, but no model of ours, have a tensor of this name."""
    return re.fullmatch(KNOWN_EXTRAS, name) is not None


def open_diffusers(folder: Path, replaced: Collection[str]) -> dict[str, State]:
    """The parts of a diffusers folder, under our names, but for those `replaced` by files.

    A text encoder whose subfolder holds no weights is absent, as one without a subfolder.
    """
    if (folder / "unet").is_dir():
        kind = "SDXL" if (folder / "text_encoder_2").is_dir() else "Stable Diffusion 1 or 2"
        raise InputError(f"{folder}: this is {kind}, not Stable Diffusion 3")
    if not (folder / "transformer").is_dir():
        raise InputError(f"{folder}: holds no transformer/ (a diffusers folder) and no run.json "
                         "(a run of this program)")  # fmt: skip
    parts = {}
    for name, (subfolder, stem) in FOLDERS.items():
        if name in replaced or not (folder / subfolder).is_dir():
            continue
        if state := open_folder(folder / subfolder, stem):
            refuse_foreign(list(state), folder / subfolder)
            parts[name] = from_diffusers(name, state)
        elif name in ("mmdit", "vae"):
            raise InputError(f"{folder / subfolder}: holds no {stem}.safetensors, nor an index of "
                             "its shards")  # fmt: skip
    return parts


def open_part(name: str, file: Path) -> State:
    """One part in a file of its own, in either layout."""
    state = open_weights(file)
    refuse_foreign(list(state), file)
    prefix = PREFIXES[name]
    if any(key.startswith(prefix) for key in state):
        state = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    if name == "vae" and any(key.startswith("decoder.up_blocks.") for key in state):
        state = from_diffusers(name, state)
    sign = {"vae": "decoder.conv_in.weight", "t5": "encoder.final_layer_norm.weight"}
    if sign.get(name, "text_model.final_layer_norm.weight") not in state:
        raise InputError(f"{file}: is no {name} (its first tensor is {next(iter(state), 'none')})")
    return state


def find_run(folder: Path) -> Found:
    """A run of this program, with another model's encoders if it was trained on those. If its
    transformer is still being trained, the averages of the newest state."""
    run = Run.read(folder)
    averages = None if "flow" in run.stages else states.averages(folder, "flow")
    config = finished_config(run, unfinished=averages is not None)
    if averages is None:
        mmdit = open_weights(folder / "flow.safetensors")
    else:
        averages |= dict(MMDiT(config.mmdit).named_buffers())
        mmdit = {name: stored(name, tensor, folder) for name, tensor in averages.items()}
    if "weights" in run.identity:
        try:
            base = find(Path(run.identity["weights"]))
        except InputError as error:
            raise InputError(f"{folder}: was trained on the encoders of {error}") from None
        parts = base.parts | {"mmdit": mmdit}
        return replace(base, path=folder, config=config, parts=parts, told="a run of this program")
    text = open_weights(folder / "text.safetensors")
    parts = {"mmdit": mmdit, "vae": open_weights(folder / "autoencoder.safetensors")}
    for name in ENCODERS:
        own = {k: t for k, t in text.items() if k.startswith(f"{name}.")}
        parts[name] = {k.removeprefix(f"{name}."): t for k, t in own.items()}
    tokenizers = read_tokenizers(folder / "tokenizers.json")
    return Found(folder, config, parts, tokenizers, "a run of this program", [])


def find_transformer(path: Path) -> State:
    """The transformer in a file, a diffusers folder or a run, whatever else is there or not."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / "run.json").exists():
        return find_run(path).parts["mmdit"]
    others = [name for name in COMPONENTS if name != "mmdit"]
    parts = open_diffusers(path, others) if path.is_dir() else open_single(path)[0]
    return parts["mmdit"]


def settle_t5(state: State) -> State:
    """The embedding may be stored under either of two names, or both."""
    if "encoder.embed_tokens.weight" not in state and "shared.weight" in state:
        return state | {"encoder.embed_tokens.weight": state["shared.weight"]}
    return state


def as_folder_says(config: Config, folder: Path, parts: dict[str, State]) -> Config:
    """What a diffusers folder's own configs and weights change of the released models' values.

    CLIP-L's pooled vector is used unprojected in SD3. Single files may hold OpenAI's matrix all
    the same, which nobody reads; diffusers always multiplies, by the identity or whatever else
    the folder has. Raises InputError, naming the file, for what no model here does.
    """

    def said(name: str, key: str, otherwise: float, kind: type = float) -> float:
        path = folder / name
        value = read_json(path).get(key, otherwise) if path.is_file() else otherwise
        if type(value) not in (int, kind) or not value > 0:
            raise InputError(f"{path}: {key} should be a number above 0, got {value!r}")
        return kind(value)

    if (heads := said("transformer/config.json", "attention_head_dim", HEAD_DIM, int)) != HEAD_DIM:
        raise InputError(f"{folder}: attention heads of {heads}, SD3's have {HEAD_DIM}")
    groups = said("vae/config.json", "norm_num_groups", config.vae.norm_groups, int)
    if any(width % groups for width in config.vae.channels):
        raise InputError(f"{folder / 'vae/config.json'}: norm_num_groups {groups} does not divide "
                         f"the widths {config.vae.channels}")  # fmt: skip
    projection = False
    if "text_projection.weight" in parts.get("clip_l", {}):
        matrix = parts["clip_l"]["text_projection.weight"].read().float()
        projection = matrix.shape[0] != matrix.shape[1] or not matrix.equal(torch.eye(len(matrix)))
    shift = said("scheduler/scheduler_config.json", "shift", config.sampling.shift)
    return replace(
        config,
        text=replace(config.text, clip_l=replace(config.text.clip_l, projection=projection)),
        vae=replace(
            config.vae,
            norm_groups=groups,
            shift=said("vae/config.json", "shift_factor", config.vae.shift),
            scale=said("vae/config.json", "scaling_factor", config.vae.scale),
        ),
        sampling=replace(config.sampling, shift=shift),
    )


def parse_own(text: str | None, path: Path) -> dict | None:
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: its own description is damaged ({error})") from None


def own_config(content: dict, path: Path) -> tuple[Config, Tokenizers]:
    """What `export` wrote down of a model trained here."""
    try:
        config = config_from_dict(content["config"], path)
        tokenizers = content["tokenizers"]
        if tokenizers is None:
            return config, Tokenizers.official()
        return config, Tokenizers.from_json(tokenizers)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its own description is damaged ({error})") from None
