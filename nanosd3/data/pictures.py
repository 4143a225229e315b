"""Read images: files and Pillow images to 8-bit RGB, arrays to what the autoencoder takes.

Training sets and `--init-image` share this reader, so that both see the same pixels in a file.
It follows the usual conventions: EXIF decides which way is up, palettes and other colour modes
become RGB, transparent pixels are composited on white, colour profiles are ignored. Each such
conversion is reported. What no convention covers is refused: animations, more than 8 bits a
channel, and transparent masks.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from torch import Tensor

from nanosd3.arguments import check_dense
from nanosd3.data.formats import formats_of, is_deep
from nanosd3.data.mnist import from_uint8
from nanosd3.errors import InputError
from nanosd3.storage.files import read_regular

ON_WHITE = "transparency placed on white"
PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA", "RGBa")  # to RGB without touching the colours


# --- files ----------------------------------------------------------------------------------------


def decode(content: bytes, path: Path) -> tuple[Image.Image, list[str]]:
    """Decode the content of an image file to upright RGB, on white where it is transparent.

    Also returns the conversions made, as in `to_rgb`. Raises InputError for unknown formats,
    damaged files, animations and more than 8 bits a channel.
    """
    return to_rgb(open_image(content, path), path)


def open_image(content: bytes, path: Path) -> Image.Image:
    """Open an image file without decoding its pixels yet."""
    with parsing(path):
        return Image.open(io.BytesIO(content), formats=formats_of(path))


@contextmanager
def parsing(name: object) -> Iterator[None]:
    """Turn whatever goes wrong while Pillow parses an image into an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is raised as an error as well
            yield
    except InputError:
        raise
    except UnidentifiedImageError:
        formats = ", ".join(formats_of(name))
        raise InputError(f"{name}: is not an image of a known format ({formats})") from None
    except Exception as error:  # parsers fail in many ways on damaged files
        raise InputError(f"{name}: damaged or too large ({error})") from None


def read_image(path: Path, channels: int) -> tuple[np.ndarray, list[str]]:
    """Read an image file as uint8 (H, W, 3), or (H, W) for one channel.

    Also returns one line for each conversion made, such as "a.jpg: rotated by its EXIF tag".
    Raises InputError for files that cannot be used, as `decode` does.
    """
    image, notes = decode(read_regular(path), path)
    pixels, more = to_channels(image, channels)
    return pixels, [f"{path}: {note}" for note in notes + more]


