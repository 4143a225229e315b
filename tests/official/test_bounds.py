"""No work in proportion to a stranger's number: one line for each, before anything is built."""

import io
import itertools
import json
import os
import shutil
import tracemalloc
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import checkpoints, tiny_official
from support.checkpoints import Rebuilt, Storage, dense
from support.commands import refused

from nanosd3 import components, weights
from nanosd3.components import COMPONENTS
from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.official import pickles
from nanosd3.official.checkpoint import METADATA_FILE, open_checkpoint
from nanosd3.official.detect import config_of
from nanosd3.official.export import export
from nanosd3.official.folders import open_folder
from nanosd3.official.limits import limited_config
from nanosd3.official.tensor_files import open_weights
from nanosd3.official.tensors import in_memory
from nanosd3.storage.files import parse_json, read_json
from nanosd3.storage.run import Run
from nanosd3.storage.shards import Shards
from nanosd3.text import Tokenizers

PATH = Path("m.safetensors")
DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def tokenizers_read_once(monkeypatch):
    monkeypatch.setattr(Tokenizers, "official", checkpoints.official_tokenizers)


@pytest.fixture
def asked(capsys):
    """The line that refuses a path: short, and printable."""

    def asked(path: Path, *options: object) -> str:
        line = refused(capsys, weights.main, "report", path, *options)
        assert line.isprintable() and len(line) < 4000
        return line

    return asked


@pytest.fixture
def sized(tmp_path, monkeypatch):
    """A tiny model with some tensors of other names and shapes. No network of more than 99 blocks
    may be built of it."""
    built = components.on_meta

    def watched(config, name):
        assert config.mmdit.depth < 99 and config.text.clip_l.layers < 99
        assert config.text.t5.layers < 99 and len(config.vae.channels) < 9
        return built(config, name)

    monkeypatch.setattr(components, "on_meta", watched)

    def sized(part: str, metadata: dict | None = None, **shapes: tuple[int, ...]) -> Path:
        parts = {
            name: {
                key: in_memory(key, torch.empty(shape, device="meta"), PATH)
                for key, shape in components.shapes(tiny_official.CONFIG, name).items()
            }
            for name in COMPONENTS
        }
        for key, shape in shapes.items():
            parts[part][key] = in_memory(key, torch.empty(shape, device="meta"), PATH)
        return checkpoints.sparse_file(parts, tmp_path / PATH, metadata=metadata)

    return sized


@pytest.fixture
def tiny_folder(tiny_run, tmp_path) -> Path:
    """An exported run, whose nanosd3.json may be changed."""
    export(open_checkpoint(tiny_run), "diffusers", tmp_path / "exported")
    return tmp_path / "exported"


# --- counts in names and shapes -------------------------------------------------------------------


@pytest.mark.parametrize("number", ["5000", "20000", "9" * 400, "007", "\u0663"])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("clip_l", "text_model.encoder.layers.{}.mlp.fc1.bias"),
        ("t5", "encoder.block.{}.layer.0.layer_norm.weight"),
        ("mmdit", "joint_blocks.{}.x_block.mlp.fc1.bias"),
        ("vae", "decoder.up.{}.block.0.norm1.bias"),
        ("vae", "encoder.down.0.block.{}.norm1.bias"),
    ],
)
def test_a_layer_of_any_number(asked, sized, part, name, number):
    line = asked(sized(part, **{name.format(number): (3,)}))
    if part == "vae":  # another level or block, without its other tensors
        assert (
            "has no tensor encoder.down.4.block.0.conv1" in line or "lacks encoder.down.0" in line
        )
    else:
        assert f"{part} lacks " in line or f"{part} of this size has no " in line


def test_a_number_too_long_to_print(asked, sized):
    path = sized("clip_l", **{f"text_model.encoder.layers.{'9' * 5000}.mlp.fc1.bias": (3,)})
    assert "a tensor has a name of 5" in asked(path)


