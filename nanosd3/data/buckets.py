"""Aspect-ratio buckets: batches of one size each, from images of many sizes.

A batch is one tensor, so all its images have one size. Center-cropping every image to a square is
easy, and taught Stable Diffusion 1 to draw people without heads: that is what the middle of a
portrait shows. Squeezing images into a square teaches it squat people. Instead, each image goes to
the nearest of a few sizes of about equal area (at 1024, in steps of 64: 1024x1024, 960x1088,
896x1152, 832x1280, 768x1344 and their transposes), so that only a little is cropped.

Equal areas mean equal numbers of tokens. So every step costs about the same, and one timestep
shift, which depends on the number of tokens, fits all buckets. The paper does the same (section
5.3.2): batches of one size H x W with H * W about S^2, whose position embeddings are cropped from
the middle of one larger grid.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from nanosd3.errors import InputError

Size = tuple[int, int]  # height and width


def bucket_sizes(side: int, multiple: int, most: int, ratio: float = 2.0) -> list[Size]:
    """List sizes of about the area side * side, from the widest to the tallest.

    Both sides are multiples of `multiple`. For each shorter side, the longer one is chosen to
    bring the area nearest to side * side, so areas are off by at most multiple / 2 times the
    shorter side. The longer side is at most `ratio` times the shorter one, and at most `most`.
    Raises InputError if not even the square satisfies this.
    """
    if side < multiple or side % multiple:
        raise InputError(f"side {side}: must be a positive multiple of {multiple}")
    if side > most:
        raise InputError(f"side {side}: must be at most {most}")
    if not ratio >= 1:
        raise InputError(f"aspect ratio {ratio}: must be at least 1")
    sizes = set()
    for short in range(multiple, side + 1, multiple):
        # Round half down: of two equally near areas, take the smaller.
        long = multiple * math.ceil(side * side / (short * multiple) - 0.5)
        if long <= min(ratio * short, most):
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size whose aspect ratio is nearest as a factor: 1:2 and 2:1 are equally far from 1:1.

    Of equally near sizes, the one with the largest area, and of those the first.
    """

    def distance(size: Size) -> tuple[float, int]:
        tall, wide = size[0] * width, size[1] * height  # integers, so that ties are exact
        return max(tall, wide) / min(tall, wide), -size[0] * size[1]

    return min(sizes, key=distance)


def cropped_share(size: Size, height: int, width: int) -> float:
    """The share of an image's area that is lost when it is scaled to cover `size` and cropped."""
    tall, wide = size[0] * width, size[1] * height
    return 1 - min(tall, wide) / max(tall, wide)


class Buckets:
    """Images grouped by bucket, and batches drawn from one bucket each.

    `sizes` holds the bucket size of each image.
    """

    def __init__(self, sizes: Sequence[Size]):
        self.sizes = list(sizes)
        members = defaultdict(list)
        for index, size in enumerate(self.sizes):
            members[size].append(index)
        self.group = {size: torch.tensor(indices) for size, indices in members.items()}

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw the indices (batch,) of images of one bucket, with replacement.

        The bucket is that of a uniformly drawn image: buckets are drawn in proportion to their
        images, and every image is equally likely. There are no epochs and no order to keep
        between steps: a draw depends on the generator alone, which makes resuming exact.
        """
        size = self.sizes[0]
        if len(self.group) > 1:
            size = self.sizes[int(torch.randint(len(self.sizes), (), generator=generator))]
        indices = self.group[size]
        return indices[torch.randint(len(indices), (batch,), generator=generator)]

    def size_of(self, indices: Tensor) -> Size:
        """The size of the one bucket that holds all these images."""
        (size,) = {self.sizes[index] for index in indices.tolist()}
        return size

    def counts(self) -> dict[Size, int]:
        """The number of images in each bucket, from the widest to the tallest."""
        sizes = sorted(self.group, key=lambda size: size[0] / size[1])
        return {size: len(self.group[size]) for size in sizes}
