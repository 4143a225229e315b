"""Shared code of the notebooks: a small trained model, a cache, and the functions of figures.py and
sliders.py.

`trained()` returns a small Stable Diffusion 3 trained on MNIST, the run in the folder `lesson`.
The first notebook that trains a transformer encodes the images, in under a minute, and keeps them
in the cache: the folder `cache` next to this file, or the one named by NANOSD3_CACHE. To make such
a model yourself, `train(begin_job("mine"))`: the stages are those of train_mnist.py, run by the
same functions with fewer steps, in about four minutes on two cores.

With NANOSD3_FAST=1 in the environment everything is scaled down: all cells run in seconds and every
assertion holds, but the model learns nothing. This is for tests only.

NANOSD3_THREADS or OMP_NUM_THREADS sets the number of CPU threads. Everything runs on the CPU, even
where there is a GPU, so that a whole classroom gets the same results.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partialmethod
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from figures import clouds, curves, densities, finish, images, lines, maps, panels, to_numpy, ways
from sliders import turn
from torch import Tensor
from tqdm import tqdm

from nanosd3.config import CONFIGS, Config, Training
from nanosd3.data.mnist import ImageSet, load_images, to_model
from nanosd3.data.sources import Described, Digits
from nanosd3.errors import InputError
from nanosd3.machine.device import default_threads
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.storage.files import read_tensors, replacing, save_tensors
from nanosd3.storage.run import Run
from nanosd3.training.cached_features import Features, get_features
from nanosd3.training.classifier import CLASSIFIER_SIZE, ConvNet, train_classifier
from nanosd3.training.encoders import get_encoders
from nanosd3.training.stages import Job
from nanosd3.training.train_flow import train_flow

__all__ = ["CACHE", "FAST", "Lesson", "begin_job", "cached", "lesson_config", "pick", "trained"]
__all__ += ["clouds", "curves", "densities", "finish", "images", "lines", "maps", "panels"]
__all__ += ["to_numpy", "turn", "ways"]

FAST = os.environ.get("NANOSD3_FAST", "") not in ("", "0")
CACHE = Path(os.environ.get("NANOSD3_CACHE") or Path(__file__).parent / "cache") / (
    "fast" if FAST else "full"
)
LESSON = Path(__file__).parent / "lesson"  # written by `python notebooks/build.py --lesson`

torch.set_num_threads(1 if FAST else default_threads("NANOSD3_THREADS"))
if "ipykernel" in sys.modules:  # Jupyter shows stderr, where progress bars are drawn, on red
    tqdm.__init__ = partialmethod(tqdm.__init__, file=sys.stdout)

T = TypeVar("T")


def pick(full: T, fast: T) -> T:
    """Return `full`, or `fast` if NANOSD3_FAST is set."""
    return fast if FAST else full


# --- the trained model --------------------------------------------------------------------------


def lesson_config() -> Config:
    """The `mnist` config with fewer steps in each stage."""
    config = CONFIGS["mnist"]
    training = config.training
    assert isinstance(training, Training)  # None for models that are only sampled
    steps = pick(
        {"judge": 300, "autoencoder": 250, "clip": 200, "t5": 150, "flow": 900},
        {"judge": 12, "autoencoder": 8, "clip": 8, "t5": 8, "flow": 10},
    )
    recipes = {}
    for stage, n in steps.items():
        recipe = getattr(training, stage)
        batch = pick(recipe.batch, 32)
        recipes[stage] = replace(recipe, steps=n, warmup=min(n // 4, 50), batch=batch)
    images = pick((60000, 10000), (400, 50))
    small = replace(training, train_images=images[0], test_images=images[1], **recipes)
    sampling = replace(config.sampling, steps=pick(config.sampling.steps, 3))
    return replace(config, training=small, sampling=sampling)


def begin_job(
    name: str = "model", config: Config | None = None, source: Digits | None = None
) -> Job:
    """Open or create a run folder in the cache, for training or reading.

    Raises InputError if the folder holds a run of another config, data set or seed.
    """
    config = config or lesson_config()
    if source is None:
        training = config.training
        assert training is not None
        images = load_images().first(training.train_images, training.test_images)
        source = Digits(images, config)
    identity = {"config": asdict(config), "data": source.fingerprint, "seed": 0}
    try:
        run = Run.open(CACHE / name, identity, fresh=False)
    except InputError:
        raise InputError(
            f"{CACHE / name}: holds a model of another version of the notebooks; "
            f"delete {CACHE} and run this cell again"
        ) from None
    return Job(run, config, source, torch.device("cpu"), seed=0)


@dataclass(frozen=True)
class Lesson:
    """The trained model and what it was trained with."""

    job: Job
    source: Digits
    classifier: ConvNet
    texts: Features  # of captions
    pipeline: Pipeline

    @cached_property
    def features(self) -> Features:
        """Of captions and of all images, which are encoded when this is first used."""
        return get_features(self.job, self.texts.encoders, [])

    @property
    def images(self) -> ImageSet:
        """The MNIST images and labels."""
        return self.source.images

    @property
    def described(self) -> Described:
        """The captions that fit each training image."""
        return self.source.described

    def classify(self, images: np.ndarray) -> list[int]:
        """The digit that the classifier sees in each uint8 image (B, 28, 28)."""
        with torch.no_grad():
            return self.classifier(seen(images)).argmax(1).tolist()

    def right(self, images: np.ndarray, digits: Sequence[int]) -> float:
        """The share of images that are read as these digits."""
        read = self.classify(images)
        return sum(a == b for a, b in zip(read, digits, strict=True)) / len(digits)

    def look(self, images: np.ndarray | Tensor) -> Tensor:
        """The classifier's features of uint8 images (B, 28, 28), for the Frechet distance."""
        with torch.no_grad():
            return self.classifier.features(seen(images))

    def pipeline_with(self, mmdit: MMDiT) -> Pipeline:
        """The pipeline with another transformer in it."""
        return self.texts.pipeline(mmdit, self.job.device)

    def new_job(self, name: str, config: Config) -> Job:
        """A second job in the cache, on the same images."""
        return begin_job(name, config, self.source)


