"""One call of the pipeline: its arguments, validated and resolved once.

`make_request` takes what was not given from the config and raises a one-line InputError for any
invalid value; nothing is checked again afterwards. Numbers may be Python's, NumPy's or 0-d
tensors, and a string is accepted where a list of strings is.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanosd3.arguments import real_number, several, truth_value, whole_number
from nanosd3.config_types import Config, Sampling
from nanosd3.data.pictures import to_latent_mask, to_pixels, to_tensor
from nanosd3.errors import InputError, shown
from nanosd3.few_steps import ALL_SAMPLERS, even_schedule
from nanosd3.flow import schedule
from nanosd3.random_streams import rng
from nanosd3.samplers import Callback, SkipLayerGuidance
from nanosd3.text import check_prompts, check_t5_length, dropped_encoders

STRENGTH = 0.6  # default of image to image
SKIP_SCALE = 2.5  # default scale of skip-layer guidance (diffusers has 2.8)
MAX_STEPS = 100_000  # with more, float32 soon cannot tell their times apart
SKIP_RANGE = (0.01, 0.2)  # the fraction of the steps in which skip-layer guidance acts


@dataclass(frozen=True)
class Request:
    """What one call asks for."""

    prompts: list[str]
    negative: str
    sampling: Sampling
    drop: list[str]  # text encoders left out
    t5_length: int | None
    times: Tensor  # visited, from the first to 0
    noise: Tensor  # (B, C, h, w)
    pixels: Tensor | None  # (1 or B, channels, H, W) in [-1, 1], the image to start from
    mask: Tensor | None  # (1, 1, h, w), 1 where the image is repainted
    skip: SkipLayerGuidance | None
    output: str  # "image" or "latent"
    callback: Callback | None
    progress: bool

    @property
    def texts(self) -> list[str]:
        """All texts to encode, each once. Without guidance the negative prompt is not used."""
        negative = [] if self.sampling.guidance == 1 else [self.negative]
        return list(dict.fromkeys([*self.prompts, *negative]))


def make_request(
    config: Config,
    prompts: str | Collection[str],
    negative: str,
    *,
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    sampler: str | None,
    seed: int,
    height: int | None,
    width: int | None,
    t5_length: int | None,
    drop: str | Collection[str],
    skip_layers: Collection[int],
    skip_scale: float,
    noise: Tensor | None,
    image: object,
    strength: float | None,
    mask: object,
    output: str,
    callback: Callback | None,
    progress: bool,
) -> Request:
    """Validate the arguments of `Pipeline.__call__`, with the config's defaults."""
    prompts = check_prompts(prompts, negative)
    sampling = sampling_of(config.sampling, steps, guidance, shift, sampler)
    if negative and sampling.guidance == 1:
        raise InputError(
            "a negative prompt has no effect without guidance; leave it out, or use guidance "
            "above 1"
        )
    pixels, height, width = starting_image(config, image, height, width, len(prompts))
    latent_mask = starting_mask(config, mask, pixels)
    times = times_from(sampling, default_strength(strength, pixels, latent_mask))
    skip = skip_layer_guidance(skip_layers, skip_scale, times, config.mmdit.depth)
    shape = (len(prompts), config.mmdit.latent_channels, *latent_size(config, height, width))
    seed = whole_number("seed", seed)
    if not isinstance(output, str) or output not in ("image", "latent"):
        raise InputError(f"output must be image or latent, got {shown(output)}")
    if callback is not None and not callable(callback):
        raise InputError(f"callback must be a function, got {shown(callback)}")
    return Request(
        prompts,
        negative,
        sampling,
        dropped_encoders(drop),
        check_t5_length(t5_length),
        times,
        seeded_noise(shape, seed) if noise is None else check_noise(noise, shape),
        pixels,
        latent_mask,
        skip,
        output,
        callback,
        truth_value("progress", progress),
    )


# --- numbers --------------------------------------------------------------------------------------


def sampling_of(
    usual: Sampling,
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    sampler: str | None,
) -> Sampling:
    """The usual sampling, overridden by what is given. Guidance up to 1 is off, as in diffusers."""
    count = usual.steps if steps is None else whole_number("steps", steps)
    scale = usual.guidance if guidance is None else real_number("guidance", guidance)
    alpha = usual.shift if shift is None else real_number("shift", shift)
    solver = usual.sampler if sampler is None else sampler
    if count < 1:
        raise InputError(f"steps must be at least 1, got {count}")
    if count > MAX_STEPS:
        raise InputError(f"steps must be at most {MAX_STEPS}, got {shown(count)}")
    if not 0 <= scale < float("inf"):
        raise InputError(f"guidance must be a number from 0 up, got {scale}")
    if not 0 < alpha < float("inf"):
        raise InputError(f"shift must be a number above 0, got {alpha}")
    if not isinstance(solver, str) or solver not in ALL_SAMPLERS:
        raise InputError(f"no sampler {shown(solver)}; there are {', '.join(ALL_SAMPLERS)}")
    distilled = usual.sampler == "consistency"
    if distilled and scale > 1:
        raise InputError(f"guidance {scale}: is already distilled into this model; leave it out")
    if solver == "consistency" and not distilled:
        raise InputError(
            "sampler consistency is for consistency models, which this is not; "
            "`python -m nanosd3.related consistency` makes one of a trained run"
        )
    return Sampling(count, max(scale, 1.0), alpha, solver)


