"""The reader of single images: what Pillow's own conversions give, and a note for each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nanosd3.data.image_folder import load_picture, read_folder
from nanosd3.data.pictures import read_image, read_mask, to_latent_mask, to_pixels
from nanosd3.errors import InputError

ROTATED, PALETTE = "rotated by its EXIF tag", "converted from palette"
ON_WHITE, GREYS = "transparency placed on white", "converted to greyscale"
NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)


def image_of(mode: str) -> Image.Image:
    if mode in ("LA", "RGBA"):
        return Image.fromarray(NOISE).convert(mode)
    return Image.fromarray(NOISE[..., :3]).convert(mode)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def by_pillow(path: Path, channels: int) -> np.ndarray:
    """Upright, on white, and in the colours asked for."""
    with Image.open(path) as image:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    rgb = Image.alpha_composite(white, rgba).convert("RGB")
    return np.array(rgb.convert("RGB" if channels == 3 else "L"))


CASES = [  # file, mode, options to save it with, notes
    ("a.png", "RGB", {}, []),
    ("a.bmp", "RGB", {}, []),
    ("a.png", "L", {}, []),
    ("a.png", "1", {}, []),
    ("a.jpg", "RGB", {"exif": exif(1)}, []),
    *[("a.jpg", "RGB", {"exif": exif(n)}, [ROTATED]) for n in range(2, 9)],
    *[(f"a{end}", "RGB", {"exif": exif(6)}, [ROTATED]) for end in (".png", ".tif", ".webp")],
    ("a.png", "P", {}, [PALETTE]),
    ("a.gif", "P", {}, [PALETTE]),
    ("a.png", "P", {"transparency": 0}, [PALETTE, ON_WHITE]),
    ("a.png", "P", {"transparency": 0, "exif": exif(8)}, [ROTATED, PALETTE, ON_WHITE]),
    ("a.png", "RGBA", {}, [ON_WHITE]),
    ("a.webp", "RGBA", {"lossless": True, "exact": True}, [ON_WHITE]),
    ("a.png", "LA", {}, [ON_WHITE]),
    ("a.png", "RGB", {"transparency": tuple(NOISE[3, 3, :3].tolist())}, [ON_WHITE]),
    ("a.jpg", "CMYK", {}, ["converted from CMYK"]),
]


@pytest.mark.parametrize(("name", "mode", "options", "notes"), CASES)
def test_pixels_are_pillows_and_the_training_sets(tmp_path, name, mode, options, notes):
    path = tmp_path / name
    image_of(mode).save(path, **options)
    path.with_suffix(".txt").write_text("noise")
    (picture,) = read_folder(tmp_path).pictures
    for channels in (3, 1):
        pixels, lines = read_image(path, channels)
        expected = by_pillow(path, channels)
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, expected)
        assert np.array_equal(pixels, load_picture(picture, picture.size, channels))
        grey = channels == 1 and mode not in ("1", "L", "LA")
        assert lines == [f"{path}: {note}" for note in [*notes, *([GREYS] if grey else [])]]
        with Image.open(path) as image:  # and in memory
            batch = to_pixels(image, channels)
        expected = expected[..., None] if channels == 1 else expected
        assert torch.equal(batch[0].permute(1, 2, 0), torch.from_numpy(expected) / 127.5 - 1)


def test_opaque_alpha_is_no_conversion(tmp_path):
    Image.fromarray(NOISE[..., :3]).convert("RGBA").save(tmp_path / "a.png")
    pixels, notes = read_image(tmp_path / "a.png", 3)
    assert np.array_equal(pixels, NOISE[..., :3]) and notes == []


def test_an_image_in_memory_is_left_as_it_is():
    image = image_of("RGBA")
    before = image.tobytes()
    to_pixels(image, 3)
    assert image.mode == "RGBA" and image.tobytes() == before


@pytest.mark.parametrize("mode", ["LAB", "I", "F", "I;16"])
def test_modes_without_a_convention(mode):
    message = "image: has the colour mode LAB" if mode == "LAB" else "image: has more than 8 bits"
    with pytest.raises(InputError, match=message):
        to_pixels(Image.new(mode, (20, 12)), 3)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "options", "notes"),
    [
        ("a.png", "L", {}, []),
        ("a.png", "RGB", {}, []),
        ("a.png", "RGBA", {}, []),
        ("a.gif", "P", {}, [PALETTE]),
        ("a.tif", "L", {"exif": exif(3)}, [ROTATED]),
    ],
)
def test_masks(tmp_path, name, mode, options, notes):
    """Grey levels of any mode: light from 128 on."""
    greys, path = NOISE[..., 0], tmp_path / name
    Image.fromarray(greys).convert(mode).save(path, **options)
    mask, lines = read_mask(path)
    expected = greys[::-1, ::-1] if options else greys
    assert mask.dtype == bool and np.array_equal(mask, expected >= 128)
    assert lines == [f"{path}: {note}" for note in notes]
    with Image.open(path) as image:
        latent = to_latent_mask(image, 12, 20, 1, 0)
    assert np.array_equal(latent[0, 0].bool(), expected >= 128)


@pytest.mark.parametrize(
    ("mode", "message"), [("RGBA", "must be opaque"), ("LA", "must be opaque"), ("RGB", "colours")]
)
def test_masks_that_are_ambiguous(tmp_path, mode, message):
    image_of(mode).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"a.png: a mask .*{message}") as refusal:
        read_mask(tmp_path / "a.png")
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match=f"mask: a mask .*{message}"):
        to_latent_mask(image_of(mode), 12, 20, 1, 0)
