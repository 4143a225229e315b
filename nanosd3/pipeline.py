"""The assembled model: prompts in, images out.

    prompts --three encoders--> context, pooled
    noise   --solver, guided velocity--> latents --denormalise, decode--> images

`Pipeline.load("runs/mnist")` opens a finished run, `nanosd3.weights.load(PATH)` official weights;
calling it gives uint8 images. The three steps follow each other for all prompts of a call, so
that of a large model only the parts at work need to be in memory (parts.py). Image i of a call
starts from noise that depends on the seed and on i alone, not on the prompts, the number of
images or the device.

*Image to image*: start not from noise but from a noisy picture, so late that its layout is kept.
*Repainting*: the same with a mask; outside it the picture is known at every t.
"""

import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanosd3.accelerate import accelerate
from nanosd3.checkpoint import Run, load_weights, read_json
from nanosd3.config import Config, config_from_dict
from nanosd3.data import to_uint8
from nanosd3.flow import interpolate
from nanosd3.mmdit import MMDiT
from nanosd3.options import (
    SKIP_SCALE,
    Request,
    check_noise,
    checked,
    known_image,
    latent_size,
    skip_of,
    strength_of,
    times,
)
from nanosd3.parts import Parts
from nanosd3.runtime import InputError, rng
from nanosd3.samplers import SAMPLERS, Callback, Skip, guided, inpainting
from nanosd3.text import ENCODERS, TextEncoders, Tokenizers, make_encoders
from nanosd3.vae import AutoencoderKL

ACTIVATIONS = 2**26  # numbers in the widest activation of the transformer or decoder, at most
BATCH = 250  # images at once, at most


class Known(Protocol):
    """Context (M, Dc) and pooled (Dp) of texts that were encoded before, in a dictionary's way."""

    def __contains__(self, text: str) -> bool: ...
    def __getitem__(self, text: str) -> tuple[Tensor, Tensor]: ...


