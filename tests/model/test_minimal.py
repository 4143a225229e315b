"""The model on one page: its lines against the package's, a short run, and (slow) a full one."""

import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanosd3 import flow, minimal, samplers
from nanosd3.cli import run_main
from nanosd3.data.mnist import DIGITS, load_images, to_model
from nanosd3.training.classifier import ConvNet, thumbnails

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def text() -> minimal.TextEncoder:
    torch.manual_seed(0)
    return minimal.TextEncoder()


def curved(z: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """A velocity that depends on everything."""
    t = t.expand(len(z)).view(-1, 1, 1, 1)
    said = context.mean((1, 2)) + pooled.std(1)
    return torch.sin(3 * z) * t + said.view(-1, 1, 1, 1) * z


# --- the lines that are written out --------------------------------------------------------------


def test_loss_is_the_flows():
    x0, context, pooled = torch.randn(6, 1, 16, 16), torch.randn(6, 3, 8), torch.randn(6, 8)
    torch.manual_seed(1)
    loss = minimal.flow_loss(curved, x0, context, pooled)
    torch.manual_seed(1)
    noise, normal = torch.randn_like(x0), torch.randn(6)
    t = flow.logit_normal(torch.special.ndtr(normal.double()), mean=0.8).float()
    velocity = curved(flow.interpolate(x0, noise, t), t, context, pooled)
    torch.testing.assert_close(loss, flow.flow_loss(velocity, x0, noise).mean())


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_samples_are_those_of_guided_euler(text, scale, steps):
    prompts = ["seven", "a handwritten 3", "the digit 0"]
    noise = torch.randn(3, 1, 16, 16)
    got = minimal.sample(curved, text, prompts, noise, steps, scale)
    with torch.no_grad():
        velocity = samplers.guided(curved, text(prompts), text([""] * 3), scale)
        expected = samplers.euler(velocity, noise, torch.linspace(1, 0, steps + 1))
    torch.testing.assert_close(got, expected)


# --- text ----------------------------------------------------------------------------------------


def test_every_caption_can_be_read(text):
    said = {template.format(name)
            for names in DIGITS for name in names for template in minimal.TEMPLATES}  # fmt: skip
    assert {word for caption in said for word in caption.split()} == set(minimal.WORDS) - {""}
    assert max(len(caption.split()) for caption in said) == minimal.LENGTH
    assert {minimal.caption(7) for _ in range(200)} < said
    context, pooled = text(sorted(said))
    assert context.shape == (80, 3, minimal.WIDTH) and pooled.shape == (80, minimal.WIDTH)
    assert len(torch.unique(context.flatten(1), dim=0)) == 80  # no two alike


def test_words_have_places(text):
    """The empty caption is padding, and a word elsewhere is another token."""
    context, pooled = text(["", "seven", "the digit seven"])
    padding = text.words.weight[0] + text.positions
    torch.testing.assert_close(context[0], padding)
    torch.testing.assert_close(context[1, 1:], padding[1:])
    torch.testing.assert_close(pooled, context.mean(1))
    assert not torch.allclose(context[1, 0], context[2, 2])


def test_a_tenth_is_learned_without_text(monkeypatch):
    heard = []

    def listening(self: nn.Module, captions: list[str]) -> tuple[Tensor, Tensor]:
        heard.extend(captions)
        return forward(self, captions)

    forward = minimal.TextEncoder.forward
    monkeypatch.setattr(minimal.TextEncoder, "forward", listening)
    random.seed(0)
    minimal.train(12, CPU)
    assert len(heard) == 12 * minimal.BATCH
    assert 0.06 < heard.count("") / len(heard) < 0.14


# --- all of it -----------------------------------------------------------------------------------


def test_short_run(tmp_path, monkeypatch, capsys):
    """It says what it does, draws, and does the same again."""
    monkeypatch.chdir(tmp_path)
    pictures, said = [], []
    for _ in range(2):
        assert minimal.main(steps=3) is None
        pictures.append((tmp_path / "minimal.png").read_bytes())
        said.append(capsys.readouterr().out)
    assert pictures[0] == pictures[1] and said[0] == said[1]
    with Image.open("minimal.png") as picture:
        assert (picture.size, picture.mode) == ((640, 640), "L")
    assert [path.name for path in tmp_path.iterdir()] == ["minimal.png"]
    assert "step     0   loss 1." in said[0] and "step     2" in said[0]


def test_interrupted(tmp_path, monkeypatch, capsys):
    """Ctrl-C: status 130, one line, no picture."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minimal, "flow_loss", interrupt)
    assert run_main(minimal.main) == 130
    err = capsys.readouterr().err
    assert "interrupted" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_one_page():
    lines = (ROOT / "nanosd3" / "minimal.py").read_text().splitlines()
    assert len(lines) < 150


def trained_judge() -> ConvNet:
    """A classifier of real digits; reads about 99% of the test images as labelled."""
    images = load_images()
    torch.manual_seed(0)
    net, steps = ConvNet(10), 800
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        i = torch.randint(len(images.train_images), (128,))
        loss = F.cross_entropy(net(to_model(images.train_images[i], 32)), images.train_labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        read = net(to_model(images.test_images, 32)).argmax(1)
    assert (read == images.test_labels).float().mean() > 0.98
    return net


@pytest.mark.slow
def test_full_run(tmp_path):
    """The picture has what its prompts ask for."""
    command = [sys.executable, "-m", "nanosd3.minimal"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
    with Image.open(tmp_path / "minimal.png") as picture:
        grid = torch.from_numpy(np.array(picture)).float() / 127.5 - 1
    digits = grid.view(10, 64, 10, 64).transpose(1, 2).reshape(100, 1, 64, 64)
    judge = trained_judge()
    with torch.no_grad():
        read = judge(thumbnails(digits)).argmax(1)
    assert (read == torch.arange(10).repeat_interleave(10)).sum() >= 90


@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--steps=3", 2)])
def test_it_has_no_options(tmp_path, monkeypatch, capsys, option, status):
    """Help and unknown options do not start two minutes of training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal", option])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(minimal.__file__, run_name="__main__")
    assert end.value.code == status
    said = capsys.readouterr()
    assert ("usage" in said.out) == (status == 0)
    assert said.err == "" or said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
