"""Key names of other programs: taken where they are unambiguous, otherwise named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import refused

from nanosd3 import weights
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.detect import refuse_foreign
from nanosd3.official.find_parts import (
    WRAPPERS,
    open_component,
    open_single,
    refuse_unclear_encoders,
)
from nanosd3.official.key_names import PREFIXES, to_diffusers
from nanosd3.official.tensors import in_memory

DOT = torch.zeros(1)


@pytest.fixture(scope="module")
def keys(official_parts) -> dict[str, list[str]]:
    """Names of every component's tensors; here they are all that counts."""
    return {part: list(state) for part, state in official_parts.items()}


@pytest.fixture
def written(tmp_path):
    """Write a file with tensors of these names."""

    def write(*names: str, file: str = "m.safetensors"):
        save_file({name: torch.zeros(1) for name in names}, tmp_path / file)
        return tmp_path / file

    return write


def under(prefixes: dict[str, str], keys: dict[str, list[str]]) -> list[str]:
    return [prefix + key for part, prefix in prefixes.items() for key in keys[part]]


# --- prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["", "_orig_mod.", "module.", "module._orig_mod.", "diffusion_model.", "model.", "transformer.",
     "model.diffusion_model._orig_mod.", "_fsdp_wrapped_module.", "state_dict.net.", "ema."],
)  # fmt: skip
def test_transformers_under_any_prefix(written, keys, prefix):
    prefixes = {"mmdit": prefix, "vae": "vae."}
    parts, rest = open_single(written(*under(prefixes, keys), f"{prefix}more"))
    assert parts["vae"].keys() == set(keys["vae"])
    assert parts["mmdit"].keys() == {*keys["mmdit"], "more"} and not rest


@pytest.mark.parametrize(
    "prefixes",
    [
        {"clip_l": "clip_l.", "clip_g": "clip_g.", "t5": "t5xxl.", "vae": "vae."},
        {"clip_l": "text_encoders.clip_l.", "clip_g": "text_encoders.clip_g.",
         "t5": "text_encoders.t5xxl.", "vae": "first_stage_model."},
        {"clip_l": "text_encoder.", "clip_g": "text_encoder_2.", "t5": "text_encoder_3.",
         "vae": "autoencoder."},
        {"clip_l": f"module.{PREFIXES['clip_l']}", "clip_g": f"{PREFIXES['clip_g']}_orig_mod.",
         "t5": "model.t5.transformer.", "vae": "first_stage_model._orig_mod."},
    ],
)  # fmt: skip
def test_all_components_under_any_prefix(written, keys, prefixes):
    parts, rest = open_single(written(*under({"mmdit": "model.diffusion_model."} | prefixes, keys)))
    assert {part: set(state) for part, state in parts.items()} == {
        part: set(names) for part, names in keys.items()
    }
    assert rest == []


@pytest.mark.parametrize("prefix", ["", "module.", "vae.", "text_encoder_2.", "model.encoder."])
@pytest.mark.parametrize("part", ["clip_l", "clip_g", "t5", "vae"])
def test_components_of_their_own_under_any_prefix(written, keys, part, prefix):
    if (part, prefix) == ("clip_l", "text_encoder_2."):  # which says that it is CLIP-G
        with pytest.raises(InputError, match=r"is not a clip_l .*; found text_encoder_2.text_mo"):
            open_component(part, written(*under({part: prefix}, keys)))
        return
    state = open_component(part, written(*under({part: prefix}, keys), "something.else"))
    assert state.keys() - {"something.else"} == set(keys[part])


@pytest.mark.parametrize(("part", "root"), [("clip_l", "text_model."), ("clip_g", "text_model."),
                                            ("t5", "encoder.")])  # fmt: skip
def test_text_encoders_without_their_root(written, keys, part, root):
    """As newer transformers write CLIP, and as T5's stack is saved alone."""
    bare = [key.removeprefix(root) for key in keys[part]]
    assert open_component(part, written(*bare)).keys() == set(keys[part])
    assert open_component(part, written(*(f"model.{key}" for key in bare))).keys() == set(
        keys[part]
    )
    whole = under({name: PREFIXES[name] for name in ("mmdit", "vae")}, keys)
    whole += [PREFIXES[part] + key for key in bare]
    assert open_single(written(*whole))[0][part].keys() == set(keys[part])


