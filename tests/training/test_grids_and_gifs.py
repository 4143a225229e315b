"""Grids, captions, images as characters."""

import io

import numpy as np
from PIL import Image

from nanosd3.training.grids_and_gifs import (
    caption_lines,
    drawn_picture,
    grid,
    grid_of,
    npy,
    png,
    shades,
)
from nanosd3.training.plots import smooth


def test_grid_places_images():
    images = np.zeros((3, 28, 28), np.uint8)
    images[1] = 255
    picture = np.asarray(grid([("seven", images)]).convert("L"))
    cells = picture[4:60, 190:]
    assert (
        cells[:, :56].max() == 0 and cells[:, 60:116].min() == 255 and cells[:, 120:176].max() == 0
    )
    assert picture[:, :190].min() < 100  # the caption
    assert grid([("x", np.zeros((20, 28, 28), np.uint8))]).height == 2 * 60 + 4
    assert grid([("x", np.zeros((2, 64, 64, 3), np.uint8))]).mode == "RGB"


def test_one_image_is_written_pixel_for_pixel():
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    for one in (images[:1], images[:1, ..., 0]):
        assert (np.asarray(Image.open(io.BytesIO(drawn_picture(one, ["x"])))) == one[0]).all()
    both = drawn_picture(images, ["seven", ""])
    assert both == png(grid_of(["seven", "(no text)"], images)) != png(grid_of(["", ""], images))
    assert (np.load(io.BytesIO(npy(images))) == images).all()


def test_captions_wrap():
    assert len(caption_lines("a thin upright handwritten seven", 120, 15)) == 3


def test_shades():
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 4:10, 3:6] = 255
    assert shades(image) == "\n".join(["   @@@"] * 3)


def test_smooth():
    assert smooth([1, 2, 3, 4], 2).tolist() == [1.5, 2.5, 3.5]


def ink(caption: str) -> np.ndarray:
    """What is drawn of a caption, beside a black picture."""
    return np.asarray(grid([(caption, np.zeros((1, 28, 28), np.uint8))]).convert("L"))[:, :190]


def test_a_long_caption_makes_no_tall_picture():
    """Neither many words nor one without a space; and nothing runs into the pictures."""
    picture = np.zeros((1, 28, 28), np.uint8)
    for caption in (
        "a red heart " * 1250,
        "x" * 15000,
        "漢" * 15000,
        "W" * 300,
        "\n" * 15000 + "a",
    ):
        assert grid([(caption, picture)]).height <= 8 * 18 + 8
        assert (ink(caption)[:, 182:] == 255).all(), caption[:9]
        assert len(caption_lines(caption, 170, 15)) <= 8
    assert caption_lines("a red heart " * 99, 170, 15)[-1].endswith("...")
    assert "".join(caption_lines("abcdefghi" * 5, 60, 15)) == "abcdefghi" * 5
    assert caption_lines("", 170, 15) == [""]


def test_every_character_is_drawn_or_replaced_by_a_sign():
    """Letters of other alphabets as they are, the rest as a box: no caption looks empty, and no
    two different letters alike."""
    empty = ink("")
    for caption in ("😀", "🎉", "قطة", "שלום", "Жук", "猫", "แมว", "\x07", "é", "\U0010fffe"):
        assert (ink(caption) < 128).sum() > 10 and (empty == 255).all(), caption
    letters = ("قطة", "ءاء", "é", "è", "Жук", "Щук", "α", "😀", "שלום")
    assert len({ink(caption).tobytes() for caption in letters}) == len(letters)
    assert (ink("é") == ink("e\u0301")).all()
