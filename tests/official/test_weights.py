"""Official weights: detected, loaded strictly, and exported bit for bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_official

from nanosd3 import weights
from nanosd3.components import COMPONENTS, on_meta
from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.lazy_modules import LazyModules
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.detect import known_as, mmdit_config, text_config
from nanosd3.official.export import export
from nanosd3.official.key_names import PREFIXES, from_diffusers, to_diffusers
from nanosd3.official.missing_keys import check, report
from nanosd3.official.tensor_files import read_file_metadata
from nanosd3.official.tensors import fill, in_memory
from nanosd3.pipeline import Pipeline, open_pipeline
from nanosd3.storage.training_state import AVERAGE, save_state

PROMPTS = ["a photo of a cat", "hello world!"]
SMALL = {"height": 64, "width": 96, "steps": 3, "guidance": 3.0}


def states(path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of a model, by component and key."""
    checkpoint = open_checkpoint(path)
    return {
        part: {key: state[key].read() for key in on_meta(checkpoint.config, part).state_dict()}
        for part, state in checkpoint.parts.items()
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[part].keys() == b[part].keys()
        and all(
            x.dtype == b[part][key].dtype and torch.equal(x, b[part][key])
            for key, x in a[part].items()
        )
        for part in a
    )


# --- sizes from shapes ----------------------------------------------------------------------------


def test_every_size_is_read_from_the_shapes(official_file):
    assert open_checkpoint(official_file).config == tiny_official.CONFIG


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sd3-medium", "sd3_medium_incl_clips_t5xxlfp16.safetensors"),
        ("sd3.5-medium", "sd3.5_medium.safetensors"),
        ("sd3.5-large", "sd3.5_large.safetensors"),
        ("sd3.5-large-turbo", "sd3.5_large_turbo.safetensors"),
    ],
)
def test_released_models_are_recognised(name, file, tmp_path):
    """From the shapes of the full-size models alone."""
    state = {
        key: in_memory(key, tensor, tmp_path)
        for key, tensor in on_meta(CONFIGS[name], "mmdit").state_dict().items()
    }
    mmdit = mmdit_config(state)
    assert mmdit == CONFIGS[name].mmdit
    detected, sampling, detected_by = known_as(mmdit, tmp_path / file)
    assert (detected, sampling) == (name, CONFIGS[name].sampling)
    assert f"depth {mmdit.depth}" in detected_by


@pytest.mark.parametrize("given", [("clip_l", "clip_g"), ("clip_l",), ("clip_g",)])
def test_swapped_clips_are_detected(given, tmp_path):
    """Both files, or only one of them, given for the other CLIP."""
    config, other = CONFIGS["sd3-medium"], {"clip_l": "clip_g", "clip_g": "clip_l"}
    parts = {
        name: {
            key: in_memory(key, tensor, tmp_path / f"{name}.safetensors")
            for key, tensor in on_meta(config, other[name]).state_dict().items()
        }
        for name in given
    }
    with pytest.raises(InputError, match=rf"{given[0]}.*: CLIP-L and CLIP-G are swapped"):
        text_config(parts, config.mmdit)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "tiny"])
