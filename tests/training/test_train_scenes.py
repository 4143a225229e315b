"""`python train_mnist.py --config tiny-scenes`: train, interrupt, resume, report, generate."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import refused
from support.interruptions import interrupted_after
from support.short_runs import observe_nothing

import train_mnist
from nanosd3 import generate
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.data.scene_prompts import ALL_AT_ONCE, GENEVAL, TYPOGRAPHY
from nanosd3.errors import InputError
from nanosd3.pipeline import Pipeline
from nanosd3.related import __main__ as related
from nanosd3.storage.files import read_json, write_json
from nanosd3.storage.run import Run
from nanosd3.training.geneval import draw_questions, geneval_scores, real
from nanosd3.training.scene_judge import open_scene_judge
from nanosd3.training.train_scenes import SAMPLES_EACH, SCENE_PROMPTS


def train(folder) -> int:
    arguments = ["--config", "tiny-scenes", "--out", str(folder)]
    return run_main(lambda: train_mnist.main(arguments))


@pytest.fixture(scope="module")
def scenes_run(tmp_path_factory, in_short):
    folder = tmp_path_factory.mktemp("runs") / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        observe_nothing(patch)
        assert train(folder) == 0
    return folder


def test_the_run_folder(scenes_run):
    with Image.open(scenes_run / "samples.png") as picture:
        assert picture.height > 56 * len(SCENE_PROMPTS) and picture.width > 84 * SAMPLES_EACH
    assert (scenes_run / "loss.png").exists() and not (scenes_run / "cache").exists()
    assert set(read_json(scenes_run / "run.json")["stages"]) == {
        *("judge", "autoencoder", "clip", "t5", "flow", "samples"),
    }


def test_metrics_have_scores_and_their_ceilings(scenes_run):
    metrics = json.loads((scenes_run / "metrics.json").read_text())
    assert metrics["questions"] == 40
    for name in ("samples", "real", "reconstructions"):
        scores = metrics[name]
        assert set(scores) == {"nano_geneval", *GENEVAL, ALL_AT_ONCE, TYPOGRAPHY}
        assert all(0 <= scores[kind] <= 1 for kind in GENEVAL)
        assert set(scores[TYPOGRAPHY]) == {"exact", "characters", "exact_by_length"}
    assert len(metrics["validation_ema"] or []) in (0, 2)


def test_interrupted_and_resumed(scenes_run, tmp_path, monkeypatch, capsys):
    """The same bytes, and the same command says so in the end."""
    observe_nothing(monkeypatch)
    folder = shutil.copytree(scenes_run, tmp_path / "run")
    content = read_json(folder / "run.json")
    for stage in ("flow", "samples"):
        del content["stages"][stage]
    write_json(folder / "run.json", content)
    (folder / "flow.safetensors").unlink()
    with interrupted_after(2):
        assert train(folder) == 130
    assert list(folder.glob("state-*")) and not (folder / "flow.safetensors").exists()
    assert train(folder) == 0
    for name in ("flow.safetensors", "samples.png"):
        assert (folder / name).read_bytes() == (scenes_run / name).read_bytes()
    assert train(folder) == 0
    assert "is finished: see" in capsys.readouterr().out


def test_generate(scenes_run, tmp_path):
    """Both sizes, from the run as it lies there."""
    picture = tmp_path / "scenes.png"
    options = ["--model", str(scenes_run), "--out", str(picture)]
    assert generate.main(["a red seven left of a 4", *options]) == 0 and picture.exists()
    pipeline = Pipeline.load(scenes_run)
    images = pipeline(["a red seven"], height=32, width=48)
    assert np.shape(images) == (1, 32, 48, 3)


def test_previews_are_drawn(scenes_run, tmp_path, monkeypatch):
    """In colour, so that there is nothing for the terminal."""
    monkeypatch.setattr("nanosd3.training.train_flow.validation_loss", lambda *_: [])
    folder = shutil.copytree(scenes_run, tmp_path / "run")
    content = read_json(folder / "run.json")
    for stage in ("flow", "samples"):
        del content["stages"][stage]
    write_json(folder / "run.json", content)
    with interrupted_after(1):
        assert train(folder) == 130
    assert len(list(folder.glob("preview-*.png"))) == 1


def test_other_images_are_refused(tmp_path, capsys):
    main = train_mnist.main
    out = tmp_path / "run"
    line = refused(capsys, main, "--config", "tiny-scenes", "--data", tmp_path, "--out", out)
    assert "--data" in line and "leave it out" in line and not out.exists()
    line = refused(capsys, main, "--config", "tiny-scenes", "--no-turbo", "--out", out)
    assert "--no-turbo: scenes have no turbo; leave it out" in line and not out.exists()


def test_a_distilled_model_is_not_trained(capsys):
    line = refused(capsys, train_mnist.main, "--config", "sd3.5-large-turbo")
    assert "argument --config: invalid choice: 'sd3.5-large-turbo'" in line


def test_related_systems_refuse_scenes(scenes_run, tmp_path, capsys):
    line = refused(capsys, related.main, "paths", "--run", scenes_run, "--out", tmp_path / "paths")
    assert str(scenes_run) in line and "scenes" in line and "train_mnist.py" in line


def test_the_judge_of_a_finished_run(scenes_run, tiny_run, tmp_path):
    """Scores the pictures as the run itself did."""
    run, cpu = Run.read(scenes_run), torch.device("cpu")
    source, judge = open_scene_judge(run, cpu)
    questions = draw_questions(source, CONFIGS["tiny-scenes"].training.evaluate, 0)
    scores = json.loads(json.dumps(geneval_scores(judge, questions, real(source.hands["test"]))))
    assert scores == read_json(scenes_run / "metrics.json")["real"]
    for folder in (tiny_run, shutil.copytree(scenes_run, tmp_path / "run")):
        content = read_json(folder / "run.json")
        if folder != tiny_run:
            write_json(folder / "run.json", content | {"data": "scenes-of-others"})
        with pytest.raises(InputError, match=str(folder)):
            open_scene_judge(Run.read(folder), cpu)
