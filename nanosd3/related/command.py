"""The command line of every related system: `python -m nanosd3.related NAME`.

A system is described by a `System`; the options, the run folder and the report common to all are
handled here. Interrupted runs resume as the main job does.
"""

import argparse
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from nanosd3.cli import Parser, positive
from nanosd3.config_types import Config, Recipe
from nanosd3.errors import InputError
from nanosd3.machine.device import peak_memory, set_up
from nanosd3.machine.signals import sigterm_interrupts
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.related.scoring import in_words, pipeline_scores
from nanosd3.storage.files import discard, write_json
from nanosd3.storage.run import Run
from nanosd3.training.cached_features import Features, get_features
from nanosd3.training.options import with_recipe
from nanosd3.training.report import shown_prompts
from nanosd3.training.stages import Job, training_of

RECIPE_SIZES = ("mnist", "tiny")  # of a recipe


@dataclass(frozen=True)
class Study:
    """What a system trains with."""

    job: Job  # its own run, config and seed; the finished run's images and captions
    finished: FinishedRun
    args: argparse.Namespace
    encoded: Features | None = None  # by the finished run's encoders, if it has just been trained

    @cached_property
    def features(self) -> Features:
        """Latents and text of the finished run's encoders, computed where they are missing."""
        if self.encoded:
            return self.encoded
        encoders = self.finished.encoders(self.job.config)
        return get_features(self.job, encoders, shown_prompts(self.finished.source))


class System(ABC):
    """A related system, as its command sees it."""

    name: str
    what: str  # in a sentence
    paper: str
    compared_with = "the main model"

    @abstractmethod
    def add_options(self, parser: Parser) -> None:
        """Add the options specific to this system."""

    @abstractmethod
    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        """The config of its run: that of the finished run, with a recipe and sampling of its own.

        Raises InputError if the options or the finished run do not fit.
        """

    @abstractmethod
    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        """Further settings that identify its run, by name."""

    @abstractmethod
    def train(self, study: Study) -> dict:
        """Train, or load what is trained; write samples.png; return scores (scoring.py) and
        `training_seconds`. If they are compared with a model other than the main one, that model's
        scores are returned as `main_model`."""

    def in_words(self, metrics: dict) -> str:
        """Its scores in a line."""
        return in_words(metrics)


def parse(system: System, arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(f"python -m nanosd3.related {system.name}", f"{system.what} {system.paper}")
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        default=Path("runs/mnist"),
        metavar="FOLDER",
        help="finished run of train_mnist.py to build on (default: %(default)s)",
    )
    add("--out", type=Path, metavar="FOLDER", help=f"run folder (default: runs/{system.name})")
    add("--data", type=Path, help="folder of the run's images (default: the packaged MNIST)")
    add("--config", choices=RECIPE_SIZES, help="size of the recipe (default: that of the run)")
    add("--fresh", action="store_true", help="delete the run in --out and start over")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: the usable cores, at most 8)")
    add = parser.add_argument_group("training (defaults: the recipe's)").add_argument
    add("--steps", type=positive, help="training steps")
    add("--batch", type=positive, help="images per step")
    add("--lr", type=float, help="peak learning rate")
    system.add_options(parser)
    return parser.parse_args(arguments)


def size_of(args: argparse.Namespace, finished: FinishedRun) -> str:
    """The size of the recipe: as given, or that of the finished run."""
    return args.config or ("tiny" if finished.config.name == "tiny" else "mnist")


def with_flow_recipe(config: Config, recipe: Recipe, args: argparse.Namespace) -> Config:
    """The config with a recipe for its network, changed by the options."""
    training = replace(training_of(config), flow=recipe)
    return with_recipe(replace(config, training=training), args)


def check_guidance(scale: float) -> None:
    """Raises InputError for an invalid scale."""
    if not 1 <= scale < float("inf"):
        raise InputError(f"--guidance must be a number from 1 up, got {scale}")


def run_system(system: System, arguments: list[str] | None) -> int:
    """Train a system on a finished run, and report how it compares."""
    args = parse(system, arguments)
    Run.read(args.run)  # raises InputError for a folder that is not a run
    device = set_up(args.threads)
    finished = open_finished_run(args.run, args.data, device)
    folder = args.out or Path("runs") / system.name
    with sigterm_interrupts(), study_in(folder, system, args, finished) as study:
        if study is None:
            pictures = folder / "samples.png"
            print(f"{folder} is finished: see {pictures}, or start over with --fresh")
            return 0
        metrics = system.train(study)
        if "main_model" not in metrics:
            count, sampling = training_of(finished.config).evaluate, finished.config.sampling
            metrics["main_model"] = pipeline_scores(finished, finished.pipeline, count, sampling)
        conclude(study, metrics | {"system": system.name})
        main = in_words(metrics["main_model"])
        print(f"{system.name}: {system.in_words(metrics)}; {system.compared_with}: {main}")
        print(f"done: {folder / 'samples.png'} and metrics.json")
    return 0


@contextlib.contextmanager
def study_in(
    folder: Path,
    system: System,
    args: argparse.Namespace,
    finished: FinishedRun,
    encoded: Features | None = None,
) -> Iterator[Study | None]:
    """Lock the system's run folder and yield what it trains with; None if it is finished."""
    config = system.config(args, finished)
    identity = {
        "config": asdict(config),
        "system": system.name,
        "finished": finished.fingerprint,
        "data": finished.source.fingerprint,
        "seed": args.seed,
        **finished.encoders_identity,
        **system.identity(args, finished),
    }
    run = Run.open(folder, identity, args.fresh, finished.source.contents)
    with run.alone():
        run = Run.read(folder)
        job = Job(run, config, finished.source, finished.device, args.seed)
        yield None if "samples" in run.stages else Study(job, finished, args, encoded)


def conclude(study: Study, metrics: dict) -> None:
    """Write metrics.json, and mark the run as finished."""
    run = study.job.run
    about = {
        "stages": run.stages,
        "threads": torch.get_num_threads(),
        "peak_memory_gb": peak_memory(study.job.device),
    }
    write_json(run.folder / "metrics.json", metrics | about)
    run.finish("samples", {})
    if study.encoded:
        return
    if "features" in vars(study):
        study.features.forget()
    else:
        discard(run.folder / "cache")
