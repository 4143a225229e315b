"""What may be asked of a pipeline, checked: one line for each value that makes no sense."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanosd3.config import Config, Sampling
from nanosd3.flow import schedule
from nanosd3.images import to_latent_mask, to_pixels
from nanosd3.runtime import InputError
from nanosd3.samplers import SAMPLERS, Skip

SKIP_RANGE = (0.01, 0.2)  # share of the steps in which skip-layer guidance acts
STRENGTH = 0.6  # of image to image, unless told otherwise
SKIP_SCALE = 2.5  # of skip-layer guidance (diffusers has 2.8)


@dataclass(frozen=True)
class Request:
    """What one call asks for, with the config's values where it says nothing."""

    prompts: list[str]
    negative: str
    how: Sampling
    drop: Collection[str]  # text encoders left out
    t5_length: int | None

    @property
    def texts(self) -> list[str]:
        """All that is to be encoded, each once. Without guidance nothing is moved away from."""
        negative = [] if self.how.guidance == 1 else [self.negative]
        return list(dict.fromkeys([*self.prompts, *negative]))


def checked(request: Request, output: str) -> Request:
    """The request, with guidance 1 for less: none, as in diffusers. Raises InputError for any
    value that makes no sense."""
    how, negative, t5_length = request.how, request.negative, request.t5_length
    if not request.prompts:
        raise InputError("no prompts given")
    for prompt in (*request.prompts, negative):
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be text, got {prompt!r}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"prompt {prompt!r}: is not valid Unicode; was it typed in UTF-8?")
    whole("steps", how.steps)
    if how.steps < 1:
        raise InputError(f"steps must be at least 1, got {how.steps}")
    if not 0 <= how.guidance < float("inf"):
        raise InputError(f"guidance must be a number from 0 up, got {how.guidance}")
    if not 0 < how.shift < float("inf"):
        raise InputError(f"shift must be a number above 0, got {how.shift}")
    if output not in ("image", "latent"):
        raise InputError(f"output must be image or latent, got {output!r}")
    if how.sampler not in SAMPLERS:
        raise InputError(f"no sampler {how.sampler!r}; there are {', '.join(SAMPLERS)}")
    if negative and how.guidance <= 1:
        raise InputError("a negative prompt has no effect at guidance 1 or less, which is none")
    if t5_length is not None and whole("t5_length", t5_length) < 1:
        raise InputError(f"t5_length must be at least 1, got {t5_length}")
    return replace(request, how=replace(how, guidance=max(how.guidance, 1.0)))


def whole(name: str, value: object) -> int:
    """A whole number. Raises InputError for anything else."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def latent_size(config: Config, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the latents of an image; None is the size trained at.

    Raises InputError, with the nearest sizes, for one that is not divisible or too large.
    """
    step, border = config.vae.factor * config.mmdit.patch_size, 2 * config.padding
    most = config.mmdit.grid * step - border
    latent = []
    for name, pixels in (("height", height), ("width", width)):
        padded = config.image_size if pixels is None else whole(name, pixels) + border
        if padded % step or not step <= padded <= most + border:
            below = min(max(padded // step, 1), config.mmdit.grid) * step - border
            sizes = [str(size) for size in (below, below + step) if size <= most]
            pixels = "not given" if pixels is None else pixels
            raise InputError(f"{name} {pixels}: sizes of this model go in steps of {step} up to "
                             f"{most}; nearest: {' or '.join(sizes)}")  # fmt: skip
        latent.append(padded // config.vae.factor)
    return latent[0], latent[1]


def strength_of(strength: float | None, pixels: Tensor | None, mask: Tensor | None) -> float:
    """How much of a picture is made new. Raises InputError if one is asked for without it."""
    if strength is None:
        return 1.0 if pixels is None or mask is not None else STRENGTH
    if pixels is None:
        raise InputError("strength has no effect without an image")
    return strength


def first_step(steps: int, strength: float) -> int:
    """The step to begin with, of `steps`, to make the share `strength` of a picture new: as in
    diffusers (Stability's code differs by one for some values, by rounding)."""
    return int(max(steps - min(steps * strength, steps), 0))


def times(how: Sampling, strength: float) -> Tensor:
    """The times to visit, from `strength` of the way to noise on.

    Raises InputError if that leaves no step, or no room between two.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}")
    ts = schedule(how.steps, how.shift)
    if not (ts.diff() < 0).all():
        raise InputError(f"shift {how.shift} leaves no room between {how.steps} steps")
    start = first_step(how.steps, strength)
    if start == how.steps:
        raise InputError(f"strength {strength} of {how.steps} steps is less than one step")
    return ts[start:]


def skip_of(layers: Collection[int], scale: float, ts: Tensor, depth: int) -> Skip | None:
    """Skip-layer guidance in the first part of these times, or None without layers.

    Raises InputError for layers the model has not, and if no step falls in that part.
    """
    if not layers:
        return None
    if wrong := [layer for layer in layers if not 0 <= layer < depth]:
        raise InputError(f"skip_layers: no layer {wrong[0]}; this model has 0 to {depth - 1}")
    if not 0 < scale < float("inf"):
        raise InputError(f"skip_scale must be a number above 0, got {scale}")
    steps = len(ts) - 1
    first, last = (share * steps for share in SKIP_RANGE)
    inside = [float(t) for i, t in enumerate(ts[:-1]) if first < i < last]
    if not inside:
        raise InputError(f"skip_layers: of {steps} steps none is in the part where it acts "
                         f"(steps {first:.1f} to {last:.1f}); take more steps")  # fmt: skip
    return Skip(tuple(layers), scale, inside[0], inside[-1])


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(noise.shape) != shape:
        raise InputError(f"noise: has shape {tuple(noise.shape)}, expected {shape}")
    if not torch.isfinite(noise).all():
        raise InputError("noise: holds NaN or infinity")
    return noise


def known_image(
    config: Config,
    image: object,
    mask: object,
    height: int | None,
    width: int | None,
    count: int,
) -> tuple[Tensor | None, Tensor | None, int | None, int | None]:
    """Pixels (B, channels, H, W) and latent mask of a picture to start from, and its size.

    Raises InputError if they do not fit each other, the `count` of prompts, or the size asked
    for.
    """
    if image is None:
        if mask is not None:
            raise InputError("mask has no effect without an image")
        return None, None, height, width
    pixels = to_pixels(image, config.vae.image_channels)
    if len(pixels) not in (1, count):
        raise InputError(f"image: {len(pixels)} images for {count} prompts")
    H, W = pixels.shape[2:]
    if (height or H, width or W) != (H, W):
        raise InputError(f"image: is {H}x{W} (height x width), but {height or H}x{width or W} "
                         "is asked for; scale or crop it first")  # fmt: skip
    latent_size(config, H, W)
    if mask is not None:
        mask = to_latent_mask(mask, H, W, config.vae.factor, config.padding)
    return pixels, mask, H, W
