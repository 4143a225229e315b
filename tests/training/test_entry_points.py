"""Every entry point, end to end, with config `tiny`: train, interrupt, resume, generate."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.idx import write_set

import train_mnist
from nanosd3 import generate, weights
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.storage import files
from nanosd3.training import (
    cached_features,
    loop,
    options,
    report,
    stages,
    throughput,
    train_autoencoder,
    train_flow,
)

ROOT = Path(__file__).parents[2]
TRAINING = CONFIGS["tiny"].training
STAGES = ("judge", "autoencoder", "clip", "t5", "flow")


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- training ------------------------------------------------------------------------------------


def test_run_folder(tiny_run):
    for name in ("samples.png", "loss.png", "samplers.png", "trajectory.gif"):
        with Image.open(tiny_run / name) as picture:
            assert min(picture.size) > 100
            assert getattr(picture, "n_frames", 1) == (5 if name.endswith("gif") else 1)
    for step in range(2, TRAINING.flow.steps + 1, 2):
        with Image.open(tiny_run / f"preview-{step:08d}.png") as picture:
            assert min(picture.size) > 100
    assert not list(tiny_run.glob("state*")) and not (tiny_run / "cache").exists()
    assert not [path for path in tiny_run.iterdir() if path.name.startswith(".")]


def test_log(tiny_run):
    log = read_log(tiny_run)
    for stage in STAGES:
        steps = [entry["step"] for entry in log if entry["stage"] == stage and "loss" in entry]
        assert steps == list(range(getattr(TRAINING, stage).steps))
    held_out = [entry for entry in log if "validation" in entry]
    assert [entry["step"] for entry in held_out] == list(range(2, TRAINING.flow.steps, 3))
    for entry in held_out:
        assert entry.keys() == {"stage", "step", "validation", "validation_ema"}
        for row in (entry["validation"], entry["validation_ema"]):
            assert len(row) == train_flow.VALIDATION_TIMES and np.isfinite(row).all()
    trained = [entry for entry in log if "validation" not in entry]
    assert all(np.isfinite((entry["loss"], entry["grad_norm"])).all() for entry in trained)
    assert len(log) == len(trained) + len(held_out)


def test_metrics(tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert metrics["samples"] == TRAINING.evaluate
    assert 0 <= metrics["prompt_accuracy"] <= 1
    assert 0 < metrics["frechet_floor_real"] < metrics["frechet_distance"]
    assert metrics["weight"].keys() == metrics["slant"].keys() == {"accuracy", "mean_by_word"}
    evaluations = list(report.SOLVER_EVALUATIONS)
    assert all([n for n, _ in ps] == evaluations for ps in metrics["solver_errors"].values())
    assert {f"zero_shot_{name}" for name in "lg"} <= metrics["stages"]["clip"].keys()
    last = read_log(tiny_run)[-1]
    assert metrics["validation"] == last["validation"]
    assert metrics["validation_ema"] == last["validation_ema"]


def test_speed(tmp_path, one_step, unobserved, monkeypatch):
    """One line every few steps of the flow stage."""
    monkeypatch.setattr(throughput, "EVERY", 3)
    recipe = replace(TRAINING.flow, steps=10)
    config = options.CONFIGS["tiny"]
    config = replace(config, training=replace(config.training, flow=recipe))
    monkeypatch.setitem(options.CONFIGS, "tiny", config)
    assert train_mnist.main(["--config", "tiny", "--out", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "speed.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == [2, 5, 8]
    mmdit, text = config.mmdit, config.text
    tokens = (config.image_size // config.vae.factor // mmdit.patch_size) ** 2
    tokens += text.clip_l.length + text.t5.length
    for entry in entries:
        seconds = recipe.batch / entry["images_per_second"]
        assert entry["seconds_per_step"] == pytest.approx(seconds, rel=0.01)
        of_one = entry["tokens_per_second"] / entry["images_per_second"]
        assert of_one == pytest.approx(tokens, rel=1e-3)
        assert 0 < entry["flops_utilisation"] < 1.5 and entry["memory_gb"] > 0.05


def test_finished_run_is_left_alone(tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.iterdir()}
    assert train_mnist.main(["--config", "tiny", "--out", str(tiny_run)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tiny_run.iterdir()}


def test_interrupted_anywhere_it_ends_in_the_same_bytes(tiny_run, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of each stage and while pictures are drawn: the same command resumes
    each time, and weights, losses and samples equal those of an uninterrupted run."""
    command = ["--config", "tiny", "--out", str(tmp_path / "run")]
    pending = {(stage, 5) for stage in STAGES} | {("consistency", 2)}
    steps_run = []

    def rng(*name):
        if len(name) == 3:  # the step's stream; those of its rows have a longer name
            steps_run.append(name[1:])
        if name[1:] in pending:
            pending.remove(name[1:])
            os.kill(os.getpid(), signal.SIGINT)
        return original(*name)

    original = loop.rng
    monkeypatch.setattr(loop, "rng", rng)
    for stage in STAGES:
        assert run_main(lambda: train_mnist.main(command)) == 130
        assert steps_run[-1] == (stage, 5)
        state = tmp_path / "run" / "state-00000006"
        assert {"state.json", "shard-00001-model-00001-of-00001.safetensors"} == {
            path.name for path in state.iterdir()
        }
        line = capsys.readouterr().err.splitlines()[-1]
        assert (
            f"{stage}: stopped after step 6 of" in line
            and "rerun the same command to resume" in line
        )

    assert run_main(lambda: train_mnist.main(command)) == 130
    assert "consistency: stopped after step 3 of 4" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report.plots, "plot_loss", interrupted)
        assert run_main(lambda: train_mnist.main(command)) == 130
    assert run_main(lambda: train_mnist.main(command)) == 0
    assert len(steps_run) == len(set(steps_run))  # no step ran twice

    for name in ("judge", "autoencoder", "clip", "t5", "text", "flow"):
        file = f"{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tiny_run / file).read_bytes(), file
    turbo = "turbo/flow.safetensors"
    assert (tmp_path / "run" / turbo).read_bytes() == (tiny_run / turbo).read_bytes()
    assert read_log(tmp_path / "run") == read_log(tiny_run)
    files = {path.name for path in tiny_run.iterdir()}
    assert files == {path.name for path in (tmp_path / "run").iterdir()}
    for file in files:
        if file.endswith((".png", ".gif")):
            assert (tmp_path / "run" / file).read_bytes() == (tiny_run / file).read_bytes(), file


