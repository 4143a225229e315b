"""Every command line prints any text to streams of any encoding."""

import importlib
import io
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import refused
from support.idx import write_set

import train_mnist
from nanosd3 import bench, cli, generate, minimal, train, weights
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS, Recipe
from nanosd3.exercises import __main__ as exercises
from nanosd3.exercises.grader.checker import Verdict
from nanosd3.machine.distributed import ProcessGroup
from nanosd3.measure import growth
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.pipeline import Pipeline
from nanosd3.storage.run import Run
from nanosd3.training import plots, report
from nanosd3.training.cached_features import Encoders, get_features
from nanosd3.training.encoders import frozen_encoders

ROOT = Path(__file__).parents[2]
ODD = "Kätzchen 猫 🐈"
STEP = Recipe(1, 4, 1e-3, 1, 0.0)
STAGES = ("judge", "autoencoder", "clip", "t5", "flow")


class Ascii:
    """Runs command lines with streams that raise UnicodeEncodeError for anything but ASCII."""

    def __init__(self, patch: pytest.MonkeyPatch, encoding: str = "ascii"):
        self.patch, self.encoding = patch, encoding

    def __call__(self, main, *arguments: object, status: int = 0) -> str:
        """What the command prints, errors last."""
        streams = [io.TextIOWrapper(io.BytesIO(), self.encoding) for _ in range(2)]
        with self.patch.context() as patch:
            patch.setattr("sys.stdout", streams[0])
            patch.setattr("sys.stderr", streams[1])
            ended = run_main(lambda: main([str(argument) for argument in arguments]))
        for stream in streams:
            stream.flush()
        printed = b"".join(stream.buffer.getvalue() for stream in streams).decode(self.encoding)
        assert ended == status and "Traceback" not in printed, printed
        return printed