def test_numbers_in_a_diffusers_folder(official_folder, tmp_path, asked):
    """Levels of the decoder are counted down."""
    folder = tmp_path / "d"
    shutil.copytree(official_folder, folder, copy_function=os.symlink)
    for number in ("5000", "9" * 400):
        state = {f"decoder.up_blocks.{number}.resnets.0.norm1.bias": torch.zeros(3)}
        file = folder / "vae/diffusion_pytorch_model.safetensors"
        file.unlink()
        save_file(load(official_folder / "vae" / file.name) | state, file)
        assert "tensors missing, misshapen or unknown: vae lacks" in asked(folder)


def load(path: Path) -> dict[str, torch.Tensor]:
    return {key: tensor.read() for key, tensor in open_weights(path).items()}


@pytest.mark.parametrize(
    ("part", "shapes", "message"),
    [
        ("mmdit", {"x_embedder.proj.weight": (64 * 5000, 16, 2, 2)}, "so 5000 blocks deep, but"),
        ("t5", {"{}relative_attention_bias.weight": (32, 1000)}, "1000 heads, but queries of 64"),
        ("t5", {"{}relative_attention_bias.weight": (9, 4)}, "shape (9, 4), expected (32, 4)"),
        ("t5", {"{}q.weight": (10**9, 1)}, "expected (1000000000, 256)"),
        ("mmdit", {"y_embedder.mlp.0.weight": (128, 2**24)}, "pooled features of both CLIPs"),
        ("mmdit", {"context_embedder.weight": (128, 2**24)}, "features of T5: 256"),
        ("mmdit", {"pos_embed": (1, 10**8, 128)}, ""),
        ("vae", {"decoder.conv_in.weight": (64, 2**20, 3, 3)}, "latent channels of the autoenc"),
    ],
)  # fmt: skip
def test_sizes_out_of_all_proportion(asked, sized, part, shapes, message):
    attention = "encoder.block.0.layer.0.SelfAttention."
    path = sized(part, **{key.format(attention): shape for key, shape in shapes.items()})
    if message:
        assert message in asked(path)
    else:
        weights.main(["report", str(path)])  # a large grid is only read when it is used


def test_clips_too_wide_for_their_places(sized):
    """What is left for an absent one would be negative."""
    checkpoint = open_checkpoint(sized("mmdit"))
    parts = {name: state for name, state in checkpoint.parts.items() if name != "clip_g"}
    narrow = {"y_embedder.mlp.0.weight": in_memory("y", torch.empty(128, 60), PATH)}
    with pytest.raises(InputError, match="CLIPs 64 and -4 wide do not fit"):
        config_of(parts | {"mmdit": parts["mmdit"] | narrow}, PATH)


# --- counts and numbers in configs ----------------------------------------------------------------


def changed(content: dict, field: str, value: object) -> dict:
    """A copy of nested dictionaries with one leaf replaced."""
    content = json.loads(json.dumps(content))
    *path, last = field.split(".")
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = value
    return content


