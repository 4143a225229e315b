"""Drawings for notebook 16: clips that move, and where things in them are."""

from collections.abc import Mapping

import numpy as np
from figures import MARKS, finish, panels, show_bytes, to_numpy
from torch import Tensor

from nanosd3.training.grids_and_gifs import gif, grid

MILLISECONDS, LAST = 250, 700  # how long each frame is shown, and the last


def animation(rows: Mapping[str, Tensor | np.ndarray]) -> bytes:
    """A looping GIF of clips uint8 (n, T, H, W), given as label -> clips, a row for each label. It
    has only eight greys: the darkest hides what would make the file large."""
    clips = {label: to_numpy(row) // 32 * 36 for label, row in rows.items()}
    count = len(next(iter(clips.values()))[0])
    frames = [grid([(label, row[:, t]) for label, row in clips.items()])
              for t in range(count)]  # fmt: skip
    return gif(frames, [MILLISECONDS] * (count - 1) + [LAST])


def play(rows: Mapping[str, Tensor | np.ndarray], caption: str) -> None:
    """Show clips as an animation. It has no still: show some of its frames as images as well."""
    words = f"Animation of clips in rows: {', '.join(rows)}. {caption}"
    show_bytes("image/gif", animation(rows), words)


def tracks(parts: Mapping[str, Tensor], side: tuple[int, int], caption: str) -> None:
    """Where things are from frame to frame: centres (n, T, 2), rows and columns, in frames of this
    height and width. The last place of each is marked."""
    figure, axes = panels(len(parts), 2.4, 2.9)
    height, width = side
    for axis, (title, centre) in zip(axes, parts.items(), strict=True):
        for i, way in enumerate(to_numpy(centre)):
            (line,) = axis.plot(way[:, 1], way[:, 0], "-")
            axis.plot(*way[-1, ::-1], MARKS[i % len(MARKS)], color=line.get_color())
        axis.set(title=title, xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="column")
    axes[0].set_ylabel("row")
    finish(figure, caption, f"Ways of centres through the frame: {', '.join(parts)}")