@pytest.mark.parametrize("part", COMPONENTS)
def test_every_name_survives_a_round_trip(name, part, tmp_path):
    ours = {
        key: in_memory(key, tensor, tmp_path)
        for key, tensor in on_meta(CONFIGS[name], part).state_dict().items()
    }
    theirs = to_diffusers(part, ours)
    if part in ("mmdit", "vae"):
        renamed = theirs.keys() - ours.keys()
        kept = ("context_embedder.", "encoder.conv_", "decoder.conv_")
        assert all(key.startswith(kept) for key in theirs.keys() & ours.keys())
        assert renamed
    back = from_diffusers(part, theirs)
    assert {k: (t.shape, t.dtype) for k, t in back.items()} == {
        k: (t.shape, t.dtype) for k, t in ours.items()
    }


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [["single"], ["diffusers"], ["single", "diffusers", "single"]])
@pytest.mark.parametrize("source", ["run", "official"])
def test_round_trips_are_bit_for_bit(tiny_run, official_file, tmp_path, source, route):
    path = origin = tiny_run if source == "run" else official_file
    for i, layout in enumerate(route):
        out = tmp_path / f"{i}.safetensors" if layout == "single" else tmp_path / str(i)
        export(open_checkpoint(path), layout, out)
        path = out
    checkpoint = open_checkpoint(path)
    assert same(states(origin), states(path))
    assert replace(checkpoint.config, name="") == replace(open_checkpoint(origin).config, name="")
    assert checkpoint.tokenizers.to_json() == open_checkpoint(origin).tokenizers.to_json()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_kept(tmp_path, dtype):
    first = tiny_official.write_single(tiny_official.parts(dtype=dtype), tmp_path / "a.safetensors")
    export(open_checkpoint(first), "diffusers", tmp_path / "b")
    export(open_checkpoint(tmp_path / "b"), "single", tmp_path / "c.safetensors")
    a, c = load_file(first), load_file(tmp_path / "c.safetensors")
    t5 = PREFIXES["t5"]
    a[f"{t5}shared.weight"] = a[f"{t5}encoder.embed_tokens.weight"]  # under both names
    assert a.keys() == c.keys()
    assert all(c[k].dtype == dtype and torch.equal(a[k], c[k]) for k in a)


def test_single_file_has_the_official_names(tiny_run, tmp_path):
    export(open_checkpoint(tiny_run), "single", tmp_path / "m.safetensors")
    names = load_file(tmp_path / "m.safetensors").keys()
    for name in (
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "first_stage_model.decoder.up.2.block.0.norm1.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight",
    ):
        assert name in names