HUGE = 10**400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mmdit.depth", -1),
        ("mmdit.depth", 0),
        ("mmdit.depth", 10**6),
        ("mmdit.depth", HUGE),
        ("mmdit.grid", 10**6),
        ("mmdit.grid_sample", 0),
        ("mmdit.grid_span", 0),
        ("mmdit.patch_size", 0),
        ("mmdit.dual_attention", [5]),
        ("mmdit.dual_attention", [[1]]),
        ("mmdit.latent_channels", 5),
        ("mmdit.context_dim", 4),
        ("mmdit.pooled_dim", 4),
        ("vae.channels", []),
        ("vae.channels", [8] * 99),
        ("vae.channels", [0, 8]),
        ("vae.channels", [10**9]),
        ("vae.channels", ["8"]),
        ("vae.blocks", 10**6),
        ("vae.norm_groups", 0),
        ("vae.norm_groups", 3),
        ("vae.shift", HUGE),
        ("vae.shift", float("nan")),
        ("vae.scale", HUGE),
        ("vae.scale", 0.0),
        ("vae.scale", -1.0),
        ("vae.scale", float("nan")),
        ("vae.scale", float("inf")),
        ("text.clip_l.pad", 10**6),
        ("text.clip_l.pad", -2),
        ("text.clip_l.layers", 10**5),
        ("text.clip_l.heads", 3),
        ("text.clip_l.activation", "relu"),
        ("text.clip_g.length", 10**9),
        ("text.clip_g.vocab", 10**9),
        ("text.t5.layers", 10**5),
        ("text.t5.length", 0),
        ("text.t5.hidden", 10**9),
        ("text.t5.width", 4),
        ("padding", -5),
        ("padding", 16),
        ("image_size", 0),
        ("name", "a\nb"),
        ("name", "\x1b[31m"),
        ("name", "x" * 9999),
        ("sampling.sampler", "evil"),
        ("sampling.shift", HUGE),
        ("sampling.shift", 0.0),
        ("sampling.steps", 0),
        ("sampling.guidance", float("nan")),
    ],
)
def test_numbers_in_a_config(field, value):
    content = changed(asdict(CONFIGS["tiny"]), field, value)
    with pytest.raises(InputError) as error:
        limited_config(content, PATH)
    line = str(error.value)
    assert line.startswith(f"{PATH}: config.") and line.isprintable() and len(line) < 200
    assert field.split(".")[0] in line


def test_all_configs_are_within_the_limits():
    for config in CONFIGS.values():
        assert limited_config(json.loads(json.dumps(asdict(config))), PATH) == config


def test_a_config_with_an_odd_field():
    content = asdict(CONFIGS["tiny"]) | {"a\n\ud800" + "b" * 999: 1}
    with pytest.raises(InputError, match="is unknown") as error:
        limited_config(content, PATH)
    assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_an_exported_model(asked, tiny_folder):
    """nanosd3.json in a folder; and tokenizers that do not belong to it."""
    index = tiny_folder / METADATA_FILE
    content = read_json(index)
    for field, value, message in (
        ("config.mmdit.depth", 10**6, "config.mmdit.depth should be from 1 to 64"),
        ("config.sampling.sampler", "evil", "config.sampling.sampler is none of"),
        ("tokenizers.clip_vocab", 10**9, "do not have the vocabularies of its config"),
        ("tokenizers.t5_pieces", [], "damaged tokenizers"),
        ("tokenizers.t5_pieces", [["a", "b"]] * 9, "damaged tokenizers"),
        ("tokenizers", "x", "damaged tokenizers"),
        ("tokenizers.words", 5, "damaged tokenizers"),
    ):
        index.write_text(json.dumps(changed(content, field, value)))
        assert message in asked(tiny_folder)
    index.write_text(DEEP)
    assert "cannot be read: not valid JSON" in asked(tiny_folder)


def test_the_index_of_a_run(capsys, tiny_run, tmp_path, asked):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("cache"))
    content = read_json(run / "run.json")
    for field, value, message in (
        ("config.mmdit.depth", 10**6, "config.mmdit.depth should be from"),
        ("stages.autoencoder.scale", "1", "no shift and scale"),
        ("stages.autoencoder.scale", 0.0, "stages.autoencoder.scale should be from"),
        ("stages.autoencoder", [1], "no shift and scale"),
    ):
        (run / "run.json").write_text(json.dumps(changed(content, field, value)))
        assert message in asked(run)


