"""The command of the related systems, and the consistency model that it makes of a tiny run."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3 import generate
from nanosd3.cli import run_main
from nanosd3.config_types import Sampling
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import export
from nanosd3.pipeline import Pipeline
from nanosd3.related import __main__ as related
from nanosd3.related import command as related_command
from nanosd3.related import train_consistency
from nanosd3.related.finished_run import open_finished_run
from nanosd3.related.scoring import accuracy_and_ratio, draw_and_floor, evaluations, in_words
from nanosd3.storage.files import read_tensors
from nanosd3.training import stages

command = partial(status, related.main)


@pytest.fixture(scope="module")
def turbo(tiny_run, tmp_path_factory):
    """A tiny consistency model, interrupted after its second step and resumed."""
    out = tmp_path_factory.mktemp("related") / "turbo"
    with interrupted_after(2):
        assert command("consistency", "--run", tiny_run, "--out", out) == 130
    assert not (out / "flow.safetensors").exists() and list(out.glob("state-*"))
    with pytest.raises(InputError, match=r"rerun `python -m nanosd3[.]related consistency --out"):
        Pipeline.load(out)
    assert command("consistency", "--run", tiny_run, "--out", out) == 0
    return out


def test_resumed_byte_for_byte(turbo, tiny_run):
    """The main job's was not interrupted."""
    whole = (tiny_run / "turbo" / "flow.safetensors").read_bytes()
    assert whole == (turbo / "flow.safetensors").read_bytes()


def test_what_a_run_leaves(turbo, tiny_run):
    metrics = json.loads((turbo / "metrics.json").read_text())
    assert metrics["system"] == "consistency" and metrics["evaluations"] == 1
    assert set(metrics["by_evaluations"]) == {"1", "2", "4"}
    assert metrics["main_model"]["evaluations"] == 8  # 4 Euler steps with guidance
    for scores in (metrics, metrics["main_model"], *metrics["by_evaluations"].values()):
        assert 0 <= scores["prompt_accuracy"] <= 1 and scores["frechet_ratio_to_real"] > 0
        assert scores["frechet_floor_real"] > 0 and scores["frechet_floor_reconstructions"] > 0
        assert len(scores["draws"]) == 2 and scores["images_per_second"] > 0
    ratios = [d["frechet_ratio_to_real"] for d in metrics["draws"]]
    assert metrics["frechet_ratio_to_real"] == pytest.approx(sum(ratios) / 2)
    assert metrics["training_seconds"] > 0
    picture = Image.open(turbo / "samples.png")
    assert picture.width > 2 * picture.height / 2 and not (turbo / "cache").exists()
    for name in ("autoencoder", "text", "judge"):
        same = (turbo / f"{name}.safetensors", tiny_run / f"{name}.safetensors")
        assert same[0].read_bytes() == same[1].read_bytes()


def test_the_ratio_of_real_images_is_one(tiny_run):
    finished = open_finished_run(tiny_run, None, torch.device("cpu"))
    draw, floor = draw_and_floor(finished, 40, 3)
    real = finished.source.images.train_images[draw.chosen]
    accuracy, ratio = accuracy_and_ratio(finished, real.numpy(), draw, floor)
    assert ratio == pytest.approx(1) and accuracy == finished.scorer.score(real, draw)[0]
    assert floor != pytest.approx(1)


def test_it_is_a_run_like_any_other(turbo, tmp_path, capsys):
    """One Euler step from t = 1, by the usual pipeline, and decoded as usual."""
    pipeline = Pipeline.load(turbo)
    noise = pipeline.noise(2, 5, (8, 8))
    context, pooled = pipeline.encode_text(["3", "7"])
    with torch.no_grad():
        x0 = noise - pipeline.mmdit(noise, torch.tensor(1.0), context, pooled)
    latents = pipeline(["3", "7"], seed=5, output="latent")
    torch.testing.assert_close(latents, x0, atol=1e-5, rtol=1e-5)
    out = tmp_path / "digits.npy"
    run = ["a three", "--run", str(turbo), "--out", str(out), "--count", "2"]
    assert run_main(lambda: generate.main(run)) == 0
    one = np.load(out)
    assert run_main(lambda: generate.main([*run, "--steps", "2"])) == 0
    assert one.shape == (2, 28, 28) and (np.load(out) != one).any()


def test_guidance_is_built_in(turbo, tiny_run, tmp_path, capsys):
    main = lambda a: generate.main(["3", "--out", str(tmp_path / "x.png"), *a])  # noqa: E731
    line = refused(capsys, main, "--run", turbo, "--guidance", "2")
    assert line == "error: guidance 2.0: is already distilled into this model; leave it out"
    line = refused(capsys, main, "--run", tiny_run, "--sampler", "consistency")
    assert "sampler consistency is for consistency models" in line
    assert run_main(lambda: main(["--run", str(turbo), "--guidance", "1"])) == 0
    assert run_main(lambda: main(["--run", str(turbo), "--sampler", "heun", "--steps", "3"])) == 0