def test_exports_are_readable_by_others(tiny_run, tmp_path):
    export(open_checkpoint(tiny_run), "single", tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == (tmp_path.joinpath("x").touch()
        or (tmp_path / "x").stat().st_mode & 0o777)  # fmt: skip


def test_the_same_digits_from_every_layout(tiny_run, tmp_path):
    export(open_checkpoint(tiny_run), "single", tmp_path / "m.safetensors")
    export(open_checkpoint(tiny_run), "diffusers", tmp_path / "d")
    expected = Pipeline.load(tiny_run)(["a bold 3", "7"], seed=3)
    for path in (tiny_run, tmp_path / "m.safetensors", tmp_path / "d"):
        assert np.array_equal(weights.load(path)(["a bold 3", "7"], seed=3), expected)


def test_an_export_without_an_encoder_needs_its_file(tiny_run, tmp_path):
    """Exports are written whole, so a part that is missing has been lost."""
    export(open_checkpoint(tiny_run), "diffusers", tmp_path / "d")
    (tmp_path / "d/text_encoder_3/model.safetensors").rename(tmp_path / "t5.safetensors")
    line = r"d: holds no t5, required .*; name the file \(--t5\) or export the model again"
    with pytest.raises(InputError, match=line):
        open_checkpoint(tmp_path / "d")
    assert "t5" in open_checkpoint(tmp_path / "d", {"t5": tmp_path / "t5.safetensors"}).parts


# --- layouts in the wild --------------------------------------------------------------------------


def test_components_in_separate_files(official_file, official_parts, tmp_path):
    """Separate files give the same images; a separate text encoder replaces the one in the file."""
    bare = tiny_official.write_single(
        official_parts, tmp_path / "bare.safetensors", ("clip_l", "clip_g", "t5", "vae")
    )
    files = {}
    for part in ("clip_l", "clip_g", "t5", "vae"):
        files[part] = tmp_path / f"{part}.safetensors"
        save_file(official_parts[part], files[part])
    whole, separate = weights.load(official_file), weights.load(bare, **files)
    assert np.array_equal(whole("a cat", **SMALL), separate("a cat", **SMALL))
    other = {k: t + 0.01 for k, t in official_parts["clip_l"].items()}
    save_file(other, files["clip_l"])
    changed = weights.load(official_file, clip_l=files["clip_l"])
    assert not np.array_equal(whole("a cat", **SMALL), changed("a cat", **SMALL))


def test_a_transformer_without_prefix(official_parts, official_file, tmp_path):
    save_file(official_parts["mmdit"], tmp_path / "mmdit.safetensors")
    with pytest.raises(InputError, match="holds no autoencoder"):
        open_checkpoint(tmp_path / "mmdit.safetensors")
    save_file(official_parts["vae"], tmp_path / "vae.safetensors")
    files = {"vae": tmp_path / "vae.safetensors"}
    checkpoint = open_checkpoint(tmp_path / "mmdit.safetensors", files)
    assert list(checkpoint.parts) == ["mmdit", "vae"]


def test_absent_t5_becomes_zeros_with_a_warning(official_parts, official_file, tmp_path):
    path = tiny_official.write_single(official_parts, tmp_path / "m.safetensors", ("t5",))
    whole, without = weights.load(official_file), weights.load(path)
    with pytest.warns(UserWarning, match="t5 is absent; zeros stand for its tokens"):
        images = without("a cat", **SMALL)
    assert np.array_equal(images, whole("a cat", drop=["t5"], **SMALL))
    assert not np.array_equal(images, whole("a cat", **SMALL))
    with pytest.warns(UserWarning, match="t5 is absent"):
        context, _ = without.encode_text("a cat", t5_length=9)
    assert context.shape == (1, 77 + 9, 256) and (context[:, 77:] == 0).all()


def test_absent_clip_is_an_error_unless_dropped(official_parts, tmp_path):
    path = tiny_official.write_single(official_parts, tmp_path / "m.safetensors", ("clip_g",))
    pipeline = weights.load(path)
    with pytest.raises(InputError, match=r"clip_g is absent; name its file \(--clip-g\)"):
        pipeline("a cat", **SMALL)
    pipeline("a cat", drop=["clip_g"], **SMALL)


def test_t5_under_either_name(official_file, official_parts, tmp_path):
    t5 = dict(official_parts["t5"])
    t5["shared.weight"] = t5.pop("encoder.embed_tokens.weight")
    save_file(t5, tmp_path / "t5.safetensors")
    checkpoint = open_checkpoint(official_file, {"t5": tmp_path / "t5.safetensors"})
    check(checkpoint)
    loaded = {
        part: {k: checkpoint.parts[part][k].read() for k in official_parts[part]}
        for part in COMPONENTS
    }
    assert same(states(official_file), loaded)


def test_shards_and_variants(official_folder, tmp_path):
    """Shards with an index, as diffusers saves large models; and fp16 file names."""
    folder = shutil.copytree(official_folder, tmp_path / "d")
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state, weight_map = load_file(whole), {}
    names = sorted(state)
    for i, some in enumerate((names[::2], names[1::2])):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, whole.with_name(shard))
        weight_map |= dict.fromkeys(some, shard)
    whole.unlink()
    index = whole.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same(states(folder), states(official_folder))

    whole.with_name(shard).unlink()
    with pytest.raises(InputError, match=f"{shard}: shard is missing"):
        open_checkpoint(folder)
    weight_map[names[0]] = "../../elsewhere.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="lists shards outside its folder"):
        open_checkpoint(folder)


def test_a_folder_may_set_shift_and_scale(official_folder, tmp_path):
    folder = shutil.copytree(official_folder, tmp_path / "d")
    for name, change in (
        ("vae/config.json", {"shift_factor": 0.5, "scaling_factor": 2.0}),
        ("scheduler/scheduler_config.json", {"shift": 1.5}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | change))
    config = open_checkpoint(folder).config
    assert (config.vae.shift, config.vae.scale, config.sampling.shift) == (0.5, 2.0, 1.5)


