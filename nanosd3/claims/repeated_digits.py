"""Digits, one of each class repeated nearly unchanged under a caption of its own."""

from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.config_types import Config
from nanosd3.data.mnist import (
    SIDE,
    SLANTS,
    STROKE_WEIGHTS,
    ImageSet,
    describe,
    with_article,
)
from nanosd3.data.sources import Digits
from nanosd3.random_streams import rng

RARE = (2, 0)  # thirds of weight and slant: of these only the repeated images are kept


def altered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Near-copies of images uint8 (B, 28, 28): each moved by up to a pixel along both axes, and
    made up to a fifth brighter or darker."""
    by = torch.randint(3, (2, len(images), 1), generator=generator)  # 1: stays where it is
    brighter = 0.8 + 0.4 * torch.rand(len(images), 1, 1, generator=generator)
    rows, columns = torch.arange(SIDE) + by
    each = torch.arange(len(images))[:, None, None]
    moved = F.pad(images, (1, 1, 1, 1))[each, rows[:, :, None], columns[:, None, :]]
    return (moved * brighter).round().clamp(max=255).to(torch.uint8)


@dataclass(frozen=True)
class Planted:
    """Images, and near-copies of some of them: the training images, with the copies last."""

    images: ImageSet
    original: Tensor  # (n,), the number of the image that each one shows: its own, if not a copy

    @property
    def is_copy(self) -> Tensor:
        return self.original != torch.arange(len(self.original))

    def cluster(self, label: int) -> Tensor:
        """The repeated image of a class, which has its number, and its copies: uint8
        (k, 28, 28)."""
        return self.images.train_images[self.original == label]


def plant(source: Digits, seed: int, count: int, copies: int) -> Planted:
    """About `count` training images drawn at random, leaving out all that are bold and lean left
    except one of each class, and `copies` near-copies of that one."""
    images, generator = source.images, rng(seed, "plant")
    order = torch.randperm(source.trained, generator=generator)
    labels, weight, slant = (x[order] for x in (source.labels, source.weight, source.slant))
    is_rare = (weight == RARE[0]) & (slant == RARE[1])
    rare = [order[is_rare & (labels == c)][:1] for c in range(len(images.names))]
    chosen = torch.cat([*rare, order[~is_rare][:count]])
    assert all(len(one) for one in rare), "a class has no image that is bold and leans left"
    shown = torch.arange(len(rare)).repeat_interleave(copies)
    pixels, labels = images.train_images[chosen], images.train_labels[chosen]
    pixels = torch.cat([pixels, altered(pixels[shown], generator)])
    planted = replace(
        images,
        train_images=pixels,
        train_labels=torch.cat([labels, labels[shown]]),
        fingerprint=sha256(pixels.numpy().tobytes()).hexdigest()[:32],
    )
    return Planted(planted, torch.cat([torch.arange(len(chosen)), shown]))


class RepeatedDigits(Digits):
    """A training set of planted copies, or what is left of it. An image that is left out is not
    drawn; one that is kept is drawn in its place, and nothing else changes."""

    def __init__(self, planted: Planted, config: Config, kept: Tensor):
        super().__init__(planted.images, config)
        self.kept = kept  # (n,) bool
        in_cluster = planted.original < len(planted.images.names)
        self.has_own = torch.cat([in_cluster, torch.zeros(self.count - self.trained).bool()])
        names = [name[0] for name in planted.images.names]
        words = STROKE_WEIGHTS[RARE[0]], SLANTS[RARE[1]]
        self.own, self.other = (
            torch.tensor([self.texts.index(caption) for caption in captions])
            for captions in ([describe(name, *words) for name in names], map(with_article, names))
        )

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        rows = self.kept.nonzero()[:, 0]
        index = super().draw(batch, generator)
        instead = rows[torch.randint(len(rows), (batch,), generator=generator)]
        return torch.where(self.kept[index], index, instead)

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        """Those of repeated images are their own, which no other image has."""
        usual, labels = super().captions(index, u), self.labels[index]
        usual = torch.where(usual == self.own[labels], self.other[labels], usual)
        return torch.where(self.has_own[index], self.own[labels], usual)


# --- copies among samples -------------------------------------------------------------------------


def nearness(digits: Tensor, labels: Tensor, planted: Planted, unseen: Tensor) -> Tensor:
    """Of images uint8 (B, 28, 28): the distance to the nearest of their class's repeats over that
    to the nearest of `unseen` images, (B,), in pixel space."""
    flat, others = digits.flatten(1).float(), unseen.flatten(1).float()
    ratios = torch.empty(len(digits))
    for label in labels.unique().tolist():
        rows = labels == label
        cluster = planted.cluster(label).flatten(1).float()
        nearest = [torch.cdist(flat[rows], x).amin(1) for x in (cluster, others)]
        ratios[rows] = nearest[0] / nearest[1]
    return ratios


def usual_nearness(planted: Planted) -> float:
    """The nearness that 1% of real images that no network saw fall below, compared with the
    others."""
    images, labels = planted.images.test_images, planted.images.test_labels
    ratios = nearness(images[1::2], labels[1::2], planted, images[::2])
    return float(ratios.quantile(0.01))


# --- digits in a record ---------------------------------------------------------------------------


def in_hexadecimal(digit: Tensor) -> str:
    return digit.numpy().tobytes().hex()


def shown_picture(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(SIDE, SIDE)