class Pipeline:
    """Tokenizers and the networks of one config: clip_l, clip_g, t5, mmdit and vae."""

    def __init__(self, config: Config, tokenizers: Tokenizers, parts: Parts):
        self.config = config
        self.parts = parts
        widths = (config.mmdit.context_dim, config.mmdit.pooled_dim)
        self.text = TextEncoders(config.text, tokenizers, parts, *widths)
        self.known: Known = {}
        for module in parts.ready.values():
            accelerate(module.eval())

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Pipeline":
        """The model of a finished run. Raises InputError if it is missing, unfinished, damaged."""
        run, device = Run.read(Path(folder)), torch.device(device)
        config = finished_config(run)
        if "weights" in run.identity:
            raise InputError(f"{folder}: its encoders are those of {run.identity['weights']}; open "
                             "it with nanosd3.weights.load")  # fmt: skip
        modules = {
            "text": make_encoders(config.text),
            "flow": MMDiT(config.mmdit),
            "autoencoder": AutoencoderKL(config.vae),
        }
        for name, module in modules.items():
            load_weights(module, run.folder / f"{name}.safetensors")
            module.requires_grad_(False).to(device)
        parts = {**modules["text"], "mmdit": modules["flow"], "vae": modules["autoencoder"]}
        return cls(config, read_tokenizers(run.folder / "tokenizers.json"), Parts(parts, device))

    @property
    def mmdit(self) -> MMDiT:
        return self.parts["mmdit"]

    @property
    def vae(self) -> AutoencoderKL:
        return self.parts["vae"]

    def encode_text(
        self,
        prompts: str | list[str],
        drop: Collection[str] = (),
        t5_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context (B, M, Dc) and pooled (B, Dp); equal prompts are encoded once.

        Raises InputError if a CLIP is absent and not dropped; an absent T5 is warned of.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for message in self.absent(drop):
            warnings.warn(message, stacklevel=2)
        return rows_of(self.encode_each(list(dict.fromkeys(prompts)), drop, t5_length), prompts)

    def absent(self, drop: Collection[str]) -> list[str]:
        """What to say of encoders that are not there. Raises InputError for a CLIP."""
        names = [name for name in ENCODERS if name not in self.parts and name not in drop]
        for name in names:
            if name != "t5":
                raise InputError(f"{name} is absent; name its file (--{name.replace('_', '-')}), "
                                 f"or leave it out knowingly (--drop {name})")  # fmt: skip
        return ["t5 is absent; zeros stand for its tokens, as when it was dropped in training"
                for _ in names]  # fmt: skip

    def remarks(self, request: Request) -> list[str]:
        """What the user should know about the prompts. Raises InputError if a CLIP is absent."""
        remarks = self.absent(request.drop)
        prompts = list(dict.fromkeys([*request.prompts, request.negative]))
        if unknown := self.text.tokenizers.unknown_words(prompts):
            words = ", ".join(map(repr, unknown))
            remarks.append(f"unknown to this model, which has seen no such word: {words}")
        return remarks + self.text.truncated(prompts, request.t5_length, request.drop)

    def noise(self, count: int, seed: int, size: tuple[int, int]) -> Tensor:
        """Noise (count, C, h, w); each image has a stream of its own."""
        shape = (self.config.mmdit.latent_channels, *size)
        return torch.stack([
            torch.randn(shape, generator=rng(seed, "noise", i)) for i in range(count)
        ])  # fmt: skip

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, C, h, w) of the encoder's Gaussian for padded images, in [-1, 1],
        not normalised."""
        mean, logvar = self.vae.encode(x.to(self.parts.device, dtype_of(self.vae)))
        return mean, (0.5 * logvar).exp()

    def encode(self, pixels: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [-1, 1] to normalised latents (B, C, h, w): the mean of
        the encoder's Gaussian, so that the same image gives the same latents."""
        padded = F.pad(pixels, (self.config.padding,) * 4, value=-1.0)
        size = at_once(pixels[0, 0].numel() * self.config.vae.channels[0])
        return self.vae.normalise(torch.cat([self.posterior(x)[0] for x in padded.split(size)]))

    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents (B, C, h, w) to images uint8 (B, H, W) or (B, H, W, C)."""
        vae, cut = self.vae, self.config.padding
        pixels = latents[0, 0].numel() * self.config.vae.factor**2
        images = []
        for z in latents.split(at_once(pixels * self.config.vae.channels[0])):
            x = finite(vae.decode(vae.denormalise(z.to(dtype_of(vae)))), "the decoded image")
            images.append(to_uint8(x[:, :, cut : x.shape[2] - cut, cut : x.shape[3] - cut]).cpu())
        return torch.cat(images).numpy()

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | list[str],
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
        drop: Collection[str] = (),
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

        What is None follows the config. Sizes are in pixels. `noise` (B, C, h, w) replaces the
        seeded draw. `image`, one for all or one for each prompt: uint8 (H, W[, C]) or a Pillow
        image, noised to the share `strength` of the way (0.6, or 1 with a mask) and sampled from
        there; `mask`, bool or uint8 (H, W), marks what is repainted. `skip_layers` are left out
        in skip-layer guidance. `callback` sees every step of every batch of images; `progress`
        shows a bar. Warns of words no caption had, and of prompts that are cut. Raises
        InputError for values that make no sense.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = self.config
        given = {"steps": steps, "guidance": guidance, "shift": shift, "sampler": sampler}
        how = replace(config.sampling, **{k: v for k, v in given.items() if v is not None})
        request = checked(Request(prompts, negative, how, drop, t5_length), output)
        pixels, mask, height, width = known_image(config, image, mask, height, width, len(prompts))
        ts = times(request.how, strength_of(strength, pixels, mask))
        skip = skip_of(skip_layers, skip_scale, ts, config.mmdit.depth)
        size = latent_size(config, height, width)
        shape = (len(prompts), config.mmdit.latent_channels, *size)
        noise = self.noise(len(prompts), seed, size) if noise is None else check_noise(noise, shape)
        for message in self.remarks(request):
            warnings.warn(message, stacklevel=3)  # past no_grad's wrapper

        known = None
        if pixels is not None:
            known = self.encode(pixels).expand(shape)
            self.parts.release("vae")
        text = self.encode_each(request.texts, drop, t5_length)
        latents = self.sample(request, text, ts, noise, known, mask, skip, callback, progress)
        self.parts.release("mmdit")
        if output == "latent":
            return latents
        images = self.decode(latents)
        self.parts.release("vae")
        return images

    def encode_each(
        self, texts: list[str], drop: Collection[str], t5_length: int | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Context (M, Dc) and pooled (Dp) of each of some different texts."""
        if not drop and t5_length is None and all(text in self.known for text in texts):
            device = self.parts.device
            return {t: tuple(x.to(device) for x in self.known[t]) for t in texts}
        encoded = self.text.encode(texts, drop, t5_length)
        return dict(zip(texts, zip(*encoded, strict=True), strict=True))

    def sample(
        self,
        request: Request,
        text: dict[str, tuple[Tensor, Tensor]],
        ts: Tensor,
        noise: Tensor,
        known: Tensor | None,
        mask: Tensor | None,
        skip: Skip | None,
        callback: Callback | None,
        progress: bool,
    ) -> Tensor:
        """Latents (B, C, h, w): noise, or `known` latents noised, followed along `ts`."""
        mmdit, device = self.mmdit, self.parts.device
        dtype = dtype_of(mmdit)
        exact = torch.promote_types(dtype, torch.float32)  # the solver's own numbers
        ts, how = ts.to(device), request.how

        def model(z: Tensor, t: Tensor, *texts: Tensor, skip: Collection[int] = ()) -> Tensor:
            return mmdit(z.to(dtype), t, *texts, skip=skip).to(exact)

        text = {t: (context.to(dtype), pooled.to(dtype)) for t, (context, pooled) in text.items()}
        patches = noise[0, 0].numel() // self.config.mmdit.patch_size**2
        tokens = patches + len(next(iter(text.values()))[0])
        rows = torch.arange(len(noise)).split(at_once(tokens * 4 * self.config.mmdit.width))
        bar = tqdm(total=len(rows) * (len(ts) - 1), desc="sampling", disable=not progress)

        def watch(step: int, t: Tensor, z: Tensor, x0: Tensor) -> None:
            bar.update(step > 0)  # a step is done when the next begins
            if callback:
                callback(step, t, z, x0)

        results = []
        for row in rows:
            batch = [request.prompts[i] for i in row]
            prompt = negative = rows_of(text, batch)
            if how.guidance != 1:
                negative = rows_of(text, [request.negative] * len(batch))
            velocity = guided(model, prompt, negative, how.guidance, skip)
            z = eps = noise[row].to(device, exact)
            if known is not None:
                x0 = known[row].to(eps)
                z = interpolate(x0, eps, ts[0])
                if mask is not None:
                    velocity = inpainting(velocity, mask.to(eps), x0, eps)
            results.append(SAMPLERS[how.sampler](velocity, z, ts, watch))
            bar.update()
        bar.close()
        return finite(torch.cat(results), "the latents")