def test_settings_of_a_folder_survive_in_a_single_file(official_folder, tmp_path):
    """Settings that shapes do not tell are kept in the header."""
    folder = shutil.copytree(official_folder, tmp_path / "d")
    content = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(content | {"shift_factor": 0.5}))
    export(open_checkpoint(folder), "single", tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").config == open_checkpoint(folder).config
    export(open_checkpoint(official_folder), "single", tmp_path / "plain.safetensors")
    assert read_file_metadata(tmp_path / "plain.safetensors") == {"format": "pt"}


def test_text_encoders_without_weights_are_absent(official_folder, official_parts, tmp_path):
    """As in a repository cloned without its large files."""
    folder = shutil.copytree(official_folder, tmp_path / "d")
    (folder / "text_encoder_3/model.safetensors").unlink()
    assert "t5" not in open_checkpoint(folder).parts
    save_file(official_parts["t5"], tmp_path / "t5.safetensors")
    assert "t5" in open_checkpoint(folder, {"t5": tmp_path / "t5.safetensors"}).parts
    model = folder / "text_encoder/model.safetensors"
    torch.save(load_file(model), model.with_name("pytorch_model.bin"))
    model.unlink()
    assert torch.equal(states(folder)["clip_l"]["text_model.final_layer_norm.weight"],
                       official_parts["clip_l"]["text_model.final_layer_norm.weight"])  # fmt: skip


def test_any_header_length(official_parts, tmp_path):
    """A header length whose first byte looks like the start of a pickle."""
    state = {f"model.diffusion_model.{k}": t for k, t in official_parts["mmdit"].items()}
    state |= {f"first_stage_model.{k}": t for k, t in official_parts["vae"].items()}
    path = tmp_path / "m.sft"
    for n in range(64):
        save_file(state, path, metadata={"note": "x" * 8 * n})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert set(open_checkpoint(path).parts) == {"mmdit", "vae"}


def test_turbo_is_detected_by_the_parent_folder(tmp_path):
    large = CONFIGS["sd3.5-large"].mmdit
    hub = tmp_path / "models--stabilityai--stable-diffusion-3.5-large-turbo" / "snapshots" / "ab12"
    assert known_as(large, hub)[0] == "sd3.5-large-turbo"
    assert known_as(large, tmp_path.parent / "sd3.5_large.safetensors")[0] == "sd3.5-large"


def test_turbo_in_the_names_of_outer_folders_says_nothing(tmp_path):
    large, models = CONFIGS["sd3.5-large"].mmdit, tmp_path / "turbot" / "models"
    (models.parent / "large").mkdir(parents=True)
    assert known_as(large, models / "sd3.5_large.safetensors")[0] == "sd3.5-large"
    assert known_as(large, models.parent / "large")[0] == "sd3.5-large"
    (models.parent / "large" / "link").symlink_to(models / "Turbo.safetensors")
    assert known_as(large, models.parent / "large" / "link")[0] == "sd3.5-large-turbo"


def test_clip_l_projection(official_file, official_folder, official_parts, tmp_path):
    """In a single file it is OpenAI's and ignored; in a diffusers folder it is applied."""
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    projected = {"clip_l": official_parts["clip_l"] | {"text_projection.weight": matrix}}
    single = tiny_official.write_single(official_parts | projected, tmp_path / "p.safetensors")
    expected = weights.load(official_file).encode_text(["a cat"])[1]
    assert torch.equal(weights.load(single).encode_text(["a cat"])[1], expected)
    assert torch.equal(weights.load(official_folder).encode_text(["a cat"])[1], expected)

    folder = shutil.copytree(official_folder, tmp_path / "d")
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": matrix}, file)
    pooled = weights.load(folder).encode_text(["a cat"])[1]
    torch.testing.assert_close(pooled[:, :64], expected[:, :64] @ matrix.T)
    assert torch.equal(pooled[:, 64:], expected[:, 64:])


def test_plain_checkpoints_load(official_file, tmp_path):
    state = load_file(official_file)
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "new.ckpt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.ckpt", "old.pt"):
        assert same(states(tmp_path / name), states(official_file))