def test_a_whole_t5(written, keys):
    """With its decoder, which has a marker of its own."""
    decoder = [key.replace("encoder.", "decoder.") for key in keys["t5"]]
    state = open_component("t5", written(*keys["t5"], *decoder, "lm_head.weight", "shared.weight"))
    assert set(keys["t5"]) <= state.keys()
    with pytest.raises(InputError, match=r"is not a t5 .*; found decoder.block"):
        open_component("t5", written(*decoder))


def test_diffusers_names_under_a_prefix(official_parts, tmp_path, keys):
    """Of an autoencoder in a file of its own, saved while it was compiled."""
    ours = {k: in_memory(k, t, tmp_path) for k, t in official_parts["vae"].items()}
    theirs = {f"_orig_mod.{k}": t.read() for k, t in to_diffusers("vae", ours).items()}
    save_file({k: t.contiguous() for k, t in theirs.items()}, tmp_path / "vae.safetensors")
    state = open_component("vae", tmp_path / "vae.safetensors")
    assert state.keys() == set(keys["vae"])
    assert all(torch.equal(state[k].read(), t) for k, t in official_parts["vae"].items())


def test_wrappers_inside_names(written, keys):
    """FSDP and activation checkpointing wrap block by block."""
    wrapped = [key.replace("joint_blocks.1.", "joint_blocks.1._checkpoint_wrapped_module.")
               for key in keys["mmdit"]]  # fmt: skip
    assert open_single(written(*wrapped, "vae.decoder.conv_in.weight"))[0]["mmdit"].keys() == set(
        keys["mmdit"]
    )
    with pytest.raises(InputError, match=r"one tensor twice, as .*; keep one of them"):
        open_single(written(*keys["mmdit"], f"module.{keys['mmdit'][0]}"))


# --- nested checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outer",
    [("model",), ("ema",), ("state_dict",), ("state_dict", "model"), ("module",), ("params_ema",),
     ("model", "_orig_mod")],
)  # fmt: skip
def test_nested_checkpoints(tmp_path, keys, outer):
    content = dict.fromkeys(keys["mmdit"], DOT)
    for key in reversed(outer):
        content = {key: content, "step": 7, "betas": [0.9, 0.99]}
    torch.save(content, tmp_path / "m.pt")
    parts, rest = open_single(tmp_path / "m.pt")
    assert parts["mmdit"].keys() == set(keys["mmdit"]) and not rest


