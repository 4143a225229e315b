"""`python -m nanosd3.related NAME --sample PROMPT`: sample with a trained system.

For systems that `nanosd3.generate` cannot open. Training options are refused here. The text
encoders are those of the finished run that the system was trained on.
"""

import argparse
import sys
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanosd3.cli import Parser, image_count, positive, unicode_text
from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.machine.device import set_up
from nanosd3.pipeline import Pipeline
from nanosd3.related.command import System, check_guidance
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.storage.files import check_writable, write_file
from nanosd3.storage.run import Run
from nanosd3.text import check_prompts
from nanosd3.training.grids_and_gifs import drawn_picture, npy

SAMPLES = "--sample PROMPT draws with a finished run; see --sample PROMPT --help"


class SamplingSystem(System):
    """A system with a `--sample` of its own."""

    drawn = "images"
    written = (".png", ".npy")  # file types, its own first
    count = 8  # drawn for a prompt

    @abstractmethod
    def add_sampling_options(self, parser: Parser) -> None:
        """Add the sampling options specific to this system."""

    @abstractmethod
    def draw(self, args: argparse.Namespace, run: Run, finished: FinishedRun) -> np.ndarray:
        """Images uint8 for `args.sample`, `args.count` of each prompt, by this run. Raises
        InputError if the options do not fit."""

    def picture(self, images: np.ndarray, captions: list[str]) -> bytes:
        """The content of a file of its own kind."""
        return drawn_picture(images, captions)


def has_option(option: str, arguments: list[str]) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in arguments)


def add_drawing_options(parser: Parser, system: SamplingSystem) -> None:
    """Add the options common to all sampling commands."""
    add = parser.add_argument
    text = f"finished run of this system (default: runs/{system.name})"
    add("--model", type=Path, default=Path("runs") / system.name, metavar="FOLDER", help=text)
    text = "finished run of train_mnist.py that it was trained on (default: %(default)s)"
    add("--run", type=Path, default=Path("runs/mnist"), metavar="FOLDER", help=text)
    add("--data", type=Path, help="folder of that run's images (default: the packaged MNIST)")
    kind, array = system.written
    text = f"{kind}: one, or a captioned grid; {array}: the array (default: %(default)s)"
    add("--out", type=Path, default=Path(f"{system.name}{kind}"), metavar="FILE", help=text)
    text = f"{system.drawn} a prompt (default: %(default)s)"
    add("--count", type=image_count, default=system.count, help=text)
    add("--steps", type=positive, help="steps of drawing (default: the run's)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: the usable cores, at most 8)")


def sampling_options(system: SamplingSystem, arguments: list[str]) -> argparse.Namespace:
    name = f"python -m nanosd3.related {system.name}"
    parser = Parser(name, f"Draw with a finished run. {system.what}")
    add = parser.add_argument
    text = 'such as "a bold seven"'
    add("--sample", nargs="+", type=unicode_text, required=True, metavar="PROMPT", help=text)
    add_drawing_options(parser, system)
    system.add_sampling_options(parser)
    args = parser.parse_args(arguments)
    check_prompts(args.sample)
    check_image_file(args.out, system.written)
    return args


def check_image_file(out: Path, kinds: tuple[str, ...]) -> None:
    """Raises InputError for a file that cannot be written, or is of another type."""
    if out.suffix.lower() not in kinds:
        raise InputError(f"--out {out}: must end in {' or '.join(kinds)}")
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {out}: must be a file in a folder that exists")
    check_writable(out)


def open_trained(
    system: System, folder: Path, finished: FinishedRun, option: str = "--model"
) -> Run:
    """The finished run of a system, trained on this finished run; `option` names it in messages.

    Raises InputError if the folder has none, or one of another system.
    """
    command = f"python -m nanosd3.related {system.name}"
    if not (folder / "run.json").exists():
        raise InputError(f"{option} {folder}: has no run; `{command}` trains one")
    run = Run.read(folder)
    if run.identity.get("system") != system.name:
        raise InputError(f"{option} {folder}: is not a run of `{command}`")
    if "samples" not in run.stages:
        raise InputError(f"{option} {folder}: unfinished; rerun `{command} ...` to resume")
    if run.identity.get("finished") != finished.fingerprint:
        raise InputError(
            f"{option} {folder}: was trained on another finished run than that of --run"
        )
    return run


def add_guidance(parser: Parser) -> None:
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the run's)")


def with_sampling(config: Config, args: argparse.Namespace) -> Config:
    """A run's config with --steps and --guidance. Raises InputError for an invalid scale."""
    own = config.sampling
    guidance = own.guidance if args.guidance is None else args.guidance
    check_guidance(guidance)
    return replace(config, sampling=replace(own, steps=args.steps or own.steps, guidance=guidance))


def repeated_prompts(args: argparse.Namespace) -> list[str]:
    """A prompt for each image to draw."""
    return [prompt for prompt in args.sample for _ in range(args.count)]


def warn_of(pipeline: Pipeline, texts: list[str]) -> None:
    """Print warnings about unknown words and truncated prompts."""
    for message in pipeline.text.remarks([text for text in texts if text], None, ()):
        print(f"warning: {message}", file=sys.stderr)


def run_sampling(system: SamplingSystem, arguments: list[str]) -> int:
    """Sample and write the file."""
    args = sampling_options(system, arguments)
    finished = open_finished_run(args.run, args.data, set_up(args.threads))
    run = open_trained(system, args.model, finished)
    images = system.draw(args, run, finished)
    write_images(system, args.out, images, args.sample)
    print(f"{len(images)} {system.drawn}: {args.out}")
    return 0


def write_images(
    system: SamplingSystem, out: Path, images: np.ndarray, captions: list[str]
) -> None:
    """Write the array, or the picture with a row for each caption."""
    is_array = out.suffix.lower() == ".npy"
    write_file(out, npy(images) if is_array else system.picture(images, captions))
