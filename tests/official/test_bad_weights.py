"""Unusable weights and images: a one-line error, and nothing written."""

import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from support import tiny_official
from support.commands import refused

from nanosd3 import bench, generate, weights
from nanosd3.errors import InputError
from nanosd3.pipeline import Pipeline

SMALL = ["--height", "64", "--width", "96", "--steps", "2"]


@pytest.fixture
def ask(capsys, tmp_path, official_file):
    """The error line when `generate` refuses its arguments and writes nothing."""

    def ask(*options: object, weights: Path = official_file) -> str:
        out = tmp_path / "cat.png"
        line = refused(
            capsys, generate.main, "a cat", "--weights", weights, "--out", out, *SMALL, *options
        )
        assert not out.exists()
        return line

    return ask


# --- not weight files -----------------------------------------------------------------------------


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(start: int, end: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text file and no more than that", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"<!DOCTYPE html><html>Log in</html>", "is a web page"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"\x80\x04garbage", "damaged or not a checkpoint"),
        (b"PK\x03\x04garbage", "damaged or not a checkpoint"),
        (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
        (with_header(b"{not json}", b""), "not a safetensors file"),
        (with_header(json.dumps({"a": entry(0, 400, [10])}).encode(), b"\0" * 40),
         "not a safetensors file"),
        (with_header(json.dumps({"a": entry(0, 40, [10]), "b": entry(20, 60, [10])}).encode(),
                     b"\0" * 60), "not a safetensors file"),
        (with_header(json.dumps({"a": entry(0, 40, [99])}).encode(), b"\0" * 40),
         "not a safetensors file"),
    ],
    ids=["empty", "text", "pointer", "page", "gguf", "pickle", "zip", "length", "json", "offsets",
         "overlap", "shape"],
)  # fmt: skip
def test_not_a_weight_file(ask, tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    line = ask(weights=path)
    assert message in line and str(path) in line


def test_truncated(ask, official_file, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(official_file.read_bytes()[:-1000])
    assert "damaged or not a safetensors file" in ask(weights=path)


def test_missing(ask, tmp_path):
    assert "no such file or folder" in ask(weights=tmp_path / "none.safetensors")


class Harmful:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused(ask, tmp_path, zipped):
    proof = tmp_path / "executed"
    torch.save({"state_dict": {}, "hyper": Harmful(proof)}, tmp_path / "m.ckpt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    assert "holds pickled Python objects, which could run code" in ask(weights=tmp_path / "m.ckpt")
    (tmp_path / "m.bin").write_bytes(pickle.dumps(Harmful(proof)))
    ask(weights=tmp_path / "m.bin")
    assert not proof.exists()


# --- other models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "this is FLUX"),
        (["model.diffusion_model.double_blocks.0.img_mod.lin.weight"], "this is FLUX"),
        (["model.diffusion_model.input_blocks.0.0.weight",
          "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"], "is SDXL"),
        (["model.diffusion_model.input_blocks.0.0.weight",
          "cond_stage_model.transformer.text_model.final_layer_norm.weight",
          "first_stage_model.decoder.conv_in.weight"], "this is Stable Diffusion 1 or 2"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "this is a LoRA"),
        (["something.weight"], "holds no Stable Diffusion 3 transformer"),
    ],
)  # fmt: skip
def test_other_models_are_named(ask, tmp_path, names, message):
    path = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    assert message in ask(weights=path)


def test_other_folders_are_named(ask, tmp_path, official_folder):
    for part in ("unet", "text_encoder_2"):
        (tmp_path / "xl" / part).mkdir(parents=True)
    assert "this is SDXL" in ask(weights=tmp_path / "xl")
    assert "holds no transformer/" in ask(weights=official_folder / "transformer")
    folder = shutil.copytree(official_folder, tmp_path / "d")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | {"attention_head_dim": 8}))
    assert "attention_head_dim is 8, expected 64" in ask(weights=folder)
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    assert "holds no diffusion_pytorch_model.safetensors" in ask(weights=folder)


