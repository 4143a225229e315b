"""Write official files: one file with prefixes, or a folder for diffusers.

Tensors keep the dtype they are stored in; only those that differ between the layouts are copied in
memory. What shapes do not tell (config and tokenizers of a model trained here) goes into the
header of a single file, or into nanosd3.json in a folder; other programs ignore both. The folder
is complete: diffusers' StableDiffusion3Pipeline opens it, with tokenizers in transformers' formats.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nanosd3.arguments import path_of
from nanosd3.components import shapes
from nanosd3.config_types import CLIPConfig, Config
from nanosd3.errors import InputError, shown
from nanosd3.layers import HEAD_DIM
from nanosd3.official.checkpoint import METADATA_FILE, METADATA_KEY, Checkpoint
from nanosd3.official.detect import config_of
from nanosd3.official.key_names import (
    FOLDERS,
    PREFIXES,
    T5_EMBEDDING,
    T5_SHARED,
    to_diffusers,
)
from nanosd3.official.tensors import State, StoredTensor, in_memory
from nanosd3.official.tokenizer_files import write_clip_tokenizer, write_t5_tokenizer
from nanosd3.storage.files import replacing, write_json, write_safetensors

LAYOUTS = ("single", "diffusers")


def export(checkpoint: Checkpoint, layout: str, out: Path) -> None:
    """Write a model in one of LAYOUTS. Raises InputError, leaving nothing behind, if `out` exists
    or cannot be written."""
    out = path_of("out", out)
    if layout not in LAYOUTS:
        raise InputError(f"no layout {shown(layout)}; there are {', '.join(LAYOUTS)}")
    if out.exists():
        raise InputError(f"{out}: exists already; choose another name")
    if not out.parent.is_dir():
        raise InputError(f"{out}: folder {out.parent} does not exist")
    if layout == "single" and out.suffix != ".safetensors":
        raise InputError(f"{out}: a single file must be named *.safetensors")
    write = write_single if layout == "single" else write_diffusers
    with replacing(out) as temporary:
        write(checkpoint, temporary)


def write_tensors(state: State, path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file and flush it to disk. The same content gives the same bytes."""
    tensors = {name: tensor.read().contiguous() for name, tensor in state.items()}
    write_safetensors(tensors, path, {"format": "pt"} | metadata)


def needed(checkpoint: Checkpoint, component: str) -> State:
    """The tensors of a component that the model has, in the model's order."""
    state = checkpoint.parts[component]
    return {name: state[name] for name in shapes(checkpoint.config, component)}


def metadata_of(checkpoint: Checkpoint) -> dict | None:
    """Config and tokenizers, if shapes do not tell them: for a model trained here, or from a folder
    with settings of its own. None for other models."""
    trained_here = bool(checkpoint.tokenizers.words)
    if not trained_here and config_of(checkpoint.parts, checkpoint.path)[0] == checkpoint.config:
        return None
    tokenizers = checkpoint.tokenizers.to_json() if trained_here else None
    return {"config": asdict(checkpoint.config), "tokenizers": tokenizers}


def copy_of(tensor: StoredTensor) -> StoredTensor:
    """The tensor in memory of its own; safetensors refuses two names for the same memory."""
    return replace(tensor, read=lambda: tensor.read().clone())


def write_single(checkpoint: Checkpoint, path: Path) -> None:
    """Write one safetensors file, with official prefixes.

    T5's embedding is written under both of its names: some programs read only one, some the other.
    """
    state: State = {}
    for component in checkpoint.parts:
        tensors = needed(checkpoint, component)
        if component == "t5":
            tensors[T5_SHARED] = copy_of(tensors[T5_EMBEDDING])
        state |= {PREFIXES[component] + name: tensor for name, tensor in tensors.items()}
    metadata = metadata_of(checkpoint)
    header = {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)} if metadata else {}
    write_tensors(state, path, header)


# --- diffusers ----------------------------------------------------------------------------------


