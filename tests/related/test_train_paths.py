"""Training along a path: the target is the path's, the text is told, and a stop changes nothing.
Its command samples with any solver."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.commands import refused, status

from nanosd3.claims.data_sets import open_latents
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.fm_networks import path_job
from nanosd3.flow import flow_loss
from nanosd3.machine.signals import Interrupted
from nanosd3.mmdit import MMDiT
from nanosd3.related import __main__ as related
from nanosd3.related import train_paths
from nanosd3.related.paths import PATHS
from nanosd3.related.solvers import dopri5, midpoint, rk4
from nanosd3.related.train_paths import (
    FIXED_SOLVERS,
    LEARNED,
    path_latents,
    path_step,
    train_path,
    velocity_for,
)
from nanosd3.samplers import euler
from nanosd3.training.loop import StepRNG


@pytest.fixture(scope="module")
def data(tiny_run, tmp_path_factory):
    return open_latents(Conditions((0,), True, tiny_run, tmp_path_factory.mktemp("paths")))


def at(data, folder: Path, name: str = "ot"):
    return path_job(replace(data, conditions=replace(data.conditions, out=folder)), name, 0)


def test_ot_has_the_losses_of_rectified_flow(data, tmp_path):
    """A network that returns zero: the loss is that of velocity zero."""
    job = at(data, tmp_path)
    seen = {}

    class Zero:
        config = job.config.mmdit

        def __call__(self, z, t, context, pooled):
            seen.update(z=z, t=t, context=context, pooled=pooled)
            return torch.zeros_like(z)

    step_rng = StepRNG((0, "flow", 3), range(8))
    found = path_step(PATHS["ot"], job, data.features, Zero(), step_rng)
    _, posterior = step_rng.noise((2, *seen["z"].shape[1:])).unbind(1)
    noise, t = step_rng.noise((2, *seen["z"].shape[1:]))[:, 0], seen["t"].view(-1, 1, 1, 1)
    x0 = (seen["z"] - t * noise) / (1 - t)
    torch.testing.assert_close(found, flow_loss(torch.zeros_like(x0), x0, noise), rtol=1e-3, atol=0)
    assert seen["context"].shape == (8, 1, job.config.mmdit.context_dim)
    assert not seen["context"].any() and seen["pooled"].any()
    assert len(seen["t"].unique()) == 8 and posterior.std() > 0


def test_times_reach_from_the_first_on(data, tmp_path):
    """Uniform; VP never below its first time."""
    times = []

    class Zero:
        config = data.finished.pipeline.config.mmdit

        def __call__(self, z, t, context, pooled):
            times.append(t)
            return torch.zeros_like(z)

    path = replace(PATHS["vp"], first=0.4)
    for step in range(100):
        path_step(path, at(data, tmp_path), data.features, Zero(),
                  StepRNG((0, "flow", step), range(8)))  # fmt: skip
    t = torch.cat(times)
    assert t.min() >= 0.4 and t.max() <= 1
    assert torch.histc(t, 4, 0.4, 1).min() > 0.2 * len(t)


def test_pooled_text_reaches_the_velocity(data):
    torch.manual_seed(0)
    model = MMDiT(data.finished.pipeline.config.mmdit)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, pooled = torch.randn(2, 2, 4, 8, 8), torch.randn(2, 2, model.config.pooled_dim)
    a, b = (velocity_for(model, p)(z[0], torch.tensor(0.5)) for p in pooled)
    assert not torch.allclose(a, b)


def test_interrupted_and_resumed(data, tmp_path, monkeypatch):
    """The same bytes as without a stop."""
    whole = at(data, tmp_path / "whole")
    train_path(PATHS["vp"], whole, data.features, kept=(2,))
    job = at(data, tmp_path / "stopped")
    calls = []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return path_step(*args)

    monkeypatch.setattr("nanosd3.related.train_paths.path_step", stop_at_the_second)
    with pytest.raises(Interrupted):
        train_path(PATHS["vp"], job, data.features, kept=(2,))
    train_path(PATHS["vp"], job, data.features, kept=(2,))
    assert len(calls) == job.training.flow.steps
    for name in ("flow.safetensors", "flow-2.safetensors"):
        assert (job.run.folder / name).read_bytes() == (whole.run.folder / name).read_bytes()


# --- sampling -----------------------------------------------------------------------------------


class Rotating:
    """A field that turns and grows, in place of a network."""

    def __init__(self, config):
        self.config = config

    def __call__(self, z, t, context, pooled):
        return torch.sin(9 * t) * z.roll(1, dims=-1) + pooled.mean()


@pytest.mark.parametrize("name", LEARNED)
def test_path_latents(data, name):
    """Each solver by its own name, from the prior to the path's first time, at the cost asked."""
    path, model = PATHS[name], Rotating(data.finished.pipeline.config.mmdit)
    z, pooled = torch.randn(2, 2, 4, 8, 8)[0], torch.randn(2, 5)
    velocity = velocity_for(model, pooled)
    for solver, steps in (("euler", 8), ("midpoint", 4), ("rk4", 2)):
        follow = {"euler": euler, "midpoint": midpoint, "rk4": rk4}[solver]
        out, evaluations = path_latents(path, model, z, pooled, solver, 8)
        assert evaluations == 8 and FIXED_SOLVERS[solver][0] is follow
        ts = torch.linspace(1, path.first, steps + 1)
        assert torch.equal(out, follow(velocity, path.prior_std * z, ts))
    counts = []
    for tolerance in (1e-2, 1e-4):
        out, evaluations = path_latents(path, model, z, pooled, "dopri5", tolerance)
        ts = torch.tensor([1.0, path.first])
        expected = dopri5(velocity, path.prior_std * z, ts, rtol=tolerance, atol=tolerance)
        assert torch.equal(out, expected)
        counts.append(evaluations)
    assert counts[0] < counts[1]


