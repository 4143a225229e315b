"""Training data behind one interface: images by index, and captions that fit them.

The first `trained` images of a `Source` are for training, the rest are held out for the validation
loss. Training draws from it without knowing whether it is MNIST or a folder.

`Digits` makes captions from labels and measurements (mnist.py), and enlarges its 28x28 pixels to
the config's image size. `Pictures` reads files of any size with captions of their own; a batch
comes from one bucket, so all of it has one size (buckets.py).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.config_types import Config
from nanosd3.data.buckets import Buckets, bucket_sizes, cropped_share, nearest
from nanosd3.data.image_folder import ImageFolder, Picture, load_picture
from nanosd3.data.mnist import (
    SIDE,
    Captions,
    ImageSet,
    bins,
    from_uint8,
    make_captions,
    measure_strokes,
    thirds,
    to_model,
)
from nanosd3.storage.run import Contents

HELD_OUT = 256  # images held out for validation, at most
SHARE_HELD_OUT = 0.05  # of the images of a folder, at most


class Source(Protocol):
    """Images by index, with captions."""

    name: str  # where it comes from
    fingerprint: str  # of all images and captions
    contents: Contents  # what they are, item by item
    texts: list[str]  # all distinct captions
    trained: int  # images below this index are for training
    count: int  # those from there up to this index are held out

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw indices (batch,) of training images, all of one size."""

    def pixels(self, index: Tensor) -> Tensor:
        """The images at `index`, all of one size, as (B, C, H, W) in [-1, 1]."""

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        """The index in `texts` of one caption for each image, picked by u in [0, 1)."""

    def key(self, number: int) -> str:
        """The cache key of an image's latents: changes with its content and its size."""

    def groups(self, numbers: range) -> list[Tensor]:
        """The indices `numbers`, grouped by size."""


@dataclass(frozen=True)
class Described:
    """The measured attributes of the training images, and the captions that fit them."""

    captions: Captions
    weight_limits: Tensor  # (classes, 2), the terciles
    slant_limits: Tensor  # (classes, 2)
    weight: Tensor  # (n,), the third of each training image: 0, 1 or 2
    slant: Tensor  # (n,)


def describe_images(images: ImageSet) -> Described:
    """Measure the training images and make the captions that fit them."""
    labels, classes = images.train_labels, len(images.names)
    weight, slant = measure_strokes(images.train_images)
    weight_limits, slant_limits = thirds(weight, labels, classes), thirds(slant, labels, classes)
    return Described(
        make_captions(images.names),
        weight_limits,
        slant_limits,
        bins(weight, labels, weight_limits),
        bins(slant, labels, slant_limits),
    )


def enlarged(images: Tensor, config: Config) -> Tensor:
    """Convert uint8 (B, 28, 28) to a config's image size: float (B, C, size, size) in [-1, 1].

    The images are padded with black and, for larger sizes, scaled up.
    """
    small = SIDE + 2 * config.padding
    x = to_model(images, max(small, 32))
    if config.image_size != x.shape[2]:
        size = (config.image_size, config.image_size)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return x.expand(-1, config.vae.image_channels, -1, -1)


def contents_of(images: ImageSet) -> Contents:
    """What an image set is made of."""
    parts: dict[str, Any] = {
        "training images": images.train_images.numpy(),
        "training labels": images.train_labels.numpy(),
        "test images": images.test_images.numpy(),
        "test labels": images.test_labels.numpy(),
        "class names": repr(images.names).encode(),
    }
    rows = {name: [hashlib.sha256(part).hexdigest()[:16]] for name, part in parts.items()}
    return {"columns": ["content"], "rows": rows}


