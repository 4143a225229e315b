"""Weights in folders: every usual name is taken, and what is not understood is refused by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import refused

from nanosd3 import generate, weights
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.find_parts import open_component, open_diffusers
from nanosd3.official.folders import open_folder
from nanosd3.official.key_names import PREFIXES

TENSORS = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], pattern: str, index: str | None
) -> list[Path]:
    """Two shards, `{}` in whose name is the number, and an index of them."""
    names, weight_map, shards = list(tensors), {}, []
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        shard = folder / pattern.format(f"{number:05}-of-00002")
        write(shard, {name: tensors[name] for name in some})
        weight_map |= dict.fromkeys(some, shard.name)
        shards.append(shard)
    if index:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return shards


def values(state: dict) -> dict[str, list[float]]:
    return {name: tensor.read().tolist() for name, tensor in sorted(state.items())}


EXPECTED = {name: tensor.tolist() for name, tensor in TENSORS.items()}


# --- usual names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        ("pytorch_model-{}.bin", "pytorch_model.bin.index.json"),
        ("pytorch_model.fp16-{}.bin", "pytorch_model.bin.index.fp16.json"),
        ("model-{}.safetensors", "model.safetensors.index.json"),
        ("model.fp16-{}.safetensors", "model.safetensors.index.fp16.json"),
        ("model-{}.fp16.safetensors", "model.safetensors.fp16.index.json"),
        ("model.bf16-{}.safetensors", "model.safetensors.index.bf16.json"),
        ("diffusion_pytorch_model.bf16-{}.safetensors", None),
        ("pytorch_model-{}.bin", None),
        ("model-{}.safetensors", None),
    ],
)
def test_shards_of_any_name(tmp_path, pattern, index):
    write_shards(tmp_path, TENSORS, pattern, index)
    assert values(open_folder(tmp_path, "model")) == EXPECTED


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.bin", "pytorch_model.bin", "pytorch_model.fp16.bin",
     "model.fp32.safetensors", "model.non_ema.safetensors", "diffusion_pytorch_model.fp8.bin"],
)  # fmt: skip
def test_whole_files_of_any_variant(tmp_path, name):
    write(tmp_path / name, TENSORS)
    (tmp_path / "training_args.bin").write_bytes(b"of no interest")
    assert values(open_folder(tmp_path, "model")) == EXPECTED


def test_the_variant_without_a_name_is_preferred(tmp_path):
    for i, name in enumerate(("model.bf16.bin", "model.fp16.bin", "model.fp16.safetensors",
                              "pytorch_model.bin", "model.safetensors")):  # fmt: skip
        write(tmp_path / name, {"a": torch.full((1,), float(i))})
        expected = [0.0, 1.0, 2.0, 3.0, 4.0][i]
        assert values(open_folder(tmp_path, "model")) == {"a": [expected]}


def test_an_index_without_its_shards_does_not_count(tmp_path):
    """As after a download of all JSON files and one variant."""
    write_shards(tmp_path, TENSORS, "model.fp16-{}.safetensors", "model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "i.json")
    plain = {"weight_map": dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(plain))
    assert values(open_folder(tmp_path, "model")) == EXPECTED


# --- not understood -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["t5xxl_fp16.safetensors", "model.gguf", "flax_model.msgpack", "tf_model.h5", "model.onnx",
     "onnx/model.onnx", "weights.pth", "MODEL.SAFETENSORS", "model.safetensors.incomplete",
     "adapter_model.safetensors", "openvino_model.bin", "model.ckpt", "model.safetensors (1)",
     "t5.tar.gz", "rust_model.ot", "__0_0.distcp", "q8_0", "model.onnx_data",
     "w.data-00000-of-00001", "t5xxl.safetensors.index.json", "Data/model.plan"],
)  # fmt: skip
def test_weights_under_other_names_are_refused(tmp_path, name):
    for text in ("config.json", "README.md", "LICENSE", "spiece.model", "merges.v1.2.txt"):
        (tmp_path / text).write_text("{}")
    (tmp_path / "onnx").mkdir()
    assert open_folder(tmp_path, "model") == {}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds no model\.safetensors or \.bin") as error:
        open_folder(tmp_path, "model")
    assert name in str(error.value) and str(tmp_path) in str(error.value)


def test_incomplete_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"model.safetensors: no such file"):
        open_folder(tmp_path, "model")
    (tmp_path / "model.safetensors").unlink()
    first, second = write_shards(tmp_path, TENSORS, "model-{}.safetensors", None)
    first.unlink()
    with pytest.raises(InputError, match=r"00002-of-00002.*: shard 1 of 2 is missing beside it"):
        open_folder(tmp_path, "model")
    second.unlink()
    for variant in ("a", "b"):
        write(tmp_path / f"model.{variant}.bin", TENSORS)
    with pytest.raises(InputError, match="holds the variants a, b; keep one of them"):
        open_folder(tmp_path, "model")


def test_a_folder_that_may_not_be_read_is_not_empty(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nanosd3.official.folders.os.listdir", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        open_folder(tmp_path, "model")


@pytest.fixture
def folder(official_folder, tmp_path) -> Path:
    """The diffusers folder as links, any of which may be replaced."""
    return shutil.copytree(official_folder, tmp_path / "d", copy_function=os.symlink)


T5_FILE = "text_encoder_3/model.safetensors"


def test_bin_shards_of_t5_are_read(folder, official_parts):
    """As transformers saves them without safetensors."""
    whole = folder / T5_FILE
    tensors = load_file(whole)
    whole.unlink()
    write_shards(whole.parent, tensors, "pytorch_model-{}.bin", "pytorch_model.bin.index.json")
    t5 = open_checkpoint(folder).parts["t5"]
    assert t5.keys() >= official_parts["t5"].keys()
    assert all(torch.equal(t5[k].read(), t) for k, t in official_parts["t5"].items())


def test_nothing_is_drawn_or_exported_without_a_t5_that_is_there(capsys, folder, tmp_path):
    (folder / T5_FILE).rename(folder / "text_encoder_3/t5xxl.safetensors")
    out = tmp_path / "out.safetensors"
    for command, options in (
        (generate.main, ["a cat", "--model", folder, "--out", tmp_path / "cat.png"]),
        (weights.main, ["report", folder]),
        (weights.main, ["export", folder, "--layout", "single", "--out", out]),
    ):
        line = refused(capsys, command, *options)
        assert "text_encoder_3: holds no model.safetensors" in line and "t5xxl.safetensors" in line
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    t5 = folder / "text_encoder_3/t5xxl.safetensors"
    assert "t5" in open_checkpoint(folder, {"t5": t5}).parts


@pytest.mark.parametrize(
    "place", ["t5xxl_fp16.safetensors", "text_encoders/t5xxl.gguf", "T5/model.safetensors",
              "Text_Encoder_3/model.safetensors"],
)  # fmt: skip
def test_a_t5_elsewhere_in_the_folder_is_not_absent(capsys, folder, place):
    (folder / "text_encoders").mkdir()
    for other in ("text_encoders/clip_l.safetensors", "sd3.safetensors", "T5.md"):
        (folder / other).write_bytes(b"x")
    assert "t5" in open_checkpoint(folder).parts
    t5 = (folder / T5_FILE).resolve()
    shutil.rmtree(folder / "text_encoder_3")
    assert "t5" not in open_checkpoint(folder).parts
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(t5)
    line = refused(capsys, weights.main, "report", folder)
    assert f"has no weights in text_encoder_3, but {place}; name the file or fol" in line
    assert "(--t5), or move it away" in line
    assert "t5" in open_checkpoint(folder, {"t5": t5}).parts


def test_a_part_that_is_no_folder_is_refused(folder):
    place = folder / "text_encoder_3"
    shutil.rmtree(place)
    assert "t5" not in open_diffusers(folder, [])
    place.symlink_to(folder / "gone")
    with pytest.raises(InputError, match=r"text_encoder_3: is a file or a broken link"):
        open_checkpoint(folder)
    place.unlink()
    place.write_bytes(b"")
    with pytest.raises(InputError, match=r"text_encoder_3: .*expected a folder"):
        open_checkpoint(folder)


def test_folders_of_single_files_are_named(official_file, tmp_path):
    (tmp_path / "sd3.5_medium.safetensors").symlink_to(official_file)
    (tmp_path / "text_encoders").mkdir()
    with pytest.raises(InputError, match=r"no transformer/.*; found sd3.5_medium.safetensors, tex"):
        open_checkpoint(tmp_path)


# --- components given by an option ----------------------------------------------------------------


def folders_of(state: dict) -> set[Path]:
    return {tensor.file.parent for tensor in state.values()}


def test_t5_may_be_a_folder_a_shard_or_an_index(official_file, official_parts, tmp_path):
    folder = tmp_path / "text_encoder_3"
    folder.mkdir()
    shards = write_shards(
        folder, official_parts["t5"], "t5-{}.safetensors", "t5.safetensors.index.json"
    )
    for path in (shards[1], folder / "t5.safetensors.index.json"):
        t5 = open_component("t5", path)
        assert t5.keys() == official_parts["t5"].keys() and folders_of(t5) == {folder}
    with pytest.raises(InputError, match=r"holds no model.safetensors.*t5-00001-of-00002"):
        open_checkpoint(official_file, {"t5": folder})
    for shard in shards:
        shard.rename(folder / shard.name.replace("t5", "model"))
    for path in (folder, tmp_path):  # the component's own folder, or that of all of them
        assert folders_of(open_component("t5", path)) == {folder}
    assert folders_of(open_checkpoint(official_file, {"t5": folder}).parts["t5"]) == {folder}
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="shard 1 of 2 is missing beside it"):
        open_component("t5", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="no such file"):
        open_component("t5", folder / "model-00001-of-00002.safetensors")


def test_an_autoencoder_and_clips_may_be_folders(official_folder, tmp_path):
    for name, subfolder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"),
                            ("vae", "vae")):  # fmt: skip
        for path in (official_folder / subfolder, official_folder):
            assert folders_of(open_component(name, path)) == {official_folder / subfolder}
    with pytest.raises(InputError, match=r"holds no weights; expected model.safetensors"):
        open_component("t5", tmp_path)


def test_a_single_file_in_shards(official_parts, tmp_path):
    state = {PREFIXES[p] + k: t for p in ("mmdit", "vae") for k, t in official_parts[p].items()}
    shards = write_shards(tmp_path, state, "sd3-{}.safetensors", None)
    parts = open_checkpoint(shards[0]).parts
    assert {p: set(state) for p, state in parts.items()} == {
        p: set(official_parts[p]) for p in ("mmdit", "vae")
    }


def test_a_shard_of_a_folder_is_told_what_to_name(official_folder, tmp_path):
    state = load_file(official_folder / "transformer/diffusion_pytorch_model.safetensors")
    shards = write_shards(tmp_path, state, "diffusion_pytorch_model-{}.safetensors", None)
    with pytest.raises(InputError, match="is one component of a diffusers folder; name the folder"):
        open_checkpoint(shards[1])