# --- JSON, wherever it is read --------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"a":' * 900 + "1" + "}" * 900,  # which Python can read, but not all that it is given to
        "1" * 5000,
        r'{"a": "\ud800"}',
        r'{"\uDFFF": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b"{\x00}",
    ],
)
def test_odd_json_in_every_place(tmp_path, text, capsys):
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InputError, match="x: not valid JSON") as error:
        parse_json(content, "x")
    assert str(error.value).isprintable() and len(str(error.value)) < 200
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        Run.read(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        open_folder(tmp_path, "model")
    (tmp_path / "manifest.json").write_bytes(content)
    assert not Shards(tmp_path).shards and "cannot be read" in capsys.readouterr().out
    (tmp_path / "log.jsonl").write_bytes(content + b'\n[1]\n5\n{"stage": "flow", "loss": 1}\n')
    assert Run(tmp_path, {}, {}).read_log("flow") == [{"stage": "flow", "loss": 1}]


def test_odd_json_in_a_header_and_in_a_folder(asked, sized, official_folder, tmp_path):
    folder = shutil.copytree(official_folder, tmp_path / "d", copy_function=os.symlink)
    for name in ("vae", "scheduler", "transformer", "text_encoder", "text_encoder_3"):
        file = next(folder.glob(f"{name}/*config.json"))
        whole = file.read_bytes()
        file.unlink()
        file.write_text(DEEP)
        assert f"{file}: cannot be read: not valid JSON" in asked(folder)
        file.write_bytes(whole)
    path = sized("mmdit", metadata={"nanosd3": DEEP})
    assert "its nanosd3 metadata is damaged: not valid JSON" in asked(path)


def test_pairs_of_surrogates_are_a_character():
    assert parse_json(r'"\ud83d\ude00"', "x") == "\U0001f600"


# --- names of tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a\u202eb", "a\0b", "x" * 9999, "\ud800"])
def test_odd_names_are_never_printed(asked, tmp_path, name):
    torch.save({name: torch.zeros(3)}, tmp_path / "m.ckpt")
    assert "a tensor has a name of" in asked(tmp_path / "m.ckpt")
    if name != "\ud800":  # the library refuses it
        save_file({name: torch.zeros(3)}, tmp_path / PATH)
        assert "a tensor has a name of" in asked(tmp_path / PATH)


# --- pickles --------------------------------------------------------------------------------------


def ckpt(tmp_path: Path, content: object, **storages: bytes) -> Path:
    return checkpoints.zip_checkpoint(tmp_path / "m.ckpt", content, storages)


def tensors_of_kinds() -> dict[str, torch.Tensor]:
    numbers = torch.tensor([1j, 2j])
    return {
        "sparse": torch.eye(3).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "meta": torch.empty(3, device="meta"),
        "conjugated": numbers.conj(),
        "negated": numbers.conj().imag,
    }


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense(asked, tmp_path):
    for kind, tensor in tensors_of_kinds().items():
        torch.save({"weight": tensor}, tmp_path / "m.ckpt")
        assert "tensor 'weight' is " in (line := asked(tmp_path / "m.ckpt")) and kind in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": dense(Storage("0", 100), 100)}, "tensor 'a' is cut short"),
        ({"a": dense(Storage("0", 4), 100)}, "tensor 'a' is cut short"),
        ({"a": dense(Storage("1", 4), 4)}, "tensor 'a' is cut short"),
        ({"a": Rebuilt(Storage("0", 4), 3, (2,), (1,), False, None)}, "tensor 'a' is cut short"),
        ({"a": Rebuilt(Storage("0", 4), -1, (2,), (1,), False, None)}, "an impossible shape"),
        ({"a": Rebuilt(Storage("0", 4), 0, (2, 2), (1,), False, None)}, "an impossible shape"),
        ({"a": Rebuilt(Storage("0", 4), 0, (2**70,), (0,), False, None)}, "an impossible shape"),
        ({"a": Rebuilt(Storage("0", 4), 0, (2.0,), (1,), False, None)}, "an impossible shape"),
        ({"a": Rebuilt(Storage("0", 4), 0, (1,) * 99, (1,) * 99, False, None)}, "an impossible"),
        ({"a": Rebuilt(Storage("0", 4), 0, [1], (1,), False, None)}, "a tensor without"),
        ({"a": Rebuilt(Storage("0", 4), 0, "1", (1,), False, None)}, "a tensor without"),
        ({"a": Rebuilt(dense(Storage("0", 4), 4), 0, (1,), (1,), False, 0)}, "a tensor without"),
        ({"a": dense(Storage("0", 2**70), 4)}, "a storage of impossible size"),
        ([1, 2], "holds a list, not named tensors"),
        (dense(Storage("0", 4), 4), "holds a tensor, not named tensors"),
        (b"\x80\x02}", "damaged or not a checkpoint"),
        (b"\x80\x02]" + b"(" * 3000, "more than 2,000 objects"),
        (b"\x80\x02" + b"}" * 2**25, "has 34 MB, more than any model's"),
        (b"\x80\x02L" + b"9" * 5000 + b"\n.", "damaged or not a checkpoint"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fx.", "damaged or not a checkpoint"),
        (b"\x80\x02h\x09.", "damaged or not a checkpoint"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged or not a checkpoint"),
        (b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "holds pickled Python objects"),
        (b"\x80\x02cos\nsystem\n(X\x01\x00\x00\x001tR.", "holds pickled Python objects"),
        (b"\x80\x02}))\x85\x85\x85s.", "holds pickled Python objects"),
        (b"\x80\x04)" + b"q\x00h\x00\x86" * 18 + b"N\x93.", "a function whose name is no text"),
        (b"\x80\x04X\x05\0\0\0torchX\0\1\0\0" + b"x" * 256 + b"\x93.", "holds pickled Python"),
        (b"\x80\x02}p%d\n." % (2**61 - 1), "an object of an impossible number"),
    ],
)
def test_pickles_that_ask_for_more_than_they_hold(asked, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(pickles, "MOST_STEPS", 2000)
    assert message in asked(ckpt(tmp_path, content, **{"0": bytes(16)}))


def test_pickles_that_inflate(asked, tmp_path):
    """Compressed records; an array of bytes by its length; one number as many."""
    path = tmp_path / "m.ckpt"
    content = {"a": dense(Storage("0", 2**24), 2**24)}
    numbers = {"0": bytes(2**26)}
    checkpoints.zip_checkpoint(path, content, numbers, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert "is compressed, as PyTorch never does" in asked(path)
    three = b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ\x00\x5e\xd0\xb2\x85Rs."
    assert "holds no named tensors; found a" in asked(ckpt(tmp_path, three))
    wide = {"a": Rebuilt(Storage("0", 1), 0, (2**20, 2**20), (0, 0), False, None)}
    assert open_weights(ckpt(tmp_path, wide, **{"0": bytes(4)}))["a"].nbytes == 2**42


def test_one_list_is_copied_once():
    """To an OrderedDict, of which Python 2 writes the content as a list."""
    pair = b"](X\x01\0\0\0aK\1\x86eq\1"
    made = b"ccollections\nOrderedDict\nq\2h\1\x85Rh\2h\1\x85R"
    program = io.BytesIO(b"\x80\x02" + pair + made + b"\x86.")
    assert pickles.follow(program) == ({"a": 1}, {})


def test_numbers_as_keys_become_text():
    """Hashes of chosen numbers may all collide, so that a dictionary of them takes forever."""
    keys = (1, 2**61 - 1, -3.5, True, "a", None)
    program = io.BytesIO(checkpoints.pickled(dict.fromkeys(keys, 0)))
    assert list(pickles.follow(program)) == ["1", str(2**61 - 1), "-3.5", "a", None]


def test_long_names_of_dictionaries_are_not_repeated(asked, tmp_path):
    weight = dense(Storage("0", 4), 4)
    content = {"k" * 10**6: dict.fromkeys(map(str, range(1000)), weight)}
    tracemalloc.start()
    assert "a tensor has a name of 503 characters" in asked(ckpt(tmp_path, content))
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


def test_the_type_of_a_tensor_is_no_module_to_import(asked, tmp_path, monkeypatch):
    """PyTorch imports some of its modules when they are asked for by name."""
    monkeypatch.setattr(torch, "__getattr__", lambda name: pytest.fail(f"asked for {name}"))
    rebuild = torch._utils._rebuild_tensor_v3
    arguments = (Storage("0", 4), 0, (4,), (1,), False, None, torch.float16)
    program = checkpoints.pickled({"a": Rebuilt(*arguments, function=rebuild)})
    assert b"ctorch\nfloat16\n" in program
    for name in (b"_dynamo_of_another_day", b"\x1b[31mred"):
        other = program.replace(b"ctorch\nfloat16\n", b"ctorch\n" + name + b"\n")
        assert "a tensor without a type" in asked(ckpt(tmp_path, other))


def test_a_part_of_a_storage_is_refused(asked, tmp_path):
    """As old versions of PyTorch wrote; its first number is not the storage's."""
    storage = Storage("0", 4)
    storage.reference += (("1", 2, 2),)
    path = ckpt(tmp_path, {"a": dense(storage, 2)}, **{"0": bytes(16)})
    assert "a part of a storage" in asked(path)


def test_a_zip_archive_of_wrong_sizes(asked, tmp_path):
    """Of a storage beyond the end of the file; of no checkpoint at all."""
    path = ckpt(tmp_path, {"a": dense(Storage("0", 2**14 + 4), 2**14 + 4)}, **{"0": bytes(16)})
    content, size = path.read_bytes(), bytes([16, 0, 0, 0] * 2)  # once before it, once at the end
    path.write_bytes(content.replace(size, bytes([16, 0, 1, 0] * 2)))
    assert content.count(size) == 2 and "tensor 'a' is cut short" in asked(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "x")
    assert "a zip archive without a data.pkl" in asked(path)


def test_keys_of_legacy_storages_are_text(asked, tmp_path):
    """Others may take forever to hash or to write."""
    for key in (2**40000, (), ((),)):
        checkpoints.legacy_checkpoint(tmp_path / "m.ckpt", {}, key, 1)
        assert "(no list of its storages)" in asked(tmp_path / "m.ckpt")


def test_a_legacy_file_whose_storage_is_cut_short(asked, tmp_path):
    path = tmp_path / "m.ckpt"
    content = {"a": dense(Storage("0", 100), 100)}
    checkpoints.legacy_checkpoint(path, content, "0", 100)
    assert open_weights(path)["a"].read().shape == (100,)
    path.write_bytes(path.read_bytes()[:-4])
    assert "tensor 'a' is cut short" in asked(path)


def test_strides_offsets_and_types(tmp_path):
    """As torch.load reads them, in both layouts."""
    base = torch.arange(24.0)
    content = {
        "transposed": base.view(4, 6).T,
        "behind": base[7:11],
        "expanded": base[3].expand(2, 2),
        "number": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base[:2]),
        "float8": base.to(torch.float8_e4m3fn),
        "bfloat16": base.bfloat16(),
        "flags": base > 3,
        "buffer": torch.nn.Buffer(base[:2]),  # which has attributes of its own
        "dimensions": base.view((1,) * 9 + (24,)),
    }
    whole = {"state_dict": content, "step": 7, "type": torch.float16, "size": base.size(),
             "bytes": b"1", "array": bytearray(b"2"), "set": {3}, "complex": 4j}  # fmt: skip
    for zipped, protocol in itertools.product((True, False), (2, 3, 4, 5)):
        torch.save(whole, tmp_path / "m.ckpt", pickle_protocol=protocol,
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        state = open_weights(tmp_path / "m.ckpt")
        assert state.keys() == {f"state_dict.{name}" for name in content}
        for name, tensor in state.items():
            read, expected = tensor.read(), content[name.removeprefix("state_dict.")]
            assert read.dtype == tensor.dtype == expected.dtype
            assert read.shape == tensor.shape == expected.shape
            assert torch.equal(read.float(), expected.float())
