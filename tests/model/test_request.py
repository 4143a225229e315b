"""The arguments of a call: numbers of every type, and one line for each invalid value."""

import warnings

import numpy as np
import pytest
import torch

from nanosd3 import weights
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import export
from nanosd3.pipeline import Pipeline
from nanosd3.text import MAX_T5_LENGTH

SMALL = {"height": 32, "width": 32, "steps": 6, "output": "latent"}
PHOTO = np.full((32, 32, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def pipeline(official_file):
    return weights.load(official_file, staged=False)


def drawn(pipeline, **options):
    return pipeline("a cat", **SMALL | options)


def test_a_number_is_its_value(pipeline):
    """However it is written, it gives the same picture."""
    i, f = np.int64, torch.tensor
    expected = drawn(pipeline, seed=1, guidance=3, shift=2, skip_layers=[0], skip_scale=2,
                     t5_length=77, drop=["t5"])  # fmt: skip
    for same in (
        {"seed": i(1), "guidance": np.float32(3), "shift": f(2.0), "skip_layers": np.array([0])},
        {"seed": f(1), "guidance": f(3), "shift": np.array(2.0), "skip_layers": f([0])},
        {"steps": i(6), "height": f(32), "width": np.array(32), "t5_length": i(77)},
        {"drop": "t5", "skip_layers": (n for n in (0,)), "skip_scale": np.float16(2)},
        {"drop": (name for name in ("t5",)), "output": np.str_("latent")},
        {"drop": np.array("t5"), "guidance": np.array(3, dtype=object)},
    ):
        common = {"seed": 1, "guidance": 3, "shift": 2, "skip_layers": [0], "skip_scale": 2,
                  "t5_length": 77, "drop": ["t5"]}  # fmt: skip
        assert torch.equal(drawn(pipeline, **common | same), expected), same
    noise = pipeline.noise(1, np.int64(3), (4, 4))
    assert torch.equal(drawn(pipeline, noise=noise.numpy()), drawn(pipeline, seed=3))
    swapped = noise.numpy().astype(">f4")  # the other byte order, and backwards in memory
    for same in (swapped, swapped[:, :, ::-1].copy()[:, :, ::-1]):
        assert torch.equal(drawn(pipeline, noise=same), drawn(pipeline, seed=3))
    eighths = noise.to(torch.float8_e4m3fn)
    assert torch.equal(drawn(pipeline, noise=eighths), drawn(pipeline, noise=eighths.float()))
    near = (drawn(pipeline, image=PHOTO, strength=s) for s in (0.5, np.float32(0.5), f(0.5)))
    a, b, c = near
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"seed": seed}, "seed must be a whole number, got ")
          for seed in (1.0, True, "1", None, torch.tensor([1]), torch.tensor(1.0), [1])],
        ({"seed": None, "noise": torch.zeros(1, 16, 4, 4)}, "seed must be a whole number"),
        ({"strength": "0.5", "image": PHOTO}, "strength must be a number, got '0.5'"),
        ({"strength": True, "image": PHOTO}, "strength must be a number, got True"),
        ({"guidance": "5"}, "guidance must be a number, got '5'"),
        ({"guidance": [5]}, "guidance must be a number, got [5]"),
        ({"guidance": 10**400}, "guidance must be a number, got 1000"),
        ({"shift": "3"}, "shift must be a number, got '3'"),
        ({"shift": 1j}, "shift must be a number, got 1j"),
        ({"skip_layers": 1}, "skip_layers must be a list of whole numbers, got 1"),
        ({"skip_layers": None}, "skip_layers must be a list of whole numbers, got None"),
        ({"skip_layers": "01"}, "a layer in skip_layers must be a whole number, got '01'"),
        ({"skip_layers": [True]}, "a layer in skip_layers must be a whole number, got True"),
        ({"skip_layers": [1.0]}, "a layer in skip_layers must be a whole number, got 1.0"),
        ({"skip_layers": [0], "skip_scale": "2"}, "skip_scale must be a number, got '2'"),
        ({"skip_scale": None}, "skip_scale must be a number, got None"),
        ({"drop": None}, "drop must be the name of a text encoder or a list of them, got None"),
        ({"drop": "bert"}, "drop: no encoder 'bert'; there are clip_l, clip_g, t5"),
        ({"drop": [5]}, "drop: no encoder 5"),
        ({"steps": "4"}, "steps must be a whole number, got '4'"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": 10**30}, "steps must be at most 100000, got 1000"),
        ({"guidance": np.ma.masked}, "guidance must be a number, got masked"),
        ({"skip_scale": float("nan")}, "skip_scale must be a number above 0, got nan"),
        ({"drop": np.array("bert")}, "drop: no encoder 'bert'"),
        ({"noise": torch.zeros(1, 16, 4, 4, device="meta")}, "noise: expected a dense tensor, go"),
        ({"noise": torch.zeros(1, 16, 4, 4).to_sparse()}, "got one of layout torch.sparse_coo"),
        ({"noise": torch.zeros(1, 16, 4, 4).to_mkldnn()}, "noise: expected a dense tensor, got o"),
        ({"noise": np.ma.zeros((1, 16, 4, 4))}, "noise: expected an array without masked values"),
        ({"image": torch.zeros(32, 32, 3, device="meta")}, "image: expected a dense tensor, got o"),
        ({"image": np.ma.array(PHOTO)}, "image: expected an array without masked values; fill"),
        ({"image": PHOTO, "mask": torch.ones(32, 32, device="meta")}, "mask: expected a dense te"),
        ({"height": "32"}, "height must be a whole number, got '32'"),
        ({"height": 0, "image": PHOTO}, "image: is 32x32 (height x width), but 0x32"),
        ({"height": 32.0, "image": PHOTO}, "height must be a whole number, got 32.0"),
        ({"t5_length": 77.0}, "t5_length must be a whole number, got 77.0"),
        ({"t5_length": 100_000}, f"t5_length must be at most {MAX_T5_LENGTH}, got 100000"),
        ({"sampler": ["euler"]}, "no sampler ['euler']; there are euler, heun, dpmpp_2m"),
        ({"output": ["image"]}, "output must be image or latent, got ['image']"),
        ({"output": None}, "output must be image or latent, got None"),
        ({"noise": "seed"}, "noise: expected a tensor of floating-point numbers, got 'seed'"),
        ({"noise": torch.zeros(1, 16, 4, 4, dtype=torch.int)}, "noise: expected a tensor of fl"),
        ({"noise": np.array(["a"])}, "noise: expected numbers, got an array of <U1"),
        ({"image": np.zeros((32, 32, 3), object)}, "image: expected numbers, got an array of ob"),
        ({"image": PHOTO.astype(">u2")}, "image: expected uint8 pixels, got torch.uint16"),
        ({"image": PHOTO, "mask": PHOTO[..., 0].astype(object)}, "mask: expected numbers, got an"),
        ({"callback": 3}, "callback must be a function, got 3"),
        ({"progress": "no"}, "progress must be True or False, got 'no'"),
        ({"progress": np.zeros(2)}, "progress must be True or False, got array([0., 0.])"),
        ({"negative": None}, "a prompt must be text, got None"),
        ({"negative": ["dull"]}, "a prompt must be text, got ['dull']"),
        ({"image": "x" * 999}, "got a str"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(pipeline, monkeypatch, options, message):
    monkeypatch.setattr(Pipeline, "generate_latents", None)  # before any work
    with pytest.raises(InputError) as refusal:
        drawn(pipeline, **options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts must be text or a list of texts, got None"),
        (7, "prompts must be text or a list of texts, got 7"),
        (b"a cat", "prompts must be text or a list of texts, got b'a cat'"),
        ({"a cat": 1}, "prompts must be text or a list of texts, got {'a cat': 1}"),
        ({"a cat"}, "got a set, which has no order"),
        ([], "no prompts given"),
        (["a cat", None], "a prompt must be text, got None"),
        (["x" * 15000, 5], "a prompt must be text, got 5"),
        ("x" * 15000 + "\udce9", "... (15,001 characters): is not valid Unicode"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_prompts(pipeline, prompts, message):
    for ask in (pipeline, pipeline.encode_text):
        with pytest.raises(InputError) as refusal:
            ask(prompts)
        assert message in str(refusal.value) and len(str(refusal.value)) < 200


def test_texts_are_encoded_with_the_same_arguments(pipeline):
    """`encode_text` takes and refuses what a call does."""
    one = pipeline.encode_text("a cat", drop="t5", t5_length=np.int64(20))
    other = pipeline.encode_text(("a cat",), drop={"t5"}, t5_length=20)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for options, message in (
        ({"t5_length": 100_000}, "t5_length must be at most"),
        ({"t5_length": "9"}, "t5_length must be a whole number"),
        ({"drop": 1}, "drop must be the name"),
        ({"drop": ["t5", "bert"]}, "no encoder 'bert'"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline.encode_text("a cat", **options)


def test_long_prompts_give_short_warnings(pipeline, tiny_run):
    with pytest.warns(UserWarning, match="too long for the CLIPs") as warned:
        pipeline("cat " * 3750, **SMALL | {"steps": 1})
    assert all(len(str(warning.message)) < 300 for warning in warned)
    assert "(15,000 characters)" in str(warned[0].message)
    words = " ".join(f"unknown{i}" for i in range(2000))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        weights.load(tiny_run)(words)
    assert "and 1,980 more" in str(warned[0].message)
    assert all(len(str(warning.message)) < 1000 for warning in warned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device: expected a name such as cpu or cuda, got 'gpu'"),
        ({"device": None}, "device: expected a name"),
        ({"device": "cuda:99"}, "device: no cuda:99 on this machine"),
        ({"dtype": "bfloat16"}, "dtype must be a type such as torch.bfloat16, got 'bfloat16'"),
        ({"t5": 5}, "t5 must be a path, got 5"),
        ({"weights": 1.5}, "weights must be a path, got 1.5"),
        ({"dtype": torch.int8}, "dtype must be a type such as torch.bfloat16, got torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, "type such as torch.bfloat16, got torch.float8"),
        ({"staged": "no"}, "staged must be True or False, got 'no'"),
    ],
)
def test_loading(official_file, options, message):
    with pytest.raises(InputError, match=message):
        weights.load(official_file, **options)


def test_paths_and_layouts(official_file, tmp_path):
    for load in (weights.load, Pipeline.load):
        with pytest.raises(InputError, match="path must be a path, got None"):
            load(None)
    with pytest.raises(InputError, match="no layout 'Single'; there are single, diffusers"):
        export(open_checkpoint(official_file), "Single", tmp_path / "x")
    with pytest.raises(InputError, match="out must be a path, got 3"):
        export(open_checkpoint(official_file), "single", 3)
    assert not list(tmp_path.iterdir())


PIXELS, LATENTS = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, 4, 4)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("encode", ([1],), "pixels must be a tensor, got [1]"),
        (
            "encode",
            (PIXELS.to(torch.uint8),),
            "pixels must be floating-point numbers, got torch.ui",
        ),
        ("encode", (PIXELS[:, :1],), "pixels: has shape (1, 1, 32, 32), expected (B, 3, H, W)"),
        ("encode", (PIXELS[0],), "pixels: has shape (3, 32, 32), expected (B, 3, H, W)"),
        ("encode", (PIXELS[:0],), "pixels: has shape (0, 3, 32, 32), expected (B, 3, H, W), none"),
        ("encode", (PIXELS[..., :31],), "height and width (32, 31) must be multiples of 8"),
        ("decode", (LATENTS.numpy(),), "latents must be a tensor, got array("),
        ("decode", (LATENTS.to("meta"),), "latents: expected a dense tensor, got one on the meta"),
        ("encode", (PIXELS.to_sparse(),), "pixels: expected a dense tensor, got one of layout"),
        ("decode", (LATENTS[:, :4],), "latents: has shape (1, 4, 4, 4), expected (B, 16, H, W)"),
        ("decode", (LATENTS.long(),), "latents must be floating-point numbers, got torch.int64"),
        ("noise", ("2", 0, (4, 4)), "count must be a positive whole number, got '2'"),
        ("noise", (2, 0.5, (4, 4)), "seed must be a whole number, got 0.5"),
        ("noise", (2, 0, (4.0, 4)), "size must be two positive whole numbers, got (4.0, 4)"),
        ("noise", (2, 0, (4, 4, 4)), "size must be two positive whole numbers, got (4, 4, 4)"),
        ("noise", (2, 0, 4), "size must be two positive whole numbers, got 4"),
        ("noise", (2, 0, (4, -4)), "size must be two positive whole numbers, got (4, -4)"),
        ("noise", (-1, 0, (4, 4)), "count must be a positive whole number, got -1"),
    ],
)
def test_arguments_of_the_steps(pipeline, call, arguments, message):
    """Those that the pipeline takes, one by one."""
    with pytest.raises(InputError) as raised:
        getattr(pipeline, call)(*arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)
