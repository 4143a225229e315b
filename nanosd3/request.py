"""One call of the pipeline: its arguments, validated and resolved once.

`make_request` fills in what was not given from the config and raises InputError, one line, for any
value that makes no sense; after it nothing is checked again.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanosd3.config_types import Config, Sampling
from nanosd3.data.pictures import to_latent_mask, to_pixels
from nanosd3.errors import InputError
from nanosd3.flow import schedule
from nanosd3.samplers import SAMPLERS, SkipLayerGuidance

STRENGTH = 0.6  # default of image to image
SKIP_SCALE = 2.5  # default scale of skip-layer guidance (diffusers has 2.8)
SKIP_RANGE = (0.01, 0.2)  # the fraction of the steps in which skip-layer guidance acts


@dataclass(frozen=True)
class Request:
    """What one call asks for."""

    prompts: list[str]
    negative: str
    sampling: Sampling
    drop: Collection[str]  # text encoders left out
    t5_length: int | None
    size: tuple[int, int]  # of the latents
    times: Tensor  # visited, from the first to 0
    noise: Tensor | None  # (B, C, h, w), or None for the seeded noise
    pixels: Tensor | None  # (1 or B, channels, H, W) in [-1, 1], the image to start from
    mask: Tensor | None  # (1, 1, h, w), 1 where the image is repainted
    skip: SkipLayerGuidance | None

    @property
    def texts(self) -> list[str]:
        """All texts to encode, each once. Without guidance the negative prompt is not used."""
        negative = [] if self.sampling.guidance == 1 else [self.negative]
        return list(dict.fromkeys([*self.prompts, *negative]))


def make_request(
    config: Config,
    prompts: str | list[str],
    negative: str,
    *,
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    sampler: str | None,
    height: int | None,
    width: int | None,
    t5_length: int | None,
    drop: Collection[str],
    skip_layers: Collection[int],
    skip_scale: float,
    noise: Tensor | None,
    image: object,
    strength: float | None,
    mask: object,
) -> Request:
    """Validate the arguments of `Pipeline.__call__`, with the config's defaults."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    usual = config.sampling
    sampling = Sampling(
        steps=usual.steps if steps is None else steps,
        guidance=usual.guidance if guidance is None else guidance,
        shift=usual.shift if shift is None else shift,
        sampler=usual.sampler if sampler is None else sampler,
    )
    check_text(prompts, negative, t5_length)
    check_sampling(sampling)
    if negative and sampling.guidance <= 1:
        raise InputError("a negative prompt has no effect at guidance 1 or less, which is none")
    sampling = replace(sampling, guidance=max(sampling.guidance, 1.0))  # as in diffusers
    pixels, height, width = starting_image(config, image, height, width, len(prompts))
    latent_mask = starting_mask(config, mask, pixels)
    times = times_from(sampling, default_strength(strength, pixels, latent_mask))
    skip = skip_layer_guidance(skip_layers, skip_scale, times, config.mmdit.depth)
    size = latent_size(config, height, width)
    if noise is not None:
        check_noise(noise, (len(prompts), config.mmdit.latent_channels, *size))
    return Request(
        prompts, negative, sampling, drop, t5_length, size, times, noise, pixels, latent_mask, skip
    )


def check_text(prompts: list[str], negative: str, t5_length: int | None) -> None:
    if not prompts:
        raise InputError("no prompts given")
    for prompt in (*prompts, negative):
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be text, got {prompt!r}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"prompt {prompt!r}: is not valid Unicode; was it typed in UTF-8?")
    if t5_length is not None and whole_number("t5_length", t5_length) < 1:
        raise InputError(f"t5_length must be at least 1, got {t5_length}")


def check_sampling(sampling: Sampling) -> None:
    if whole_number("steps", sampling.steps) < 1:
        raise InputError(f"steps must be at least 1, got {sampling.steps}")
    if not 0 <= sampling.guidance < float("inf"):
        raise InputError(f"guidance must be a number from 0 up, got {sampling.guidance}")
    if not 0 < sampling.shift < float("inf"):
        raise InputError(f"shift must be a number above 0, got {sampling.shift}")
    if sampling.sampler not in SAMPLERS:
        raise InputError(f"no sampler {sampling.sampler!r}; there are {', '.join(SAMPLERS)}")


