"""Write tokenizers in the formats of transformers."""

from pathlib import Path

from nanosd3.config_types import CLIPConfig
from nanosd3.storage.files import write_file, write_json
from nanosd3.tokenizers import BPE, PAD, SPECIALS, Unigram, t5_tokenizer


def write_clip_tokenizer(folder: Path, bpe: BPE, clip: CLIPConfig) -> None:
    """Write vocab.json, merges.txt and the special tokens, padding included."""
    start, end = SPECIALS
    pad = end if clip.pad < 0 else bpe.symbols[clip.pad]
    write_json(folder / "vocab.json", bpe.ids | {start: bpe.start, end: bpe.end})
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe.merges)]
    write_file(folder / "merges.txt", ("\n".join(merges) + "\n").encode())
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": clip.length}
    write_json(folder / "tokenizer_config.json", special | settings)


def write_t5_tokenizer(folder: Path, unigram: Unigram, length: int) -> None:
    """Write tokenizer.json: the published one with our pieces.

    T5's own tokenizer class would ignore half of it: transformers 5 rebuilds the normaliser, losing
    the lower-casing and adding a strip.
    """
    content = t5_tokenizer()
    content["model"]["vocab"] = unigram.pieces
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"] = [
        {"id": i, "content": piece, **flags, "normalized": False, "special": True}
        for piece, i in unigram.controls.items()
    ]
    if unigram.lower_case:
        content["normalizer"]["normalizers"].append({"type": "Lowercase"})
    write_json(folder / "tokenizer.json", content)
    special = {
        "eos_token": unigram.pieces[1][0],
        "unk_token": unigram.pieces[2][0],
        "pad_token": unigram.pieces[PAD][0],
    }
    sentinels = sum(piece.startswith("<extra_id") for piece in unigram.controls)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_ids": sentinels,
        "model_max_length": length,
    }
    write_json(folder / "tokenizer_config.json", special | settings)
