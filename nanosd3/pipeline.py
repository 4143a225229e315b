"""The assembled model: prompts in, images out.

    prompts --three encoders--> context, pooled
    noise   --solver, guided velocity--> latents --denormalise, decode--> images

`Pipeline.load("runs/mnist")` opens a run, a file of official weights or a diffusers folder; calling
it gives uint8 images. Each of the three steps is done for all prompts of a call before the next
begins, so that only the network at work needs to be in memory (lazy_modules.py). Image i of a call
starts from noise that depends only on the seed and i, not on the prompts, the number of images or
the device.

*Image to image*: start not from noise but from a noisy image, late enough to keep its layout.
*Inpainting*: the same with a mask; outside it the image is known at every t.
"""

import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanosd3.arguments import batch_of, path_of, positive_number, two_sides, whole_number
from nanosd3.config_types import Config, MMDiTConfig, VAEConfig
from nanosd3.data.mnist import to_uint8
from nanosd3.errors import InputError, shown
from nanosd3.few_steps import ALL_SAMPLERS, consistency, inpainting_afresh
from nanosd3.flow import interpolate
from nanosd3.lazy_modules import LazyModules
from nanosd3.machine.accelerate import accelerate
from nanosd3.machine.device import at_once, device_of
from nanosd3.mmdit import MMDiT
from nanosd3.official.checkpoint import Checkpoint, open_checkpoint
from nanosd3.official.load_networks import open_networks
from nanosd3.request import SKIP_SCALE, Request, make_request, seeded_noise
from nanosd3.samplers import Callback, guided, inpainting
from nanosd3.text import (
    TextEncoders,
    Tokenizers,
    check_prompts,
    check_t5_length,
    dropped_encoders,
    rows_of,
)
from nanosd3.torch_settings import usual_settings
from nanosd3.vae import AutoencoderKL


class EncodedText(Protocol):
    """A mapping from texts to their context (M, Dc) and pooled vector (Dp), encoded beforehand."""

    def __contains__(self, text: str) -> bool: ...
    def __getitem__(self, text: str) -> tuple[Tensor, Tensor]: ...


