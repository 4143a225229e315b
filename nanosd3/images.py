"""Pictures given by the user: files to arrays, arrays to what the autoencoder takes.

A picture file may say less than it seems to: what lies behind transparent pixels, which way is
up, how 16 bits become 8. Readers differ in their guesses, so nothing is guessed here: such files
are refused with the way to make them plain.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nanosd3.runtime import InputError

ORIENTATION = 0x0112  # of EXIF; 1 is upright
UPRIGHT = "ImageOps.exif_transpose(Image.open(path)).save(...)"


def read_image(path: Path, channels: int) -> np.ndarray:
    """An 8-bit picture as uint8 (H, W, 3), or (H, W) for one channel.

    Raises InputError for what is no picture, or needs a decision first: alpha, palette, 16 bits,
    EXIF rotation, colours for a model of one channel.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        raise InputError(f"{path}: is not a picture that Pillow can read") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: damaged or too large ({error})") from None
    mode = image.mode
    if image.getexif().get(ORIENTATION, 1) != 1:
        raise InputError(f"{path}: is stored turned, with an EXIF note of the rotation; save it "
                         f"upright first (in Pillow: {UPRIGHT})")  # fmt: skip
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        raise InputError(f"{path}: has transparent pixels (an alpha channel); lay it on a "
                         "background and save it as RGB first")  # fmt: skip
    if mode == "P":
        raise InputError(f"{path}: has a palette; save it as RGB first (in Pillow: "
                         '.convert("RGB"))')  # fmt: skip
    if mode.startswith(("I", "F")):
        raise InputError(f"{path}: has more than 8 bits a channel (mode {mode}); scale its "
                         "values to 0..255 and save it with 8 bits first")  # fmt: skip
    if mode not in ("1", "L", "RGB"):
        raise InputError(f"{path}: has the colour mode {mode}; save it as RGB first")
    if mode == "RGB" and channels == 1:
        raise InputError(f"{path}: is in colour, the model is not; save it as greyscale first")
    return np.asarray(image.convert("RGB" if channels == 3 else "L"))


def read_mask(path: Path) -> np.ndarray:
    """A mask as bool (H, W): True where the picture is light, which is to be repainted."""
    pixels = read_image(path, 3)
    if (pixels != pixels[..., :1]).any():
        raise InputError(f"{path}: a mask is black and white, this has colours")
    return pixels[..., 0] >= 128


def to_pixels(image: object, channels: int) -> Tensor:
    """uint8 (H, W[, C]) or (B, H, W[, C]), or a Pillow image, to float (B, C, H, W) in [-1, 1].

    Raises InputError if it is neither.
    """
    if isinstance(image, Image.Image):
        image = image.convert("RGB" if channels == 3 else "L")
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.dtype != torch.uint8:
        raise InputError(f"image: expected uint8 pixels, got {pixels.dtype}")
    if channels == 1 and pixels.shape[-1:] != (1,):
        pixels = pixels[..., None]
    pixels = pixels[None] if pixels.ndim == 3 else pixels  # (B, H, W, C)
    if pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise InputError(f"image: expected (H, W, {channels}), got {tuple(pixels.shape)}")
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_latent_mask(mask: object, height: int, width: int, factor: int, padding: int) -> Tensor:
    """bool or uint8 (H, W), or a Pillow image, to float (1, 1, h, w), 1 where any of the latent's
    pixels is to be repainted. Raises InputError for another size, or if nothing is marked."""
    if isinstance(mask, Image.Image):
        mask = mask.convert("L")
    marked = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    marked = marked if marked.dtype == torch.bool else marked >= 128
    if tuple(marked.shape) != (height, width):
        raise InputError(f"mask: is {'x'.join(map(str, marked.shape))} (height x width), but the "
                         f"image is {height}x{width}")  # fmt: skip
    if not marked.any():
        raise InputError("mask: nothing is marked (light) in it, so nothing would be repainted")
    marked = F.pad(marked.float()[None, None], (padding,) * 4)
    return F.max_pool2d(marked, factor)