def test_autoencoder_with_four_channels(ask, official_parts, tmp_path):
    vae = official_parts["vae"] | {"decoder.conv_in.weight": torch.zeros(64, 4, 3, 3)}
    path = tiny_official.write_single(official_parts | {"vae": vae}, tmp_path / "m.safetensors")
    line = ask(weights=path)
    assert "4 latent channels, as in Stable Diffusion 1.5 and SDXL; SD3's has 16" in line


def test_components_of_another_model(ask, official_parts, tmp_path):
    """A T5 of another width, and files given for the wrong component."""
    t5 = {
        k: t[..., :128].contiguous() if "embed" in k else t for k, t in official_parts["t5"].items()
    }
    save_file(t5, tmp_path / "t5.safetensors")
    line = ask("--t5", tmp_path / "t5.safetensors")
    assert "features of T5: 128, but the transformer takes 256" in line
    save_file(official_parts["clip_l"], tmp_path / "clip.safetensors")
    assert "pooled features of both CLIPs" in ask("--clip-g", tmp_path / "clip.safetensors")
    assert "is not a t5" in ask("--t5", tmp_path / "clip.safetensors")
    scaled = official_parts["t5"] | {"encoder.block.0.layer.0.SelfAttention.q.scale_weight":
                                     torch.ones(1)}  # fmt: skip
    save_file(scaled, tmp_path / "t5.safetensors")
    assert "8-bit weights with separate scales" in ask("--t5", tmp_path / "t5.safetensors")


def test_missing_and_misshapen_tensors_are_listed(ask, official_parts, tmp_path):
    vae = dict(official_parts["vae"])
    del vae["decoder.norm_out.bias"]
    clip = official_parts["clip_g"] | {"text_projection.weight": torch.zeros(3, 4)}
    path = tiny_official.write_single(
        official_parts | {"vae": vae, "clip_g": clip}, tmp_path / "m.safetensors"
    )
    line = ask(weights=path)
    assert "2 tensors missing or misshapen" in line and "vae lacks decoder.norm_out.bias" in line
    assert "text_projection.weight: has shape (3, 4), expected (128, 128)" in line


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("mmdit", "pos_embed"),
        ("mmdit", "x_embedder.proj.weight"),
        ("mmdit", "context_embedder.weight"),
        ("mmdit", "y_embedder.mlp.0.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("vae", "encoder.conv_in.weight"),
        ("vae", "encoder.down.0.block.0.conv1.weight"),
        ("clip_l", "text_model.embeddings.token_embedding.weight"),
        ("clip_g", "text_model.embeddings.position_embedding.weight"),
        ("t5", "encoder.embed_tokens.weight"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
@pytest.mark.parametrize("wrong", [torch.zeros(()), torch.zeros(7), torch.zeros(0, 1, 2, 2)])
def test_size_defining_tensors_are_checked(ask, official_parts, tmp_path, part, name, wrong):
    state = official_parts[part] | {name: wrong}
    path = tiny_official.write_single(official_parts | {part: state}, tmp_path / "m.safetensors")
    assert name in ask(weights=path)


def test_vocabularies_must_be_the_official_ones(ask, official_parts, tmp_path):
    embeddings = "text_model.embeddings"
    for part, name, rows, message in (
        ("clip_l", f"{embeddings}.token_embedding.weight", 20000, "a CLIP with 20000 tokens"),
        ("clip_g", f"{embeddings}.position_embedding.weight", 38, "length 38"),
        ("t5", "encoder.embed_tokens.weight", 16000, "a T5 with 16000 tokens"),
    ):
        state = official_parts[part] | {name: official_parts[part][name][:rows].contiguous()}
        path = tiny_official.write_single(
            official_parts | {part: state}, tmp_path / "m.safetensors"
        )
        assert message in ask(weights=path)


def test_quantised_weights_are_refused(ask, official_parts, tmp_path):
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    for extra, message in (
        ({"joint_blocks.0.x_block.mlp.fc1.scale_weight": torch.ones(1)}, "separate scales"),
        ({"joint_blocks.0.x_block.mlp.fc1.weight_scale": torch.ones(1)}, "separate scales"),
        ({name: official_parts["mmdit"][name].int()}, "has dtype torch.int32"),
    ):
        path = tiny_official.write_single(
            official_parts | {"mmdit": official_parts["mmdit"] | extra}, tmp_path / "m.safetensors"
        )
        assert message in ask(weights=path)
    vae = official_parts["vae"] | {"quant_conv.weight": torch.zeros(32, 32, 1, 1)}
    path = tiny_official.write_single(official_parts | {"vae": vae}, tmp_path / "m.safetensors")
    assert "quant_conv" in ask(weights=path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vae/config.json", {"shift_factor": None}, "shift_factor should be a number"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor should be a number"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor should be a number above 0"),
        ("vae/config.json", {"norm_num_groups": 7}, "norm_num_groups 7 does not divide"),
        ("scheduler/scheduler_config.json", {"shift": "abc"}, "shift should be a number"),
    ],
)
def test_invalid_folder_configs(ask, official_folder, tmp_path, file, change, message):
    folder = shutil.copytree(official_folder, tmp_path / "d")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    line = ask(weights=folder)
    assert message in line and file in line


def test_odd_names_and_shapes_in_a_folder(ask, official_folder, tmp_path):
    folder = shutil.copytree(official_folder, tmp_path / "d")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    whole, name = load_file(file), "transformer_blocks.0.attn.to_k.weight"
    for wrong in (whole[name][:, 1:].contiguous(), whole[name][1:].contiguous(), torch.zeros(())):
        save_file(whole | {name: wrong}, file)
        assert "joint_blocks.0.x_block.attn.qkv.weight" in ask(weights=folder)
    save_file(whole, file)
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(vae) | {"decoder.up_blocks.x.resnets.0.norm1.weight": torch.ones(1)}, vae)
    generate.main(["--weights", str(folder), "--report"])
    assert "one component of a diffusers folder" in ask(weights=file)


