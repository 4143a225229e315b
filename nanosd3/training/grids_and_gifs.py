"""Image grids with captions and animated GIFs, drawn with Pillow."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LINES = 8  # of a caption, at most
CELL = 56  # smaller images are enlarged to about this height, in pixels
GAP = 4  # pixels between images
COLUMNS = 16  # images in a row, at most
SHADES = " .:-=+*#%@"  # characters from dark to light, on a dark terminal


@cache
def font(size: int, ascii_only: bool = True) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which covers little more than ASCII, or DejaVu Sans, which comes with
    matplotlib: it covers many alphabets, and draws a box for other characters."""
    if ascii_only:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def to_image(image: np.ndarray) -> Image.Image:
    """Pixels uint8 (H, W) or (H, W, 3) to a Pillow image, small ones enlarged by an integer."""
    factor = max(1, round(CELL / image.shape[0]))
    return Image.fromarray(
        np.kron(image, np.ones((factor, factor, *[1] * (image.ndim - 2)), np.uint8))
    )


def caption_lines(text: str, width: int, size: int) -> list[str]:
    """Wrap a caption into at most LINES lines of at most `width` pixels, between words unless they
    are too long; "..." stands for the rest."""
    length = font(size, text.isascii()).getlength
    lines, line = [], ""
    for word in text[: LINES * width].split():  # no character is narrower than a pixel
        longer = f"{line} {word}".strip()
        if line and length(longer) > width:
            lines.append(line)
            longer = word
        while length(longer) > width and len(longer) > 1:
            fits = max(1, int(len(longer) * width / length(longer)))
            while fits > 1 and length(longer[:fits]) > width:
                fits -= 1
            lines.append(longer[:fits])
            longer = longer[fits:]
        line = longer
    lines.append(line)
    if len(lines) <= LINES:
        return lines
    last = lines[LINES - 1]
    while length(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: LINES - 1], f"{last}..."]


def grid(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """A row for each caption (on the left) and its images (n, H, W) or (n, H, W, 3)."""
    label, size = 190, 15  # width of the captions and their font size, in pixels
    cell_width, cell_height = to_image(rows[0][1][0]).size
    columns = min(COLUMNS, max(1, 4096 // cell_width), max(len(images) for _, images in rows))
    wrapped = [caption_lines(caption, label - 20, size) for caption, _ in rows]
    heights = [
        max(-(-len(images) // columns) * (cell_height + GAP), len(lines) * (size + 3) + GAP)
        for (_, images), lines in zip(rows, wrapped, strict=True)
    ]
    width = label + columns * (cell_width + GAP) + GAP
    canvas = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for (caption, images), lines, height in zip(rows, wrapped, heights, strict=True):
        middle = top + (height - GAP) / 2 - len(lines) * (size + 3) / 2
        for i, line in enumerate(lines):
            letters = font(size, caption.isascii())
            draw.text((10, middle + i * (size + 3)), line, "black", letters)
        for i, image in enumerate(images):
            left = label + i % columns * (cell_width + GAP)
            canvas.paste(to_image(image), (left, top + i // columns * (cell_height + GAP)))
        top += height
    return canvas


def grid_of(captions: Sequence[str], images: np.ndarray) -> Image.Image:
    """A row for each caption, with an equal share of the images (n, H, W) or (n, H, W, 3)."""
    rows = zip(captions, np.split(images, len(captions)), strict=True)
    return grid([(caption or "(no text)", row) for caption, row in rows])


def side_by_side(columns: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures side by side, each under its title."""
    size, top = 17, 30
    width = sum(picture.width for _, picture in columns)
    canvas = Image.new("RGB", (width, top + max(p.height for _, p in columns)), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for title, picture in columns:
        draw.text((left + 10, 7), title, "black", font(size, title.isascii()))
        canvas.paste(picture, (left, top))
        left += picture.width
    return canvas


def png(picture: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def npy(images: np.ndarray) -> bytes:
    """The content of a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, images)
    return buffer.getvalue()


def drawn_picture(images: np.ndarray, captions: Sequence[str]) -> bytes:
    """The content of a PNG file: one image pixel for pixel, so that it can be edited further, or a
    grid with a row for each caption."""
    if len(images) == 1:
        return png(Image.fromarray(images[0]))
    return png(grid_of(captions, images))


def gif(frames: list[Image.Image], milliseconds: list[int]) -> bytes:
    """The content of a looping greyscale GIF that shows each frame for the given time."""
    buffer = io.BytesIO()
    first, *rest = [frame.convert("L").quantize(16) for frame in frames]
    first.save(buffer, "gif", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def shades(images: np.ndarray) -> str:
    """Greyscale images (n, H, W) side by side as characters, for a terminal."""
    small = images[:, ::2, :].astype(int)  # a character is about twice as tall as it is wide
    index = small * len(SHADES) // 256
    rows = [
        "  ".join("".join(SHADES[v] for v in row) for row in line) for line in index.swapaxes(0, 1)
    ]
    return "\n".join(row.rstrip() for row in rows if row.strip())
