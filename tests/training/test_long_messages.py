"""Nothing that is printed grows with what was typed, and commands can be copied into a shell."""

import os
import shlex

import numpy as np
import pytest
from PIL import Image
from support.commands import refused

import train_mnist
from nanosd3 import generate, train
from nanosd3.cli import command_line
from nanosd3.config import CONFIGS
from nanosd3.data.image_folder import read_folder
from nanosd3.data.sources import Pictures
from nanosd3.training import report
from nanosd3.training.options import generate_command

LONG = "a red heart " * 1250  # 15,000 characters


@pytest.mark.parametrize("prompt", ["it's a \"7\"", "$(rm -rf x); `y` & z", "-x", "--out", "a\nb",
                                    "*", "", LONG, "\x1b[31mred", "caf\udce9"])  # fmt: skip
def test_a_suggested_command_is_one_command(tmp_path, monkeypatch, prompt):
    """The shell gives `generate` back the prompt, on one line and shortened if it is long."""
    folder = tmp_path / "my runs" / "it's"
    command = generate_command(prompt, folder, "x.png")
    assert len(command) < 250 + len(str(folder)) and command.isprintable()
    assert shlex.split(command)[:3] == ["python", "-m", "nanosd3.generate"]
    args = generate.parse(shlex.split(command)[3:])
    assert (args.model, str(args.out)) == (folder, "x.png")
    (back,) = args.prompts
    assert back == prompt or not prompt.isprintable() or back == LONG[:77].rstrip() + "..."


def test_windows_has_quotes_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    assert command_line("python", "a seven") == 'python "a seven"'


def test_a_folder_with_long_captions(tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(LONG)
    folder = read_folder(tmp_path)
    train.print_summary(folder, Pictures(folder, CONFIGS["tiny"]))
    printed = capsys.readouterr()
    assert "1 captions, such as 'a red heart a red" in printed.out
    assert "(14,999 characters)" in printed.out and len(printed.out) < 500 + len(str(tmp_path))


def test_a_preview_of_long_prompts(tmp_path, capsys, monkeypatch):
    class Blank:
        def decode(self, latents):
            return np.zeros((len(latents), 28, 28), np.uint8)

    monkeypatch.setattr(report, "sample_latents", lambda _, prompts, seed: prompts)
    prompts = [LONG, "x" * 15000, "\x1b[31m", *["short"] * 9]
    report.preview(Blank(), 3, prompts, tmp_path, is_main=True)
    said = capsys.readouterr().err
    assert "a red heart" in said and len(said) < 500 and "\x1b" not in said
    with Image.open(tmp_path / "preview-00000003.png") as picture:
        assert picture.height < 12 * 160


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "x" * 9999], ["x" * 9999], ["--x\ny"], ["--config", "x" * 9999], ["--lr", "x\n"]],
)
def test_a_refusal_is_one_short_line(capsys, arguments):
    assert len(refused(capsys, train_mnist.main, *arguments)) < 600


@pytest.mark.parametrize("name", ["é" * 125 + ".PNG", "x" * 250 + ".Npy"])
def test_names_of_outputs(tmp_path, tiny_run, name):
    """Long ones, and suffixes in any case."""
    out = tmp_path / name
    assert generate.main(["7", "--run", str(tiny_run), "--count", "1", "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name.lower().endswith(".npy"):
        assert np.load(out).shape == (1, 28, 28)
    else:
        with Image.open(out) as image:
            assert image.format == "PNG"


@pytest.mark.parametrize("out", ["x" * 252 + ".png", "/proc/x.png", "cat.PNGX"])
def test_what_cannot_be_written_is_refused_before_the_sampling(
    capsys, tmp_path, monkeypatch, tiny_run, out
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "open_model", None)
    line = refused(capsys, generate.main, "7", "--run", tiny_run, "--out", out)
    assert "cannot be written" in line or "must end in .png or .npy" in line or "too long" in line
    assert not list(tmp_path.iterdir())


def test_a_t5_length_is_refused_by_its_name(capsys, tmp_path, tiny_run):
    line = refused(capsys, generate.main, "7", "--run", tiny_run, "--t5-length", 100_000,
                   "--out", tmp_path / "x.png")  # fmt: skip
    assert "t5_length must be at most 4096, got 100000" in line