def test_activations_that_overflow(official_parts, tmp_path):
    """An error rather than a silently black image."""
    state = {k: t.clone() for k, t in official_parts["mmdit"].items()}
    state["joint_blocks.1.x_block.attn.proj.weight"] *= 1e6
    path = tiny_official.write_single(official_parts | {"mmdit": state}, tmp_path / "m.safetensors")
    small = {"height": 64, "width": 96, "steps": 2}
    with pytest.raises(InputError, match=r"proj.weight has values too large for torch.float16"):
        weights.load(path, dtype=torch.float16)("a cat", **small)
    state["joint_blocks.1.x_block.attn.proj.weight"] /= 5e1
    path = tiny_official.write_single(official_parts | {"mmdit": state}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"the latents: not finite.*try bfloat16 or float32"):
        weights.load(path, dtype=torch.float16)("a cat", **small)
    assert weights.load(path)("a cat", **small).std() > 1


@pytest.mark.parametrize("part", ["mmdit", "vae", "t5"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_the_weights(ask, official_parts, tmp_path, part, value):
    state = {k: t.clone() for k, t in official_parts[part].items()}
    name = next(k for k, t in state.items() if t.ndim > 1 and k != "pos_embed")
    state[name].view(-1)[7] = value
    path = tiny_official.write_single(official_parts | {part: state}, tmp_path / "m.safetensors")
    line = ask(weights=path)
    assert name in line and "holds NaN or infinity" in line


def test_an_encoder_that_overflows(official_parts, tmp_path):
    t5 = {k: t.clone() for k, t in official_parts["t5"].items()}
    t5["encoder.block.0.layer.0.SelfAttention.o.weight"].fill_(3e38)
    path = tiny_official.write_single(official_parts | {"t5": t5}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="t5: its output is not finite"):
        weights.load(path).encode_text(["a cat"])


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "100"], "nearest: 96 or 112"),
        (["--width", "1"], "nearest: 16 or 32"),
        (["--height", "4000"], "nearest: 192"),  # a grid of 12 patches of 16 pixels
        (["--skip-layers", "2"], "no layer 2; this model has 0 to 1"),
        (["--skip-layers", "0", "--steps", "2"], "none of 2 steps is in the part where it acts"),
        (["--skip-layers", "a,b"], "expected numbers as in 7,8,9"),
        (["--skip-scale", "2"], "no effect without --skip-layers"),
        (["--strength", "0.5"], "no effect without --init-image"),
        (["--mask", "m.png"], "no effect without --init-image"),
        (["--t5-length", "0"], "must be at least 1"),
        (["--count", "100001"], "argument --count: must be at most 100000, got 100001"),
        (["--threads", "9" * 4000], "argument --threads: must be at most 1000000000, got 999"),
        (["--steps", "100001"], "steps must be at most 100000, got 100001"),
        (["--dtype", "int8"], "invalid choice"),
        (["--run", "runs/mnist"], "name one of them"),
    ],
)
def test_options(ask, options, message, monkeypatch):
    monkeypatch.setattr(Pipeline, "generate_latents", None)  # nothing is drawn
    assert message in ask(*options)