def latent_size(config: Config, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of an image's latents; None is the size trained at.

    Raises InputError, naming the nearest sizes, for one that is not divisible or too large.
    """
    step, border = config.vae.factor * config.mmdit.patch_size, 2 * config.padding
    largest = config.mmdit.grid * step - border
    latent = []
    for name, pixels in (("height", height), ("width", width)):
        padded = config.image_size if pixels is None else whole_number(name, pixels) + border
        if padded % step or not step <= padded <= largest + border:
            below = min(max(padded // step, 1), config.mmdit.grid) * step - border
            nearest = [str(size) for size in (below, below + step) if size <= largest]
            asked = "not given" if pixels is None else pixels
            raise InputError(
                f"{name} {asked}: sizes of this model go in steps of {step} up to {largest}; "
                f"nearest: {' or '.join(nearest)}"
            )
        latent.append(padded // config.vae.factor)
    return latent[0], latent[1]


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise (B, C, h, w); each image has a stream of its own."""
    each = [torch.randn(shape[1:], generator=rng(seed, "noise", i)) for i in range(shape[0])]
    return torch.stack(each)


def check_noise(noise: object, shape: tuple[int, ...]) -> Tensor:
    """The noise as a tensor. Raises InputError if it is not a tensor of this shape."""
    if isinstance(noise, np.ndarray | Tensor):
        noise = to_tensor(noise, "noise")
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise InputError(f"noise: expected a tensor of floating-point numbers, got {shown(noise)}")
    if tuple(noise.shape) != shape:
        raise InputError(f"noise: has shape {tuple(noise.shape)}, expected {shape}")
    noise = noise.float() if noise.dtype.itemsize == 1 else noise
    if not torch.isfinite(noise).all():
        raise InputError("noise: holds NaN or infinity")
    return noise


# --- images to start from -----------------------------------------------------------------------


def starting_image(
    config: Config, image: object, height: int | None, width: int | None, count: int
) -> tuple[Tensor | None, int | None, int | None]:
    """The pixels (1 or B, channels, H, W) of an image to start from, and the size to generate.

    Raises InputError if they do not fit each other or the `count` of prompts.
    """
    if image is None:
        return None, height, width
    pixels = to_pixels(image, config.vae.image_channels)
    if len(pixels) not in (1, count):
        raise InputError(f"image: {len(pixels)} images for {count} prompts")
    H, W = pixels.shape[2:]
    asked = (
        H if height is None else whole_number("height", height),
        W if width is None else whole_number("width", width),
    )
    if asked != (H, W):
        raise InputError(
            f"image: is {H}x{W} (height x width), but {asked[0]}x{asked[1]} is asked for; "
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
    """How much an image is changed, up to 1. Raises InputError if it is given without an image."""
    if strength is None:
        return 1.0 if pixels is None or mask is not None else STRENGTH
    if pixels is None:
        raise InputError("strength has no effect without an image")
    return real_number("strength", strength)


def first_step(steps: int, strength: float) -> int:
    """The step to begin with so that a fraction `strength` of all steps is taken, as in diffusers
    (Stability's code rounds differently and differs by one for some values)."""
    return int(max(steps - min(steps * strength, steps), 0))


def times_from(sampling: Sampling, strength: float) -> Tensor:
    """The times to visit, descending to 0, from `strength` of the way to noise.

    Raises InputError if that leaves no step, or two times are equal.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}")
    spaced = even_schedule if sampling.sampler == "consistency" else schedule
    times = spaced(sampling.steps, sampling.shift)
    if not (times.diff() < 0).all():
        raise InputError(
            f"shift {sampling.shift} makes consecutive times of {sampling.steps} steps equal"
        )
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
    given = several("skip_layers", layers, "a list of whole numbers")
    layers = tuple(whole_number("a layer in skip_layers", layer) for layer in given)
    scale = real_number("skip_scale", scale)
    if not 0 < scale < float("inf"):
        raise InputError(f"skip_scale must be a number above 0, got {scale}")
    if not layers:
        return None
    if wrong := [layer for layer in layers if not 0 <= layer < depth]:
        raise InputError(f"skip_layers: no layer {wrong[0]}; this model has 0 to {depth - 1}")
    steps = len(times) - 1
    first, last = (fraction * steps for fraction in SKIP_RANGE)
    inside = [float(t) for i, t in enumerate(times[:-1]) if first < i < last]
    if not inside:
        raise InputError(
            f"skip_layers: none of {steps} steps is in the part where it acts "
            f"(steps {first:.1f} to {last:.1f}); take more steps"
        )
    return SkipLayerGuidance(layers, scale, inside[0], inside[-1])
