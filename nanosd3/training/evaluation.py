"""How good are prompted samples? Do they match their prompts, and do they look real?

A classifier of real images answers both. Prompt accuracy is the share of samples that it assigns to
the prompted class. The Frechet distance compares the distribution of its features on samples with
that on the test images; the floor is the same distance for as many training images, that is, real
ones.

Guidance trades one for the other: more of it raises prompt accuracy and lowers diversity. So a
single pair of numbers says little about a model; the frontier, which traces both along the guidance
scale, says more.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanosd3.config_types import config_from_dict
from nanosd3.data.mnist import SIDE, from_uint8, load_images, to_model, to_uint8
from nanosd3.data.scenes import SCENE_CONFIGS
from nanosd3.data.sources import Digits
from nanosd3.errors import InputError
from nanosd3.pipeline import Pipeline
from nanosd3.random_streams import rng
from nanosd3.storage.files import read_module
from nanosd3.storage.run import Run
from nanosd3.training.classifier import CLASSIFIER_SIZE, ConvNet, thumbnails
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.stages import in_chunks, training_of


def to_digits(images: Tensor) -> Tensor:
    """Convert samples uint8 (B, H, W) or (B, H, W, 3) of any size to digits uint8 (B, 28, 28)."""
    if images.shape[1:] == (SIDE, SIDE):
        return images
    x = images.float() if images.ndim == 3 else images.float().mean(3)
    edge = (CLASSIFIER_SIZE - SIDE) // 2
    x = to_uint8(thumbnails(from_uint8(x)[:, None]))
    return x[:, edge:-edge, edge:-edge]


def balanced(labels: Tensor, classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Random indices of about `count` items, the same number from each class."""
    order = torch.randperm(len(labels), generator=generator)
    each = [order[labels[order] == label] for label in range(classes)]
    return torch.cat([ids[: max(2, count // classes)] for ids in each])


@dataclass(frozen=True)
class Draw:
    """Training images drawn at random, the same number from each class, and a caption for each."""

    chosen: Tensor  # their indices
    labels: Tensor
    prompts: list[str]


def draw_prompts(source: Digits, count: int, seed: int) -> Draw:
    """About `count` prompts for samples, drawn anew for every seed."""
    images, generator = source.images, rng(seed, "evaluate")
    chosen = balanced(images.train_labels, len(images.names), count, generator)
    u = torch.rand(len(chosen), generator=generator)
    prompts = [source.texts[i] for i in source.captions(chosen, u).tolist()]
    return Draw(chosen, images.train_labels[chosen], prompts)


class Scorer:
    """A classifier with the features of the test images."""

    def __init__(self, source: Digits, classifier: ConvNet, device: torch.device):
        self.source, self.classifier, self.device = source, classifier, device

    @cached_property
    def test(self) -> Tensor:
        """Features (n, F) of the test images, computed on first use."""
        return self.features(self.source.images.test_images)

    @torch.no_grad()
    def features(self, digits: Tensor) -> Tensor:
        """Features (B, F) of digits uint8 (B, 28, 28)."""

        def of_chunk(chunk: Tensor) -> Tensor:
            x = to_model(chunk, CLASSIFIER_SIZE).to(self.device)
            return self.classifier.features(x).cpu()

        return in_chunks(of_chunk, digits)

    @torch.no_grad()
    def read(self, features: Tensor) -> Tensor:
        """The predicted label (B,) of each digit, from its features (B, F)."""
        head: Callable[[Tensor], Tensor] = self.classifier.head
        return in_chunks(head, features.to(self.device)).argmax(1).cpu()

    def distance(self, digits: Tensor) -> float:
        """The Frechet distance of digits to the test images."""
        return frechet_distance(self.features(digits), self.test)

    def floor(self, draw: Draw) -> float:
        """What real images get: the distance of a draw's training images to the test images."""
        return self.distance(self.source.images.train_images[draw.chosen])

    @torch.no_grad()
    def score(self, digits: Tensor, draw: Draw) -> tuple[float, float]:
        """Accuracy and distance of digits uint8 (B, 28, 28), a sample for each prompt of a draw."""
        features = self.features(digits)
        accuracy = (self.read(features) == draw.labels).float().mean().item()
        return accuracy, frechet_distance(features, self.test)


def open_scorer(run: Run, data: Path | None, device: torch.device) -> Scorer:
    """The classifier of a finished run of train_mnist.py, with the images it was trained on.

    Raises InputError if the run is of another kind, not finished, or trained on other data.
    """
    if "judge" not in run.stages or "samples" not in run.stages:
        raise InputError(f"{run.folder}: expected a finished run of train_mnist.py")
    config = config_from_dict(run.identity["config"], run.folder / "run.json")
    if config.name in SCENE_CONFIGS:
        raise InputError(
            f"{run.folder}: a run on scenes; expected one of train_mnist.py on single digits"
        )
    training = training_of(config)
    source = Digits(load_images(data).first(training.train_images, training.test_images), config)
    if source.fingerprint != run.identity["data"]:
        raise InputError(f"{run.folder}: trained on other images; name their folder with --data")
    classes = len(source.images.names)
    classifier = read_module(lambda: ConvNet(classes), run.folder / "judge.safetensors")
    return Scorer(source, classifier.to(device), device)


# --- the frontier ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Scores at one guidance scale: those of each draw, and their mean."""

    guidance: float
    accuracies: list[float]
    ratios: list[float]  # Frechet distance relative to the floor

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def ratio(self) -> float:
        return sum(self.ratios) / len(self.ratios)


def frontier(
    scorer: Scorer,
    pipeline: Pipeline,
    guidances: Iterable[float],
    count: int = 1000,
    seeds: Iterable[int] = (1, 2, 3),
) -> Iterator[Point]:
    """Scores along the guidance scale. Each seed is a draw of prompts and noise, the same at every
    scale."""
    draws = {seed: draw_prompts(scorer.source, count, seed) for seed in seeds}
    floors = {seed: scorer.floor(draw) for seed, draw in draws.items()}
    for guidance in guidances:
        point = Point(guidance, [], [])
        for seed, draw in draws.items():
            samples = np.asarray(pipeline(draw.prompts, seed=seed, guidance=guidance))
            accuracy, distance = scorer.score(to_digits(torch.from_numpy(samples)), draw)
            point.accuracies.append(accuracy)
            point.ratios.append(distance / floors[seed])
        yield point


def at_accuracy(points: list[Point], accuracy: float) -> tuple[float, float] | None:
    """Guidance and distance, relative to the floor, where the frontier first reaches an accuracy;
    between two scales both are interpolated. None if it is outside the measured range."""
    for a, b in pairwise(points):
        if a.accuracy < accuracy <= b.accuracy:
            share = (accuracy - a.accuracy) / (b.accuracy - a.accuracy)
            return (
                a.guidance + share * (b.guidance - a.guidance),
                a.ratio + share * (b.ratio - a.ratio),
            )
    return None