def test_options_that_need_weights(capsys, monkeypatch, tiny_run, tmp_path):
    line = refused(capsys, generate.main, "7", "--run", tiny_run, "--t5", "x")
    assert f"{tiny_run}: a run has all its components; omit --t5" in line
    monkeypatch.chdir(tmp_path)  # where there is no runs/mnist
    assert "runs/mnist: no such file or folder" in refused(capsys, generate.main, "--report")


def test_sizes_of_mnist(capsys, tiny_run, tmp_path):
    line = refused(capsys, generate.main, "7", "--run", tiny_run, "--height", "30", "--out",
                   tmp_path / "x.png")  # fmt: skip
    assert "height 30: sizes of this model go in steps of 8 up to 44; nearest: 28 or 36" in line


def test_long_prompts_are_truncated_with_a_warning(official_file):
    pipeline = weights.load(official_file)
    small = {"height": 64, "width": 96, "steps": 1, "output": "latent"}
    with pytest.warns(UserWarning, match=r"too long for the CLIPs \(77 of 102 tokens kept\), cut"):
        cut = pipeline("cat " * 100, **small)
    assert cut.isfinite().all()


# --- the weights command --------------------------------------------------------------------------


def test_export_options(capsys, tiny_run, tmp_path):
    ask = lambda *options: refused(capsys, weights.main, *options)  # noqa: E731
    assert "export needs --layout" in ask("export", tiny_run)
    assert "belong to export" in ask("report", tiny_run, "--layout", "single")
    assert "must be named *.safetensors" in ask(
        "export", tiny_run, "--layout", "single", "--out", tmp_path / "m.bin"
    )
    (tmp_path / "there").mkdir()
    assert "exists already" in ask(
        "export", tiny_run, "--layout", "diffusers", "--out", tmp_path / "there"
    )
    assert "does not exist" in ask(
        "export", tiny_run, "--layout", "diffusers", "--out", tmp_path / "no" / "where"
    )
    assert "omit --t5" in ask("report", tiny_run, "--t5", "x")
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(capsys, tiny_run, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanosd3.storage.files.save_file", full)
    for layout, name in (("single", "m.safetensors"), ("diffusers", "d")):
        line = refused(capsys, weights.main, "export", tiny_run, "--layout", layout, "--out",
                       tmp_path / name)  # fmt: skip
        assert "No space left" in line and not list(tmp_path.iterdir())


def test_damaged_metadata(capsys, tiny_run, tmp_path):
    weights.main(["export", str(tiny_run), "--layout", "single", "--out",
                  str(tmp_path / "m.safetensors")])  # fmt: skip
    state = load_file(tmp_path / "m.safetensors")
    for text, message in (("{", "damaged"), ("{}", "damaged"), ('{"config": {}}', "is missing")):
        save_file(state, tmp_path / "m.safetensors", metadata={"nanosd3": text})
        assert message in refused(capsys, weights.main, "report", tmp_path / "m.safetensors")


def test_unfinished_run(capsys, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    del content["stages"]["flow"]
    (run / "run.json").write_text(json.dumps(content))
    assert "unfinished (no flow yet)" in refused(
        capsys,
        weights.main,
        "export",
        run,
        "--layout",
        "single",
        "--out",
        tmp_path / "m.safetensors",
    )


# --- images ---------------------------------------------------------------------------------------


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (96, 64), **save) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **save)
    return path


