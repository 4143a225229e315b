"""Single files that we write, in other programs; and every export of a model has the same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_official

from nanosd3 import weights
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import export, write_tensors
from nanosd3.official.key_names import PREFIXES
from nanosd3.official.tensor_files import read_file_metadata
from nanosd3.official.tensors import in_memory

OURS, SHARED = (PREFIXES["t5"] + name for name in ("encoder.embed_tokens.weight", "shared.weight"))


def single(path: Path, out: Path) -> Path:
    export(open_checkpoint(path), "single", out)
    return out


# --- both names of T5's embedding -----------------------------------------------------------------


def state_of(parts: dict[str, dict], *names: str) -> dict[str, torch.Tensor]:
    return {PREFIXES[name] + key: t for name in names for key, t in parts[name].items()}


def test_a_correct_official_file_stays_one(official_parts, tmp_path):
    state = state_of(official_parts, "mmdit", "vae", "t5")
    state[SHARED] = state[OURS].clone()
    save_file(state, tmp_path / "a.safetensors")
    written = load_file(single(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("wrong", [torch.ones(32128, 256), torch.ones(32128, 8)])
def test_two_embeddings_of_t5_are_not_one(official_parts, tmp_path, wrong):
    """Other programs would read the other one."""
    path = tiny_official.write_single(official_parts, tmp_path / "two.safetensors")
    save_file(load_file(path) | {SHARED: wrong}, path)
    with pytest.raises(InputError) as refusal:
        open_checkpoint(path)
    assert f"T5 has two embeddings, {OURS} and {SHARED}, which differ" in str(refusal.value)


def test_a_pickled_file_with_one_name(official_parts, tmp_path):
    """Whose tensors may be in memory: safetensors would refuse one memory under two names."""
    state = state_of(official_parts, "mmdit", "vae", "t5")
    embedding = state.pop(OURS)
    torch.save(state | {SHARED: embedding}, tmp_path / "a.ckpt")
    written = load_file(single(tmp_path / "a.ckpt", tmp_path / "b.safetensors"))
    assert torch.equal(written[OURS], embedding) and torch.equal(written[SHARED], embedding)


# --- diffusers ------------------------------------------------------------------------------------


def opened_by_diffusers(file: Path, folder: Path, **components):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusion3Pipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, **components
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_diffusers_opens_a_single_file(official_file, official_folder, tmp_path):
    """It draws the same latents as we do from the file that was exported."""
    theirs = opened_by_diffusers(single(official_file, tmp_path / "m.safetensors"), official_folder)
    embeddings = theirs.text_encoder_3.shared, theirs.text_encoder_3.encoder.embed_tokens
    assert torch.equal(*(embedding.weight for embedding in embeddings))
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    prompt, size = "a naïve photo of a cat", {"height": 64, "width": 96}
    expected = theirs(
        prompt, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=77,
        latents=noise.clone(), output_type="latent", **size,
    ).images  # fmt: skip
    latents = weights.load(official_file)(prompt, noise=noise, steps=2, guidance=1.0,
                                          sampler="euler", t5_length=77, output="latent",
                                          **size)  # fmt: skip
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_diffusers_opens_a_single_file_of_a_run(tiny_run, tmp_path):
    """diffusers tells the CLIPs apart by their widths, which are equal in the tiny config."""
    transformers = pytest.importorskip("transformers")
    export(open_checkpoint(tiny_run), "diffusers", tmp_path / "d")
    file = single(tiny_run, tmp_path / "m.safetensors")
    clip_g = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "d/text_encoder_2")
    theirs = opened_by_diffusers(file, tmp_path / "d", text_encoder_2=clip_g)
    ours = weights.load(tiny_run)
    context, pooled = ours.encode_text([""])
    noise = ours.noise(1, 0, (8, 8))
    pixels = theirs(
        ["a bold 3"], negative_prompt_embeds=context, negative_pooled_prompt_embeds=pooled,
        max_sequence_length=ours.config.text.t5.length, guidance_scale=1.6,
        num_inference_steps=2, latents=noise.clone(), output_type="np",
    ).images[:, 2:-2, 2:-2, 0]  # fmt: skip
    mine = ours(["a bold 3"], noise=noise, steps=2, guidance=1.6, sampler="euler")
    assert np.abs(mine - (pixels * 255).round()).max() <= 1


# --- the same bytes -------------------------------------------------------------------------------


def test_metadata_is_sorted(tmp_path):
    """The library writes it in an order that changes from call to call."""
    metadata = {key: f'é"\\\n\x01 {key}' for key in "zyxwvu"}
    state = {"a": in_memory("a", torch.arange(3.0), tmp_path)}
    for name in ("a", "b"):
        write_tensors(state, tmp_path / name, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_file_metadata(tmp_path / "a") == {"format": "pt"} | metadata
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.arange(3.0))
    content = (tmp_path / "a").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == ["format", *sorted(metadata)]


def test_exports_have_the_same_bytes(tiny_run, tmp_path):
    """Files and folders; and a file of a file."""
    files = [single(tiny_run, tmp_path / f"{i}.safetensors") for i in range(2)]
    files.append(single(files[0], tmp_path / "again.safetensors"))
    assert len({file.read_bytes() for file in files}) == 1
    assert len(read_file_metadata(files[0])) == 2
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        export(open_checkpoint(tiny_run), "diffusers", folder)
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert names[0] == names[1] and len(names[0]) > 20
    assert all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in names[0])
