"""What is trained on: images, and captions that fit them, under one shape.

A `Source` numbers its images. The first `trained` of them are for training, the rest are held out
for the validation loss. All stages draw from it; none asks whether it is MNIST or a folder.

`Digits` makes captions from labels and measurements (data.py), and enlarges its 28x28 pixels to
whatever a config works on. `Pictures` takes files of any size and their own captions; a batch is of
one bucket, that is, one size (buckets.py).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.buckets import Buckets, bucket_sizes, nearest
from nanosd3.config import Config
from nanosd3.data import SIDE, Captions, ImageSet, bins, make_captions, measure, thirds, to_model
from nanosd3.folders import ImageFolder, Picture, load_picture

HELD_OUT = 256  # images, at most
SHARE_HELD_OUT = 0.05  # of a folder, at most


class Source(Protocol):
    """Images by number, with captions."""

    name: str  # where it is from
    fingerprint: str  # of all images and captions
    texts: list[str]  # all captions, each once
    trained: int  # images 0 to here are trained on
    count: int  # those from there to here are held out

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Numbers (batch,) of images to train on, all of one size."""

    def pixels(self, index: Tensor) -> Tensor:
        """Those images, of one size, (B, C, H, W) in [-1, 1]."""

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        """For each image the place in `texts` of one of its captions, picked by u in [0, 1)."""

    def key(self, number: int) -> str:
        """What an image's latents are kept under: changes with its content and its size."""

    def groups(self, numbers: range) -> list[Tensor]:
        """The numbers, those of one size together."""


@dataclass(frozen=True)
class Described:
    """The captions that fit each training image, and the ruler that measured it."""

    captions: Captions
    weight_limits: Tensor  # (classes, 2)
    slant_limits: Tensor  # (classes, 2)
    weight: Tensor  # third of each training image, (n,)
    slant: Tensor


def describe_images(images: ImageSet) -> Described:
    """Measure the training images and find the captions that fit them."""
    labels, classes = images.train_labels, len(images.names)
    weight, slant = measure(images.train_images)
    weight_limits, slant_limits = thirds(weight, labels, classes), thirds(slant, labels, classes)
    return Described(
        make_captions(images.names),
        weight_limits,
        slant_limits,
        bins(weight, labels, weight_limits),
        bins(slant, labels, slant_limits),
    )


def enlarged(images: Tensor, config: Config) -> Tensor:
    """uint8 (B, 28, 28) to float (B, C, size, size) in [-1, 1], as a config's autoencoder takes
    it: padded with background or, for larger pictures, also blown up."""
    small = SIDE + 2 * config.padding
    x = to_model(images, max(small, 32))
    if config.image_size != x.shape[2]:
        size = (config.image_size, config.image_size)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return x.expand(-1, config.vae.image_channels, -1, -1)


class Digits:
    """MNIST, or IDX files like it."""

    def __init__(self, images: ImageSet, config: Config):
        self.images, self.config = images, config
        self.described = described = describe_images(images)
        self.name, self.fingerprint = images.source, images.fingerprint
        self.texts = described.captions.texts
        self.trained = len(images.train_images)
        held = min(HELD_OUT, len(images.test_images))
        self.count = self.trained + held
        self.all_images = torch.cat([images.train_images, images.test_images[:held]])
        self.labels = torch.cat([images.train_labels, images.test_labels[:held]])
        weight, slant = measure(images.test_images[:held])
        test_labels = images.test_labels[:held]
        self.weight = torch.cat([
            described.weight, bins(weight, test_labels, described.weight_limits)
        ])  # fmt: skip
        self.slant = torch.cat([described.slant, bins(slant, test_labels, described.slant_limits)])

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.trained, (batch,), generator=generator)

    def pixels(self, index: Tensor) -> Tensor:
        return enlarged(self.all_images[index], self.config)

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        labels, weight, slant = self.labels[index], self.weight[index], self.slant[index]
        return self.described.captions.draw(labels, weight, slant, u)

    def key(self, number: int) -> str:
        subset = f"{self.trained}-{self.count}"  # the fingerprint is of all images
        return f"{self.fingerprint}-{subset}-{self.config.image_size}-{number}"

    def groups(self, numbers: range) -> list[Tensor]:
        return [torch.tensor(numbers)]


class Pictures:
    """A folder of pictures with captions, those of a size about a config's own.

    The pictures held out are those whose checksums come first, so that they stay the same when
    others are added.
    """

    def __init__(self, folder: ImageFolder, config: Config):
        self.config = config
        self.name, self.fingerprint = str(folder.root), folder.fingerprint
        pictures = sorted(folder.pictures, key=lambda picture: picture.digest)
        held = min(HELD_OUT, int(len(pictures) * SHARE_HELD_OUT))
        self.pictures: Sequence[Picture] = pictures[held:] + pictures[:held]
        self.trained, self.count = len(pictures) - held, len(pictures)
        patch = config.vae.factor * config.mmdit.patch_size
        sizes = bucket_sizes(config.image_size, patch, config.mmdit.grid * patch)
        self.sizes = [nearest(sizes, *picture.size) for picture in self.pictures]
        self.buckets = Buckets(self.sizes[: self.trained])
        places: dict[str, int] = {}
        self.choices = [
            [places.setdefault(text, len(places)) for text in picture.captions]
            for picture in self.pictures
        ]
        self.texts = list(places)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return self.buckets.draw(batch, generator)

    def pixels(self, index: Tensor) -> Tensor:
        pad, channels = self.config.padding, self.config.vae.image_channels
        height, width = self.sizes[index[0]]
        inner = (height - 2 * pad, width - 2 * pad)
        images = [load_picture(self.pictures[i], inner, channels) for i in index.tolist()]
        x = torch.stack([torch.from_numpy(image) for image in images]).float() / 127.5 - 1
        x = x[:, None] if channels == 1 else x.permute(0, 3, 1, 2)
        return F.pad(x, (pad,) * 4, value=-1.0)

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        rows = [self.choices[i] for i in index.tolist()]
        return torch.tensor([
            row[int(v * len(row))] for row, v in zip(rows, u.tolist(), strict=True)
        ])  # fmt: skip

    def key(self, number: int) -> str:
        height, width = self.sizes[number]
        return f"{self.pictures[number].digest}-{height}x{width}"

    def groups(self, numbers: range) -> list[Tensor]:
        sizes = sorted({self.sizes[i] for i in numbers})
        return [torch.tensor([i for i in numbers if self.sizes[i] == size]) for size in sizes]


def caption_key(text: str) -> str:
    """What a caption's features are kept under."""
    return hashlib.sha256(text.encode()).hexdigest()
