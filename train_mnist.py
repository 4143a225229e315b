"""Train all of Stable Diffusion 3, small, on MNIST: `python train_mnist.py`.

Data, autoencoder, text encoders, flow, turbo, samples: several minutes on two CPU cores, without
internet or GPU. Ctrl-C stops it; rerun the same command to resume. With another --config the same
stages train a network of any size on enlarged digits; with `--config scenes` a small one on several
digits in colour, composed by caption (training/train_scenes.py).
"""

import argparse
import sys
from pathlib import Path

from nanosd3.cli import Parser, run_main
from nanosd3.data.mnist import load_images
from nanosd3.data.scenes import SCENE_CONFIGS
from nanosd3.data.sources import Digits
from nanosd3.errors import shown
from nanosd3.related.command import RECIPE_SIZES
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import in_words
from nanosd3.related.train_consistency import turbo_stage
from nanosd3.torch_settings import usual_settings
from nanosd3.training.cached_features import end_job, get_features
from nanosd3.training.classifier import train_classifier
from nanosd3.training.encoders import frozen_encoders, trained_encoders
from nanosd3.training.evaluation import Scorer
from nanosd3.training.options import Plan, add_options, generate_command, job_of, make_plan
from nanosd3.training.report import previews, report_digits, shown_prompts
from nanosd3.training.stages import Job, training_of
from nanosd3.training.train_autoencoder import train_autoencoder
from nanosd3.training.train_flow import train_flow
from nanosd3.training.train_scenes import train_on_scenes
from nanosd3.training.train_text import train_text_encoders


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("train_mnist.py", "Train Stable Diffusion 3, small, on MNIST.")
    add_options(parser, "mnist")
    parser.add_argument(
        "--data", type=Path, help="folder of other 28x28 IDX files (default: the packaged MNIST)"
    )
    text = "leave out the distillation to one network evaluation per image"
    parser.add_argument("--no-turbo", action="store_true", help=text)
    return parser.parse_args(arguments)


def percent(attribute: dict) -> str:
    """The share of samples that match an attribute of their prompt, if any prompt has it."""
    return "-" if attribute["accuracy"] is None else f"{attribute['accuracy']:.0%}"


@usual_settings()
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    plan = make_plan(args)
    if plan.config.name in SCENE_CONFIGS:  # digits in colour, composed by caption
        return train_on_scenes(args, plan)
    training = training_of(plan.config)

    # Data: images, and captions that say what is in them.
    images = load_images(args.data).first(training.train_images, training.test_images)
    source = Digits(images, plan.config)
    with job_of(args, plan, source) as job:
        if job:
            train(job, plan, source, with_turbo=not args.no_turbo)
    return 0


def train(job: Job, plan: Plan, source: Digits, with_turbo: bool) -> None:
    """The stages in order; finished ones are loaded."""
    images, folder = source.images, job.run.folder
    first = f"the first {source.trained} of " if source.trained < images.found else ""
    print(
        f"data: {first}{images.found} images from {images.source} (names: {images.why}); "
        f"{len(source.texts)} captions, such as {shown(source.texts[-1])}"
    )
    classifier = train_classifier(job, images)  # reads digits, for the metrics

    if plan.frozen:  # the encoders of another model (--weights, --init)
        encoders = frozen_encoders(job, plan.frozen)
    else:
        # Autoencoder: images to small latents. Text encoders: two CLIPs and a T5.
        autoencoder = train_autoencoder(job)
        text_encoders = train_text_encoders(job)
        encoders = trained_encoders(job, autoencoder, text_encoders)
    prompts = shown_prompts(source)
    features = get_features(job, encoders, prompts)  # latents and text, encoded once and kept

    # Flow: the MMDiT learns the velocity from data to noise.
    mmdit = train_flow(job, features, previews(job, features, prompts), plan.init)
    if mmdit is None:
        return  # the main process does the rest

    # Turbo: a copy of it learns to draw a digit in one evaluation instead of many.
    pipeline = features.pipeline(mmdit, job.device)
    scorer, turbo = Scorer(source, classifier, job.device), None
    if with_turbo and job.config.name not in RECIPE_SIZES:
        print(f"turbo: left out; its few steps are for the configs {' and '.join(RECIPE_SIZES)}")
    elif with_turbo:
        finished = FinishedRun(job.run, pipeline.config, source, scorer, pipeline, job.device)
        turbo = turbo_stage(finished, features, job.seed)

    # Samples: grids, the path from noise to digits, and how good they are.
    metrics = report_digits(job, scorer, pipeline, turbo)
    end_job(job, features)
    print(
        f"samples: {metrics['prompt_accuracy']:.1%} match their prompt; Frechet distance "
        f"{metrics['frechet_distance']:.2f} (real images {metrics['frechet_floor_real']:.2f}, "
        f"reconstructions {metrics['frechet_floor_reconstructions']:.2f}); weight as prompted "
        f"{percent(metrics['weight'])}, slant {percent(metrics['slant'])} (chance: 33%); "
        f"{metrics['images_per_second']:.0f} images a second"
    )
    if turbo:
        print(
            f"turbo: {in_words(turbo)}; {turbo['images_per_second']:.0f} images a second; its "
            f"folder: {folder / 'turbo'}, beside the main model: {folder / 'turbo.png'}"
        )
    print(
        f"done: {folder / 'samples.png'} and trajectory.gif, loss.png, samplers.png, metrics.json. "
        f"More: {generate_command(prompts[0], folder, 'digits.png')}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