def seen(images: np.ndarray | Tensor) -> Tensor:
    """Images (B, 28, 28) as the classifier takes them."""
    return to_model(torch.as_tensor(np.ascontiguousarray(images)), CLASSIFIER_SIZE)


def unpack_lesson() -> None:
    """Copy the trained model to the cache, unless it is there. The copy can be written even where
    the original cannot; if several notebooks begin at once, the first one's copy is kept."""
    model = CACHE / "model"
    if model.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(model) as folder:
            folder.mkdir()
            for path in LESSON.iterdir():
                shutil.copyfile(path, folder / path.name)
    except InputError:
        if not (model / "run.json").exists():
            raise


def trained() -> Lesson:
    """The model of all notebooks; with NANOSD3_FAST, one trained on the spot, in seconds."""
    if not FAST:
        unpack_lesson()
    job = begin_job()
    alone = contextlib.nullcontext() if "flow" in job.run.stages else job.run.alone()
    with alone, contextlib.redirect_stderr(sys.stdout):  # Jupyter shows stderr on red
        return train(job)


def train(job: Job) -> Lesson:
    """Run all stages of a job, as train_mnist.py does; finished stages are loaded."""
    source = job.source
    assert isinstance(source, Digits)
    classifier = train_classifier(job, source.images)
    untrained = "flow" not in job.run.stages
    features = get_features(job, get_encoders(job, None), [], images=untrained)
    mmdit = train_flow(job, features)
    assert mmdit is not None  # None only in a worker process
    return Lesson(job, source, classifier, features, features.pipeline(mmdit, job.device))


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `make()`, computed once and kept in the cache under `name`."""
    path = CACHE / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({key: value.contiguous() for key, value in make().items()}, path)
    return read_tensors(path)
