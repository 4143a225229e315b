"""Settings of a folder that change the picture are followed or refused; other models are named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import checkpoints
from support.commands import refused

from nanosd3 import generate, weights
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import METADATA_FILE, open_checkpoint
from nanosd3.official.detect import refuse_foreign
from nanosd3.official.export import export
from nanosd3.storage.files import read_json
from nanosd3.text import Tokenizers


@pytest.fixture(autouse=True)
def tokenizers_read_once(monkeypatch):
    monkeypatch.setattr(Tokenizers, "official", checkpoints.official_tokenizers)


@pytest.fixture
def folder(official_folder, tmp_path) -> Path:
    """A diffusers folder whose files are links to another's."""
    return shutil.copytree(official_folder, tmp_path / "d", copy_function=os.symlink)


def edit(file: Path, **change: object) -> None:
    content = read_json(file)
    file.unlink()
    file.write_text(json.dumps(content | change))


def test_settings_that_are_followed(folder, official_folder):
    before = open_checkpoint(official_folder).config.text
    edit(folder / "text_encoder/config.json", hidden_act="gelu", num_attention_heads=2)
    edit(folder / "text_encoder_2/config.json", hidden_act="quick_gelu", num_attention_heads=4)
    after = open_checkpoint(folder).config.text
    assert (before.clip_l.activation, before.clip_l.heads) == ("quick_gelu", 1)
    assert (after.clip_l.activation, after.clip_l.heads) == ("gelu", 2)
    assert (before.clip_g.activation, before.clip_g.heads) == ("gelu", 2)
    assert (after.clip_g.activation, after.clip_g.heads) == ("quick_gelu", 4)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("text_encoder_2/config.json", {"hidden_act": ["gelu"]}),
        ("text_encoder/config.json", {"layer_norm_eps": 1e-3}),
        ("text_encoder/config.json", {"num_attention_heads": 3}),
        ("text_encoder_3/config.json", {"feed_forward_proj": "relu"}),
        ("text_encoder_3/config.json", {"dense_act_fn": "silu"}),
        ("text_encoder_3/config.json", {"relative_attention_max_distance": 64}),
        ("vae/config.json", {"use_quant_conv": True}),
        ("vae/config.json", {"use_post_quant_conv": True}),
        ("vae/config.json", {"act_fn": "gelu"}),
        ("vae/config.json", {"mid_block_add_attention": False}),
        ("vae/config.json", {"scaling_factor": float("inf")}),
        ("vae/config.json", {"scaling_factor": float("nan")}),
        ("vae/config.json", {"scaling_factor": 10**400}),
        ("vae/config.json", {"shift_factor": 10**400}),
        ("vae/config.json", {"scaling_factor": True}),
        ("vae/config.json", {"norm_num_groups": 0}),
        ("vae/config.json", {"norm_num_groups": 2.0}),
        ("transformer/config.json", {"qk_norm": "layer_norm"}),
        ("scheduler/scheduler_config.json", {"shift": 10**400}),
        ("scheduler/scheduler_config.json", {"shift": -1}),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 50}),
    ],
)
def test_settings_that_are_refused(folder, file, change):
    edit(folder / file, **change)
    with pytest.raises(InputError) as error:
        open_checkpoint(folder)
    line = str(error.value)
    assert line.startswith(f"{folder / file}: {next(iter(change))} ") and "\n" not in line
    assert len(line) < 300 + len(str(folder))


def test_defaults_may_be_written_out(folder, official_folder):
    """As the hub's own files do, null included."""
    edit(folder / "vae/config.json", act_fn="silu", use_quant_conv=False)
    edit(folder / "scheduler/scheduler_config.json", use_karras_sigmas=None)
    edit(folder / "text_encoder_3/config.json", dense_act_fn="gelu_new")
    assert open_checkpoint(folder).config == open_checkpoint(official_folder).config


def test_pipes_in_a_folder_are_not_opened(folder, capsys):
    if not hasattr(os, "mkfifo"):
        return
    for file in ("vae/config.json", METADATA_FILE, "transformer/config.json"):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)
        line = refused(capsys, weights.main, "report", folder)
        assert f"{folder / file}: is not a file" in line
        (folder / file).unlink()


# --- a model of ours that another program has saved -----------------------------------------------