class Pipeline:
    """Tokenizers and the networks of one config: clip_l, clip_g, t5, mmdit and vae."""

    def __init__(self, config: Config, tokenizers: Tokenizers, parts: LazyModules):
        self.config = config
        self.parts = parts
        widths = (config.mmdit.context_dim, config.mmdit.pooled_dim)
        self.text = TextEncoders(config.text, tokenizers, parts, *widths)
        self.encoded_text: EncodedText = {}
        # Normalised latents to images in [-1, 1], in place of the autoencoder's own decoder.
        self.decoder: Callable[[Tensor], Tensor] | None = None
        for module in parts.ready.values():
            accelerate(module.eval())

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Pipeline":
        """The model in a run folder, a single file or a diffusers folder, kept in memory. A short
        form of `nanosd3.weights.load`."""
        checkpoint = open_checkpoint(path_of("path", path))
        pipeline = open_pipeline(checkpoint, device, None, staged=False)
        pipeline.parts.load()
        return pipeline

    @property
    def mmdit(self) -> MMDiT:
        return cast(MMDiT, self.parts["mmdit"])

    @property
    def vae(self) -> AutoencoderKL:
        return cast(AutoencoderKL, self.parts["vae"])

    @usual_settings()
    def encode_text(
        self,
        prompts: str | Collection[str],
        drop: str | Collection[str] = (),
        t5_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context (B, M, Dc) and pooled (B, Dp); equal prompts are encoded once.

        Raises InputError if a CLIP is absent and not dropped; warns about an absent T5 and
        truncated prompts.
        """
        prompts, drop = check_prompts(prompts), dropped_encoders(drop)
        length = check_t5_length(t5_length)
        for message in [*self.text.absent(drop), *self.text.truncated(prompts, length, drop)]:
            warnings.warn(message, stacklevel=3)  # past the decorator
        return rows_of(self.encode_each(list(dict.fromkeys(prompts)), drop, length), prompts)

    @usual_settings()
    def noise(self, count: int, seed: int, size: tuple[int, int]) -> Tensor:
        """The noise (count, C, h, w) of a seed, for latents of size (h, w)."""
        channels = self.config.mmdit.latent_channels
        shape = (positive_number("count", count), channels, *two_sides("size", size))
        return seeded_noise(shape, whole_number("seed", seed))

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the encoder's Gaussian for padded images in
        [-1, 1], not normalised."""
        mean, logvar = self.vae.encode(x.to(self.parts.device, dtype_of(self.vae)))
        return mean, (0.5 * logvar).exp()

    def encode(self, pixels: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [-1, 1] to normalised latents (B, C, h, w): the mean of
        the encoder's Gaussian, so that the same image gives the same latents."""
        vae, cut = self.config.vae, self.config.padding
        pixels = batch_of("pixels", pixels, vae.image_channels, vae.factor, 2 * cut)
        padded = F.pad(pixels, (cut,) * 4, value=-1.0)
        size = images_at_once(vae, pixels[0, 0].numel())
        return self.vae.normalise(torch.cat([self.posterior(x)[0] for x in padded.split(size)]))

    @usual_settings()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents (B, C, h, w) to images uint8 (B, H, W) or (B, H, W, C)."""
        latents = batch_of("latents", latents, self.config.vae.latent_channels)
        vae, cut = self.vae, self.config.padding
        pixels = latents[0, 0].numel() * self.config.vae.factor**2
        images = []
        for z in latents.split(images_at_once(self.config.vae, pixels)):
            z = z if self.decoder else vae.denormalise(z.to(dtype_of(vae)))
            x = (self.decoder or vae.decode)(z)
            x = finite(x, "the decoded image")
            images.append(to_uint8(x[:, :, cut : x.shape[2] - cut, cut : x.shape[3] - cut]).cpu())
        return torch.cat(images).numpy()

    @torch.no_grad()
    @usual_settings()
    def __call__(
        self,
        prompts: str | Collection[str],
        negative: str = "",
        *,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        t5_length: int | None = None,
        drop: str | Collection[str] = (),
        skip_layers: Collection[int] = (),
        skip_scale: float = SKIP_SCALE,
        noise: Tensor | None = None,
        image: object = None,
        strength: float | None = None,
        mask: object = None,
        output: str = "image",
        callback: Callback | None = None,
        progress: bool = False,
    ) -> np.ndarray | Tensor:
        """One image for each prompt: uint8 (B, H, W), or (B, H, W, C) in colour; with
        output="latent" the normalised latents (B, C, h, w) instead.

        Sampling options and sizes (in pixels) that are None follow the config. `noise` (B, C, h, w)
        replaces the seeded noise. `image`, one for all prompts or one for each, is uint8
        (H, W[, C]) or a Pillow image; it is noised a fraction `strength` of the way (0.6, or 1
        with a mask) and sampled from there. `mask`, bool or uint8 (H, W), marks what to repaint.
        `skip_layers` are left out in skip-layer guidance. `callback` gets copies of the state at
        every step of every batch; `progress` shows a bar. Warns about words that occur in no
        caption and about truncated prompts. Raises InputError for invalid values.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        request = make_request(self.config, **given)
        prompts = list(dict.fromkeys([*request.prompts, request.negative]))
        for message in self.text.remarks(prompts, request.t5_length, request.drop):
            warnings.warn(message, stacklevel=4)  # past two decorators
        latents = self.generate_latents(request)
        if request.output == "latent":
            return latents
        with self.parts.using("vae"):
            return self.decode(latents)

    def generate_latents(self, request: Request) -> Tensor:
        """Encode the image to start from and the texts, then sample: latents (B, C, h, w)."""
        known = None
        if request.pixels is not None:
            with self.parts.using("vae"):
                known = self.encode(request.pixels).expand(request.noise.shape)
        text = self.encode_each(request.texts, request.drop, request.t5_length)
        with self.parts.using("mmdit"):
            return self.sample(request, text, known)

    def encode_each(
        self, texts: list[str], drop: Collection[str], t5_length: int | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Context (M, Dc) and pooled (Dp) of each of several distinct texts."""
        if not drop and t5_length is None and all(text in self.encoded_text for text in texts):
            device = self.parts.device
            encoded = (self.encoded_text[text] for text in texts)
            rows = [(context.to(device), pooled.to(device)) for context, pooled in encoded]
        else:
            rows = list(zip(*self.text.encode(texts, drop, t5_length), strict=True))
        return dict(zip(texts, rows, strict=True))

    def sample(
        self, request: Request, text: dict[str, tuple[Tensor, Tensor]], known: Tensor | None
    ) -> Tensor:
        """Follow the velocity from the noise, or from noised `known` latents, to latents
        (B, C, h, w), a few images at a time."""
        mmdit, device, sampling = self.mmdit, self.parts.device, request.sampling
        dtype = dtype_of(mmdit)
        solver_dtype = torch.promote_types(dtype, torch.float32)
        times, noise = request.times.to(device), request.noise

        def model(z: Tensor, t: Tensor, *texts: Tensor, skip: Collection[int] = ()) -> Tensor:
            return mmdit(z.to(dtype), t, *texts, skip=skip).to(solver_dtype)

        text = {t: (context.to(dtype), pooled.to(dtype)) for t, (context, pooled) in text.items()}
        length = len(next(iter(text.values()))[0])
        size = latents_at_once(self.config.mmdit, noise[0, 0].numel(), length)
        batches = torch.arange(len(noise)).split(size)
        bar = tqdm(
            total=len(batches) * (len(times) - 1), desc="sampling", disable=not request.progress
        )

        def watch(step: int, t: Tensor, z: Tensor, x0: Tensor) -> None:
            bar.update(step > 0)  # a step is done when the next begins
            if request.callback:
                request.callback(step, t.clone(), z.clone(), x0.clone())

        results, sampler = [], ALL_SAMPLERS[sampling.sampler]
        with bar:  # closed after errors, too, which would leave its line to the next one
            for rows in batches:
                prompts = [request.prompts[i] for i in rows]
                prompt = negative = rows_of(text, prompts)
                if sampling.guidance != 1:
                    negative = rows_of(text, [request.negative] * len(prompts))
                velocity = guided(model, prompt, negative, sampling.guidance, request.skip)
                z = eps = noise[rows].to(device, solver_dtype)
                if known is not None:
                    x0 = known[rows].to(eps)
                    z = interpolate(x0, eps, times[0])
                    if request.mask is not None:
                        mask = request.mask.to(eps)
                        if sampler is consistency:
                            velocity = inpainting_afresh(velocity, mask, x0)
                        else:
                            velocity = inpainting(velocity, mask, x0, eps)
                more = {"noise": eps} if sampler is consistency else {}
                results.append(sampler(velocity, z, times, watch, **more))
                bar.update()
        return finite(torch.cat(results), "the latents")


def images_at_once(config: VAEConfig, pixels: int) -> int:
    """How many images of this many pixels the autoencoder processes at once."""
    return at_once(pixels * config.channels[0])


def latents_at_once(config: MMDiTConfig, size: int, text_tokens: int) -> int:
    """How many latents with `size` numbers per channel the transformer processes at once."""
    return at_once((size // config.patch_size**2 + text_tokens) * 4 * config.width)


def open_pipeline(
    checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype | None, staged: bool
) -> Pipeline:
    """A Pipeline from a checkpoint; see `open_networks`."""
    kind = dtype or torch.float32
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize > 1):
        raise InputError(f"dtype must be a type such as torch.bfloat16, got {shown(dtype)}")
    networks = open_networks(checkpoint, device_of(device), dtype, staged)
    return Pipeline(checkpoint.config, checkpoint.tokenizers, networks)


def finite(x: Tensor, what: str) -> Tensor:
    """x itself. Raises InputError if it holds NaN or infinity, which would be drawn black."""
    if not x.isfinite().all():
        raise InputError(
            f"{what}: not finite, the activations are too large for this type (float16?); "
            "try bfloat16 or float32, and less guidance"
        )
    return x


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