class Digits:
    """MNIST, or IDX files like it, as a `Source`."""

    def __init__(self, images: ImageSet, config: Config):
        self.images, self.config = images, config
        self.described = described = describe_images(images)
        self.name, self.fingerprint = images.source, images.fingerprint
        self.contents = contents_of(images)
        self.texts = described.captions.texts
        self.trained = len(images.train_images)
        held = min(HELD_OUT, len(images.test_images))
        self.count = self.trained + held
        self.all_images = torch.cat([images.train_images, images.test_images[:held]])
        self.labels = torch.cat([images.train_labels, images.test_labels[:held]])
        weight, slant = measure_strokes(images.test_images[:held])
        test_labels = images.test_labels[:held]
        weight = bins(weight, test_labels, described.weight_limits)
        slant = bins(slant, test_labels, described.slant_limits)
        self.weight = torch.cat([described.weight, weight])
        self.slant = torch.cat([described.slant, slant])

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.trained, (batch,), generator=generator)

    def pixels(self, index: Tensor) -> Tensor:
        return enlarged(self.all_images[index], self.config)

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        labels, weight, slant = self.labels[index], self.weight[index], self.slant[index]
        return self.described.captions.draw(labels, weight, slant, u)

    def key(self, number: int) -> str:
        subset = f"{self.trained}-{self.count}"  # the fingerprint covers all images
        return f"{self.fingerprint}-{subset}-{self.config.image_size}-{number}"

    def groups(self, numbers: range) -> list[Tensor]:
        return [torch.tensor(numbers)]


class Pictures:
    """A folder of images with captions as a `Source`, in buckets around the config's image size.

    The images with the lowest checksums are held out, so that most of them stay held out when
    images are added.
    """

    def __init__(self, folder: ImageFolder, config: Config):
        self.config = config
        self.name, self.fingerprint = str(folder.root), folder.fingerprint
        self.contents = folder.contents
        pictures = sorted(folder.pictures, key=lambda picture: picture.digest)
        held = min(HELD_OUT, int(len(pictures) * SHARE_HELD_OUT))
        self.pictures: Sequence[Picture] = pictures[held:] + pictures[:held]
        self.trained, self.count = len(pictures) - held, len(pictures)
        patch = config.vae.factor * config.mmdit.patch_size
        sizes = bucket_sizes(config.image_size, patch, config.mmdit.grid * patch)
        self.sizes = [nearest(sizes, *picture.size) for picture in self.pictures]
        self.buckets = Buckets(self.sizes[: self.trained])
        index_of: dict[str, int] = {}
        self.choices = [
            [index_of.setdefault(text, len(index_of)) for text in picture.captions]
            for picture in self.pictures
        ]
        self.texts = list(index_of)

    def cropped(self) -> list[tuple[str, float]]:
        """The name of each image, and the share of it that is cropped."""
        return [
            (picture.path.name, cropped_share(size, *picture.size))
            for picture, size in zip(self.pictures, self.sizes, strict=True)
        ]

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return self.buckets.draw(batch, generator)

    def pixels(self, index: Tensor) -> Tensor:
        pad, channels = self.config.padding, self.config.vae.image_channels
        height, width = self.sizes[index[0]]
        inner = (height - 2 * pad, width - 2 * pad)
        images = [load_picture(self.pictures[i], inner, channels) for i in index.tolist()]
        x = from_uint8(torch.stack([torch.from_numpy(image) for image in images]))
        x = x[:, None] if channels == 1 else x.permute(0, 3, 1, 2)
        return F.pad(x, (pad,) * 4, value=-1.0)

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        rows = [self.choices[i] for i in index.tolist()]
        chosen = [row[int(v * len(row))] for row, v in zip(rows, u.tolist(), strict=True)]
        return torch.tensor(chosen)

    def key(self, number: int) -> str:
        height, width = self.sizes[number]
        return f"{self.pictures[number].digest}-{height}x{width}"

    def groups(self, numbers: range) -> list[Tensor]:
        sizes = sorted({self.sizes[i] for i in numbers})
        return [torch.tensor([i for i in numbers if self.sizes[i] == size]) for size in sizes]


def caption_key(text: str) -> str:
    """The cache key of a caption's text features."""
    return hashlib.sha256(text.encode()).hexdigest()