@pytest.fixture
def ascii(unobserved, monkeypatch, tmp_path) -> Ascii:
    """Steps are few, and no pictures are drawn."""
    monkeypatch.chdir(tmp_path)
    tiny = CONFIGS["tiny"]
    training = replace(tiny.training, evaluate=20, **dict.fromkeys(STAGES, STEP))
    monkeypatch.setitem(CONFIGS, "tiny", replace(tiny, training=training))
    monkeypatch.setattr(report, "draw_samples", lambda *_: None)
    for name in ("plot_loss", "plot_samplers", "plot_growth"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    return Ascii(monkeypatch)


def folder_of(root: Path, caption: str = ODD) -> Path:
    """A folder with pictures that are used, converted, cropped, skipped and of other formats."""
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(pixels[..., :3]).save(root / f"{i} {ODD}.png")
        (root / f"{i} {ODD}.txt").write_text(f"{caption} {i}\n", encoding="utf-8")
    Image.fromarray(pixels[:4]).save(root / f"wide {ODD}.png")
    (root / f"wide {ODD}.txt").write_text(caption, encoding="utf-8")
    (root / f"{ODD}.heic").write_bytes(b"?")
    (root / f"alone {ODD}.txt").write_text("?")
    (root / f"more.{ODD}").write_bytes(b"?")
    return root


def test_train(ascii, tmp_path):
    data = folder_of(tmp_path / f"data {ODD}")
    command = "--config", "tiny", "--data", data, "--out", tmp_path / f"run {ODD}"
    printed = ascii(train.main, *command)
    odd, suffix = (
        text.encode("ascii", "backslashreplace").decode() for text in (ODD, f".{ODD.lower()}")
    )
    assert "data: 5 images from" in printed and f"captions, such as '{odd}" in printed
    assert f"0 more held out, 2 skipped, 1 other files ({suffix})" in printed
    assert "note: transparency placed on white: 1 of 5 images" in printed
    assert "note: cropped by more than 25%: 1 of 5 images, at most 79% (wide K" in printed
    assert r"skipped: " in printed and r"\U0001f408.heic: .heic images are not read" in printed
    assert "is the caption of no image" in printed and "done: " in printed
    assert "is finished" in ascii(train.main, *command)


def test_train_mnist(ascii, tmp_path):
    data = write_set(tmp_path / f"set {ODD}", labels=[0, 1])
    (data / "classes.txt").write_text("Kätzchen\n猫\n", encoding="utf-8")
    command = "--config", "tiny", "--data", data, "--out", tmp_path / f"run {ODD}"
    printed = ascii(train_mnist.main, *command)
    assert r"such as 'a photo of a \u732b'" in printed or r"\u732b" in printed
    assert "30 images from" in printed and "done: " in printed


def test_generate_and_weights(ascii, tmp_path, tiny_run):
    run = shutil.copytree(tiny_run, tmp_path / f"run {ODD}")
    out, picture = tmp_path / f"out {ODD}.png", tmp_path / f"in {ODD}.png"
    Image.new("RGBA", (28, 28)).save(picture)
    printed = ascii(
        generate.main, ODD, "--run", run, "--count", 2, "--steps", 1, "--out", out,
        "--init-image", picture, "--strength", 1, "--negative", ODD,
    )  # fmt: skip
    assert r"2 images in" in printed and r"out K\xe4tzchen \u732b \U0001f408.png" in printed
    assert "warning: words that occur in no training" in printed and r"'k\xe4tzchen'" in printed
    assert "note: " in printed and "transparency placed on white" in printed
    assert r"run K\xe4tzchen" in ascii(generate.main, "--run", run, "--report")
    assert r"run K\xe4tzchen" in ascii(weights.main, "report", run)
    file = tmp_path / f"{ODD}.safetensors"
    printed = ascii(weights.main, "export", run, "--layout", "single", "--out", file)
    assert r"written: " in printed and r"\u732b" in printed and file.exists()


def test_bench(ascii, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "multiplication_speed", lambda *_: 1e9)
    tiny = "--config", "tiny", "--size", 32, "--repeats", 1, "--threads", 1, "--batch", 1
    for command in (["forward", "--parts", "vae"], ["train", "--depth", 1]):
        assert "tiny, " in ascii(bench.main, *command, *tiny)
    assert "here" in ascii(bench.main, "table")
    monkeypatch.setattr(growth, "grow", lambda *_: {})
    monkeypatch.setattr(growth, "plot_data", lambda *_: ([], "", 1e9))
    out = tmp_path / f"{ODD}.png"
    assert r"\u732b" in ascii(bench.main, "growth", *tiny, "--out", out)
    line = ascii(bench.main, "memory", "--config", "tiny", "--folder", ODD, status=2)
    assert "choose an official model" in line
    line = ascii(bench.main, "cuda", "--device", "cpu", "--out", f"{ODD}.txt", status=2)
    assert r"\u732b" in line


def test_exercises(ascii, tmp_path, monkeypatch):
    folder = tmp_path / f"answers {ODD}"
    folder.mkdir()
    file, table = folder / f"{ODD}.py", tmp_path / f"{ODD}.csv"
    only = "--only", "shift"
    assert "shift" in ascii(exercises.main, "list", *only)
    assert r"wrote " in ascii(exercises.main, "start", file, *only)
    file.write_text(f"# {ODD}\n", encoding="utf-8")
    wrong = Verdict("shift", "wrong", 0, 1, f"says {ODD}")
    monkeypatch.setattr(exercises, "grade", lambda *_: [wrong])
    printed = ascii(exercises.main, "grade", file, *only)
    assert "shift" in printed and r"\u2717" in printed  # the first cross
    assert r"\u732b" in ascii(exercises.main, "grade-all", folder, "--csv", table, *only)


def test_minimal(ascii, tmp_path, monkeypatch):
    monkeypatch.setattr(minimal, "train", lambda *_: (None, None))
    monkeypatch.setattr(minimal, "sample", lambda *_, **__: torch.zeros(100, 1, 16, 16))
    assert "a row for each prompt" in ascii(lambda _: minimal.main())


MAINS = {  # with arguments that name something that does not exist
    "train_mnist": ["--data", ODD],
    "nanosd3.train": ["--data", ODD],
    "nanosd3.generate": ["7", "--model", ODD],
    "nanosd3.weights": ["report", ODD],
    "nanosd3.bench": ["growth", "--out", f"{ODD}/x.png"],
    "nanosd3.exercises.__main__": ["grade", ODD],
    "nanosd3.related.__main__": ["consistency", "--run", ODD],
    "nanosd3.claims.__main__": [ODD],
}


def test_these_are_all_command_lines():
    files = [ROOT / "train_mnist.py", *(ROOT / "nanosd3").rglob("*.py")]
    mains = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if re.search(r"^if __name__ == ", file.read_text(encoding="utf-8"), re.M)
    } - {f"nanosd3.exercises.grader.{name}" for name in ("sandbox", "fork_server")}  # processes
    assert mains == {*MAINS, "nanosd3.minimal"}  # which has no options
    for name in mains:
        path = ROOT / (name.replace(".", "/") + ".py")
        assert "    sys.exit(run_main(" in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", MAINS)
