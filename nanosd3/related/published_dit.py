"""Published DiTs: the authors' checkpoints, and the folders that diffusers converts them to.

A checkpoint (`DiT-XL-2-256x256.pt`) is a dictionary of tensors under our own names. It is parsed,
not unpickled. The folder of a DiTTransformer2DModel has other names, separate queries, keys and
values, and a copy of the time and class embedders in every block; the copies are compared, and one
is kept. Loading is strict, and the position table, where a file has one, must be the fixed one.

Diffusers differs from the released code in two ways: its time frequencies are 10000^(-k/127), not
10000^(-k/128), and its norm before the MLP has epsilon 1e-5, not 1e-6. The weights were trained
with the released code's values, so a folder's weights are run with those.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nanosd3.errors import InputError, listed
from nanosd3.official.folder_settings import check_fixed, read_setting
from nanosd3.official.folders import open_folder
from nanosd3.official.limits import check_fields
from nanosd3.official.tensor_files import open_weights
from nanosd3.official.tensors import State, StoredTensor, fill, in_memory, stack_rows
from nanosd3.patchify import sincos_positions
from nanosd3.related.dit import SIZES, DiT, DiTConfig

OUTSIDE = {  # our layers' names in diffusers
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_EVERY_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
IN_ITS_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
FIXED_IN_DIT = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
}
LARGEST_LATENTS = 1024  # side of the latents
FileNames = Callable[[str, int], list[str]]  # for our name of a tensor, and the network's depth


def open_dit(
    path: Path,
    config: DiTConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiT:
    """The DiT in a file, or in a diffusers folder (of the network or of the whole pipeline).

    Without a `config` its sizes are read from the tensors; but a file does not say how many heads
    there are, so it must be of a published size. Raises InputError for anything missing, unknown,
    misshapen or not finite.
    """
    file_names: FileNames = diffusers_names if path.is_dir() else own_names
    state, settings = open_dit_folder(path) if path.is_dir() else (open_weights(path), None)
    if config is None:
        config = detect_dit(state, file_names, settings, path)
    elif settings and dit_settings(settings) != (config.heads, config.latent_size):
        heads, size = dit_settings(settings)
        raise InputError(f"{settings}: {heads} heads and latents of {size} are not the config's")
    with torch.device("meta"):
        model = DiT(config)
    grid = config.latent_size // config.patch_size
    positions = sincos_positions(config.width, grid, grid, grid)
    found = matched(state, model, file_names, path)
    if "pos_embed" in found:
        check_positions(found["pos_embed"], positions)
    found["pos_embed"] = in_memory("pos_embed", positions.to(device), path)
    fill(model, found, torch.device(device), dtype)
    return model


# --- names ----------------------------------------------------------------------------------------


def own_names(key: str, depth: int) -> list[str]:
    return [key]


def diffusers_names(key: str, depth: int) -> list[str]:
    """Diffusers' names of a tensor of ours: one, three parts, or `depth` copies."""
    if key == "pos_embed":
        return ["pos_embed.pos_embed"]
    layer, _, kind = key.rpartition(".")
    if layer in OUTSIDE:
        return [f"{OUTSIDE[layer]}.{kind}"]
    if layer in IN_EVERY_BLOCK:
        name = f"{IN_EVERY_BLOCK[layer]}.{kind}"
        return [f"transformer_blocks.{i}.{name}" for i in range(depth)]
    _, i, inner = layer.split(".", 2)
    return [f"transformer_blocks.{i}.{name}.{kind}" for name in IN_ITS_BLOCK[inner]]


# --- files ----------------------------------------------------------------------------------------


def open_dit_folder(folder: Path) -> tuple[State, Path]:
    """The weights of a diffusers folder, and the file of its settings, which have been checked."""
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    settings = folder / "config.json"
    if not settings.exists():
        raise InputError(f"{settings}: is missing; expected a DiTTransformer2DModel's folder")
    check_fixed(settings, FIXED_IN_DIT)
    state = open_folder(folder, "diffusion_pytorch_model")
    if not state:
        raise InputError(f"{folder}: holds no weights; expected diffusion_pytorch_model")
    return state, settings


