"""Moving MNIST: handwritten digits cross a dark frame and bounce off its walls.

The data set of Srivastava et al. (arXiv 1502.04681), made on the fly and with captions: every clip
has a digit, a direction and a speed, and its caption names them, "a seven moving left, fast". A
digit starts where its whole path fits into the frame, if possible; otherwise it starts at the wall
behind it and bounces off the one ahead.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.data.mnist import with_article
from nanosd3.data.sources import Digits
from nanosd3.random_streams import rng
from nanosd3.storage.run import Contents

DIGIT_SIDE = 24  # pixels that a digit's 28 are scaled to
SPRITE = 20  # their middle, with 99% of the ink
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
SPEEDS = {", slowly": 1, "": 2, ", fast": 3}  # pixels a frame
MOTIONS = [(d, s) for d in DIRECTIONS for s in SPEEDS]  # after them: no motion at all
ClipSize = tuple[int, int, int]  # frames, height, width in pixels


def bounced(position: Tensor, room: Tensor) -> Tensor:
    """Positions on an endless line, folded into [0, room] by reflection at both ends."""
    period = 2 * room.clamp(min=1)
    position = position.remainder(period)
    return torch.minimum(position, period - position).minimum(room)


def sprites(images: Tensor) -> Tensor:
    """Digits uint8 (B, 28, 28) as ink in [0, 1], (B, SPRITE, SPRITE)."""
    x = F.interpolate(
        images[:, None].float() / 255, (DIGIT_SIDE, DIGIT_SIDE), mode="bilinear", antialias=True
    )
    edge = (DIGIT_SIDE - SPRITE) // 2
    return x[:, 0, edge:-edge, edge:-edge]


def velocities(motion: Tensor) -> Tensor:
    """Rows and columns per frame, (B, 2), of motions given by index."""
    table = [[SPEEDS[s] * x for x in DIRECTIONS[d]] for d, s in MOTIONS]
    return torch.tensor([*table, [0, 0]])[motion]


def paths(velocity: Tensor, u: Tensor, size: ClipSize) -> Tensor:
    """Corners (B, T, 2) of sprites that move by `velocity` (B, 2), from a start chosen by u (B, 2)
    in [0, 1)."""
    frames = torch.arange(size[0])
    room = torch.tensor(size[1:]) - SPRITE  # (2,)
    travel = velocity * (size[0] - 1)  # (B, 2)
    low = (-travel).clamp(min=0).minimum(room)  # starts from here ...
    high = (room - travel).clamp(min=0).minimum(room).maximum(low)  # ... to here keep it inside
    start = low + (u * (high - low + 1)).long()
    return bounced(start[:, None] + velocity[:, None] * frames[:, None], room)


def drawn_clips(ink: Tensor, corners: Tensor, size: ClipSize) -> Tensor:
    """Sprites (B, SPRITE, SPRITE) at corners (B, T, 2), as videos (B, 1, T, H, W) in [-1, 1]."""
    B, T = corners.shape[:2]
    inside = torch.arange(SPRITE)
    rows = corners[:, :, 0, None, None] + inside[:, None]  # (B, T, SPRITE, 1)
    columns = corners[:, :, 1, None, None] + inside  # (B, T, 1, SPRITE)
    x = torch.zeros(B, *size)
    batch, frames = torch.arange(B)[:, None, None, None], torch.arange(T)[:, None, None]
    x[batch, frames, rows, columns] = ink[:, None].expand(-1, T, -1, -1)
    return x[:, None] * 2 - 1


@dataclass(frozen=True)
class Clips:
    """The contents of some clips, before they are drawn."""

    digits: Tensor  # (B,), indices of the finished run's images
    motion: Tensor  # (B,), see `MOTIONS`
    start: Tensor  # (B, 2) in [0, 1)

    def at(self, rows: Tensor | slice) -> "Clips":
        """Some of them."""
        return Clips(self.digits[rows], self.motion[rows], self.start[rows])


class MovingDigits:
    """Moving digits with captions; as a `Source`, for the text encoders, each clip is one image,
    the maximum over its frames, with later ones brighter."""

    def __init__(self, digits: Digits, size: ClipSize):
        self.digits, self.size = digits, size
        self.name = f"moving digits of {digits.name}"
        self.fingerprint = f"moving-{digits.fingerprint}"
        self.contents: Contents = digits.contents
        self.trained, self.count = digits.trained, digits.count
        self.names = digits.images.names
        self.ink = sprites(digits.all_images)
        self.texts: list[str] = []
        self.numbers: dict[tuple[int, str, int], int] = {}  # label, name, motion
        for label, names in enumerate(self.names):
            for name in names:
                for motion in range(len(MOTIONS) + 1):
                    self.numbers[label, name, motion] = len(self.texts)
                    self.texts.append(caption(name, motion))

    def draw_clips(self, count: int, generator: torch.Generator, moving: bool = True) -> Clips:
        """Clips with training images, moving or still."""
        digits = self.digits.draw(count, generator)
        motion = torch.randint(len(MOTIONS), (count,), generator=generator)
        start = torch.rand(count, 2, generator=generator)
        return Clips(digits, motion if moving else torch.full_like(motion, len(MOTIONS)), start)

    def videos(self, clips: Clips, size: ClipSize) -> Tensor:
        """The clips as (B, 1, T, H, W) in [-1, 1]."""
        corners = paths(velocities(clips.motion), clips.start, size)
        return drawn_clips(self.ink[clips.digits], corners, size)

    def captions_of(self, clips: Clips, u: Tensor) -> Tensor:
        """The index in `texts` of a caption for each clip, picked by u (B,) in [0, 1)."""
        chosen = []
        labels = self.digits.labels[clips.digits].tolist()
        for label, motion, x in zip(labels, clips.motion.tolist(), u.tolist(), strict=True):
            names = self.names[label]
            chosen.append(self.numbers[label, names[int(x * len(names))], motion])
        return torch.tensor(chosen)

    # --- as a Source: clip `i` shows image `i`, and moves in a way drawn for it -------------------

    def clips(self, index: Tensor) -> Clips:
        """The clips of some images, always the same ones."""
        streams = [rng("moving digits", int(i)) for i in index]
        motion = torch.cat([torch.randint(len(MOTIONS) + 1, (1,), generator=s) for s in streams])
        start = torch.stack([torch.rand(2, generator=s) for s in streams])
        return Clips(index, motion, start)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return self.digits.draw(batch, generator)

    def pixels(self, index: Tensor) -> Tensor:
        return long_exposure(self.videos(self.clips(index), self.size))

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        return self.captions_of(self.clips(index), u)

    def key(self, number: int) -> str:
        return f"{self.fingerprint}-{number}"

    def groups(self, numbers: range) -> list[Tensor]:
        return [torch.tensor(numbers)]


def caption(name: str, motion: int) -> str:
    """'a seven moving left, fast'; 'a seven' if it does not move."""
    if motion == len(MOTIONS):
        return with_article(name)
    direction, speed = MOTIONS[motion]
    return f"{with_article(name)} moving {direction}{speed}"


def long_exposure(videos: Tensor) -> Tensor:
    """An image (B, C, H, W) of each video (B, C, T, H, W): the maximum over its frames, each of
    which is made brighter than the one before."""
    T = videos.shape[2]
    light = torch.arange(1, T + 1).view(T, 1, 1) / T
    return ((videos + 1) * light).amax(2) - 1