def test_plain_images_are_accepted(official_file, tmp_path):
    for name, mode in (("a.png", "RGB"), ("b.jpg", "RGB"), ("c.png", "L"), ("d.png", "1"),
                       ("e.tiff", "RGB"), ("f.tiff", "L")):  # fmt: skip
        out = tmp_path / f"{name}.out.png"
        source = picture(tmp_path / name, mode)
        assert generate.main(["a cat", "--weights", str(official_file), "--steps", "2",
                              "--init-image", str(source), "--out", str(out)]) == 0  # fmt: skip
        with Image.open(out) as image:
            assert image.size == (96, 64)


NEAR = {"steps": 4, "strength": 0.5}  # the image given still shows


def images_from(weights_file: Path, source: Path, *options: object) -> np.ndarray:
    """What `generate` makes of an --init-image, as an array."""
    out = source.with_suffix(".npy")
    arguments = ["a cat", "--weights", weights_file, "--out", out, *options]
    arguments += [x for key, value in NEAR.items() for x in (f"--{key}", value)]
    assert generate.main([*map(str, arguments), "--init-image", str(source)]) == 0
    return np.load(out)


def notes(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def translucent(mode: str = "RGBA") -> Image.Image:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 4), np.uint8))
    return image.convert(mode)


def on_white(image: Image.Image) -> np.ndarray:
    """Composited on white, by Pillow."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha(capsys, official_file, tmp_path, mode):
    source, image = tmp_path / "a.png", translucent(mode)
    image.save(source)
    images = images_from(official_file, source)
    assert notes(capsys) == [f"note: {source}: transparency placed on white"]
    pipeline = weights.load(official_file)
    assert np.array_equal(images, pipeline("a cat", image=on_white(image), **NEAR))
    assert np.array_equal(images, pipeline("a cat", image=image, **NEAR))  # in memory, too
    assert not np.array_equal(
        images, pipeline("a cat", image=np.array(image.convert("RGB")), **NEAR)
    )


def test_palette_and_transparent_palette(capsys, official_file, tmp_path):
    pipeline = weights.load(official_file)
    for options, more in (({}, []), ({"transparency": 0}, ["transparency placed on white"])):
        source = picture(tmp_path / "a.png", "P", **options)
        images = images_from(official_file, source)
        lines = [f"note: {source}: {note}" for note in ["converted from palette", *more]]
        assert notes(capsys) == lines
        with Image.open(source) as image:
            expected = on_white(image) if options else np.array(image.convert("RGB"))
            assert (expected != np.array(image.convert("RGB"))).any() == bool(options)
        assert np.array_equal(images, pipeline("a cat", image=expected, **NEAR))


def test_other_colour_modes(capsys, official_file, tmp_path):
    source = picture(tmp_path / "a.jpg", "CMYK")
    images = images_from(official_file, source)
    assert notes(capsys) == [f"note: {source}: converted from CMYK"]
    with Image.open(source) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(images, weights.load(official_file)("a cat", image=expected, **NEAR))


def test_sixteen_bits(ask, tmp_path):
    Image.fromarray(np.full((64, 96), 40000, np.uint16)).save(tmp_path / "a.png")
    assert "a.png: has more than 8 bits a channel" in ask("--init-image", tmp_path / "a.png")
    rows = b"".join(b"\0" + bytes(96 * 6) for _ in range(64))  # RGB, which Pillow would halve
    size = struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ))  # fmt: skip
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == "RGB"
    assert "b.png: has more than 8 bits a channel" in ask("--init-image", tmp_path / "b.png")
    frames = [Image.new("RGB", (96, 64), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "c.tiff", save_all=True, append_images=frames[1:])
    assert "has 2 frames" in ask("--init-image", tmp_path / "c.tiff")
    Image.new("LAB", (96, 64)).save(tmp_path / "d.tiff")
    assert "d.tiff: has the colour mode LAB" in ask("--init-image", tmp_path / "d.tiff")


def test_sixteen_pixels_are_not_sixteen_bits(official_file, tmp_path):
    for name in ("a.png", "b.tiff", "c.bmp"):
        source, out = picture(tmp_path / name, size=(16, 16)), tmp_path / f"{name}.npy"
        assert generate.main(["a cat", "--weights", str(official_file), "--steps", "2", "--out",
                              str(out), "--init-image", str(source)]) == 0  # fmt: skip
        assert np.load(out).shape[1:] == (16, 16, 3)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff"])
def test_exif_rotation(capsys, official_file, tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = picture(tmp_path / name, exif=exif)
    images = images_from(official_file, source)
    assert images.shape == (1, 96, 64, 3)  # stored as 64x96
    assert notes(capsys) == [f"note: {source}: rotated by its EXIF tag"]
    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image)
    pipeline = weights.load(official_file)
    assert np.array_equal(images, pipeline("a cat", image=np.array(upright), **NEAR))


def test_plain_pictures_have_no_notes(capsys, official_file, tmp_path):
    for name, mode in (("a.png", "RGB"), ("b.jpg", "L"), ("c.png", "RGBA")):  # an opaque alpha
        images_from(official_file, picture(tmp_path / name, mode))
        assert notes(capsys) == []


def test_not_an_image(ask, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    assert "is not an image of a known format" in ask("--init-image", tmp_path / "a.png")
    assert "no such file" in ask("--init-image", tmp_path / "none.png")
    whole = picture(tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    assert "b.png" in ask("--init-image", tmp_path / "b.png")


def test_images_of_another_size(ask, tmp_path):
    line = ask("--init-image", picture(tmp_path / "a.png", size=(64, 64)))
    assert "image: is 64x64 (height x width), but 64x96 is asked for" in line
    good = picture(tmp_path / "b.png")
    mask = picture(tmp_path / "m.png", "L", size=(64, 64))
    line = ask("--init-image", good, "--mask", mask)
    assert "mask: is 64x64 (height x width), but the image is 64x96" in line
    line = ask("--init-image", good, "--mask", good)
    assert "a mask is black and white" in line
    translucent("LA").save(tmp_path / "m.png")
    line = ask("--init-image", good, "--mask", tmp_path / "m.png")
    assert "m.png: a mask must be opaque" in line and "without an alpha channel" in line
    Image.new("L", (96, 64)).save(tmp_path / "m.png")
    assert "nothing is marked" in ask("--init-image", good, "--mask", tmp_path / "m.png")
    assert "less than one step" in ask("--init-image", good, "--strength", "1e-18")
    assert "strength must be above 0" in ask("--init-image", good, "--strength", "1.5")


def test_image_size_must_be_divisible(capsys, official_file, tmp_path):
    odd = picture(tmp_path / "a.png", size=(100, 64))
    line = refused(capsys, generate.main, "a cat", "--weights", official_file, "--init-image", odd,
                   "--out", tmp_path / "x.png")  # fmt: skip
    assert "width 100" in line and "nearest: 96 or 112" in line


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("LAB", (96, 64)), "image: has the colour mode LAB"),
        (Image.new("I;16", (96, 64)), "image: has more than 8 bits"),
        ("photo.png", "image: expected an array of pixels or a Pillow image, got a str"),
        (np.zeros((2, 64, 96, 3), np.uint8), "2 images for 1 prompts"),
        (np.zeros((64, 96), np.uint8), r"expected \(H, W, 3\)"),
    ],
)
def test_images_in_memory(official_file, picture, message):
    with pytest.raises(InputError, match=message):
        weights.load(official_file)("a cat", image=picture)


def test_masks_in_memory(official_file):
    image = np.zeros((64, 96, 3), np.uint8)
    with pytest.raises(InputError, match="mask: expected bool or uint8"):
        weights.load(official_file)("a cat", image=image, mask=np.ones((64, 96), np.uint16))

    for mask, message in (
        (Image.new("RGBA", (96, 64)), "mask: a mask must be opaque"),
        (Image.new("RGB", (96, 64), "red"), "mask: a mask is black and white"),
    ):
        with pytest.raises(InputError, match=message):
            weights.load(official_file)("a cat", image=image, mask=mask)


def test_masks_are_turned_with_their_picture(capsys, official_file, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((64, 96), np.uint8)
    stored[:32] = 255
    source, mask = picture(tmp_path / "a.png", exif=exif), tmp_path / "m.png"
    Image.fromarray(stored).save(mask, exif=exif)
    images = images_from(official_file, source, "--mask", mask)
    assert notes(capsys) == [f"note: {path}: rotated by its EXIF tag" for path in (source, mask)]
    with Image.open(source) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    turned = np.rot90(stored, -1) >= 128
    expected = weights.load(official_file)("a cat", image=upright, mask=turned, **NEAR)
    assert np.array_equal(images, expected)


def test_colours_for_a_grey_model(capsys, tiny_run, tmp_path):
    source, out = picture(tmp_path / "a.png", size=(28, 28)), tmp_path / "x.npy"
    arguments = ["7", "--run", tiny_run, "--init-image", source, "--out", out, "--count", 1]
    assert generate.main([str(argument) for argument in arguments]) == 0
    assert notes(capsys) == [f"note: {source}: converted to greyscale"]
    with Image.open(source) as image:
        greys = np.array(image.convert("L"))
    assert np.array_equal(np.load(out), weights.load(tiny_run)("7", image=greys))


def test_invalid_pipeline_arguments(official_file):
    pipeline = weights.load(official_file)
    with pytest.raises(InputError, match=r"noise: has shape \(1, 16, 8, 8\), expected"):
        pipeline("a cat", height=64, width=96, noise=torch.zeros(1, 16, 8, 8))
    with pytest.raises(InputError, match="strength has no effect without an image"):
        pipeline("a cat", strength=0.5)
    with pytest.raises(InputError, match="mask has no effect without an image"):
        pipeline("a cat", mask=np.ones((64, 96), bool))
    with pytest.raises(InputError, match="expected uint8 pixels"):
        pipeline("a cat", image=np.zeros((64, 96, 3)))
    with pytest.raises(InputError, match=r"steps must be a whole number, got 2\.5"):
        pipeline("a cat", steps=2.5)
    with pytest.raises(InputError, match="height must be a whole number"):
        pipeline("a cat", height=64.0)
    with pytest.raises(InputError, match="is not valid Unicode"):
        pipeline("caf\udce9")
    with pytest.raises(InputError, match="a prompt must be text"):
        pipeline(["a cat", 7])


def test_bench_options(capsys):
    assert "invalid choice" in refused(capsys, bench.main, "forward", "--against", "magic")
    assert "tiny is small" in refused(capsys, bench.main, "memory", "--config", "tiny")
