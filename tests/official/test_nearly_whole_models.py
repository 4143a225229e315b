"""A part that is missing is not a smaller model: what is nearly a released one is refused."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support import checkpoints, tiny_official

from nanosd3.errors import InputError
from nanosd3.official.checkpoint import Checkpoint
from nanosd3.official.detect import config_of
from nanosd3.official.missing_keys import check, report
from nanosd3.official.tensors import State, in_memory

PATH = Path("model.safetensors")
released = cache(checkpoints.released)


def opened(parts: dict[str, State]) -> Checkpoint:
    config, detected_by = config_of(parts, PATH)
    return Checkpoint(PATH, config, parts, checkpoints.official_tokenizers(), detected_by, [])


def without(name: str, part: str, prefix: str) -> dict[str, State]:
    """A released model without the tensors of a part that begin so."""
    parts = released(name, PATH)
    kept = {k: t for k, t in parts[part].items() if not k.startswith(prefix)}
    assert len(kept) < len(parts[part])
    return parts | {part: kept}


def with_tensors(name: str, part: str, **shapes: tuple[int, ...]) -> dict[str, State]:
    """A released model with further tensors in a part, or with these in other shapes."""
    parts = released(name, PATH)
    more = {
        key: in_memory(key, torch.empty(shape, device="meta"), PATH)
        for key, shape in shapes.items()
    }
    return parts | {part: parts[part] | more}


def refusal(parts: dict[str, State]) -> str:
    """The line that refuses a model, after a look at its report."""
    checkpoint = opened(parts)
    with pytest.raises(InputError) as error:
        check(checkpoint)
    assert "\n" not in str(error.value)
    first = report(checkpoint).splitlines()[0]
    assert f"{PATH}: nearly {checkpoint.config.name} (" in first
    assert f"{PATH}: nearly {checkpoint.config.name}, but " in str(error.value)
    return str(error.value)


def test_whole_models_pass():
    for name in ("sd3-medium", "sd3.5-medium"):
        checkpoint = opened(released(name, PATH))
        check(checkpoint)
        assert report(checkpoint).startswith(f"{PATH}: {name} (")


CLIP, BLOCK = "text_model.encoder.layers.", "joint_blocks."


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
@pytest.mark.parametrize(
    ("part", "prefix"),
    [
        ("t5", "encoder.block.23."),
        ("t5", "encoder.block.0.layer.1."),
        ("clip_g", f"{CLIP}31."),
        ("clip_g", f"{CLIP}7."),
        ("clip_g", "text_projection."),
        ("clip_l", f"{CLIP}11."),
        ("mmdit", f"{BLOCK}23."),
        ("mmdit", f"{BLOCK}9.x_block.mlp."),
        ("vae", "encoder.down.3."),
        ("vae", "decoder.up.3."),
        ("vae", "decoder.up.1.block.2."),
        ("vae", "encoder.down.0.block.1."),
    ],
)
def test_a_layer_is_missing(name, part, prefix):
    assert f"{part} lacks {prefix}" in refusal(without(name, part, prefix))


def test_a_level_is_missing_on_both_sides_of_the_autoencoder():
    parts = without("sd3-medium", "vae", "encoder.down.3.")
    parts["vae"] = {k: t for k, t in parts["vae"].items() if not k.startswith("decoder.up.3.")}
    assert "vae lacks encoder.down.3." in refusal(parts)


@pytest.mark.parametrize(
    "key",
    [
        "0.context_block.attn.ln_k.weight",
        "0.x_block.attn.ln_q.weight",
        "23.context_block.attn.ln_k.weight",
        "12.x_block.attn2.ln_k.weight",
        "12.x_block.attn2.qkv.weight",
        "5.x_block.attn2.",
    ],
)
def test_norms_and_second_attentions_are_all_or_none(key):
    """One that is missing does not switch the others off."""
    assert f"mmdit lacks {BLOCK}{key}" in refusal(without("sd3.5-medium", "mmdit", BLOCK + key))


def test_all_norms_or_all_second_attentions_are_missing():
    parts = released("sd3.5-medium", PATH)
    for removed in (".ln_", ".attn2."):
        kept = {k: t for k, t in parts["mmdit"].items() if removed not in k}
        assert "nearly sd3.5-medium, but" in refusal(parts | {"mmdit": kept})


@pytest.mark.parametrize(
    ("part", "key", "shape"),
    [
        ("mmdit", f"{BLOCK}24.x_block.attn.qkv.weight", (4608, 1536)),
        ("mmdit", "context_processor.layers.0.attn.qkv.weight", (4608, 1536)),
        ("mmdit", "register", (1, 4, 1536)),
        ("mmdit", f"{BLOCK}0.x_block.attn.ln_q.bias", (64,)),
        ("clip_l", f"{CLIP}12.mlp.fc1.weight", (3072, 768)),
        ("t5", "encoder.block.24.layer.0.layer_norm.weight", (4096,)),
        ("t5", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", (32, 64)),
        ("vae", "decoder.up.4.block.0.conv1.weight", (512, 512, 3, 3)),
        ("vae", "encoder.down.3.attn.0.q.weight", (512, 512, 1, 1)),
    ],
)
def test_layers_that_the_model_does_not_have(part, key, shape):
    line = refusal(with_tensors("sd3.5-medium", part, **{key: shape}))
    assert f"{part} of this size has no {key}" in line


def test_other_unexpected_tensors_are_only_reported():
    """As the decoder of a T5, or a language model's head."""
    parts = with_tensors(
        "sd3-medium", "t5", **{"decoder.block.0.layer.0.layer_norm.weight": (4096,)}
    )
    check(opened(parts))
    assert "t5, unexpected: decoder.block.0" in report(opened(parts))


@pytest.mark.parametrize(
    ("part", "key", "shape"),
    [
        ("mmdit", "pos_embed", (1, 96 * 96, 1536)),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 1000)),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", (65536, 4096)),
    ],
)
def test_a_size_of_its_own(part, key, shape):
    assert f"{part} {key}: has shape {shape}" in refusal(
        with_tensors("sd3-medium", part, **{key: shape})
    )


def test_another_vocabulary():
    """UMT5, mT5: as wide as T5, with words of its own."""
    table = {"encoder.embed_tokens.weight": (256384, 4096)}
    with pytest.raises(InputError, match="a T5 with 256384 tokens, expected 32128"):
        opened(with_tensors("sd3-medium", "t5", **table))


# --- unreleased sizes: what is inconsistent in itself ---------------------------------------------


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("mmdit", "joint_blocks.0.context_block.attn.ln_k.weight"),
        ("mmdit", "joint_blocks.0.x_block.attn2.qkv.weight"),
        ("t5", "encoder.block.0.layer.1.layer_norm.weight"),
        ("clip_g", f"{CLIP}0.mlp.fc1.bias"),
        ("vae", "decoder.up.3.block.1.conv2.bias"),
        ("vae", "encoder.down.2.block.0.norm1.weight"),
    ],
)
def test_blocks_are_consistent_among_themselves(official_parts, part, key):
    parts = {
        name: {k: in_memory(k, t, PATH) for k, t in state.items()}
        for name, state in official_parts.items()
    }
    assert opened(parts).config == replace(tiny_official.CONFIG)
    del parts[part][key]
    with pytest.raises(InputError, match=f"1 tensors missing or misshapen: {part} lacks {key}"):
        check(opened(parts))