def dit_settings(file: Path) -> tuple[int, int]:
    """Settings that shapes do not reveal: the number of heads, and the side of the latents."""
    return read_setting(file, "num_attention_heads", 16), read_setting(file, "sample_size", 32)


def detect_dit(state: State, file_names: FileNames, settings: Path | None, path: Path) -> DiTConfig:
    """A network's sizes, from the shapes of its tensors and from a folder's settings."""

    def shape(key: str, axes: int) -> tuple[int, ...]:
        name = file_names(key, 1)[0]
        if name not in state:
            raise InputError(f"{path}: tensor {name} is missing; expected a DiT")
        if len(state[name].shape) != axes or 0 in state[name].shape:
            raise InputError(f"{path}: tensor {name} has shape {state[name].shape}, not a DiT's")
        return state[name].shape

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    rows, _ = shape("y_embedder.embedding_table.weight", 2)
    out, _ = shape("final_layer.linear.weight", 2)
    blocks = {m[1] for m in map(partial(re.match, r"\w*blocks\.(\d+)\."), state) if m}
    depth = len(blocks)
    if settings:
        heads, size = dit_settings(settings)
    else:
        heads = {(d, w): h for d, w, h in SIZES.values()}.get((depth, width), 0)
        size = math.isqrt(shape("pos_embed", 3)[1]) * patch
    if not heads or width % heads or width % 4:
        what = f"{depth} blocks of width {width}" + (f" with {heads} heads" if heads else "")
        raise InputError(f"{path}: {what} are no published DiT; give its config")
    if size > LARGEST_LATENTS or size % patch:
        raise InputError(
            f"{settings}: sample_size is {size}, expected up to {LARGEST_LATENTS} in {patch}s"
        )
    learned = out == 2 * patch**2 * channels
    sizes = depth, width, heads, patch, size, channels, rows - 1
    config = DiTConfig(*sizes, learned, block="adaln_zero", embedding_std=0.02)
    check_fields(config, "config", settings or path)
    return config


def matched(state: State, model: DiT, file_names: FileNames, path: Path) -> State:
    """The tensors of a file under our names. Raises InputError unless they are exactly the
    model's."""
    found, problems = {}, []
    unknown = dict.fromkeys(state)
    for key, target in model.state_dict().items():
        names = file_names(key, model.config.depth)
        there = [state[name] for name in names if name in state]
        for tensor in there:
            unknown.pop(tensor.name)
        if not there and names == ["pos_embed.pos_embed"]:
            continue  # diffusers recomputes it
        copies = key.rpartition(".")[0] in IN_EVERY_BLOCK
        rows = target.shape[0] // (1 if copies else len(names))
        shape = (rows, *target.shape[1:])
        wrong = [f"{name} is missing" for name in names if name not in state]
        wrong += [f"{t.name} has shape {t.shape}, not {shape}" for t in there if t.shape != shape]
        wrong += [f"{t.name} is {t.dtype}" for t in there if not t.dtype.is_floating_point]
        if not wrong and copies:
            wrong = [f"{t.name} is not {there[0].name}" for t in there if differ(t, there[0])]
        if not wrong:
            found[key] = there[0] if copies else stack_rows(there)
        problems += wrong
    problems += [f"{name} is unknown" for name in unknown]
    if problems:
        raise InputError(f"{path}: not this DiT: {listed(problems)}")
    return found


def differ(a: StoredTensor, b: StoredTensor) -> bool:
    return not torch.equal(a.read(), b.read())


def check_positions(stored: StoredTensor, positions: torch.Tensor) -> None:
    """Raise InputError unless a stored table is the fixed one, up to rounding to bfloat16."""
    if not torch.allclose(stored.read().float(), positions, atol=4e-3, rtol=0):
        raise InputError(f"{stored.file}: {stored.name} is not DiT's table of sines and cosines")