def write_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that StableDiffusion3Pipeline.from_pretrained opens."""
    config = checkpoint.config
    folder.mkdir()
    for component in checkpoint.parts:
        subfolder, stem = FOLDERS[component]
        state = diffusers_state(component, needed(checkpoint, component))
        (folder / subfolder).mkdir()
        write_tensors(state, folder / subfolder / f"{stem}.safetensors", {})
        write_json(folder / subfolder / "config.json", part_config(config, component))
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.sampling.shift,
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    bpe, unigram = checkpoint.tokenizers.bpe, checkpoint.tokenizers.unigram
    write_clip_tokenizer(folder / "tokenizer", bpe, config.text.clip_l)
    write_clip_tokenizer(folder / "tokenizer_2", bpe, config.text.clip_g)
    write_t5_tokenizer(folder / "tokenizer_3", unigram, config.text.t5.length)
    write_json(folder / "model_index.json", model_index(checkpoint))
    if metadata := metadata_of(checkpoint):
        write_json(folder / METADATA_FILE, metadata)


def diffusers_state(component: str, state: State) -> State:
    """Convert a component's state to what diffusers and transformers expect in its file.

    Both CLIPs have a projection (CLIP-L's is the identity, as SD3 uses it unprojected), and T5's
    embedding is called `shared`.
    """
    state = to_diffusers(component, state)
    if component == "clip_l" and "text_projection.weight" not in state:
        norm = state["text_model.final_layer_norm.weight"]
        identity = torch.eye(norm.shape[0], dtype=norm.dtype)
        state["text_projection.weight"] = in_memory("identity", identity, norm.file)
    if component == "t5":
        state[T5_SHARED] = state.pop(T5_EMBEDDING)
    return state


def model_index(checkpoint: Checkpoint) -> dict:
    """model_index.json: the library and class that open each subfolder."""
    classes = {
        "transformer": ("diffusers", "SD3Transformer2DModel", "mmdit"),
        "vae": ("diffusers", "AutoencoderKL", "vae"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", "clip_l"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", "clip_g"),
        "text_encoder_3": ("transformers", "T5EncoderModel", "t5"),
        "tokenizer": ("transformers", "CLIPTokenizer", "clip_l"),
        "tokenizer_2": ("transformers", "CLIPTokenizer", "clip_g"),
        "tokenizer_3": ("transformers", "PreTrainedTokenizerFast", "t5"),
    }
    index: dict[str, str | list[str | None]] = {"_class_name": "StableDiffusion3Pipeline"}
    for name, (library, kind, component) in classes.items():
        index[name] = [library, kind] if component in checkpoint.parts else [None, None]
    return index | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}


def part_config(config: Config, component: str) -> dict:
    """A component's config.json."""
    if component in ("clip_l", "clip_g"):
        return clip_json(getattr(config.text, component))
    return {"mmdit": mmdit_json, "vae": vae_json, "t5": t5_json}[component](config)


def mmdit_json(config: Config) -> dict:
    mmdit = config.mmdit
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": config.image_size // config.vae.factor,
        "patch_size": mmdit.patch_size,
        "in_channels": mmdit.latent_channels,
        "out_channels": mmdit.latent_channels,
        "num_layers": mmdit.depth,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": mmdit.depth,
        "joint_attention_dim": mmdit.context_dim,
        "caption_projection_dim": mmdit.width,
        "pooled_projection_dim": mmdit.pooled_dim,
        "pos_embed_max_size": mmdit.grid,
        "dual_attention_layers": list(mmdit.dual_attention),
        "qk_norm": "rms_norm" if mmdit.qk_norm else None,
    }


def vae_json(config: Config) -> dict:
    vae = config.vae
    levels = len(vae.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.image_channels,
        "out_channels": vae.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(vae.channels),
        "layers_per_block": vae.blocks,
        "latent_channels": vae.latent_channels,
        "norm_num_groups": vae.norm_groups,
        "sample_size": config.image_size,
        "shift_factor": vae.shift,
        "scaling_factor": vae.scale,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def clip_json(clip: CLIPConfig) -> dict:
    end = clip.vocab - 1
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": clip.width,
        "intermediate_size": 4 * clip.width,
        "projection_dim": clip.width,
        "num_hidden_layers": clip.layers,
        "num_attention_heads": clip.heads,
        "max_position_embeddings": clip.length,
        "vocab_size": clip.vocab,
        "hidden_act": clip.activation,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end if clip.pad < 0 else clip.pad,
    }


def t5_json(config: Config) -> dict:
    t5 = config.text.t5
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": t5.width,
        "d_kv": t5.head_dim,
        "d_ff": t5.hidden,
        "num_layers": t5.layers,
        "num_heads": t5.heads,
        "vocab_size": t5.vocab,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,  # diffusers leaves the T5 of a single file in training mode
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
