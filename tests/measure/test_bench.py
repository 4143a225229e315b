"""`python -m nanosd3.bench`: every command but `cuda`, and the options that are refused."""

import re

import pytest
import torch
from PIL import Image
from support import tiny_official

from nanosd3 import bench
from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.measure import compare_diffusers, growth, training_memory
from nanosd3.measure.random_models import random_inputs, random_model


def test_bench_forward(capsys):
    """Both implementations give the same numbers, so times and memory are of the same work."""
    pytest.importorskip("diffusers")
    arguments = ["--config", "tiny", "--size", "32", "--repeats", "2", "--threads", "1"]
    assert bench.main(["forward", "--against", "diffusers", *arguments]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line[0] == "|"][2:]
    assert [row[1].strip() for row in rows] == list(bench.NAMES.values())
    for row in rows:
        assert float(row[4]) > 0 and float(row[6]) > 0 and float(row[7]) < 1e-4
    assert bench.main(["forward", "--parts", "vae", *arguments]) == 0


def test_the_reference_keeps_its_layout():
    """Given weights in channels-last memory, PyTorch would convolve in it for diffusers too."""
    pytest.importorskip("diffusers")
    config, device = CONFIGS["tiny"], torch.device("cpu")
    ours = random_model(config, "vae", device, torch.float32)
    theirs = compare_diffusers.reference_model(config, "vae", ours)
    weights = [model.decoder.conv_in.weight for model in (ours, theirs)]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [True, False]
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("name", "size", "at_once"), [("mnist", 32, 128), ("sd3-d15", 512, 2), ("sd3-d15", 1024, 1)]
)
def test_as_many_images_are_decoded_as_in_the_pipeline(name, size, at_once):
    (latents,) = random_inputs(CONFIGS[name], "vae", size, 128, like=torch.zeros(()))
    assert len(latents) == at_once


@pytest.mark.parametrize("what", ["forward", "train"])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_without_the_reference(what, library, monkeypatch):
    monkeypatch.setattr(compare_diffusers, "find_spec", lambda name: None if name == library else 1)
    command = [what, "--against", "diffusers", "--config", "tiny", "--size", "32"]
    with pytest.raises(InputError, match=f"^{library} is not installed, .*requirements-dev.txt$"):
        bench.main(command)


def test_bench_train(capsys):
    arguments = ["--config", "tiny", "--size", "32", "--repeats", "2", "--threads", "1"]
    assert bench.main(["train", "--against", "diffusers", *arguments]) == 0
    ours, against = capsys.readouterr().out.splitlines()[1:]
    assert "tiny, depth 2, 32x32, batch 2" in ours and "image tokens a second" in ours
    difference = float(against.split("differs by ")[1])
    assert against.startswith("against diffusers: time ") and difference < 1e-5
    assert bench.main(["train", "--depth", "1", *arguments]) == 0
    assert "tiny, depth 1" in capsys.readouterr().out


def test_bench_memory(capfd, monkeypatch):
    monkeypatch.setattr(bench, "CONFIGS", {"small": tiny_official.CONFIG})
    assert bench.main(["memory", "--config", "small", "--size", "64", "--without", "t5"]) == 0
    out = capfd.readouterr().out
    assert "of the program and its largest part (CLIP-G)" in out and "T5" not in out


def test_table(capsys):
    sizes = ["--config", "sd3.5-large", "--size", "1024", "--processes", "8", "64"]
    assert bench.main(["table", *sizes, "--precision", "bfloat16", "--checkpointing"]) == 0
    first, head, *rows, here = capsys.readouterr().out.splitlines()
    assert "8.057 billion" in first and "4096 image tokens, 333 of text" in first
    assert head.split()[-2:] == ["8", "64"] and "available" in here
    options = {"precision": "bfloat16", "checkpointing": True, "sharded": True}
    mmdit = CONFIGS["sd3.5-large"].mmdit
    predicted = [
        training_memory.memory(mmdit, 1, 64, 64, 333, **options, processes=n) for n in (8, 64)
    ]
    for row in rows:
        name, *numbers = row.split()
        assert numbers == [f"{getattr(memory, name) / 1e9:.2f}" for memory in predicted]
    assert [row.split()[0] for row in rows] == [*vars(predicted[0]), "total"]
    words = ["--config", "sd3-medium", "--processes", "1", "--precision", "bfloat16"]
    assert bench.main(["table", *words]) == 0  # one process: autocast
    sd3 = CONFIGS["sd3-medium"].mmdit
    alone = training_memory.memory(sd3, 1, 16, 16, 154, precision="bfloat16")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["total", f"{alone.total / 1e9:.2f}"]
    assert bench.main(["table"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-3:] == ["1", "8", "64"]


def test_growth(capsys, tmp_path, monkeypatch):
    """Every point is printed, measured memory is near the formula, and the plot exists."""
    monkeypatch.setattr("nanosd3.training.plot_style.DPI", 110)
    out = tmp_path / "growth.png"
    largest = ["--size", "32", "--depth", "2", "--batch", "3", "--repeats", "1", "--threads", "1"]
    assert bench.main(["growth", "--config", "tiny", *largest, "--out", str(out)]) == 0
    table = [line.strip("|") for line in capsys.readouterr().out.splitlines() if line[0] == "|"]
    rows = [[float(cell) for cell in line.split("|")] for line in table[2:]]
    assert [tuple(row[:3]) for row in rows] == [
        (1, 4, 1), (2, 4, 1),
        (1, 1, 1), (1, 9, 1), (1, 16, 1),
        (1, 4, 2), (1, 4, 3),
    ]  # fmt: skip
    assert all(0.9 < row[-1] < 1.1 for row in rows)
    with Image.open(out) as picture:
        assert picture.width > picture.height > 700


def test_sweeps():
    assert growth.fractions(8) == [1, 2, 4, 6, 8] and growth.fractions(1) == [1]
    largest = growth.StepShape(8, 16, 4)
    assert growth.sweep(largest, "side", [3]) == [growth.StepShape(4, 3, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("forward --depth 2", "unrecognized arguments: --depth 2"),
        ("train --layers 2", "unrecognized arguments: --layers 2"),
        ("memory --batch 2", "unrecognized arguments: --batch 2"),
        ("growth --out x.png --dtype float32", "unrecognized arguments: --dtype float32"),
        ("table --repeats 2", "unrecognized arguments: --repeats 2"),
        ("table --size 100", "--size 100: sd3-d15 expects a multiple of 16, at most 3072"),
        ("train --size 4000", "--size 4000: sd3-d15 expects"),
        ("forward --size 8", "--size 8: sd3-d15 expects"),
        ("memory --size 100", "--size 100: sd3-d15 expects"),
        ("growth", "required: --out"),
        ("growth --out x.jpg", "x.jpg: expected a .png file in an existing folder"),
        ("growth --out nowhere/x.png", "expected a .png file in an existing folder"),
        ("paint", "invalid choice: 'paint'"),
        ("", "required: what"),
    ],
)
def test_refused_options(words, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        bench.main(words.split())
    assert "\n" not in str(error.value)
