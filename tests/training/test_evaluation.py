"""Samples scored: draws, the classifier's verdict, the frontier along guidance, its command."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nanosd3 import bench
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.data.mnist import load_images
from nanosd3.data.sources import Digits
from nanosd3.errors import InputError
from nanosd3.storage.run import Run
from nanosd3.training.evaluation import Point, at_accuracy, draw_prompts, frontier, open_scorer
from nanosd3.training.metrics import frechet_distance

CPU = torch.device("cpu")


def test_draws_are_balanced_and_another_for_every_seed():
    source = Digits(load_images().first(512, 64), CONFIGS["tiny"])
    draw = draw_prompts(source, 40, 1)
    assert torch.bincount(draw.labels).tolist() == [4] * 10
    assert draw.labels.equal(source.labels[draw.chosen]) and len(draw.prompts) == 40
    assert draw.prompts == draw_prompts(source, 40, 1).prompts
    assert draw.prompts != draw_prompts(source, 40, 2).prompts


def points(*values: tuple[float, float, float]) -> list[Point]:
    return [Point(g, [a - 0.01, a + 0.01], [r, r]) for g, a, r in values]


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [(0.95, (1.5, 2.5)), (0.96, (1.6, 2.6)), (0.98, (2.5, 4.5)), (0.89, None), (0.995, None)],
)
def test_the_frontier_is_interpolated(accuracy, expected):
    measured = points((1.0, 0.9, 2.0), (2.0, 1.0 - 0.0, 3.0))
    if accuracy > 0.96:
        measured = points((1.0, 0.9, 2.0), (2.0, 0.97, 3.0), (3.0, 0.99, 6.0))
    assert at_accuracy(measured, accuracy) == (expected and pytest.approx(expected))


def test_where_accuracy_falls_again_the_first_crossing_counts():
    measured = points((1.0, 0.9, 2.0), (2.0, 1.0, 3.0), (3.0, 0.9, 4.0), (4.0, 1.0, 5.0))
    assert at_accuracy(measured, 0.95) == pytest.approx((1.5, 2.5))


@pytest.fixture(scope="module")
def scorer(tiny_run):
    return open_scorer(Run.read(tiny_run), None, CPU)


def test_real_images_score_as_real_images(scorer):
    """Training images in place of samples are at the floor; the test images themselves at zero."""
    images = scorer.source.images
    draw = draw_prompts(scorer.source, 40, 3)
    real = images.train_images[draw.chosen]
    accuracy, distance = scorer.score(real, draw)
    assert distance == scorer.floor(draw)
    features = scorer.features(real)
    assert distance == frechet_distance(features, scorer.features(images.test_images))
    assert scorer.distance(images.test_images) == pytest.approx(0, abs=1e-6)
    predicted = scorer.classifier.head(features).argmax(1)
    assert accuracy == pytest.approx((predicted == draw.labels).float().mean().item())


def test_every_guidance_scale_sees_the_same_prompts_and_noise(scorer):
    calls = []

    def pipeline(prompts, seed, guidance):
        calls.append((tuple(prompts), seed, guidance))
        return scorer.source.images.train_images[: len(prompts)].numpy()

    measured = list(frontier(scorer, pipeline, (1.5, 2.0), count=20, seeds=(7, 8)))
    assert [(seed, guidance) for _, seed, guidance in calls] == [
        (7, 1.5), (8, 1.5), (7, 2.0), (8, 2.0)
    ]  # fmt: skip
    assert calls[0][0] == calls[2][0] != calls[1][0] == calls[3][0]
    assert [point.guidance for point in measured] == [1.5, 2.0]
    assert measured[0].accuracies == measured[1].accuracies
    assert measured[0].ratio == pytest.approx(np.mean(measured[0].ratios))


# --- the command ----------------------------------------------------------------------------------

QUICK = ["--draws", "1", "--count", "20", "--threads", "1", "--guidance"]


def test_the_command(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nanosd3.training.plot_style.DPI", 110)
    out = tmp_path / "frontier.png"
    assert bench.main(["frontier", str(tiny_run), "--out", str(out), *QUICK, "2", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "%" in line]
    assert [row.split()[1] for row in rows] == ["1", "2"] and lines[-1] == str(out)
    with Image.open(out) as picture:
        assert picture.width > 400


def refused(capsys, *words) -> str:
    assert run_main(lambda: bench.main(["frontier", *map(str, words)])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_refused(tiny_run, tmp_path, capsys):
    assert "expected a .png file" in refused(capsys, tiny_run, "--out", tmp_path / "x.jpg")
    assert "expected numbers of at least 0" in refused(capsys, tiny_run, *QUICK, "-1")
    assert "expected numbers of at least 0" in refused(capsys, tiny_run, *QUICK, "nan")
    assert "no such" in refused(capsys, tmp_path / "nowhere")
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    for folder in (unfinished, other):
        shutil.copytree(tiny_run, folder)
    content = json.loads((unfinished / "run.json").read_text())
    del content["stages"]["samples"]
    (unfinished / "run.json").write_text(json.dumps(content))
    assert "expected a finished run of train_mnist.py" in refused(capsys, unfinished)
    content = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(content | {"data": "0" * 64}))
    assert "trained on other images; name their folder with --data" in refused(capsys, other)
    assert not list(tmp_path.glob("*.png"))
    with pytest.raises(InputError, match="required: run"):
        bench.main(["frontier"])
