"""The classic Moving MNIST: two digits in a frame of 64 x 64, moving independently.

They bounce off the walls, not off each other; where they overlap the maximum is taken, as in the
data set of Srivastava et al. (arXiv 1502.04681). Captions name both digits, "a seven and an 8", in
arbitrary order, but not their motion.
"""

import torch
from torch import Tensor

from nanosd3.config_types import Config
from nanosd3.data.mnist import with_article
from nanosd3.data.sources import Digits
from nanosd3.errors import InputError
from nanosd3.random_streams import rng
from nanosd3.related.moving_digits import MOTIONS, Clips, ClipSize, MovingDigits

TOGETHER = 2  # digits in a clip
PAIR_SIZES: dict[str, tuple[ClipSize, ...]] = {  # (frames, height, width) by size of the recipe
    "mnist": ((10, 64, 64), (1, 64, 64)),
    "tiny": ((4, 48, 48), (1, 48, 48)),
}
PAIR_BATCH = {"mnist": 16, "tiny": 4}
PAIRS_ENCODED = {"mnist": 2000, "tiny": 16}


class MovingPairs(MovingDigits):
    """Clips of two digits: in `Clips`, every per-digit field holds both digits', (B, 2, ...)."""

    def __init__(self, digits: Digits, size: ClipSize):
        super().__init__(digits, size)
        self.name = f"pairs of {self.name}"
        self.fingerprint = f"pairs-{self.fingerprint}"
        names = [(label, name) for label, names in enumerate(self.names) for name in names]
        pairs = [(a, b) for a in names for b in names]
        self.texts = [f"{with_article(a[1])} and {with_article(b[1])}" for a, b in pairs]
        self.pairs = {pair: i for i, pair in enumerate(pairs)}

    def draw_clips(self, count: int, generator: torch.Generator, moving: bool = True) -> Clips:
        return in_pairs(super().draw_clips(TOGETHER * count, generator, moving))

    def videos(self, clips: Clips, size: ClipSize) -> Tensor:
        each = [super(MovingPairs, self).videos(one_of(clips, k), size) for k in range(TOGETHER)]
        return torch.stack(each).amax(0)

    def captions_of(self, clips: Clips, u: Tensor) -> Tensor:
        """The index in `texts` of a caption for each clip, picked by u (B,) in [0, 1): its first
        part picks the first name, the remainder the second."""
        chosen = []
        labels = self.digits.labels[clips.digits].tolist()
        for (a, b), x in zip(labels, u.tolist(), strict=True):
            first, left = divmod(x * len(self.names[a]), 1)
            second = self.names[b][int(left * len(self.names[b]))]
            chosen.append(self.pairs[(a, self.names[a][int(first)]), (b, second)])
        return torch.tensor(chosen)

    def clips(self, index: Tensor) -> Clips:
        """The clips of some images, always the same ones, each paired with another image."""
        others = [torch.randint(self.trained, (1,), generator=rng("pairs", int(i))) for i in index]
        both = torch.stack([index, torch.cat(others)], dim=1).flatten()
        streams = [rng("pairs that move", k, int(i)) for i in index for k in range(TOGETHER)]
        motion = torch.cat([torch.randint(len(MOTIONS), (1,), generator=s) for s in streams])
        start = torch.stack([torch.rand(2, generator=s) for s in streams])
        return in_pairs(Clips(both, motion, start))


def in_pairs(clips: Clips) -> Clips:
    """Clips of one digit (2 B, ...) as B clips of two."""
    parts = (clips.digits, clips.motion, clips.start)
    return Clips(*(x.unflatten(0, (-1, TOGETHER)) for x in parts))


def one_of(clips: Clips, k: int) -> Clips:
    """Digit `k` of each clip, as a clip of its own."""
    return Clips(clips.digits[:, k], clips.motion[:, k], clips.start[:, k])


def check_pairs(size: ClipSize, config: Config) -> None:
    """Raises InputError for a finished run whose position grid is too small for frames of pairs."""
    most = config.mmdit.grid * config.mmdit.patch_size * config.vae.factor
    if max(size[1:]) > most:
        raise InputError(
            f"--two-digits: draws frames of {size[1]}x{size[2]} pixels, but the transformer of "
            f"--run has positions for {most}x{most}"
        )
