"""Students distilled from the main model, several seeds, and their samples in few steps: what the
experiments on consistency models share."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, once, table_of
from nanosd3.claims.runs import open_encoded
from nanosd3.few_steps import FRESH, consistency, even_schedule
from nanosd3.pipeline import Pipeline
from nanosd3.related.command import parse, study_in
from nanosd3.related.consistency import clean_image, inconsistency
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import score_samples
from nanosd3.related.train_consistency import Consistency, distilled
from nanosd3.samplers import Velocity, euler, guided
from nanosd3.text import rows_of
from nanosd3.training.cached_features import Features
from nanosd3.training.evaluation import Draw

STUDENT_STEPS, TEACHER_STEPS = (1, 2, 4), (1, 2, 4, 16)
SHIFT = 3.0  # of the times at which noise is kept; the published times are even
AT_ONCE = 250  # images
ScoresBySteps = dict[str, dict[str, list[tuple[float, float]]]]  # by name, steps and seed
STUDENT_SAMPLERS = {
    "teacher": "teacher, Euler",
    "fresh": "student, fresh noise",
    "kept": "student, noise kept",
}


def sample_in_steps(
    pipeline: Pipeline, features: Features, draw: Draw, seed: int, sampler: str, steps: int
) -> np.ndarray:
    """Images uint8 of a draw's prompts, by one of STUDENT_SAMPLERS."""
    config = pipeline.config
    side = (config.image_size // config.vae.factor,) * 2
    noise = pipeline.noise(len(draw.prompts), seed, side)
    text = {prompt: features[prompt] for prompt in {*draw.prompts, ""}}
    results = []
    for rows in torch.arange(len(noise)).split(AT_ONCE):
        velocity = velocity_of(pipeline, text, [draw.prompts[i] for i in rows])
        if sampler == "teacher":
            results.append(euler(velocity, noise[rows], even_schedule(steps)))
        else:
            fresh, alpha = (1.0, 1.0) if sampler == "fresh" else (FRESH, SHIFT)
            ts = even_schedule(steps, alpha)
            results.append(consistency(velocity, noise[rows], ts, fresh=fresh))
    return pipeline.decode(torch.cat(results))


def velocity_of(
    pipeline: Pipeline, text: dict[str, tuple[Tensor, Tensor]], prompts: list[str]
) -> Velocity:
    """With the guidance that the pipeline's config has: none for a student."""
    negative = rows_of(text, [""] * len(prompts))
    scale = pipeline.config.sampling.guidance
    return guided(pipeline.mmdit, rows_of(text, prompts), negative, scale)


@once
@torch.no_grad()
def consistency_study(conditions: Conditions) -> dict:
    """Students of several seeds and their teacher: scores by steps, and how consistent they are."""
    finished, features = open_encoded(conditions)
    count, steps_walked = (20, 20) if conditions.fast else (1000, 100)
    scores: ScoresBySteps = {
        sampler: {str(n): [] for n in (TEACHER_STEPS if sampler == "teacher" else STUDENT_STEPS)}
        for sampler in STUDENT_SAMPLERS
    }
    spreads: dict[str, list[float]] = {"student": [], "teacher": []}
    seconds = 0.0
    for seed in conditions.seeds:
        student, took = student_pipeline(conditions, finished, features, seed)
        seconds += took
        for sampler, by_steps in scores.items():
            pipeline = finished.pipeline if sampler == "teacher" else student
            for steps, found in by_steps.items():
                found.append(
                    score_in_steps(finished, pipeline, features, seed, sampler, int(steps), count)
                )
        for name, value in spreads_of(finished, student, features, seed, steps_walked).items():
            spreads[name].append(value)
    return {
        "scores": scores,
        "spreads": spreads,
        "training_seconds": seconds,
        "table": table_by_steps(scores, STUDENT_SAMPLERS, TEACHER_STEPS),
    }


def score_in_steps(
    finished: FinishedRun,
    pipeline: Pipeline,
    features: Features,
    seed: int,
    sampler: str,
    steps: int,
    count: int,
) -> tuple[float, float]:
    """Share of a seed's draw of samples that is classified as prompted, and Frechet distance over
    that of real images."""
    generate = partial(sample_in_steps, pipeline, features, sampler=sampler, steps=steps)
    score = score_samples(finished, generate, count, steps, draws=(100 + seed,))
    return score["prompt_accuracy"], score["frechet_ratio_to_real"]


def table_by_steps(scores: ScoresBySteps, labels: dict[str, str], counts: tuple[int, ...]) -> dict:
    """A table with a column for each number of steps."""
    columns = list(map(str, counts))
    rows = [
        [f"{labels[name]}, {what}", *[[s[i] for s in by[n]] if n in by else "" for n in columns]]
        for name, by in scores.items()
        for i, what in ((1, "Frechet ratio"), (0, "read as asked"))
    ]
    return table_of(["steps", *columns], rows)


def student_pipeline(
    conditions: Conditions, finished: FinishedRun, features: Features, seed: int
) -> tuple[Pipeline, float]:
    """The student of a seed, trained or loaded, and the seconds of a core that it took."""
    size = ["--config", "tiny"] if conditions.fast else []
    system = Consistency()
    args = parse(system, ["--seed", str(seed), *size])
    folder = conditions.out / f"consistency-{'fast-' * conditions.fast}{seed}"
    with torch.enable_grad(), study_in(folder, system, args, finished, features) as study:
        assert study is not None
        pipeline = distilled(study)
        return pipeline, study.job.run.stages["flow"]["thread_seconds"]


def spreads_of(
    finished: FinishedRun, student: Pipeline, features: Features, seed: int, steps: int
) -> dict[str, float]:
    """The variance of ten predictions along a trajectory of the teacher, as a share of the images':
    of where the student points, and of where the teacher's velocity points."""
    prompts = list(finished.source.texts[:: max(1, len(finished.source.texts) // 64)])[:64]
    text = {prompt: features[prompt] for prompt in {*prompts, ""}}
    side = (student.config.image_size // student.config.vae.factor,) * 2
    noise = student.noise(len(prompts), seed, side)
    path: list[tuple[Tensor, Tensor]] = []
    by_teacher = velocity_of(finished.pipeline, text, prompts)
    by_student = velocity_of(student, text, prompts)

    def record(step: int, t: Tensor, z: Tensor, x0: Tensor) -> None:
        if step % (steps // 10) == 0:
            path.append((t, z))

    euler(by_teacher, noise, even_schedule(steps), record)

    def spread(velocity: Velocity) -> float:
        return inconsistency(lambda z, t: clean_image(velocity(z, t[0]), z, t), path)

    return {"student": spread(by_student), "teacher": spread(by_teacher)}
