"""Editing tasks: which coordinates are known, and how the result is scored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.claims.data_sets import HalvedPixels, halved
from nanosd3.claims.hdit_detail import decibels
from nanosd3.few_steps import even_schedule
from nanosd3.random_streams import rng
from nanosd3.related.editing import Basis, block_basis, block_means_known, edit
from nanosd3.samplers import Velocity
from nanosd3.training.evaluation import Draw


@dataclass(frozen=True)
class Task:
    """Which coordinates of an image are known, and in which basis."""

    known: Tensor
    to: Basis = lambda x: x
    back: Basis = lambda x: x

    def edit(self, velocity: Velocity, y: Tensor, steps: int, seed: int) -> Tensor:
        generator = rng(seed, "edit noise")
        times = even_schedule(steps)
        return edit(velocity, y, self.known, times, generator, self.to, self.back)

    def largest_error(self, x: Tensor, y: Tensor) -> float:
        """The largest difference of known coordinates from those of y."""
        return float(((self.to(x) - self.to(y)) * self.known).abs().max())


def tasks(side: int) -> dict[str, Task]:
    """Of square images: the lower half is unknown, or all but the means of 2x2 blocks."""
    upper = (torch.arange(side) < side // 2)[:, None]
    return {
        "repainted": Task(upper),
        "enlarged": Task(block_means_known(2), *block_basis(2)),
    }


def constant_model(image: Tensor) -> Velocity:
    """A model that predicts the same image (1, C, H, W) from everything."""
    return lambda z, t: (z - image) / t


@dataclass(frozen=True, eq=False)
class Edited:
    """Test digits to edit, and scores of their edits."""

    data: HalvedPixels
    chosen: Tensor

    @property
    def y(self) -> Tensor:
        """The digits as the model sees them, (B, 1, 12, 12)."""
        return self.data.normalised(halved(self.digits))

    @property
    def digits(self) -> Tensor:
        return self.data.finished.source.images.test_images[self.chosen]

    def scores(self, x: Tensor) -> list[float]:
        """Share classified as the original digit, Frechet distance over that of the digits
        themselves, and error in decibels."""
        images = self.data.finished.source.images
        draw = Draw(self.chosen, images.test_labels[self.chosen], [])
        original, shown = self.data.to_digits(self.y), self.data.to_digits(x)
        scorer = self.data.scorer
        accuracy, distance = scorer.score(shown, draw)
        ratio = distance / scorer.distance(original)
        return [accuracy, ratio, float(decibels(shown, original).mean())]
