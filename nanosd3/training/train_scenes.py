"""Train on scenes of coloured digits: `python train_mnist.py --config scenes`.

The stages of the main job, on another source (data/scenes.py), with another judge: samples are
scored by what their prompts ask for (geneval.py). One digit in the middle says little about prompt
following; here words about different digits must not be mixed up, and order and place count.
"""

import argparse

import torch

from nanosd3.data.mnist import load_images
from nanosd3.data.scenes import CANVASES, Scenes
from nanosd3.errors import InputError, shown
from nanosd3.pipeline import Pipeline
from nanosd3.storage.files import write_file, write_json
from nanosd3.training import plots
from nanosd3.training.cached_features import end_job, get_features
from nanosd3.training.encoders import get_encoders
from nanosd3.training.geneval import (
    draw_questions,
    drawn_by,
    geneval_scores,
    in_a_table,
    real,
    reconstructed,
    sample_scenes,
)
from nanosd3.training.grids_and_gifs import grid_of, png
from nanosd3.training.options import Plan, generate_command, job_of
from nanosd3.training.report import about_training, previews
from nanosd3.training.scene_judge import SceneJudge, train_scene_judge
from nanosd3.training.stages import Job
from nanosd3.training.train_flow import train_flow

SCENE_PROMPTS = (
    "a seven",
    "a 2 and a five",
    "three red 4s",
    "a yellow 8 in the upper right",
    "a three left of a 6",
    "a white nine and a purple one",
    "a small blue seven left of a big green four",
    "a big red 5 above a small yellow zero",
    "the number 4071 in red",
    "the number 38",
)
SAMPLES_EACH = 6


def train_on_scenes(args: argparse.Namespace, plan: Plan) -> int:
    """Train, or resume, by the options of train_mnist.py. Raises InputError for options that apply
    only to single digits: scenes are made of the packaged digits, and have no turbo."""
    if args.data:
        raise InputError(f"--data {args.data}: scenes are of the packaged digits; leave it out")
    if args.no_turbo:
        raise InputError("--no-turbo: scenes have no turbo; leave it out")
    source = Scenes(load_images(), plan.config)
    with job_of(args, plan, source) as job:
        if job:
            run_stages(job, plan, source)
    return 0


def run_stages(job: Job, plan: Plan, source: Scenes) -> None:
    """The stages in order; finished ones are loaded."""
    print(
        f"data: {source.trained} scenes of digits, {len(source.texts)} captions, such as "
        f"{shown(max(source.texts, key=len))}"
    )
    judge = train_scene_judge(job, source)
    encoders = get_encoders(job, plan.frozen)
    prompts = list(SCENE_PROMPTS[:-2])  # previews are not wide enough for numbers
    features = get_features(job, encoders, prompts)
    mmdit = train_flow(job, features, previews(job, features, prompts), plan.init)
    if mmdit is None:  # not the main process
        return
    pipeline = features.pipeline(mmdit, job.device)
    scores = report_scenes(job, source, judge, pipeline)
    end_job(job, features)
    print(f"samples that follow their prompts:\n{in_a_table(scores)}")
    command = generate_command(prompts[6], job.run.folder, "scenes.png")
    print(f"done: {job.run.folder / 'samples.png'} and loss.png, metrics.json. More: {command}")


@torch.no_grad()
def report_scenes(job: Job, source: Scenes, judge: SceneJudge, pipeline: Pipeline) -> dict:
    """Write samples.png, loss.png and metrics.json; return the scores."""
    folder, hand = job.run.folder, source.hands["test"]
    questions = draw_questions(source, job.training.evaluate, job.seed)
    scores = {
        name: geneval_scores(judge, questions, drawn)
        for name, drawn in (
            ("samples", drawn_by(pipeline, job.seed)),
            ("real", real(hand)),
            ("reconstructions", reconstructed(hand, pipeline)),
        )
    }
    prompts = [prompt for prompt in SCENE_PROMPTS for _ in range(SAMPLES_EACH)]
    images = sample_scenes(pipeline, prompts, CANVASES[-1], job.seed)
    picture = grid_of(SCENE_PROMPTS, images.numpy())
    write_file(folder / "samples.png", png(picture))
    plots.plot_loss(job.run.read_log(), folder / "loss.png")
    count = sum(len(scenes) for scenes in questions.values())
    write_json(folder / "metrics.json", {"questions": count, **scores, **about_training(job)})
    return scores