def test_interrupted_after_the_last_step(tmp_path, one_step, unobserved, monkeypatch):
    """Nothing is lost between a stage's last step and its end (here: measuring the latents)."""
    command = ["--config", "tiny", "--out", str(tmp_path / "run")]
    steps_run, original = [], loop.rng
    monkeypatch.setattr(loop, "rng", lambda *name: steps_run.append(name) or original(*name))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_autoencoder, "measured_latents", interrupted)
        assert run_main(lambda: train_mnist.main(command)) == 130
    assert train_mnist.main(command) == 0
    ran = [name[1] for name in steps_run if len(name) == 3]
    assert sorted(set(ran)) == sorted({*STAGES, "consistency"})
    assert all(ran.count(stage) == 1 for stage in STAGES)


def test_interrupted_while_encoding(tmp_path, one_step, unobserved, monkeypatch):
    """What was encoded before Ctrl-C is not encoded again; the cache is deleted at the end."""
    command = ["--config", "tiny", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(cached_features, "SHARD", 100)
    encoded, original = [], Pipeline.posterior

    def posterior(self, x):
        encoded.append(len(x))
        if sum(encoded) in (300, 600):
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(Pipeline, "posterior", posterior)
    for shards in (2, 4):
        assert run_main(lambda: train_mnist.main(command)) == 130
        assert len(list((tmp_path / "run" / "cache").glob("*/latents/*.safetensors"))) == shards
    with monkeypatch.context() as patch:
        patch.setattr(loop, "progress", None)  # the flow stage starts after encoding
        with pytest.raises(TypeError):
            train_mnist.main(command)
    assert sum(encoded) == TRAINING.train_images + TRAINING.test_images + 2 * 100
    assert train_mnist.main(command) == 0
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize("classes", [2, 30])
def test_any_number_of_classes(tmp_path, one_step, unobserved, classes):
    folder = write_set(tmp_path / "set", train=4 * classes, test=60, labels=list(range(classes)))
    (folder / "classes.txt").write_text("\n".join(f"Thing{i}" for i in range(classes)))
    run = tmp_path / "run"
    assert train_mnist.main(["--config", "tiny", "--data", str(folder), "--out", str(run)]) == 0
    with Image.open(run / "samples.png") as grid:
        assert grid.height == classes * 60 + 4


def test_other_images(tmp_path, one_step, unobserved, capsys):
    """A Fashion-MNIST folder: class names as captions, from data to samples."""
    folder = write_set(tmp_path / "fashion-mnist", train=60)
    run = tmp_path / "run"
    assert train_mnist.main(["--config", "tiny", "--data", str(folder), "--out", str(run)]) == 0
    assert "Fashion-MNIST" in capsys.readouterr().out
    assert "sneaker" in json.loads((run / "tokenizers.json").read_text())["words"]
    with pytest.raises(
        InputError, match=r"with different data: .*5 with other content \(training images, "
    ):
        train_mnist.main(["--config", "tiny", "--out", str(run)])


def test_fresh_starts_over(tmp_path, one_step, unobserved):
    command = ["--config", "tiny", "--out", str(tmp_path / "run")]
    assert train_mnist.main(command) == 0
    first = (tmp_path / "run" / "flow.safetensors").stat().st_mtime_ns
    assert train_mnist.main([*command, "--seed", "1", "--fresh"]) == 0
    assert (tmp_path / "run" / "flow.safetensors").stat().st_mtime_ns > first
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == 1


@pytest.fixture
def wider(one_step, monkeypatch) -> str:
    """The name of a config whose transformer takes wider text features than `tiny` has."""
    config = options.CONFIGS["tiny"]
    widths = {"context_dim": config.mmdit.context_dim + 8, "pooled_dim": 48}
    config = replace(config, name="wider", mmdit=replace(config.mmdit, **widths))
    monkeypatch.setitem(options.CONFIGS, "wider", config)
    return "wider"


def test_with_the_encoders_of_another_run(tiny_run, tmp_path, wider, unobserved, capsys):
    """Training and generating read them from the other run's folder; nothing is copied."""
    encoders, run = shutil.copytree(tiny_run, tmp_path / "encoders"), tmp_path / "run"
    command = ["--config", wider, "--weights", str(encoders), "--out", str(run)]
    assert train_mnist.main(command) == 0
    weights_files = {path.name for path in run.glob("*.safetensors")}
    assert weights_files == {"judge.safetensors", "flow.safetensors"}
    pipeline, base = weights.load(run), Pipeline.load(tiny_run)
    z = torch.randn(1, 4, 8, 8)
    assert np.array_equal(Pipeline.load(run).decode(z), pipeline.decode(z))  # the same door
    encoded = (p.text.encode(["a bold 3"]) for p in (pipeline, base))
    for a, b in zip(*encoded, strict=True):
        assert torch.equal(a[..., : b.shape[-1]], b) and (a[..., b.shape[-1] :] == 0).all()
    z = torch.randn(1, 4, 8, 8)
    assert np.array_equal(pipeline.decode(z), base.decode(z))
    out = tmp_path / "x.npy"
    assert generate.main(["7", "--run", str(run), "--count", "2", "--out", str(out)]) == 0
    assert np.array_equal(np.load(out), pipeline(["7", "7"]))

    assert train_mnist.main(command) == 0 and "is finished" in capsys.readouterr().out
    state = files.read_tensors(encoders / "text.safetensors")
    state["t5.encoder.final_layer_norm.weight"] += 1
    files.save_tensors(state, encoders / "text.safetensors")
    with pytest.raises(InputError, match="holds a run with other encoders than those of"):
        train_mnist.main(command)
    shutil.rmtree(encoders)
    with pytest.raises(InputError, match=f"was trained on the encoders of {encoders}: no such"):
        generate.main(["7", "--run", str(run), "--out", str(out)])


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropped_encoders_teach_nothing(tmp_path, unobserved, monkeypatch, dropout):
    """With every encoder dropped, the layers that read text stay at their initial weights."""
    short = {name: replace(getattr(TRAINING, name), steps=4) for name in STAGES}
    training = replace(TRAINING, **short, encoder_dropout=dropout)
    config = replace(CONFIGS["tiny"], training=training)
    monkeypatch.setitem(options.CONFIGS, "tiny", config)
    assert train_mnist.main(["--config", "tiny", "--out", str(tmp_path / "run")]) == 0
    trained = files.read_tensors(tmp_path / "run" / "flow.safetensors")
    task = stages.Job(None, config, None, torch.device("cpu"), seed=0)
    fresh = stages.build(task, "flow", lambda: MMDiT(config.mmdit)).state_dict()
    for key in ("context_embedder.weight", "y_embedder.mlp.0.weight"):
        assert torch.equal(trained[key], fresh[key]) == (dropout == 1.0), key


def test_the_seed_matters(tiny_run, tmp_path):
    pipeline = Pipeline.load(tiny_run)
    a, b = (pipeline(["7"], seed=seed, output="latent") for seed in (0, 1))
    assert not torch.equal(a, b)


def test_as_a_program(tmp_path, tiny_run):
    """As a separate process, from another working directory."""
    script = [
        sys.executable,
        str(ROOT / "train_mnist.py"),
        "--config",
        "tiny",
        "--out",
        str(tiny_run),
    ]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "is finished" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "nanosd3.generate", "a seven", "--run", tiny_run, "--out",
         tmp_path / "x.png", "--count", "2", "--threads", "1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "x.png").exists()


# --- generation ----------------------------------------------------------------------------------


def test_generate(tiny_run, tmp_path):
    prompts, out = ["a handwritten seven", "the digit 3", "a bold 4"], tmp_path / "digits.npy"
    common = ["--run", str(tiny_run), "--count", "4", "--seed", "5"]
    assert generate.main([*prompts, *common, "--out", str(out)]) == 0
    images = np.load(out)
    assert images.shape == (12, 28, 28) and images.dtype == np.uint8
    repeated = [prompt for prompt in prompts for _ in range(4)]
    assert np.array_equal(images, Pipeline.load(tiny_run)(repeated, seed=5))
    assert generate.main([*prompts, *common, "--out", str(tmp_path / "digits.png")]) == 0
    with Image.open(tmp_path / "digits.png") as grid:
        assert grid.width > grid.height > 3 * 56


def test_what_it_draws_can_be_the_start(tiny_run, tmp_path):
    """A single image has the pixels that --init-image takes."""
    one, other = tmp_path / "one.png", tmp_path / "other.npy"
    common = ["--run", str(tiny_run), "--count", "1", "--steps", "2"]
    assert generate.main(["a seven", *common, "--out", str(one)]) == 0
    words = ["--init-image", str(one), "--strength", "0.5", "--out", str(other)]
    assert generate.main(["a seven", *common, *words]) == 0
    with Image.open(one) as image:
        assert image.size == (28, 28) and np.load(other).shape == (1, 28, 28)


@pytest.fixture(scope="module")
def pipeline(tiny_run):
    """The tiny model with perturbed weights, so that every part of it has an effect."""
    pipeline = Pipeline.load(tiny_run)
    torch.manual_seed(0)
    for parameter in pipeline.mmdit.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return pipeline


OPTIONS = [
    {"steps": 7},
    {"guidance": 1.0},
    {"guidance": 5.0},
    {"shift": 3.0},
    {"sampler": "heun"},
    {"sampler": "dpmpp_2m"},
    {"negative": "a thin 4"},
    {"seed": 1},
    {"drop": ["t5"]},
    {"drop": ["clip_l"]},
    {"drop": ["clip_g"]},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_changes_the_images(pipeline, tmp_path, tiny_run, option, monkeypatch):
    prompts = ["a seven", "a bold 3"]
    images = pipeline(prompts, **option)
    for other in [{}] + [o for o in OPTIONS if o != option]:
        assert not np.array_equal(images, pipeline(prompts, **other)), other
    # ... and the command line passes it on
    monkeypatch.setattr(generate, "open_pipeline", lambda *_, **__: pipeline)
    flags = [["--drop", v[0]] if k == "drop" else [f"--{k}", str(v)] for k, v in option.items()]
    out = ["--run", str(tiny_run), "--count", "1", "--out", str(tmp_path / "x.npy")]
    generate.main([*prompts, *out, *itertools.chain(*flags)])
    assert np.array_equal(np.load(tmp_path / "x.npy"), images)


def test_a_negative_prompt_needs_guidance(pipeline):
    with pytest.raises(InputError, match="no effect without guidance"):
        pipeline(["7"], negative="3", guidance=1.0)


def test_prompts_change_the_images(pipeline):
    images = pipeline(["7", "3", "a bold 7", ""], guidance=3.0, seed=0)
    same_noise = [pipeline([p], guidance=3.0)[0] for p in ("7", "3", "a bold 7", "")]
    for i, image in enumerate(same_noise):
        assert all(not np.array_equal(image, other) for other in same_noise[i + 1 :])
    assert np.array_equal(images[0], same_noise[0])


def test_an_image_does_not_depend_on_its_neighbours(pipeline):
    """Image i of a call depends only on its prompt, the seed and i."""
    many = pipeline(["7"] * 3, output="latent")
    torch.testing.assert_close(pipeline(["7"], output="latent")[0], many[0], atol=1e-5, rtol=0)
    other = pipeline(["a thin 1", "7", "8"], output="latent")
    torch.testing.assert_close(other[1], many[1], atol=1e-5, rtol=0)


def test_large_calls_are_split(pipeline, monkeypatch):
    whole = pipeline(["7"] * 5, output="latent")
    monkeypatch.setattr("nanosd3.machine.device.BATCH", 2)
    torch.testing.assert_close(pipeline(["7"] * 5, output="latent"), whole, atol=1e-5, rtol=0)


def test_dropping_all_encoders_is_the_empty_prompt(pipeline):
    everything = ["clip_l", "clip_g", "t5"]
    a, b = pipeline(["a seven"], drop=everything), pipeline([""])
    assert np.array_equal(a, b)


def test_callback_sees_every_step(pipeline):
    seen = []
    pipeline("7", steps=6, callback=lambda i, t, z, x0: seen.append((i, float(t), z.shape)))
    assert [i for i, _, _ in seen] == list(range(6)) and seen[0][1] == 1
    assert seen[0][2] == (1, 4, 8, 8)


def test_warnings(pipeline):
    with pytest.warns(UserWarning, match="'zebra'"):
        pipeline(["a zebra"])
    with pytest.warns(UserWarning, match="too long"):
        pipeline(["a 7 " * 20])
