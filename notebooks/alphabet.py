"""For notebook 14: pictures as text, what is known of one while it is drawn, and how good it is."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import finish, panels, to_numpy
from lab import Lesson
from matplotlib.patches import Rectangle
from torch import Tensor

from nanosd3.data.mnist import from_uint8
from nanosd3.related.muse_editing import VQPipeline
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.plot_style import PALE

UNKNOWN = 110  # the grey of a hidden token, in a picture of 0 to 255


def written(pictures: np.ndarray, tokens: Tensor, caption: str) -> None:
    """Pictures (n, H, W) under the grid of their tokens (n, h, w); beside each, the tokens."""
    figure, axes = panels(2 * len(pictures), 2.0, 2.3)
    (height, width), side = tokens.shape[1:], pictures.shape[1]
    f = side // height
    for i, (picture, numbers) in enumerate(zip(pictures, to_numpy(tokens), strict=True)):
        image, text = axes[2 * i], axes[2 * i + 1]
        image.imshow(picture, vmin=0, vmax=255, interpolation="nearest")
        for draw, count in ((image.axhline, height), (image.axvline, width)):
            for k in range(1, count):
                draw(f * k - 0.5, color=PALE, linestyle="-", linewidth=0.4)
        text.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
        for row, line in enumerate(numbers):
            for column, number in enumerate(line):
                text.text(column, row, str(number), ha="center", va="center", fontsize=8)
        for axis in (image, text):
            axis.axis("off")
    finish(figure, caption, "Digits with a grid over them, and the number in each of its cells")


def codebook(pictures: np.ndarray, tokens: Tensor, codes: int, caption: str) -> None:
    """For each code, most frequent first, the mean of pictures (n, H, W) around the positions where
    it is the token in `tokens` (n, h, w): the position, framed, and as much again on every side."""
    f = pictures.shape[1] // tokens.shape[1]
    padded = np.pad(pictures.astype(float), ((0, 0), (f, f), (f, f)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (3 * f, 3 * f), (1, 2))[:, ::f, ::f]
    numbers = to_numpy(tokens)
    order = np.bincount(numbers.flatten(), minlength=codes).argsort()[::-1]
    figure, axes = plt.subplots(4, codes // 4, figsize=(0.12 * codes, 2.2), squeeze=False)
    for axis, code in zip(axes.flat, order, strict=True):
        here = around[numbers == code]
        mean = here.mean(0) if len(here) else np.zeros((3 * f, 3 * f))
        axis.imshow(mean, vmin=0, vmax=160, interpolation="nearest")
        axis.add_patch(Rectangle((f - 0.5, f - 0.5), f, f, fill=False, edgecolor=PALE, lw=0.7))
        axis.axis("off")
    finish(figure, caption, "Small grey pictures, one for each code")


def covered(pictures: np.ndarray, hidden: Tensor) -> np.ndarray:
    """Pictures (n, H, W) in bytes with grey where a token is hidden, bool (n, h, w)."""
    f = pictures.shape[1] // hidden.shape[1]
    cells = hidden.repeat_interleave(f, 1).repeat_interleave(f, 2)
    return np.where(to_numpy(cells), np.uint8(UNKNOWN), pictures)


class Judge:
    """How good pictures and tokens are: whether the lesson's classifier reads them, and how many
    neighbouring tokens are a pair that fewer than one training image in 1,000 has."""

    def __init__(self, lesson: Lesson, pipeline: VQPipeline):
        self.lesson, self.pipeline = lesson, pipeline
        self.codes = pipeline.vq.config.codes
        self.real = lesson.look(lesson.images.test_images[1::5])
        images = lesson.images.train_images[:10000]
        count = torch.zeros(2 * self.codes**2)
        for part in images.split(1000):
            pairs = self.pairs(pipeline.tokens(from_uint8(part)[:, None]))
            count += torch.bincount(pairs, minlength=len(count))
        self.rare = count * 1000 < len(images)

    def right(self, pictures: np.ndarray, asked: Sequence[int]) -> float:
        """The share that is read as asked."""
        return self.lesson.right(pictures, asked)

    def pairs(self, tokens: Tensor) -> Tensor:
        """All neighbours in tokens (B, h, w), side by side or one above the other, each pair as one
        number."""
        beside = tokens[:, :, :-1] * self.codes + tokens[:, :, 1:]
        above = tokens[:, :-1] * self.codes + tokens[:, 1:] + self.codes**2
        return torch.cat([beside.flatten(), above.flatten()])

    def scores(self, tokens: Tensor, asked: Sequence[int]) -> str:
        """In words: share of rare pairs, share that is read as asked, and Frechet distance to
        a fifth of the test images."""
        pictures = self.pipeline.images(tokens)
        rare = self.rare[self.pairs(tokens)].float().mean()
        apart = frechet_distance(self.lesson.look(pictures), self.real)
        right = self.right(pictures, asked)
        return f"{rare:.1%} rare pairs, {right:.0%} read as asked, distance {apart:.0f}"