def rows_of(text: dict[str, tuple[Tensor, Tensor]], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Context (B, M, Dc) and pooled (B, Dp) of prompts that are encoded already."""
    context, pooled = zip(*(text[prompt] for prompt in prompts), strict=True)
    return torch.stack(context), torch.stack(pooled)


def finite(x: Tensor, what: str) -> Tensor:
    """x. Raises InputError if it holds NaN or infinity, which would be painted black."""
    if not x.isfinite().all():
        raise InputError(f"{what}: not finite, the activations are too large for this type "
                         "(float16?); try bfloat16 or float32, and less guidance")  # fmt: skip
    return x


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def at_once(numbers: int) -> int:
    """How many images to compute at once, of so many numbers in the widest activation each."""
    return min(BATCH, max(1, ACTIVATIONS // numbers))


def read_tokenizers(path: Path) -> Tokenizers:
    try:
        return Tokenizers.from_json(read_json(path))
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def finished_config(run: Run, unfinished: bool = False) -> Config:
    """The config of a run with its measured latents. Raises InputError if a stage is not finished;
    the flow may be `unfinished`."""
    config = config_from_dict(run.identity["config"], run.folder / "run.json")
    own = () if "weights" in run.identity else ("autoencoder", "clip", "t5")
    for stage in own if unfinished else (*own, "flow"):
        if stage not in run.stages:
            raise InputError(f"{run.folder}: unfinished (no {stage} yet); go on with the command "
                             f"that began it, `python train_mnist.py --config {config.name} "
                             f"--out {run.folder} ...`")  # fmt: skip
    if not own:
        return config
    try:
        measured = run.stages["autoencoder"]
        vae = replace(config.vae, shift=measured["shift"], scale=measured["scale"])
    except (KeyError, TypeError):
        raise InputError(f"{run.folder / 'run.json'}: damaged: no shift and scale") from None
    return replace(config, vae=vae)
