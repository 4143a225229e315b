"""Find the components in a file or folder of weights, whatever their key prefixes.

Official single files have PREFIXES. Other programs use different ones or none, and training
wrappers insert fields of their own into every name. A component is found by its marker, a name that
only it has; what precedes the marker is the prefix. With two candidates, or none, the error says
which names were found.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from nanosd3.errors import InputError, options_of
from nanosd3.official.detect import UNET, refuse_foreign
from nanosd3.official.folders import first_few, open_file, open_folder, weight_like_files
from nanosd3.official.key_names import FOLDERS, PREFIXES, from_diffusers, is_known_extra
from nanosd3.official.tensors import State
from nanosd3.text import ENCODERS

# Fields put into names by torch.compile, DistributedDataParallel, FSDP and activation
# checkpointing; and the usual key of a nested checkpoint.
WRAPPERS = frozenset(
    "_orig_mod module _fsdp_wrapped_module _checkpoint_wrapped_module state_dict".split()
)

# A tensor of each component, under our name and those of other programs.
CLIP_MARKERS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
MARKERS = {
    "mmdit": (
        "joint_blocks.0.x_block.attn.qkv.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    ),
    "vae": ("decoder.conv_in.weight",),
    "clip_l": CLIP_MARKERS,
    "clip_g": CLIP_MARKERS,
    "t5": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
}

# The field in front of a text encoder's names that some programs omit, and what comes after it.
CLIP_ROOT = ("text_model.", ("embeddings.", "encoder.", "final_layer_norm."))
ROOTS = {
    "clip_l": CLIP_ROOT,
    "clip_g": CLIP_ROOT,
    "t5": ("encoder.", ("embed_tokens.", "block.", "final_layer_norm.")),
}

# Both CLIPs have the same names; these fields of a prefix tell which it is.
CLIP_FIELDS = {"clip_l": {"clip_l", "text_encoder"}, "clip_g": {"clip_g", "text_encoder_2"}}

# What belongs to a text encoder, even where it is not understood.
ENCODER_NAMES = r"(^|[._])(text_(encoders?|model)|t5|t5xxl|clip(_[lg])?|cond_stage_model)[._]"

DIFFUSERS_NAMES = ("transformer_blocks.", "decoder.up_blocks.")


def open_single(path: Path) -> tuple[dict[str, State], list[str]]:
    """The components of a single file, and the names of tensors that belong to none."""
    state = unwrapped(open_file(path), path)
    prefixes: dict[str, str] = {}  # prefix: component
    for name in PREFIXES:
        found = prefixes_of(name, state)
        if name in CLIP_FIELDS:
            found = [prefix for prefix in found if which_clip(prefix) == name]
        if found:
            prefixes[only(name, found, path)] = name
    found_parts: dict[str, State] = {}
    unassigned = []
    for key, tensor in state.items():
        prefix = max((p for p in prefixes if key.startswith(p)), key=len, default=None)
        if prefix is not None:
            found_parts.setdefault(prefixes[prefix], {})[key.removeprefix(prefix)] = tensor
        elif not is_known_extra(key):
            unassigned.append(key)
    mmdit = found_parts.get("mmdit", {})
    if not any(key.startswith("joint_blocks.") for key in mmdit):
        refuse_foreign(list(state), path)
        if any(key.startswith("transformer_blocks.") for key in mmdit):
            raise InputError(
                f"{path}: is one component of a diffusers folder; name the folder that holds "
                "transformer/ and vae/"
            )
        raise InputError(f"{path}: holds no Stable Diffusion 3 transformer; found {outline(state)}")
    return {name: in_our_names(name, part) for name, part in found_parts.items()}, unassigned


def open_component(name: str, path: Path) -> State:
    """A component in a file or folder of its own, or in a diffusers folder, in either layout."""
    if not path.is_dir():
        state = open_file(path)
    else:
        subfolder, stem = FOLDERS[name]
        path = path / subfolder if (path / subfolder).is_dir() else path
        state = open_folder(path, stem)
        if not state:
            raise InputError(f"{path}: holds no weights; expected {stem}.safetensors")
    return only_component(name, state, path)


def only_component(name: str, state: State, path: Path) -> State:
    """The component in a file or folder that holds it alone, or one of each kind."""
    refuse_foreign(list(state), path)
    state = unwrapped(state, path)
    found = prefixes_of(name, state)
    if name in CLIP_FIELDS:
        found = [prefix for prefix in found if which_clip(prefix) in (name, None)]
    if not found:
        raise InputError(
            f"{path}: is not a {name} (it has no tensor {MARKERS[name][0]}); found {outline(state)}"
        )
    prefix = only(name, found, path)
    part = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    return in_our_names(name, part)


def open_diffusers(folder: Path, skip: Collection[str]) -> dict[str, State]:
    """The components of a diffusers folder under our key names, except those in `skip`.

    A text encoder whose subfolder is missing or holds no weights is absent.
    """
    if (folder / "unet").is_dir():
        model = "SDXL, not Stable Diffusion 3" if (folder / "text_encoder_2").is_dir() else UNET
        raise InputError(f"{folder}: this is {model}")
    if not (folder / "transformer").is_dir():
        names = sorted(path.name for path in folder.iterdir())
        found = f"; found {first_few(names)}" if names else ""
        raise InputError(
            f"{folder}: holds no transformer/ (diffusers) and no run.json (a run){found}"
        )
    parts = {}
    for name, (subfolder, stem) in FOLDERS.items():
        place = folder / subfolder
        if name in skip or not os.path.lexists(place):
            continue
        if not place.is_dir():
            raise InputError(f"{place}: is a file or a broken link; expected a folder")
        if state := open_folder(place, stem):
            parts[name] = only_component(name, state, place)
        elif name in ("mmdit", "vae"):
            raise InputError(f"{place}: holds no {stem}.safetensors and no index")
    refuse_misplaced_encoders(folder, [name for name in ENCODERS if name not in (*parts, *skip)])
    return parts


def refuse_misplaced_encoders(folder: Path, absent: Collection[str]) -> None:
    """Raise InputError if weights elsewhere in a diffusers folder may be an absent text encoder."""
    files = weight_like_files(folder, "*", "*/*")
    for name in absent:
        subfolder, _ = FOLDERS[name]
        if found := [
            file
            for file in files
            if name in file.lower() or subfolder in Path(file.lower()).parts[:-1]
        ]:
            raise InputError(
                f"{folder}: has no weights in {subfolder}, but {first_few(found)}; name the file "
                f"or folder ({options_of([name])}), or move it away to go without"
            )


def unwrapped(state: State, path: Path) -> State:
    """The tensors under their names without WRAPPERS."""
    plain: State = {}
    for name, tensor in state.items():
        key = ".".join(field for field in name.split(".") if field not in WRAPPERS)
        if key in plain:
            names = f"{plain[key].name} and {tensor.name}"
            raise InputError(f"{path}: holds one tensor twice, as {names}; keep one of them")
        plain[key] = tensor
    return plain


def prefixes_of(name: str, keys: Iterable[str]) -> list[str]:
    """The key prefixes of a component's tensors: one prefix for each copy of it, or the
    official one alone."""
    found = set()
    for key in keys:
        if key.startswith(PREFIXES[name]):
            return [PREFIXES[name]]
        marker = next((m for m in MARKERS[name] if key == m or key.endswith(f".{m}")), None)
        if marker is not None:
            found.add(key.removesuffix(marker))
    return sorted(prefix for prefix in found if not prefix.endswith("decoder."))  # of a whole T5


def only(name: str, prefixes: list[str], path: Path) -> str:
    """The one prefix of a component. Raises InputError if there are several."""
    if len(prefixes) > 1:
        names = first_few(repr(prefix) for prefix in prefixes)
        raise InputError(
            f"{path}: holds {len(prefixes)} of {name}, under the prefixes {names}; save one alone"
        )
    return prefixes[0]


def which_clip(prefix: str) -> str | None:
    """Which CLIP has this prefix; None if it does not say."""
    fields = set(prefix.split("."))
    return next((name for name, words in CLIP_FIELDS.items() if words & fields), None)


def in_our_names(name: str, state: State) -> State:
    """A component under our key names, from any layout."""
    if any(key.startswith(DIFFUSERS_NAMES) for key in state):
        state = from_diffusers(name, state)
    root, inside = ROOTS.get(name, ("", ()))
    return {root + key if key.startswith(inside) else key: t for key, t in state.items()}


def refuse_unclear_encoders(absent: Collection[str], names: Iterable[str], path: Path) -> None:
    """Raise InputError if one of these tensors may belong to a text encoder that was not found."""
    present = [name for name in ENCODERS if name not in absent]
    unclear = [
        name
        for name in names
        if re.search(ENCODER_NAMES, name)
        and not is_known_extra(name)
        and not any(other in name for other in present)
    ]
    if absent and unclear:
        raise InputError(
            f"{path}: holds no {first_few(absent)} under known names; found {outline(unclear)}; "
            f"name a file for it ({options_of(absent)})"
        )


def outline(names: Iterable[str]) -> str:
    """The beginnings of tensor names for a message, the most frequent first."""
    groups = Counter(".".join(name.split(".")[:2])[:80] for name in names)
    return first_few(f"{group} ({n})" for group, n in groups.most_common()) or "no tensors"
