"""Train all of Stable Diffusion 3, small, on MNIST: `python train_mnist.py`.

Data, autoencoder, text encoders, flow, samples: some minutes on two CPU cores, no network, no
GPU. Ctrl-C stops it; the same command goes on where it stopped. At another --config the same
stages train a network of any size on enlarged digits.
"""

import argparse
import sys
from pathlib import Path

from nanosd3.data import load_images
from nanosd3.jobs import (
    Plan,
    add_options,
    get_encoders,
    get_features,
    job_of,
    make_plan,
    previews,
)
from nanosd3.report import report_digits, shown_prompts
from nanosd3.runtime import Parser, run_main
from nanosd3.sources import Digits
from nanosd3.stages import Job, train_flow, train_judge


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("train_mnist.py", "Train Stable Diffusion 3, small, on MNIST.")
    add_options(parser, "mnist")
    parser.add_argument("--data", type=Path, help="folder of other 28x28 IDX files (default: the "
                        "MNIST inside)")  # fmt: skip
    return parser.parse_args(arguments)


def share(followed: dict) -> str:
    """How many samples have what the prompt says, if any prompt says it."""
    return "-" if followed["accuracy"] is None else f"{followed['accuracy']:.0%}"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    plan = make_plan(args)
    training = plan.config.training

    # 1. Data: images, and captions that say what is in them.
    images = load_images(args.data).first(training.train_images, training.test_images)
    source = Digits(images, plan.config)
    with job_of(args, plan, source) as job:
        if job:
            train(job, plan, source)
    return 0


def train(job: Job, plan: Plan, source: Digits) -> None:
    """All stages, one after the other; those that are finished are loaded."""
    images, folder = source.images, job.run.folder
    print(
        f"data: {len(images.train_images)} images from {images.source} (names: {images.why}); "
        f"{len(source.texts)} captions, such as {source.texts[-1]!r}"
    )
    judge = train_judge(job, images)  # reads digits, for the metrics

    # 2. Autoencoder: images to small latents. 3. Text encoders: two CLIPs and a T5.
    # All are trained, then frozen: what they say of images and captions is computed once.
    prompts = shown_prompts(source)
    encoders = get_encoders(job, plan.frozen)
    features = get_features(job, encoders, prompts)

    # 4. Flow: the MMDiT learns the velocity from data to noise.
    mmdit = train_flow(job, features, previews(job, features, prompts), plan.init)
    if mmdit is None:
        return  # this process is not the first of its team, which does the rest

    # 5. Samples: grids, the path from noise to digits, and how good they are.
    metrics = report_digits(job, source, judge, features.pipeline(mmdit, job.device))
    features.forget()
    job.run.finish("samples", {})
    print(
        f"samples: {metrics['prompt_accuracy']:.1%} are what the prompt says; Frechet distance "
        f"{metrics['frechet_distance']:.2f} (real images {metrics['frechet_floor_real']:.2f}, "
        f"reconstructions {metrics['frechet_floor_reconstructions']:.2f}); weight as told "
        f"{share(metrics['weight'])}, slant {share(metrics['slant'])} (chance: 33%); "
        f"{metrics['images_per_second']:.0f} images a second"
    )
    print(
        f"done: {folder / 'samples.png'} and trajectory.gif, loss.png, samplers.png, metrics.json. "
        f'More: python -m nanosd3.generate "{prompts[0]}" --run {folder} --out digits.png'
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