def test_known_pixels_are_kept_by_several_steps(turbo):
    """Inpainting with fresh noise in every step: the known part ends where it was."""
    pipeline = Pipeline.load(turbo)
    image = np.zeros((28, 28), np.uint8)
    image[8:20, 10:16] = 255
    mask = np.zeros((28, 28), bool)
    mask[14:] = True
    pixels = torch.from_numpy(image)[None, None] / 127.5 - 1
    with torch.no_grad():
        known = pipeline.encode(pixels)
    for steps in (1, 2, 5):
        latents = pipeline("3", image=image, mask=mask, steps=steps, output="latent")
        torch.testing.assert_close(latents[:, :, :4], known[:, :, :4], atol=1e-5, rtol=0)
        assert (latents[:, :, 4:] - known[:, :, 4:]).abs().mean() > 0.05


def test_every_option_counts(tiny_run, turbo, tmp_path, monkeypatch):
    """Each option of the training gives other weights."""
    scores = {"evaluations": 1, "prompt_accuracy": 0.0, "frechet_ratio_to_real": 0.0}
    for module in (train_consistency, related_command):
        monkeypatch.setattr(module, "pipeline_scores", lambda *_: scores)
    monkeypatch.setattr(train_consistency, "draw_beside_main", lambda *_: None)
    found = {"default": (turbo / "flow.safetensors").read_bytes()}
    options = {"levels": 2, "guidance": 1, "method": "training", "seed": 1, "lr": 1e-4}
    for name, value in (options | {"steps": 2, "batch": 8}).items():
        out = tmp_path / name
        assert command("consistency", "--run", tiny_run, "--out", out, f"--{name}", value) == 0
        found[name] = (out / "flow.safetensors").read_bytes()
    assert len(set(found.values())) == len(found)
    more = tmp_path / "more"
    words = ("--method", "training", "--levels", 2)
    assert command("consistency", "--run", tiny_run, "--out", more, *words) == 0
    assert (more / "flow.safetensors").read_bytes() not in found.values()


