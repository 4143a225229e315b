"""x-cm-5: what halving learns from, as many passes for both, and the rules in all three ways."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import consistency_progressive as progressive
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import network_job, open_encoded
from nanosd3.cli import run_main
from nanosd3.config_types import Recipe
from nanosd3.flow import interpolate
from nanosd3.related.consistency import draw_levels, even_levels
from nanosd3.related.train_consistency import RECIPES
from nanosd3.storage.files import read_tensors
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import training_of


@pytest.fixture(scope="module")
def opened(tiny_run, tmp_path_factory):
    conditions = Conditions((0,), True, tiny_run, tmp_path_factory.mktemp("halving"))
    finished, features = open_encoded(conditions)
    recipe = Recipe(1, batch=16, lr=1e-3, warmup=1, weight_decay=0.0)
    training = replace(training_of(finished.config), flow=recipe)
    config = replace(finished.config, training=training)
    return conditions, finished, features, network_job(conditions, finished, "halving", config, 0)


def test_a_student_that_knows_where_two_steps_end_has_no_loss(opened):
    """The teacher's velocity is 2 z + t, whose two steps from t to s are done by hand."""
    *_, features, job = opened
    name, steps, seen = StepRNG((0, "halving", 0), range(16)), 4, []

    def student(z, t, *text):
        seen.append((z, t))
        h, t = 0.125, t.view(-1, 1, 1, 1)
        half = z - h * (2 * z + t)
        return (z - (half - h * (2 * half + t - h))) / 0.25

    def teacher(text):
        return lambda z, t: 2 * z + t.view(-1, 1, 1, 1)

    losses, _ = progressive.halving_loss(job, features, student, teacher, steps)(name)
    torch.testing.assert_close(losses, torch.zeros(16), atol=1e-9, rtol=0)

    def off(z, t, *text):
        return student(z, t, *text) + 0.5

    losses, _ = progressive.halving_loss(job, features, off, teacher, steps)(name)
    z, t = seen[-1]
    assert set(t.tolist()) <= {0.25, 0.5, 0.75, 1.0}
    torch.testing.assert_close(losses, 0.25 * torch.maximum((1 - t) ** 2, t**2), rtol=1e-4, atol=0)
    generator = name.generator()
    images = job.source.draw(16, generator)
    torch.rand(16, generator=generator)
    t_drawn, _ = draw_levels(even_levels(steps), 16, generator)
    assert t.equal(t_drawn)
    assert z.equal(interpolate(*features.latents_and_noise(images, name), t))


def test_the_first_teacher_is_guided(opened):
    """Away from the empty prompt, by the main job's scale."""
    _, finished, features, _ = opened
    context, pooled = features.text(torch.tensor([3, 8]))
    z, t = (
        torch.randn(2, *finished.pipeline.noise(1, 0, (4, 4)).shape[1:]),
        torch.tensor([0.3, 0.9]),
    )
    model, (no_context, no_pooled) = finished.pipeline.mmdit, features[""]
    scale = finished.config.sampling.guidance
    assert scale > 1
    with torch.no_grad():
        out = progressive.guided_teacher(finished, features, scale)((context, pooled))(z, t)
        with_text = model(z, t, context, pooled)
        without = model(z, t, no_context.expand_as(context), no_pooled.expand_as(pooled))
    torch.testing.assert_close(out, without + scale * (with_text - without), atol=1e-5, rtol=1e-5)


def test_as_many_passes_as_the_consistency_model():
    steps = RECIPES["distillation", "mnist"].steps
    halving = progressive.CONSISTENCY_PASSES * steps // sum(progressive.PROGRESSIVE_PASSES)
    assert (steps, halving) == (480, 174)
    assert len(progressive.PROGRESSIVE_PASSES) == len(progressive.HALVED)


def test_each_student_starts_from_its_teacher(opened, monkeypatch):
    """The first from the main model, the next from the one before; each is what it learned."""
    conditions, finished, features, _ = opened
    begun, learn, scales, teach = {}, progressive.fit_average, [], progressive.guided_teacher

    def guided_by(finished, features, scale):
        scales.append(scale)
        return teach(finished, features, scale)

    def watched(job, stage, student, *rest):
        begun[stage] = {name: x.clone() for name, x in student.state_dict().items()}
        return learn(job, stage, student, *rest)

    monkeypatch.setattr(progressive, "fit_average", watched)
    monkeypatch.setattr(progressive, "guided_teacher", guided_by)
    pipelines, seconds = progressive.progressive_students(conditions, finished, features, 0)
    assert seconds > 0 and list(pipelines) == [8, 4, 2, 1]
    assert scales == [finished.config.sampling.guidance]
    folder = conditions.networks / "progressive-0"
    learned = [finished.run.folder / "flow.safetensors"]
    learned += [folder / f"progressive-{n}.safetensors" for n in pipelines]
    for (before, after), stage in zip(pairwise(learned), begun, strict=True):
        weights = read_tensors(before)
        assert all(begun[stage][name].equal(x) for name, x in weights.items()), stage
        assert any(not x.equal(weights[name]) for name, x in read_tensors(after).items())
    for n, pipeline in pipelines.items():
        assert pipeline.config.sampling.guidance == 1
        weights = read_tensors(folder / f"progressive-{n}.safetensors")
        assert all(x.equal(weights[name]) for name, x in pipeline.mmdit.state_dict().items())


def test_both_run_fast(tiny_run, tmp_path):
    for name in ("x-cm-5", "x-cm-5-steps"):
        words = [name, "--fast", "--seeds", "2", "--run", str(tiny_run), "--out", str(tmp_path)]
        assert run_main(lambda words=words: command.main(words)) == 0
    results = json.loads((tmp_path / "fast/x-cm-5.json").read_text())["results"]
    assert all(len(row) == 4 for row in results["table"]["rows"])
    assert list(results["scores"]) == ["fresh", "kept", "progressive"]
    assert all(list(by_steps) == ["1", "2", "4"] for by_steps in results["scores"].values())
    assert results["training_seconds"] > 0
    assert (tmp_path / "fast/x-cm-5.png").stat().st_size > 4000


def made_up(fresh, halved):
    """Two seeds with these ratios at 1, 2 and 4 steps."""
    scores = {
        name: {str(n): [(0.9, r), (0.9, r + d)] for n, r in zip((1, 2, 4), found, strict=True)}
        for name, found, d in (("fresh", fresh, 0.1), ("progressive", halved, 0.0))
    }
    return {"scores": scores}


@pytest.mark.parametrize(
    ("fresh", "halved", "one", "more"),
    [
        ((2.0, 2.0, 2.0), (3.0, 3.0, 3.0), "supported", "supported"),
        ((3.0, 2.0, 3.0), (2.0, 3.0, 2.0), "refuted", "refuted"),
        ((2.0, 2.0, 2.0), (2.05, 2.05, 3.0), "undecided", "undecided"),
    ],
)
def test_rules(fresh, halved, one, more):
    results = made_up(fresh, halved)
    assert EXPERIMENTS["x-cm-5"].decide(results) == one
    assert EXPERIMENTS["x-cm-5-steps"].decide(results) == more
    alone = {name: {n: s[:1] for n, s in by.items()} for name, by in results["scores"].items()}
    assert EXPERIMENTS["x-cm-5"].decide({"scores": alone}) == "undecided"
