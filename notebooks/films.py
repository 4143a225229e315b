"""Moving pictures, for where time is the subject, and the attention that one of them shows.

A moving picture is an animated PNG: an image like any other to JupyterLab, VS Code, GitHub and
browsers. Its default image, which paper and old viewers show, is not a frame but a still: a few
moments side by side. Pillow draws it, in the look of figures.py.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import torch
from figures import even_lines, show_bytes, to_numpy
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from nanosd3 import layers, mmdit
from nanosd3.training.plot_style import INK, MEANINGS

WIDTH, GAP, LINE = 720, 6, 22  # of a page, between pictures, of a line of text, in pixels
LABEL = 124  # the width of labels beside pictures
MILLISECONDS, HOLD = 200, 2000  # how long each frame is shown, and the last
MOMENTS = 5  # in the still, the last of as many parts
STRONGEST = 0.8  # share of the prompt's colour where the tint is 1


@contextmanager
def attention_seen() -> Iterator[list[Tensor]]:
    """The weights (B, heads, queries, keys) of every attention that an MMDiT computes meanwhile, in
    order. It goes on with the package's results, which are checked against the weights."""
    seen: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = layers.attention(q, k, v), (q @ k.mT / 8).softmax(dim=-1)
        by_weights = (weights @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(by_weights, out, atol=1e-4, rtol=1e-4)
        seen.append(weights)
        return out

    with patch.object(mmdit, "attention", attention):
        yield seen


@dataclass(frozen=True)
class Film:
    """Pictures that change together, each with its name and each moment with a title."""

    frames: np.ndarray  # (moments, pictures, H, W), uint8, light on black
    names: Sequence[str]
    titles: Sequence[str]
    tint: np.ndarray | None  # (moments, pictures, h, w), 0 to 1: how much of the prompt's colour

    def __post_init__(self) -> None:
        count = len(self.titles), len(self.names)
        for x in (self.frames, self.tint):
            if x is not None and x.shape[:2] != count:
                raise ValueError(f"{x.shape[:2]} moments and pictures, {count} titles and names")

    def picture(self, moment: int, number: int, side: int) -> Image.Image:
        """One picture at one moment, with sides of this many pixels."""
        pixels = np.repeat(self.frames[moment, number, ..., None].astype(float), 3, axis=-1)
        if self.tint is not None:
            tint = self.tint[moment, number]
            share = np.kron(tint, np.ones([pixels.shape[0] // tint.shape[0]] * 2))[..., None]
            pixels += STRONGEST * share * (ImageColor.getrgb(MEANINGS["prompt"]) - pixels)
        small = Image.fromarray(pixels.round().astype(np.uint8))
        sharp = side % small.width == 0  # all pixels are of one size
        way = Image.Resampling.NEAREST if sharp else Image.Resampling.BICUBIC
        return small.resize((side, side), way)


def letters(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(folder / f"DejaVuSans{style}.ttf", size)


class Page:
    """A white page; it grows downwards as things are put on it."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 1600), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.y = GAP

    def line(self, texts: Sequence[tuple[float, str]], size: int = 14, style: str = "") -> None:
        """Texts, each in the middle of a place."""
        for x, text in texts:
            self.draw.text((x, self.y + LINE / 2), text, INK, letters(size, style), anchor="mm")
        self.y += LINE

    def row(self, pictures: Sequence[Image.Image], left: float, label: str = "") -> None:
        side = pictures[0].height
        middle = (left - 2 * GAP, self.y + side / 2)
        self.draw.text(middle, label, INK, letters(14), anchor="rm")
        for i, picture in enumerate(pictures):
            self.image.paste(picture, (round(left) + i * (side + GAP), self.y))
        self.y += side + GAP

    def time_line(self, share: float) -> None:
        """How much of the film is over."""
        x, y = 60 + share * (WIDTH - 120), self.y + LINE // 2
        self.draw.line((60, y, WIDTH - 60, y), MEANINGS["noise"], 2)
        self.draw.ellipse((x - 6, y - 6, x + 6, y + 6), MEANINGS["prediction"])
        self.y += LINE

    def caption(self, text: str) -> None:
        for line in even_lines(text, 88):
            self.line([(WIDTH / 2, line)], 14, "-Oblique")


def middles(count: int, side: int, left: float) -> list[float]:
    return [left + i * (side + GAP) + side / 2 for i in range(count)]


def draw_frame(film: Film, i: int, caption: str) -> Page:
    """All pictures at one moment, in one row or two."""
    page, count = Page(), len(film.names)
    columns = count if count <= 5 else -(-count // 2)
    scale = min(8, (WIDTH // columns - GAP) // film.frames.shape[-1])
    side = scale * film.frames.shape[-1]
    left = (WIDTH - columns * (side + GAP) + GAP) / 2
    page.line([(WIDTH / 2, film.titles[i])], 16, "-Bold")
    for start in range(0, count, columns):
        row = range(start, min(start + columns, count))
        page.line([*zip(middles(len(row), side, left), film.names[start:], strict=False)])
        page.row([film.picture(i, j, side) for j in row], left)
    page.time_line(i / max(1, len(film.frames) - 1))
    page.caption(caption)
    return page


def draw_still(film: Film, caption: str) -> Page:
    """A few moments, without the first, which is often only noise: a column for each, or a row if
    there are many pictures."""
    page = Page()
    moments = np.linspace(0, len(film.frames) - 1, MOMENTS + 1)[1:].round().astype(int).tolist()
    upright = len(film.names) > MOMENTS
    columns = len(film.names) if upright else MOMENTS
    side = (WIDTH - LABEL) // columns - GAP
    if side > film.frames.shape[-1] * 3:  # large enough for pixels of one size
        side -= side % film.frames.shape[-1]
    above = film.names if upright else [film.titles[i] for i in moments]
    page.line([*zip(middles(columns, side, LABEL), above, strict=True)])
    for k in range(MOMENTS if upright else len(film.names)):
        cells = [(moments[k], j) if upright else (moments[j], k) for j in range(columns)]
        label = film.titles[moments[k]] if upright else film.names[k]
        page.row([film.picture(*cell, side) for cell in cells], LABEL, label)
    page.caption(caption)
    return page


def palette(film: Film) -> Image.Image:
    """The colours of all pages: greys, tinted greys, and the colours that have a meaning."""
    greys = np.linspace(0, 255, 10 if film.tint is None else 16)[:, None].repeat(3, axis=1)
    prompt = np.array(ImageColor.getrgb(MEANINGS["prompt"]))
    tints = np.linspace(0, STRONGEST, 1 if film.tint is None else 14)
    colours = [greys + share * (prompt - greys) for share in tints]
    colours += [np.array([ImageColor.getrgb(colour)]) for colour in MEANINGS.values()]
    image = Image.new("P", (1, 1))
    image.putpalette(np.concatenate(colours).round().astype(np.uint8).tobytes())
    return image


def animated_png(film: Film, caption: str) -> bytes:
    """The content of its file: frames in an endless loop, and the still."""
    pages = [draw_still(film, caption)]
    pages += [draw_frame(film, i, caption) for i in range(len(film.frames))]
    box, few = (0, 0, WIDTH, max(page.y for page in pages) + GAP), palette(film)
    still, *frames = [
        page.image.crop(box).quantize(palette=few, dither=Image.Dither.NONE) for page in pages
    ]
    durations = [MILLISECONDS] * (len(frames) - 1) + [HOLD]
    options = {"save_all": True, "default_image": True, "append_images": frames, "optimize": True}
    buffer = io.BytesIO()
    still.save(buffer, "png", duration=durations, loop=0, **options)
    return buffer.getvalue()


def stacked(tables: Mapping[str, Tensor]) -> np.ndarray:
    """Weights (moments, patches) of squares of patches, divided by the largest of each picture."""
    grids = []
    for table in tables.values():
        side = int(table.shape[1] ** 0.5)
        grids.append(to_numpy(table / table.max()).reshape(-1, side, side))
    return np.stack(grids, axis=1)


def film(
    rows: Mapping[str, np.ndarray],
    titles: Sequence[str],
    caption: str,
    tint: Mapping[str, Tensor] | None = None,
) -> None:
    """Show pictures that change together, given as name -> (moments, H, W), below a notebook's
    cell. `tint`, given as name -> (moments, patches), colours the patches of each."""
    frames = np.stack([*rows.values()], axis=1)
    film = Film(frames, [*rows], titles, stacked(tint) if tint else None)
    content = animated_png(film, caption)
    words = f"Moving picture of {', '.join(rows)}: {titles[0]} to {titles[-1]}. {caption}"
    show_bytes("image/png", content, words)
