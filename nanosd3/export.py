"""Writing weights as official files: one file with prefixes, or a folder for diffusers.

Tensors go from file to file in the type they are stored in; only those that change between the
layouts pass through memory. A single file of a model trained here carries its config and its
tokenizers in the header, a diffusers folder has them beside the parts (nanosd3.json): other
programs ignore both. The folder is complete: diffusers' StableDiffusion3Pipeline opens it, with
tokenizers in the files that transformers reads.
"""

import gzip
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanosd3.audit import shapes
from nanosd3.checkpoint import replacing, write_file, write_json
from nanosd3.config import CLIPConfig, Config
from nanosd3.found import OWN, Found
from nanosd3.layers import HEAD_DIM
from nanosd3.layouts import FOLDERS, PREFIXES, to_diffusers
from nanosd3.parts import State, stored
from nanosd3.runtime import InputError
from nanosd3.sizes import config_of
from nanosd3.tokenizers import ASSETS, BPE, PAD, SPECIALS, Unigram

LAYOUTS = ("single", "diffusers")


def export(found: Found, layout: str, out: Path) -> None:
    """Write a model in one of LAYOUTS. Raises InputError if `out` exists or cannot be written;
    what was begun is removed then."""
    if out.exists():
        raise InputError(f"{out}: exists already; choose another name")
    if not out.parent.is_dir():
        raise InputError(f"{out}: folder {out.parent} does not exist")
    if layout == "single" and out.suffix != ".safetensors":
        raise InputError(f"{out}: a single file must be named *.safetensors")
    write = write_single if layout == "single" else write_diffusers
    with replacing(out) as temporary:
        write(found, temporary)


def write_tensors(state: State, path: Path, metadata: dict[str, str]) -> None:
    """One safetensors file, flushed to disk."""
    tensors = {name: tensor.read().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt"} | metadata)
    mask = os.umask(0)  # the library leaves files that nobody else may read
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def needed(found: Found, part: str) -> State:
    """The tensors of a part that the model has, under our names."""
    return {name: found.parts[part][name] for name in shapes(found.config, part)}


def own_description(found: Found) -> dict | None:
    """Config and tokenizers of a model that shapes do not tell: one trained here, or one from a
    folder with settings of its own. None for the others."""
    trained = bool(found.tokenizers.words)
    if not trained and config_of(found.parts, found.path)[0] == found.config:
        return None
    tokenizers = found.tokenizers.to_json() if trained else None
    return {"config": asdict(found.config), "tokenizers": tokenizers}


def write_single(found: Found, path: Path) -> None:
    state: State = {}
    for part in found.parts:
        tensors = needed(found, part)
        state |= {PREFIXES[part] + name: tensor for name, tensor in tensors.items()}
    own = own_description(found)
    write_tensors(state, path, {"nanosd3": json.dumps(own, ensure_ascii=False)} if own else {})


# --- diffusers ----------------------------------------------------------------------------------


def write_diffusers(found: Found, folder: Path) -> None:
    config = found.config
    folder.mkdir()
    for part in found.parts:
        subfolder, stem = FOLDERS[part]
        state = diffusers_state(part, needed(found, part))
        (folder / subfolder).mkdir()
        write_tensors(state, folder / subfolder / f"{stem}.safetensors", {})
        write_json(folder / subfolder / "config.json", part_config(config, part))
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.sampling.shift,
    })  # fmt: skip
    bpe, unigram = found.tokenizers.bpe, found.tokenizers.unigram
    write_clip_tokenizer(folder / "tokenizer", bpe, config.text.clip_l)
    write_clip_tokenizer(folder / "tokenizer_2", bpe, config.text.clip_g)
    write_t5_tokenizer(folder / "tokenizer_3", unigram, config.text.t5.length)
    write_json(folder / "model_index.json", model_index(found))
    if own := own_description(found):
        write_json(folder / OWN, own)


def diffusers_state(part: str, state: State) -> State:
    """Our tensors of a part as diffusers and transformers write them: with a projection for both
    CLIPs (of L the identity, SD3 takes it unprojected), and T5's embedding as `shared`."""
    state = to_diffusers(part, state)
    if part == "clip_l" and "text_projection.weight" not in state:
        like = state["text_model.final_layer_norm.weight"]
        identity = torch.eye(like.shape[0], dtype=like.dtype)
        state["text_projection.weight"] = stored("identity", identity, like.file)
    if part == "t5":
        state["shared.weight"] = state.pop("encoder.embed_tokens.weight")
    return state


def model_index(found: Found) -> dict:
    """Which class diffusers and transformers open each subfolder with."""
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
    index = {"_class_name": "StableDiffusion3Pipeline"}
    for name, (library, kind, part) in classes.items():
        index[name] = [library, kind] if part in found.parts else [None, None]
    return index | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}


def part_config(config: Config, part: str) -> dict:
    """A part's config.json."""
    if part in ("clip_l", "clip_g"):
        return clip_json(getattr(config.text, part))
    return {"mmdit": mmdit_json, "vae": vae_json, "t5": t5_json}[part](config)


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
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }


# --- tokenizers ---------------------------------------------------------------------------------


def write_clip_tokenizer(folder: Path, bpe: BPE, clip: CLIPConfig) -> None:
    """vocab.json and merges.txt, and what to pad with."""
    start, end = SPECIALS
    pad = end if clip.pad < 0 else bpe.symbols[clip.pad]
    write_json(folder / "vocab.json", bpe.ids | {start: bpe.start, end: bpe.end})
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe.merges)]
    write_file(folder / "merges.txt", ("\n".join(merges) + "\n").encode())
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": clip.length
    })  # fmt: skip


def write_t5_tokenizer(folder: Path, unigram: Unigram, length: int) -> None:
    """tokenizer.json: the published one with these pieces. T5's own class would ignore half of
    it: transformers 5 builds the normaliser anew, without lower case and with a strip."""
    content = json.loads(gzip.decompress((ASSETS / "t5_tokenizer.json.gz").read_bytes()))
    content["model"]["vocab"] = unigram.pieces
    content["added_tokens"] = [
        {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for piece, i in unigram.controls.items()
    ]  # fmt: skip
    if unigram.lower_case:
        content["normalizer"]["normalizers"].append({"type": "Lowercase"})
    write_json(folder / "tokenizer.json", content)
    special = {
        "eos_token": unigram.pieces[1][0],
        "unk_token": unigram.pieces[2][0],
        "pad_token": unigram.pieces[PAD][0],
    }
    sentinels = sum(piece.startswith("<extra_id") for piece in unigram.controls)
    write_json(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_ids": sentinels,
        "model_max_length": length,
    })  # fmt: skip