def test_one_model_under_two_keys(tmp_path, keys):
    model = dict.fromkeys(keys["mmdit"], DOT)
    torch.save({"model": model, "ema": model}, tmp_path / "m.pt")  # the same object
    assert open_single(tmp_path / "m.pt")[0]["mmdit"].keys() == set(keys["mmdit"])
    torch.save({"model": model, "ema": dict(model)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"2 of mmdit, under the prefixes 'ema.', 'model.'; save"):
        open_single(tmp_path / "m.pt")
    official = {PREFIXES["mmdit"] + key: DOT for key in keys["mmdit"]}
    torch.save({"state_dict": official, "ema": model}, tmp_path / "m.pt")
    parts, rest = open_single(tmp_path / "m.pt")  # the official prefix decides
    assert parts["mmdit"].keys() == set(keys["mmdit"]) and len(rest) == len(model)


def test_checkpoints_without_names(tmp_path):
    looped = {"step": 3}
    looped["itself"] = looped
    for content, found in ((looped, "step, itself"), ({"shadow_params": [DOT]}, "shadow_params")):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(InputError, match=f"holds no named tensors; found {found}"):
            open_single(tmp_path / "m.pt")


# --- not understood -------------------------------------------------------------------------------


def test_what_was_found_is_named(written, keys):
    names = [f"model.layers.{i}.weight" for i in range(9)]
    with pytest.raises(InputError, match=r"no Stable Diffusion 3 transformer; found model.layers "):
        open_single(written(*names, "lm_head.weight"))
    with pytest.raises(InputError, match=r"is not a t5 .*; found model.layers \(9\), lm_head.weig"):
        open_component("t5", written(*names, "lm_head.weight"))
    with pytest.raises(
        InputError, match=r"is not a clip_g .*; found positional_embedding \(1\), tok"
    ):
        open_component("clip_g", written("token_embedding.weight", "positional_embedding"))
    with pytest.raises(InputError, match=r"2 of vae, under the prefixes 'a.', 'b.'"):
        open_component("vae", written(*(f"{p}.decoder.conv_in.weight" for p in "ab")))
    many = [f"field{i}.weight" for i in range(9)]
    with pytest.raises(InputError, match=r"field4.weight \(1\) and 4 more$"):
        open_single(written(*many))


def test_clips_are_not_taken_for_each_other(written, keys):
    """From a whole checkpoint without the one that is asked for."""
    path = written(*under({part: PREFIXES[part] for part in ("mmdit", "clip_g")}, keys))
    assert open_component("clip_g", path).keys() == set(keys["clip_g"])
    with pytest.raises(InputError, match="is not a clip_l"):
        open_component("clip_l", path)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("text_encoders.t5xxl.enc.blk.0.attn_q.weight", PREFIXES["mmdit"]),
        ("t5xxl.encoder.layers.0.weight", ""),
        ("model.text_model.layers.0.weight", "diffusion_model."),
        ("text_encoder_3.blocks.0.weight", "model."),
    ],
)
def test_an_encoder_that_is_not_understood_is_not_absent(capsys, written, keys, name, prefix):
    prefixes = {"mmdit": prefix, "vae": PREFIXES["vae"]}
    path = written(*under(prefixes, keys), name)
    out = path.with_name("out.safetensors")
    line = refused(capsys, weights.main, "export", path, "--layout", "single", "--out", out)
    assert "holds no clip_l, clip_g, t5 under known names" in line and "--t5" in line
    assert ".".join(name.split(".")[:2]) in line and not out.exists()


@pytest.mark.parametrize(
    ("absent", "names"),
    [(["t5"], ["text_encoders.clip_l.more.weight", "text_encoders.t5xxl.logit_scale"]),
     ([], ["text_encoder_4.weight"]), (["t5", "clip_g"], ["controller.weight"])],
)  # fmt: skip
def test_other_tensors_may_be_left_over(tmp_path, absent, names):
    refuse_unclear_encoders(absent, names, tmp_path)


def test_a_missing_autoencoder_names_what_is_there(written, keys):
    path = written(*under({"mmdit": "model.diffusion_model."}, keys), "tae.layers.0.weight")
    with pytest.raises(InputError, match=r"no autoencoder \(.*; found mmdit and tae.layers \(1\)"):
        open_checkpoint(path)


# --- additions to models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight",
          "time_text_embed.text_embedder.linear_1.weight"], "a ControlNet"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["controlnet_x_embedder.weight", "double_blocks.0.img_attn.qkv.weight"], "a ControlNet"),
        (["lora_unet_joint_blocks_0.lokr_w1", "lora_unet_joint_blocks_0.alpha"], "a LoKr"),
        (["diffusion_model.joint_blocks.0.x.lokr_w2_a"], "a LoKr"),
        (["lycoris_joint_blocks_0.hada_w1_a", "lycoris_joint_blocks_0.alpha"], "a LoHa"),
        (["lycoris_joint_blocks_0_mlp.diff"], "a LyCORIS"),
        (["transformer.transformer_blocks.0.attn.to_q.oft_R.weight"], "a LyCORIS"),
        (["lora_unet_joint_blocks_0.lora_down.weight"], "a LoRA"),
        (["base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight"], "a LoRA"),
        (["clip_l", "clip_g"], "a textual inversion"),
        (["ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
    ],
)  # fmt: skip
def test_additions_are_called_by_their_names(capsys, written, names, message):
    path = written(*names)
    assert f"this is {message}" in refused(capsys, weights.main, "report", path)
    with pytest.raises(InputError, match=f"this is {message}"):
        open_component("t5", path)


def test_no_name_of_ours_is_one_of_an_addition(keys):
    """Nor has it a field of a wrapper, which is dropped wherever it stands."""
    for names in keys.values():
        refuse_foreign(names, Path("m.safetensors"))
        assert not any(WRAPPERS & set(name.split(".")) for name in names)
