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


def plain(image: Image.Image, name: object, channels: int) -> np.ndarray:
    """An 8-bit picture as uint8 (H, W, 3), or (H, W) for one channel.

    Raises InputError for what needs a decision first: alpha, palette, 16 bits, EXIF rotation,
    several frames, colours for a model of one channel.
    """
    mode = image.mode
    if image.getexif().get(ORIENTATION, 1) not in (0, 1):
        raise InputError(f"{name}: is stored turned, with an EXIF note of the rotation; save it "
                         f"upright first (in Pillow: {UPRIGHT})")  # fmt: skip
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        raise InputError(f"{name}: has transparent pixels (an alpha channel); lay it on a "
                         "background and save it as RGB first")  # fmt: skip
    if mode == "P":
        raise InputError(f"{name}: has a palette; save it as RGB first (in Pillow: "
                         '.convert("RGB"))')  # fmt: skip
    if mode.startswith(("I", "F")):
        raise InputError(f"{name}: has more than 8 bits a channel (mode {mode}); scale its "
                         "values to 0..255 and save it with 8 bits first")  # fmt: skip
    if mode not in ("1", "L", "RGB"):
        raise InputError(f"{name}: has the colour mode {mode}; save it as RGB first")
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{name}: has {image.n_frames} frames; save the one you mean by itself")
    if mode == "RGB" and channels == 1:
        raise InputError(f"{name}: is in colour, the model is not; save it as greyscale first")
    return np.array(image.convert("RGB" if channels == 3 else "L"))


def read_image(path: Path, channels: int) -> np.ndarray:
    """The picture in a file, as `plain` gives it. Raises InputError for any it cannot take."""
    try:
        with Image.open(path) as image:
            deep = is_deep(image)
            image.load()
            if not deep:
                return plain(image, path, channels)
    except UnidentifiedImageError:
        raise InputError(f"{path}: is not a picture that Pillow can read") from None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # whatever a damaged file makes of the parser
        raise InputError(f"{path}: damaged or too large ({error})") from None
    raise InputError(f"{path}: has 16 bits a channel; scale its values to 0..255 and save it with "
                     "8 bits first")  # fmt: skip


def is_deep(image: Image.Image) -> bool:
    """Whether a picture, not yet decoded, has more than 8 bits a channel. Pillow halves those of
    colours without a word; only a tag (TIFF) or its name for the stored pixels (PNG) tells."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) > 8  # BitsPerSample
    return image.format == "PNG" and any(";16" in str(tile[3]) for tile in image.tile)


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
        image = plain(image, "image", channels)
    pixels = to_tensor(image, "image")
    if pixels.dtype != torch.uint8:
        raise InputError(f"image: expected uint8 pixels, got {pixels.dtype}")
    if channels == 1 and pixels.shape[-1:] != (1,):
        pixels = pixels[..., None]
    pixels = pixels[None] if pixels.ndim == 3 else pixels  # (B, H, W, C)
    if pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise InputError(f"image: expected (H, W, {channels}), got {tuple(pixels.shape)}")
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_tensor(array: object, name: str) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array.copy())
    raise InputError(f"{name}: expected an array of pixels or a Pillow image, got a "
                     f"{type(array).__name__}")  # fmt: skip


def to_latent_mask(mask: object, height: int, width: int, factor: int, padding: int) -> Tensor:
    """bool or uint8 (H, W), or a Pillow image, to float (1, 1, h, w), 1 where any of the latent's
    pixels is to be repainted. Raises InputError for another size, or if nothing is marked."""
    if isinstance(mask, Image.Image):
        mask = plain(mask, "mask", 1)
    marked = to_tensor(mask, "mask")
    if marked.dtype not in (torch.bool, torch.uint8):
        raise InputError(f"mask: expected bool or uint8, got {marked.dtype}")
    marked = marked if marked.dtype == torch.bool else marked >= 128
    if tuple(marked.shape) != (height, width):
        raise InputError(f"mask: is {'x'.join(map(str, marked.shape))} (height x width), but the "
                         f"image is {height}x{width}")  # fmt: skip
    if not marked.any():
        raise InputError("mask: nothing is marked (light) in it, so nothing would be repainted")
    marked = F.pad(marked.float()[None, None], (padding,) * 4)
    return F.max_pool2d(marked, factor)
