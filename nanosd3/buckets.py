"""Aspect-ratio buckets: batches of one size each, from images of many.

A batch is one tensor, so its images must be of one size. Cropping all of them square is easy, and
taught Stable Diffusion 1 to draw people without heads: that is what the middle of a standing
person's photograph shows. Squeezing them into a square teaches squat people. Instead each image
goes to the nearest of a few sizes of about equal area (at 1024, in steps of 64, 1024x1024,
960x1088, 896x1152, 832x1280, 768x1344 and their transposes), and loses only the little that
sticks out of that.

Equal areas mean equal numbers of tokens. So every step costs about the same, and a timestep
shift, which is chosen by their number, fits all. The paper does the same (section 5.3.2): batches
of one size H x W with H * W about S^2, their positions cut from the middle of one larger grid.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from nanosd3.runtime import InputError

Size = tuple[int, int]  # height and width


def bucket_sizes(side: int, multiple: int, most: int, ratio: float = 2.0) -> list[Size]:
    """Sizes of about the area of a square of `side`, from the widest to the tallest.

    For each shorter side, a multiple of `multiple`, the longer one is the multiple that brings
    the area nearest to side * side. So areas differ from it by at most half a step, that is
    multiple / 2 times the shorter side. No size is longer than `ratio` times its width or the
    other way round, and no side exceeds `most`. Raises InputError if the square itself does not
    fit into this.
    """
    if side < multiple or side % multiple:
        raise InputError(f"side {side}: must be a multiple of {multiple}, and not 0")
    if side > most:
        raise InputError(f"side {side}: must be at most {most}")
    if not ratio >= 1:
        raise InputError(f"aspect ratio {ratio}: must be at least 1")
    sizes = set()
    for short in range(multiple, side + 1, multiple):
        # Rounded, halves down: of two areas equally near, the smaller.
        long = multiple * math.ceil(side * side / (short * multiple) - 0.5)
        if long <= min(ratio * short, most):
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size whose aspect ratio is nearest, as a factor: 1:2 and 2:1 are equally far from 1:1.
    Of sizes equally near, the one of the largest area, and of those the first."""

    def order(size: Size) -> tuple[float, int]:
        tall, wide = size[0] * width, size[1] * height  # whole numbers: ties are exact
        return max(tall, wide) / min(tall, wide), -size[0] * size[1]

    return min(sizes, key=order)


class Buckets:
    """Which image lies in which bucket, and batches from a single one.

    Made from the size of each image's bucket, in the order of the images.
    """

    def __init__(self, sizes: Sequence[Size]):
        self.sizes = list(sizes)
        members = defaultdict(list)
        for image, size in enumerate(self.sizes):
            members[size].append(image)
        self.members = {size: torch.tensor(images) for size, images in members.items()}

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """The indices (batch,) of images of one bucket, drawn with replacement.

        The bucket is that of an image drawn uniformly, so each has the probability that its
        images make up of all, and every image is equally likely. There are no epochs and no
        order to carry from step to step: what is drawn depends on the generator alone, which
        makes resuming exact.
        """
        size = self.sizes[0]
        if len(self.members) > 1:
            size = self.sizes[int(torch.randint(len(self.sizes), (), generator=generator))]
        images = self.members[size]
        return images[torch.randint(len(images), (batch,), generator=generator)]

    def size_of(self, indices: Tensor) -> Size:
        """The size of the bucket in which all these images lie."""
        (size,) = {self.sizes[image] for image in indices.tolist()}
        return size

    def counts(self) -> dict[Size, int]:
        """How many images each bucket has, from the widest to the tallest."""
        by_shape = sorted(self.members, key=lambda size: size[0] / size[1])
        return {size: len(self.members[size]) for size in by_shape}
