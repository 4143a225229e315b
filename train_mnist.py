"""Train all of Stable Diffusion 3, small, on MNIST: `python train_mnist.py`.

Data, autoencoder, text encoders, flow, samples: some minutes on two CPU cores, no network, no
GPU. Ctrl-C stops it; the same command goes on where it stopped.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nanosd3.audit import on_meta
from nanosd3.checkpoint import Run
from nanosd3.config import CONFIGS, Config
from nanosd3.data import load_images
from nanosd3.layouts import COMPONENTS
from nanosd3.mmdit import MMDiT
from nanosd3.parts import Parts
from nanosd3.pipeline import Pipeline
from nanosd3.report import preview, report, shown_prompts
from nanosd3.runtime import InputError, Parser, memory_found, positive, run_main, set_up
from nanosd3.train import Job, describe_images, train_autoencoder, train_flow, train_judge
from nanosd3.train_text import train_text_encoders

PREVIEWS = (0.1, 0.25, 0.5)  # of the flow's steps, when early samples are shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("train_mnist.py", "Train Stable Diffusion 3, small, on MNIST.")
    add = parser.add_argument
    add(
        "--config",
        default="mnist",
        choices=tuple(CONFIGS),
        help="which size (default: %(default)s)",
    )
    add("--data", type=Path, help="folder of other 28x28 IDX files (default: the MNIST inside)")
    add("--out", type=Path, help="run folder (default: runs/NAME)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: all usable cores)")
    add("--fresh", action="store_true", help="start over, deleting the run in the folder")
    return parser.parse_args(arguments)


def refuse(config: Config) -> None:
    """Say what training a full-size config takes, before anything is allocated."""
    trained, *frozen = (count(on_meta(config, part)) for part in COMPONENTS)  # the MMDiT first
    # float32 weights, gradients, two Adam moments and the average; the frozen parts in bfloat16
    needed = 20 * trained / 1e9 + 2 * sum(frozen) / 1e9
    found, where = memory_found()
    verdict = (
        "not enough" if found < needed else "enough, but this script trains mnist and tiny only"
    )
    raise InputError(f"{config.name}: training its {trained / 1e9:.1f}B parameters needs "
                     f"{needed:.0f} GB of memory before activations; found {found:.0f} GB {where}: "
                     f"{verdict}")  # fmt: skip


def share(followed: dict) -> str:
    """How many samples have what the prompt says, if any prompt says it."""
    return "-" if followed["accuracy"] is None else f"{followed['accuracy']:.0%}"


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    config = CONFIGS[args.config]
    if config.training is None:
        refuse(config)
    folder = args.out or Path("runs") / config.name

    # 1. Data: images, and captions that say what is in them.
    images = load_images(args.data).first(config.training.train_images, config.training.test_images)
    identity = {"config": asdict(config), "data": images.fingerprint, "seed": args.seed}
    run = Run.open(folder, identity, args.fresh)
    if "samples" in run.stages:
        print(f"{folder} is finished: see {folder / 'samples.png'}, or start over with --fresh")
        return 0
    with run.alone():
        train(Job(run, config, images, set_up(args.threads), args.seed))
    return 0


def train(job: Job) -> None:
    """All stages, one after the other; those that are finished are loaded."""
    run, config, images, folder = job.run, job.config, job.images, job.run.folder
    described = describe_images(images)
    print(
        f"data: {len(images.train_images)} images from {images.source} (names: {images.why}); "
        f"{len(described.captions.texts)} captions, such as {described.captions.texts[-1]!r}"
    )

    # 2. Autoencoder: images to small latents. (The judge reads digits, for the metrics.)
    judge = train_judge(job)
    vae = train_autoencoder(job)

    # 3. Text encoders: two CLIPs and a T5, trained, then frozen.
    text = train_text_encoders(job, described)

    # 4. Flow: the MMDiT learns the velocity from data to noise.
    prompts = shown_prompts(job, described)[-5:]
    measured = replace(config, vae=vae.config)

    def pipeline_of(mmdit: MMDiT) -> Pipeline:
        parts = {**text.parts, "mmdit": mmdit, "vae": vae}
        return Pipeline(measured, text.tokenizers, Parts(parts, job.device))

    def watch(step: int, ema: MMDiT) -> None:
        if step + 1 in [int(share * config.training.flow.steps) for share in PREVIEWS]:
            preview(pipeline_of(ema), step + 1, prompts)

    mmdit = train_flow(job, described, vae, text, watch)

    # 5. Samples: grids, the path from noise to digits, and how good they are.
    metrics = report(job, described, judge, pipeline_of(mmdit))
    run.finish("samples", {})
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