def test_eight_bit_floats_load(official_parts, tmp_path):
    rough = {
        k: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for k, t in official_parts["t5"].items()
    }
    file = tiny_official.write_single(official_parts | {"t5": rough}, tmp_path / "m.safetensors")
    context, _ = weights.load(file).encode_text(["a cat"])
    assert context.isfinite().all() and context.dtype == torch.float32


# --- report and strict loading --------------------------------------------------------------------


def test_report(official_file, official_parts, tmp_path):
    text = report(open_checkpoint(official_file))
    assert "unreleased size" in text and "depth 2, with QK-norm" in text
    for part in COMPONENTS:
        row = next(line.split() for line in text.splitlines() if line.startswith(f"{part} "))
        assert row[1] == str(len(official_parts[part])) and row[-3:] == ["0", "0", "0"]
    mmdit = dict(official_parts["mmdit"])
    del mmdit["joint_blocks.1.x_block.mlp.fc1.bias"]
    mmdit["final_layer.linear.bias"] = torch.zeros(3)
    mmdit["something.else"] = torch.zeros(1)
    file = tiny_official.write_single(official_parts | {"mmdit": mmdit}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(file)
    lines = report(checkpoint).splitlines()
    assert "  mmdit, missing: joint_blocks.1.x_block.mlp.fc1.bias" in lines
    assert any("misshapen" in x and "has shape (3,), expected (64,)" in x for x in lines)
    assert "  mmdit, unexpected: model.diffusion_model.something.else" in lines
    assert not any("in no component" in line for line in lines)
    with pytest.raises(InputError) as error:
        check(checkpoint)
    assert "2 tensors missing or misshapen" in str(error.value)
    assert "mlp.fc1.bias" in str(error.value) and "\n" not in str(error.value)


def test_report_lists_tensors_in_no_component(official_file, tmp_path):
    extra = {
        "text_encoders.clip_l.logit_scale": torch.zeros(1),  # a known extra, not reported
        "control.weight": torch.zeros(1),
    }
    save_file(load_file(official_file) | extra, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    check(checkpoint)
    assert checkpoint.unassigned == ["control.weight"]
    assert "  in no component: control.weight" in report(checkpoint).splitlines()


def test_report_reads_no_tensors(official_file, monkeypatch):
    def get_tensor(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(
        "nanosd3.official.tensor_files.safe_open.get_tensor", get_tensor, raising=False
    )
    report(open_checkpoint(official_file))


# --- memory ---------------------------------------------------------------------------------------


def test_components_are_loaded_when_needed_and_released(official_file):
    """No two networks are ever in memory together."""
    pipeline, seen = weights.load(official_file), []
    original = pipeline.parts.makers.copy()

    def watch(name):
        def make():
            assert not pipeline.parts.ready, f"{name} joins {list(pipeline.parts.ready)}"
            seen.append(name)
            return original[name]()

        return make

    pipeline.parts.makers = {name: watch(name) for name in original}
    pipeline("a cat", **SMALL)
    assert seen == ["clip_l", "clip_g", "t5", "mmdit", "vae"] and not pipeline.parts.ready
    seen.clear()
    image = np.zeros((64, 96, 3), np.uint8)
    pipeline("a cat", drop=["t5"], image=image, strength=1.0, steps=2, output="latent")
    assert seen == ["vae", "clip_l", "clip_g", "mmdit"]


def test_components_stay_loaded_unless_staged(official_file):
    pipeline = weights.load(official_file, staged=False)
    pipeline("a cat", **SMALL)
    assert set(pipeline.parts.ready) == set(COMPONENTS)
    assert pipeline.mmdit is pipeline.parts["mmdit"]


def test_tensors_are_cast_one_by_one(official_file, tmp_path):
    """No second copy: each tensor is freed before the next is read."""
    import weakref

    checkpoint = open_checkpoint(official_file)
    alive: list = []

    def reading(entry):
        def read():
            assert not [ref for ref in alive if ref() is not None]
            tensor = entry.read().clone()
            if entry.name.endswith("pos_embed"):  # keeps its stored dtype
                return tensor
            alive.append(weakref.ref(tensor))
            return tensor

        return replace(entry, read=read)

    state = {k: reading(t) for k, t in checkpoint.parts["mmdit"].items()}
    module = fill(on_meta(checkpoint.config, "mmdit"), state, torch.device("cpu"), torch.bfloat16)
    assert module.final_layer.linear.weight.dtype == torch.bfloat16
    assert module.pos_embed.dtype == torch.float32  # as stored


def test_same_dtype_is_mapped_not_copied(official_file):
    checkpoint = open_checkpoint(official_file)
    t5 = on_meta(checkpoint.config, "t5")
    module = fill(t5, checkpoint.parts["t5"], torch.device("cpu"), None)
    table = module.encoder["embed_tokens"].weight
    maps = [line for line in open("/proc/self/maps") if str(official_file) in line]
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    assert any(low <= table.data_ptr() < high for low, high in spans)


def test_changed_weights_stay_in_their_pipeline(official_file):
    """Whoever breaks a model on purpose and loads it again has it whole."""
    broken, whole = weights.load(official_file), weights.load(official_file).mmdit
    broken.mmdit.context_embedder.weight.zero_()
    for again in (whole, weights.load(official_file).mmdit):
        assert again.context_embedder.weight.abs().sum() > 0


@pytest.fixture
def training_run(run_before_flow, tiny_run, tmp_path):
    """A run whose transformer is still being trained."""
    run, trained = shutil.copytree(run_before_flow, tmp_path / "run"), weights.load(tiny_run).mmdit
    so_far = {f"{AVERAGE}{name}": parameter for name, parameter in trained.named_parameters()}
    save_state(run, "flow", 3, so_far, skipped=0)
    return run


@pytest.mark.parametrize("model", ["official_file", "training_run"])
def test_networks_of_a_checkpoint_share_nothing(request, model):
    """Two pipelines of one opened model, and a network that is freed and read again while others
    are in memory."""
    checkpoint = open_checkpoint(request.getfixturevalue(model))
    broken, whole = (open_pipeline(checkpoint, "cpu", None, staged=False) for _ in range(2))
    broken.parts.load()
    broken.mmdit.context_embedder.weight.zero_()
    assert whole.mmdit.context_embedder.weight.abs().sum() > 0
    broken.parts.free("mmdit")
    assert broken.mmdit.context_embedder.weight.abs().sum() > 0


def test_convolutions_are_channels_last(official_file):
    vae = weights.load(official_file).vae
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(official_file, dtype):
    """Close to the float32 result; the text encoders never run in float16."""
    pipeline = weights.load(official_file, dtype=dtype)
    assert pipeline.mmdit.final_layer.linear.weight.dtype == dtype
    kept = torch.float32 if dtype == torch.float16 else torch.bfloat16
    assert pipeline.parts["t5"].encoder["final_layer_norm"].weight.dtype == kept
    rough = pipeline("a cat", output="latent", **SMALL)
    exact = weights.load(official_file)("a cat", output="latent", **SMALL)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_lazy_modules_accept_plain_modules():
    parts = LazyModules({"a": torch.nn.Linear(1, 1), "b": lambda: torch.nn.Linear(2, 2)},
                  torch.device("cpu"), staged=True)  # fmt: skip
    assert len(parts) == 2 and set(parts) == {"a", "b"} and "c" not in parts
    assert parts["b"] is parts["b"]
    parts.release("a")
    parts.release("b")
    assert list(parts.ready) == ["a"]


def test_prefixes_cover_all_components():
    assert set(PREFIXES) == set(COMPONENTS)