def whole_number(name: str, value: object) -> int:
    """The value as an int. Raises InputError if it is not a whole number."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def latent_size(config: Config, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of an image's latents; None is the size trained at.

    Raises InputError, with the nearest sizes, for one that is not divisible or too large.
    """
    step, border = config.vae.factor * config.mmdit.patch_size, 2 * config.padding
    largest = config.mmdit.grid * step - border
    latent = []
    for name, pixels in (("height", height), ("width", width)):
        padded = config.image_size if pixels is None else whole_number(name, pixels) + border
        if padded % step or not step <= padded <= largest + border:
            below = min(max(padded // step, 1), config.mmdit.grid) * step - border
            nearest = [str(size) for size in (below, below + step) if size <= largest]
            shown = "not given" if pixels is None else pixels
            raise InputError(
                f"{name} {shown}: sizes of this model go in steps of {step} up to {largest}; "
                f"nearest: {' or '.join(nearest)}"
            )
        latent.append(padded // config.vae.factor)
    return latent[0], latent[1]


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(noise.shape) != shape:
        raise InputError(f"noise: has shape {tuple(noise.shape)}, expected {shape}")
    if not torch.isfinite(noise).all():
        raise InputError("noise: holds NaN or infinity")


# --- images to start from -----------------------------------------------------------------------


def starting_image(
    config: Config, image: object, height: int | None, width: int | None, count: int
) -> tuple[Tensor | None, int | None, int | None]:
    """The pixels (1 or B, channels, H, W) of an image to start from, and the size to generate.

    Raises InputError if they fit neither each other nor the `count` of prompts.
    """
    if image is None:
        return None, height, width
    pixels = to_pixels(image, config.vae.image_channels)
    if len(pixels) not in (1, count):
        raise InputError(f"image: {len(pixels)} images for {count} prompts")
    H, W = pixels.shape[2:]
    if (height or H, width or W) != (H, W):
        raise InputError(
            f"image: is {H}x{W} (height x width), but {height or H}x{width or W} is asked for; "
            "scale or crop it first"
        )
    latent_size(config, H, W)
    return pixels, H, W


def starting_mask(config: Config, mask: object, pixels: Tensor | None) -> Tensor | None:
    """The mask (1, 1, h, w) of what is repainted, at the size of the latents."""
    if mask is None:
        return None
    if pixels is None:
        raise InputError("mask has no effect without an image")
    H, W = pixels.shape[2:]
    return to_latent_mask(mask, H, W, config.vae.factor, config.padding)


def default_strength(strength: float | None, pixels: Tensor | None, mask: Tensor | None) -> float:
    """How much of an image is made new. Raises InputError if it is given without an image."""
    if strength is None:
        return 1.0 if pixels is None or mask is not None else STRENGTH
    if pixels is None:
        raise InputError("strength has no effect without an image")
    return strength


def first_step(steps: int, strength: float) -> int:
    """The step to begin with so that the fraction `strength` of an image is made new: as in
    diffusers (Stability's code differs by one for some values, by rounding)."""
    return int(max(steps - min(steps * strength, steps), 0))


def times_from(sampling: Sampling, strength: float) -> Tensor:
    """The times to visit, descending to 0, from `strength` of the way to noise.

    Raises InputError if that leaves no step, or no room between two.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}")
    times = schedule(sampling.steps, sampling.shift)
    if not (times.diff() < 0).all():
        raise InputError(f"shift {sampling.shift} leaves no room between {sampling.steps} steps")
    start = first_step(sampling.steps, strength)
    if start == sampling.steps:
        raise InputError(f"strength {strength} of {sampling.steps} steps is less than one step")
    return times[start:]


def skip_layer_guidance(
    layers: Collection[int], scale: float, times: Tensor, depth: int
) -> SkipLayerGuidance | None:
    """Skip-layer guidance in the first part of these times, or None without layers.

    Raises InputError for layers that the model does not have, and if no step falls in that part.
    """
    if not layers:
        return None
    if wrong := [layer for layer in layers if not 0 <= layer < depth]:
        raise InputError(f"skip_layers: no layer {wrong[0]}; this model has 0 to {depth - 1}")
    if not 0 < scale < float("inf"):
        raise InputError(f"skip_scale must be a number above 0, got {scale}")
    steps = len(times) - 1
    first, last = (fraction * steps for fraction in SKIP_RANGE)
    inside = [float(t) for i, t in enumerate(times[:-1]) if first < i < last]
    if not inside:
        raise InputError(
            f"skip_layers: of {steps} steps none is in the part where it acts "
            f"(steps {first:.1f} to {last:.1f}); take more steps"
        )
    return SkipLayerGuidance(tuple(layers), scale, inside[0], inside[-1])
