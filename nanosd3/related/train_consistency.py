"""Distil a finished run into a consistency model: prompted digits in one network evaluation.

The result is a run folder like any other: `generate --model runs/consistency` draws with it, one
step by default. The text encoders and the autoencoder are the finished run's.

`distillation` starts from the trained transformer, whose guided steps are the student's targets;
`training` starts from fresh weights and has no teacher.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanosd3.cli import Parser, positive
from nanosd3.config_types import Config, Recipe, Sampling
from nanosd3.errors import InputError
from nanosd3.flow import interpolate
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.related.command import (
    Study,
    System,
    check_guidance,
    conclude,
    parse,
    size_of,
    study_in,
    with_flow_recipe,
)
from nanosd3.related.consistency import (
    consistency_loss,
    doubling_count,
    draw_levels,
    even_levels,
    teacher_step,
)
from nanosd3.related.finished_run import FinishedRun, repeated
from nanosd3.related.scoring import draw_beside_main, pipeline_scores
from nanosd3.samplers import Velocity, guided
from nanosd3.storage.files import read_json
from nanosd3.storage.run import Run
from nanosd3.training.cached_features import Features
from nanosd3.training.loop import StepLoss, StepRNG
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, training_of

METHODS = ("distillation", "training")
RECIPES = {
    ("distillation", "mnist"): Recipe(
        480, batch=32, lr=4e-3, warmup=20, weight_decay=0.0, optimizer="muon"
    ),
    ("distillation", "tiny"): Recipe(4, batch=16, lr=1e-3, warmup=1, weight_decay=0.0),
    ("training", "mnist"): Recipe(
        1900, batch=64, lr=8e-3, warmup=100, weight_decay=0.0, optimizer="muon"
    ),
    ("training", "tiny"): Recipe(4, batch=16, lr=8e-3, warmup=1, weight_decay=0.0),
}
EMA_DECAY = {"distillation": 0.99, "training": 0.995}
FIRST_LEVELS = 2  # without a teacher, levels double from this number up to --levels
STEPS_SHOWN = (1, 2, 4)  # network evaluations an image


def levels_of(args: argparse.Namespace) -> int:
    return args.levels or (4 if args.method == "distillation" else 8)


def guidance_of(args: argparse.Namespace, finished: FinishedRun) -> float:
    return finished.config.sampling.guidance if args.guidance is None else args.guidance


# --- a training step ------------------------------------------------------------------------------

Text = tuple[Tensor, Tensor]  # context (B, M, Dc), pooled (B, Dp)


def draw_batch(
    job: Job, features: Features, levels: Tensor, step_rng: StepRNG
) -> tuple[Tensor, Tensor, Text, Tensor, Tensor]:
    """Latents x0 (B, C, h, w), noise like them, the text of their captions, none of it dropped, and
    neighbouring levels t and s, each (B,)."""
    generator, size = step_rng.generator(), job.training.flow.batch
    images = step_rng.take(job.source.draw(size, generator))
    captions = job.source.captions(images, step_rng.take(torch.rand(size, generator=generator)))
    t, s = (step_rng.take(x).to(job.device) for x in draw_levels(levels, size, generator))
    x0, noise = features.latents_and_noise(images, step_rng)
    context, pooled = (x.to(job.device) for x in features.text(captions))
    return x0.to(job.device), noise.to(job.device), (context, pooled), t, s


def guided_teacher(
    finished: FinishedRun, features: Features, scale: float
) -> Callable[[Text], Velocity]:
    """The main model guided by `scale`: its velocity, with t (B,), for the text of a batch."""
    model = finished.pipeline.mmdit
    no_context, no_pooled = (x.to(finished.device) for x in features[""])

    def network(z: Tensor, t: Tensor, *text: Tensor) -> Tensor:
        return model(z, repeated(t, len(z)), *text)  # guidance doubles z, not t

    def velocity_of(text: Text) -> Velocity:
        no_text = no_context.expand_as(text[0]), no_pooled.expand_as(text[1])
        return guided(network, text, no_text, scale)

    return velocity_of


def distillation_loss(study: Study, features: Features, student: MMDiT) -> StepLoss:
    """Losses of pairs that the guided teacher makes with one Heun step from t to s."""
    job, finished = study.job, study.finished
    teacher = guided_teacher(finished, features, guidance_of(study.args, finished))
    levels = even_levels(levels_of(study.args))

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        x0, noise, text, t, s = draw_batch(job, features, levels, step_rng)
        z_t = interpolate(x0, noise, t)
        with torch.no_grad():
            z_s = teacher_step(teacher(text), z_t, t, s)
        return consistency_loss(student, z_t, t, z_s, s, *text), {}

    return loss_of


def training_loss(study: Study, features: Features, student: MMDiT) -> StepLoss:
    """Losses of pairs that are the same image with the same noise, at two levels."""
    job, most = study.job, levels_of(study.args)
    first = min(FIRST_LEVELS, most)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        step = int(step_rng.name[-1])
        count = doubling_count(step, job.training.flow.steps, first, most) - 1
        x0, noise, text, t, s = draw_batch(job, features, even_levels(count), step_rng)
        z_t, z_s = interpolate(x0, noise, t), interpolate(x0, noise, s)
        return consistency_loss(student, z_t, t, z_s, s, *text), {"levels": count}

    return loss_of


# --- the run --------------------------------------------------------------------------------------


def student_of(study: Study, features: Features) -> MMDiT:
    """The student, trained or loaded: the moving average of its weights."""
    job, distilled = study.job, study.args.method == "distillation"
    student = build(job, "flow", lambda: MMDiT(job.config.mmdit)).to(job.device)

    def train() -> dict:
        if distilled:
            student.load_state_dict(study.finished.pipeline.mmdit.state_dict())
        loss_of = (distillation_loss if distilled else training_loss)(study, features, student)
        return fit_average(job, "consistency", student, loss_of, job.training.ema_decay)

    finish_or_load(job, "flow", student, train)  # "flow", the name of a run's transformer
    return student


class Consistency(System):
    name = "consistency"
    what = "Consistency models: one network evaluation an image."
    paper = "arXiv 2303.01469, 2310.14189"

    def add_options(self, parser: Parser) -> None:
        add = parser.add_argument
        text = "how a pair of neighbouring points is made (default: %(default)s)"
        add("--method", choices=METHODS, default=METHODS[0], help=text)
        text = "levels of noise at which it learns (default: 4, without a teacher 8)"
        add("--levels", type=positive, help=text)
        text = "guidance scale to build in (default: that of the finished run)"
        add("--guidance", type=float, help=text)

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        if finished.config.sampling.sampler == "consistency":
            raise InputError(
                f"{args.run}: is a consistency model already; name the run that it was made of"
            )
        if args.method == "training" and args.guidance is not None:
            raise InputError("--guidance has no effect with --method training: it has no teacher")
        check_guidance(guidance_of(args, finished))
        recipe = RECIPES[args.method, size_of(args, finished)]
        config = with_flow_recipe(finished.config, recipe, args)
        training = replace(training_of(config), ema_decay=EMA_DECAY[args.method])
        # With the shift, two steps are at t = 1 and 0.75 (LOG.md).
        sampling = Sampling(steps=1, guidance=1.0, shift=3.0, sampler="consistency")
        return replace(config, training=training, sampling=sampling)

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        given: dict = {"method": args.method, "levels": levels_of(args)}
        if args.method == "distillation":
            given["guidance"] = guidance_of(args, finished)
        return given

    def train(self, study: Study) -> dict:
        job, finished = study.job, study.finished
        pipeline = distilled(study)
        by_evaluations = {}
        for steps in STEPS_SHOWN:
            sampling, count = replace(job.config.sampling, steps=steps), job.training.evaluate
            by_evaluations[steps] = pipeline_scores(finished, pipeline, count, sampling)
        draw_beside_main(finished, pipeline, job.run.folder / "samples.png")
        seconds = job.run.stages["flow"]["seconds"]
        scores = by_evaluations[1]
        return scores | {"by_evaluations": by_evaluations, "training_seconds": seconds}


def distilled(study: Study) -> Pipeline:
    """The consistency model, trained or loaded, with the finished run's encoders in its folder."""
    study.finished.copy_encoders_to(study.job)
    features, device = study.features, study.job.device
    encoders = study.finished.encoders(study.job.config)
    student = student_of(study, features)
    return Features(features.folder.parent, features.source, encoders).pipeline(student, device)


def turbo_stage(finished: FinishedRun, features: Features, seed: int) -> dict:
    """The main job's stage: distil it into the folder turbo/ of its run, and compare both on the
    main job's own draw, in turbo.png and in the scores returned."""
    system, folder = Consistency(), finished.run.folder / "turbo"
    args = parse(system, ["--seed", str(seed)])
    if (folder / "run.json").exists():  # one made from other weights is deleted
        args.fresh = Run.read(folder).identity.get("finished") != finished.fingerprint
    with study_in(folder, system, args, finished, features) as study:
        if study is None:
            return read_json(folder / "metrics.json")
        pipeline, count = distilled(study), study.job.training.evaluate
        sampling = study.job.config.sampling
        scores = pipeline_scores(finished, pipeline, count, sampling, draws=(seed,))
        seconds = study.job.run.stages["flow"]["seconds"]
        draw_beside_main(finished, pipeline, finished.run.folder / "turbo.png")
        conclude(study, scores | {"system": system.name, "training_seconds": seconds})
    return scores