def test_an_export_saved_again_without_our_config(tiny_run, tmp_path, capsys):
    """What shapes do not tell is lost with nanosd3.json; with it, all is well."""
    export(open_checkpoint(tiny_run), "diffusers", tmp_path / "d")
    index = (tmp_path / "d" / METADATA_FILE).read_bytes()
    (tmp_path / "d" / METADATA_FILE).unlink()
    line = refused(capsys, weights.main, "report", tmp_path / "d")
    assert "has the vocabulary of a model trained with nanosd3" in line
    assert "copy nanosd3.json from the folder that nanosd3 exported" in line
    (tmp_path / "d" / METADATA_FILE).write_bytes(index)
    assert weights.main(["report", str(tmp_path / "d")]) == 0
    export(open_checkpoint(tiny_run), "single", tmp_path / "m.safetensors")
    state = weights.open_checkpoint(tmp_path / "m.safetensors")
    assert state.config.name == "tiny"


# --- other models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["double_layers.0.attn.w1q.weight", "single_layers.0.attn.w1q.weight"], "AuraFlow"),
        (["joint_transformer_blocks.0.norm1.linear.weight",
          "single_transformer_blocks.0.norm1.linear.weight"], "AuraFlow"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight",
          "pos_embed_input.proj.weight"], "a ControlNet"),
        (["controlnet_blocks.0.weight", "single_transformer_blocks.0.norm.linear.weight"],
         "a ControlNet"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.img_mod.1.weight",
          "txt_norm.weight"], "Qwen-Image"),
        (["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"],
         "Chroma"),
        (["txt_in.individual_token_refiner.blocks.0.mlp.fc1.bias", "double_blocks.0.img_in"],
         "HunyuanVideo"),
        (["single_transformer_blocks.0.norm.linear.weight",
          "transformer_blocks.0.attn.to_q.weight"], "FLUX"),
        (["patch_embed.text_proj.weight", "time_embedding.linear_1.weight",
          "transformer_blocks.0.attn1.to_q.weight"], "CogVideoX"),
        (["transformer_blocks.0.attn1.to_q.weight", "patch_embed.text_proj.weight",
          "time_condition_embed.timestep_embedder.linear_1.weight"], "CogVideoX or CogView"),
        (["add_embedding.image_norm.weight", "encoder_hid_proj.image_embeds.weight",
          "time_embedding.linear_1.weight"], "Kandinsky"),  # 2.2
        (["add_time_condition.attention.to_k.weight", "time_embedding.linear_1.weight",
          "encoder_hid_proj.projection_linear.weight"], "Kandinsky"),  # 3
        (["visual_transformer_blocks.0.self_attention.to_query.weight",
          "text_transformer_blocks.0.feed_forward.in_layer.weight"], "Kandinsky"),  # 5
        (["add_embedding.linear_1.weight", "time_embedding.linear_1.weight",
          "down_blocks.0.resnets.0.temporal_res_block.conv1.weight"], "a video model"),
        (["model.diffusion_model.label_emb.0.0.weight",
          "model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight"],
         "a video model"),
        (["add_embedding.linear_1.weight", "time_embedding.linear_1.weight",
          "down_blocks.0.resnets.0.conv1.weight"], "SDXL"),
        (["add_embedding.pool.q_proj.weight", "time_embedding.linear_1.weight",
          "encoder_hid_proj.weight"], "a U-Net such as"),  # DeepFloyd IF
        (["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"],
         "a U-Net such as Stable Diffusion 1 or 2 have"),
    ],
)  # fmt: skip
def test_other_models_by_name(names, model, tmp_path, capsys):
    with pytest.raises(InputError, match=f"this is {model}"):
        refuse_foreign(names, tmp_path)
    file = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(2) for name in names}, file)
    line = refused(capsys, generate.main, "a cat", "--model", file, "--out", tmp_path / "x.png")
    assert f"this is {model}" in line and "name the folder" not in line


@pytest.mark.parametrize(
    "name",
    ["PixArtTransformer2DModel", "AllegroTransformer3DModel", "MochiTransformer3DModel",
     "SanaTransformer2DModel", "WanTransformer3DModel"],
)  # fmt: skip
def test_models_without_a_name_here_are_not_told_to_name_a_folder(name, tmp_path):
    pytest.importorskip("diffusers")
    import diffusers

    with torch.device("meta"):
        keys = getattr(diffusers, name)(num_layers=1).state_dict()
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="holds no Stable Diffusion 3 transformer"):
        open_checkpoint(tmp_path / "m.safetensors")