def test_ve_would_start_from_its_prior():
    config = type("Config", (), {"context_dim": 3})
    z, pooled = torch.ones(1, 1, 2, 2), torch.zeros(1, 3)
    zero = Rotating(config)
    zero.__class__ = type("Zero", (Rotating,), {"__call__": lambda self, z, t, c, p: 0 * z})
    out, _ = path_latents(PATHS["ve"], zero, z, pooled, "euler", 4)
    torch.testing.assert_close(out, 80 * z)


# --- the command --------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    return related.main(["paths", *words])


command = partial(status, main)


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory) -> dict[str, Path]:
    """A run by Euler along OT, and others that differ in one option."""
    folder = tmp_path_factory.mktemp("related")
    options = {
        "euler": ("--evaluations", 4),
        "vp": ("--evaluations", 4, "--path", "vp"),
        "rk4": ("--evaluations", 4, "--solver", "rk4"),
        "dopri5": ("--solver", "dopri5"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_paths, "DEFAULT_TOLERANCE", 0.3)  # an untrained field is rough
        for name, words in options.items():
            assert command("--run", tiny_run, "--out", folder / name, *words) == 0
    return {name: folder / name for name in options}


def test_what_a_run_leaves(runs):
    found = {name: json.loads((out / "metrics.json").read_text()) for name, out in runs.items()}
    evaluations = {name: metrics["evaluations"] for name, metrics in found.items()}
    assert [evaluations[name] for name in ("euler", "vp", "rk4")] == [4, 4, 4]
    assert evaluations["dopri5"] >= 8
    for name, metrics in found.items():
        assert metrics["system"] == "paths" and metrics["training_seconds"] > 0
        assert metrics["main_model"]["samples"] == metrics["samples"]
        assert Image.open(runs[name] / "samples.png").width > 500
        assert not (runs[name] / "cache").exists()


def test_every_option_changes_the_output(runs):
    """The path the weights; the solver and its cost the samples alone."""
    weights = {name: (out / "flow.safetensors").read_bytes() for name, out in runs.items()}
    assert weights["euler"] == weights["rk4"] == weights["dopri5"] != weights["vp"]
    scores = {
        json.loads((out / "metrics.json").read_text())["frechet_distance"] for out in runs.values()
    }
    assert len(scores) == len(runs)
    pictures = {runs[name].joinpath("samples.png").read_bytes() for name in ("euler", "rk4")}
    assert len(pictures) == 2


def test_finished_runs_are_kept(runs, tiny_run, capsys):
    out = runs["euler"]
    before = (out / "metrics.json").read_bytes()
    same = ("--run", tiny_run, "--out", out, "--evaluations", 4)
    assert command(*same) == 0
    assert "is finished" in capsys.readouterr().out
    said = refused(capsys, main, *same, "--path", "vp")
    assert "with path ot, not vp" in said
    said = refused(capsys, main, *same[:-2])
    assert "with evaluations 4, not 16" in said
    assert (out / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--path", "ve"], "--path"),
        (["--path", "straight"], "--path"),
        (["--solver", "rk5"], "--solver"),
        (["--solver", "rk4", "--evaluations", "6"], "--evaluations must be a multiple of 4"),
        (["--evaluations", "0"], "--evaluations"),
        (["--solver", "dopri5", "--evaluations", "8"], "--evaluations: dopri5 finds"),
        (["--tolerance", "1e-3"], "--tolerance: euler has none"),
        (["--solver", "dopri5", "--tolerance", "0"], "--tolerance must be a number from 1e-06"),
        (["--solver", "dopri5", "--tolerance", "1e-7"], "--tolerance must be a number from 1e-06"),
        (["--solver", "dopri5", "--tolerance", "nan"], "--tolerance must be a number from 1e-06"),
        (["--solver", "dopri5", "--tolerance", "inf"], "--tolerance must be a number from 1e-06"),
    ],
)
def test_bad_options(tiny_run, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    assert said in refused(capsys, main, "--run", tiny_run, "--out", out, *words)
    assert not out.exists()