def test_diffusers_draws_the_same_with_one_step(turbo, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "diffusers"
    export(open_checkpoint(turbo), "diffusers", folder)
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    pipeline = Pipeline.load(turbo)
    noise = pipeline.noise(2, 5, (8, 8))
    context, pooled = pipeline.encode_text(["3", "7"])
    scheduler.set_timesteps(1)
    with torch.no_grad():
        velocity = theirs(noise, context, pooled, scheduler.timesteps.expand(2)).sample
        stepped = scheduler.step(velocity, scheduler.timesteps[0], noise).prev_sample
    ours = pipeline(["3", "7"], seed=5, output="latent")
    torch.testing.assert_close(stepped, ours, atol=1e-4, rtol=1e-4)


def test_the_exported_file_is_a_consistency_model_too(turbo, tmp_path):
    file = tmp_path / "turbo.safetensors"
    export(open_checkpoint(turbo), "single", file)
    again, before = Pipeline.load(file), Pipeline.load(turbo)
    assert again.config.sampling == before.config.sampling == Sampling(1, 1.0, 3.0, "consistency")
    assert (again("3", seed=1) == before("3", seed=1)).all()


def test_the_main_job_has_one(tiny_run, tmp_path):
    """Its sixth stage: the same model as by the command, and its scores in metrics.json."""
    folder = tiny_run / "turbo"
    by_command = tmp_path / "by-command"
    assert command("consistency", "--run", tiny_run, "--out", by_command) == 0
    for name in ("flow", "autoencoder", "judge"):
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (by_command / file).read_bytes()
    metrics = json.loads((tiny_run / "metrics.json").read_text())["turbo"]
    own = json.loads((folder / "metrics.json").read_text())
    assert metrics == {key: own[key] for key in metrics} and metrics["evaluations"] == 1
    assert Image.open(tiny_run / "turbo.png").width > 500
    assert Pipeline.load(folder)("3").shape == (1, 28, 28)


def test_refused(tiny_run, turbo, tmp_path, capsys):
    out = tmp_path / "out"

    def line(*words):
        return refused(capsys, related.main, *words)

    assert "no system 'x'; there are " in line("x")
    assert "no such run folder; `python train_mnist.py`" in line("consistency", "--run", out)
    assert not out.exists()
    common = ("consistency", "--run", tiny_run, "--out", out)
    assert "--guidance must be a number from 1 up" in line(*common, "--guidance", "0.5")
    assert "--guidance must be a number from 1 up" in line(*common, "--guidance", "nan")
    words = ("--method", "training", "--guidance", "2")
    assert "--guidance has no effect with --method training" in line(*common, *words)
    assert "--lr must be a number above 0" in line(*common, "--lr", "nan")
    assert "--levels" in line(*common, "--levels", "0")
    assert not out.exists()
    taken = line("consistency", "--run", turbo, "--out", out)
    assert "is a consistency model already" in taken
    assert "holds a run" in line("consistency", "--run", tiny_run, "--out", tiny_run)
    assert "with levels 4, not 2" in line(
        "consistency", "--run", tiny_run, "--out", turbo, "--levels", 2)  # fmt: skip


def test_an_unfinished_run_is_no_teacher(tiny_run, tmp_path, capsys):
    folder = tmp_path / "half"
    shutil.copytree(tiny_run, folder)
    content = json.loads((folder / "run.json").read_text())
    del content["stages"]["flow"]
    (folder / "run.json").write_text(json.dumps(content))
    assert "unfinished (no flow yet)" in refused(
        capsys, related.main, "consistency", "--run", folder, "--out", tmp_path / "x")  # fmt: skip


def test_another_teacher_is_another_run(tiny_run, turbo, tmp_path, capsys):
    folder = tmp_path / "other"
    shutil.copytree(tiny_run, folder)
    tensors = read_tensors(folder / "flow.safetensors")
    from safetensors.torch import save_file

    tensors["final_layer.linear.bias"] += 1
    save_file(tensors, folder / "flow.safetensors")
    assert "made from a finished run other than that of --run" in refused(
        capsys, related.main, "consistency", "--run", folder, "--out", turbo)  # fmt: skip


def test_finished_is_said(tiny_run, turbo, capsys):
    assert command("consistency", "--run", tiny_run, "--out", turbo) == 0
    assert "is finished: see" in capsys.readouterr().out


def test_list_and_help(capsys):
    assert command("list") == 0 and command() == 0
    with pytest.raises(SystemExit) as end:
        command("--help")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.count("consistency ") >= 3 and "arXiv 2303.01469" in said
    with pytest.raises(SystemExit):
        related.main(["consistency", "--help"])
    assert "--levels" in capsys.readouterr().out


def test_evaluations_are_counted():
    assert evaluations(Sampling(12, 1.6, 1.0, "heun")) == 46
    assert evaluations(Sampling(50, 1.0, 1.0, "euler")) == 50
    assert evaluations(Sampling(2, 1.0, 1.0, "consistency")) == 2
    scores = {"evaluations": 1, "prompt_accuracy": 0.5, "frechet_ratio_to_real": 2.0}
    assert in_words(scores).startswith("1 network evaluation an image, prompt accuracy 50.0%")


def test_the_teacher_guides(tiny_run, monkeypatch):
    """The pair's end is the guided teacher's Heun step, with the scale that was asked for."""
    scales = []
    original = train_consistency.guided
    monkeypatch.setattr(
        train_consistency, "guided", lambda *a: scales.append(a[3]) or original(*a))  # fmt: skip
    out = tiny_run.parent / "guided"
    words = ("--guidance", 3, "--steps", 1)
    assert command("consistency", "--run", tiny_run, "--out", out, *words) == 0
    assert scales == [3.0]
    shutil.rmtree(out)


def test_what_a_student_learns_from(tiny_run, tmp_path, monkeypatch):
    """Normalised latents, t above s; what is kept is the average of its weights."""
    module, seen = train_consistency, {"t": [], "normalised": 0}
    interpolate, ema, normalise = module.interpolate, stages.make_ema, module.Features.normalise

    def normalised(self, z):
        seen["normalised"] += 1
        return normalise(self, z)

    monkeypatch.setattr(module.Features, "normalise", normalised)
    both = lambda x, n, t: seen["t"].append(t) or interpolate(x, n, t)  # noqa: E731
    monkeypatch.setattr(module, "interpolate", both)
    monkeypatch.setattr(stages, "make_ema", lambda net: seen.setdefault("ema", ema(net)))
    words = ("--method", "training", "--steps", 1)
    assert command("consistency", "--run", tiny_run, "--out", tmp_path / "x", *words) == 0
    saved, average = read_tensors(tmp_path / "x/flow.safetensors"), seen["ema"].state_dict()
    assert seen["normalised"] >= 1 and saved.keys() == average.keys()
    assert all(saved[name].equal(average[name]) for name in saved)
    (t, s) = seen["t"]
    assert (t > s).all() and (s >= 0).all()


def test_what_a_student_starts_from(tiny_run, tmp_path, monkeypatch):
    """A distilled one from its teacher's weights, another from its own; images and noise keep their
    places in both."""
    module, first, places = train_consistency, [], set()
    ema, drawn, interpolate = stages.make_ema, module.Features.latents_and_noise, module.interpolate

    def copied(net):
        first.append({name: x.clone() for name, x in net.state_dict().items()})
        return ema(net)

    def marked(self, images, step_rng):
        x0, noise = drawn(self, images, step_rng)
        return torch.zeros_like(x0), torch.ones_like(noise)

    def watched(x0, noise, t):
        places.add((x0.max().item(), noise.min().item()))
        return interpolate(x0, noise, t)

    monkeypatch.setattr(stages, "make_ema", copied)
    monkeypatch.setattr(module.Features, "latents_and_noise", marked)
    monkeypatch.setattr(module, "interpolate", watched)
    for method in ("distillation", "training"):
        words = ("--method", method, "--steps", 1, "--out", tmp_path / method)
        assert command("consistency", "--run", tiny_run, *words) == 0
    teacher = read_tensors(tiny_run / "flow.safetensors")
    assert all(first[0][name].equal(teacher[name]) for name in teacher)
    assert not first[1]["x_embedder.proj.weight"].equal(teacher["x_embedder.proj.weight"])
    assert places == {(0.0, 1.0)}
