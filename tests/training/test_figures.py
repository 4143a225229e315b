"""Grids, captions, images as characters."""

import numpy as np

from nanosd3.training.figures import caption_lines, grid, shades, smooth


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


def test_captions_wrap():
    assert len(caption_lines("a thin upright handwritten seven", 120, 15)) == 3


def test_shades():
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 4:10, 3:6] = 255
    assert shades(image) == "\n".join(["   @@@"] * 3)


def test_smooth():
    assert smooth([1, 2, 3, 4], 2).tolist() == [1.5, 2.5, 3.5]