def read_mask(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a mask file as bool (H, W), True where it is light, and the conversions made.

    Raises InputError for files that cannot be used, as `to_greys` does.
    """
    greys, notes = to_greys(open_image(read_regular(path), path), path)
    return greys >= 128, [f"{path}: {note}" for note in notes]


# --- Pillow images --------------------------------------------------------------------------------


def to_rgb(image: Image.Image, name: object) -> tuple[Image.Image, list[str]]:
    """Convert an image to upright RGB, on white where it is transparent.

    Also returns the conversions made: a few words for each that may come as a surprise. Raises
    InputError for damaged images, animations, more than 8 bits a channel, and colour modes that
    Pillow cannot convert.
    """
    notes = []
    with parsing(name):
        check_kind(image, name)
        # Read before decoding, during which Pillow rotates TIFF files and removes their tag.
        if image.getexif().get(Base.Orientation, 1) in range(2, 9):
            notes.append("rotated by its EXIF tag")
        if image.format == "ICO" and len(image.info["sizes"]) > 1:
            notes.append(f"the largest of {len(image.info['sizes'])} sizes taken")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("P", "PA"):
            notes.append("converted from palette")
        elif image.mode not in PLAIN_MODES:
            notes.append(f"converted from {image.mode}")
        if not image.has_transparency_data:
            return image.convert("RGB"), notes
        rgba = image.convert("RGBA")
        if (np.asarray(rgba)[..., 3] < 255).any():  # an alpha channel may well be opaque
            notes.append(ON_WHITE)
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB"), notes


def check_kind(image: Image.Image, name: object) -> None:
    """Raise InputError for an image whose conversion to 8-bit RGB would need a decision."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's photograph and its preview
        raise InputError(
            f"{name}: has {frames} frames, expected a still image; save the one you mean by itself"
        )
    if is_deep(image):
        raise InputError(
            f"{name}: has more than 8 bits a channel; scale its values to 0..255 and save it "
            "with 8 bits"
        )
    if image.mode in ("LAB", "La"):
        raise InputError(f"{name}: has the colour mode {image.mode}; save it as RGB")


def to_channels(image: Image.Image, channels: int) -> tuple[np.ndarray, list[str]]:
    """Turn an RGB image into uint8 (H, W, 3), or (H, W) for one channel; and the conversions."""
    if channels == 3:
        return np.array(image), []
    notes = ["converted to greyscale"] if has_colour(np.asarray(image)) else []
    return np.array(image.convert("L")), notes


def to_greys(image: Image.Image, name: object) -> tuple[np.ndarray, list[str]]:
    """Convert a mask to upright grey levels, uint8 (H, W), and return the conversions made.

    A mask is not composited on white: that would mark its transparent pixels as light, while
    they may be meant either way. Raises InputError for transparent pixels, for colours, and as
    `to_rgb` does.
    """
    image, notes = to_rgb(image, name)
    if ON_WHITE in notes:
        raise InputError(
            f"{name}: a mask must be opaque, this has transparent pixels; paint what is to be "
            "repainted white, the rest black, and save it without an alpha channel"
        )
    pixels = np.array(image)
    if has_colour(pixels):
        raise InputError(
            f"{name}: a mask is black and white, this has colours; save it as greyscale"
        )
    return pixels[..., 0], notes


def has_colour(pixels: np.ndarray) -> bool:
    """Whether any pixel of an image (H, W, 3) is not grey."""
    return bool((pixels != pixels[..., :1]).any())


# --- arrays ---------------------------------------------------------------------------------------


def to_pixels(image: object, channels: int) -> Tensor:
    """Convert an image for the autoencoder: float (B, C, H, W) in [-1, 1].

    Takes uint8 (H, W, C) or (B, H, W, C), without C for one channel, or a Pillow image, which
    is converted as a file would be. Raises InputError for anything else.
    """
    if isinstance(image, Image.Image):
        image, _ = to_channels(to_rgb(image, "image")[0], channels)
    pixels = to_tensor(image, "image")
    if pixels.dtype != torch.uint8:
        raise InputError(f"image: expected uint8 pixels, got {pixels.dtype}")
    if channels == 1 and pixels.shape[-1:] != (1,):
        pixels = pixels[..., None]
    pixels = pixels[None] if pixels.ndim == 3 else pixels  # (B, H, W, C)
    if pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise InputError(f"image: expected (H, W, {channels}), got {tuple(pixels.shape)}")
    return from_uint8(pixels.permute(0, 3, 1, 2))


def to_tensor(array: object, name: str) -> Tensor:
    """A tensor as it is, or a copy of a NumPy array, in whatever byte order. Raises InputError for
    anything else, such as an array of texts, or a tensor that does not store all its elements."""
    if isinstance(array, Tensor):
        check_dense(name, array)
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{name}: expected an array without masked values; fill them first")
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{name}: expected an array of pixels or a Pillow image, got a {type(array).__name__}"
        )
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError:
        raise InputError(f"{name}: expected numbers, got an array of {array.dtype}") from None


def to_latent_mask(mask: object, height: int, width: int, factor: int, padding: int) -> Tensor:
    """Convert a mask to float (1, 1, h, w): 1 for latents with any pixel to be repainted.

    Takes (H, W) bool, or uint8 that is light (128 and above) where to repaint, or a Pillow
    image. `factor` is the autoencoder's, `padding` the border around the image. Raises
    InputError for anything else, for a size other than the image's, and if nothing is marked.
    """
    if isinstance(mask, Image.Image):
        mask, _ = to_greys(mask, "mask")
    marked = to_tensor(mask, "mask")
    if marked.dtype not in (torch.bool, torch.uint8):
        raise InputError(f"mask: expected bool or uint8, got {marked.dtype}")
    marked = marked if marked.dtype == torch.bool else marked >= 128
    if tuple(marked.shape) != (height, width):
        size = "x".join(map(str, marked.shape))
        raise InputError(f"mask: is {size} (height x width), but the image is {height}x{width}")
    if not marked.any():
        raise InputError("mask: nothing is marked (light) in it, so nothing would be repainted")
    marked = F.pad(marked.float()[None, None], (padding,) * 4)
    return F.max_pool2d(marked, factor)