def test_refusals_and_help(name, encoding, tmp_path, monkeypatch):
    """`\\udcff` is how Python reads the byte 255 in an argument or a file name."""
    monkeypatch.chdir(tmp_path)
    ascii, main = Ascii(monkeypatch, encoding), importlib.import_module(name).main
    line = ascii(main, *MAINS[name], status=2)
    assert line.startswith("error: ")
    assert ODD.encode(encoding, "backslashreplace").decode(encoding) in line
    assert r"\udcff" in ascii(main, *MAINS[name][:-1], "\udcff", status=2)
    with pytest.raises(SystemExit) as end:
        ascii(main, "--help")
    assert end.value.code == 0


def test_other_ranks_print_nothing_of_any_text(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("sys.stdout", sys.stdout)  # to be put back
    assert cli.status_of(lambda: print(ODD, "\udcff")) == 0


def test_without_streams(monkeypatch):
    """As under pythonw on Windows."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert cli.status_of(lambda: print(ODD)) == 0


def test_prompts_typed_in_utf_8_in_a_locale_without_it(capsys):
    """Python then reads their bytes one by one."""
    typed = ODD.encode().decode("ascii", "surrogateescape")
    args = generate.parse([typed, "7", "--negative", typed])
    assert args.prompts == [ODD, "7"] and args.negative == ODD
    assert train.parse(["--data", "x", "--prompt", typed]).prompts == [ODD]
    for main, option in ((generate.main, "--negative"), (train.main, "--prompt")):
        line = refused(capsys, main, "--data" if main == train.main else "7", "x", option, "\udcff")
        assert f"argument {option}: expected text in UTF-8, got '\\udcff'" in line


@pytest.mark.parametrize("weights_of_another", [False, True])
def test_long_captions_are_said_to_be_cut(tmp_path, tiny_run, capsys, weights_of_another):
    """Whether the text encoders are trained here or taken from elsewhere."""
    pipeline = Pipeline.load(tiny_run)
    source = SimpleNamespace(texts=["a 7", "a 3 " * 3750], count=0, groups=lambda numbers: [])
    job = SimpleNamespace(
        config=pipeline.config,
        device=torch.device("cpu"),
        source=source,
        group=ProcessGroup(),
        run=Run(tmp_path, {"encoders": "x"}, {}),
    )
    encoders = Encoders(pipeline.config, "x", lambda: pipeline)
    if weights_of_another:
        encoders = frozen_encoders(job, open_checkpoint(tiny_run))
    for printed in ("text: 1 of 2 captions are truncated; one is too long for the CLIPs (12", ""):
        get_features(job, encoders, [])
        assert capsys.readouterr().out.startswith(printed)
    with pytest.warns(UserWarning, match="too long for the CLIPs"):  # to who encodes a text alone
        pipeline.encode_text(source.texts[1])
