"""The assembled model: prompts in, images out.

    prompts --three encoders--> context, pooled
    noise   --solver, guided velocity--> latents --denormalise, decode--> images

`Pipeline.load("runs/mnist")` opens a finished run; calling it gives uint8 images. Image i of a
call starts from noise that depends on the seed and on i alone, not on the prompts, the number
of images or the device.
"""

import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanosd3.checkpoint import Run, load_weights, read_json
from nanosd3.config import Config, config_from_dict
from nanosd3.data import to_uint8
from nanosd3.flow import schedule
from nanosd3.mmdit import MMDiT
from nanosd3.runtime import InputError, rng
from nanosd3.samplers import SAMPLERS, Callback, guided
from nanosd3.text import TextEncoders, Tokenizers
from nanosd3.vae import AutoencoderKL

BATCH = 250  # images sampled at once; more would only need more memory


class Pipeline:
    """Text encoders, MMDiT and autoencoder of one config."""

    def __init__(self, config: Config, text: TextEncoders, mmdit: MMDiT, vae: AutoencoderKL):
        self.config = config
        self.text = text.eval()
        self.mmdit = mmdit.eval()
        self.vae = vae.eval()

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Pipeline":
        """The model of a finished run. Raises InputError if it is missing, unfinished, damaged."""
        run = Run.read(Path(folder))
        config = finished_config(run)
        path = run.folder / "tokenizers.json"
        try:
            tokenizers = Tokenizers.from_json(read_json(path))
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        pipeline = cls(
            config,
            TextEncoders(config.text, tokenizers),
            MMDiT(config.mmdit),
            AutoencoderKL(config.vae),
        )
        parts = {"text": pipeline.text, "flow": pipeline.mmdit, "autoencoder": pipeline.vae}
        for name, module in parts.items():
            load_weights(module, run.folder / f"{name}.safetensors")
            module.to(device)
        return pipeline

    def encode_text(self, prompts: list[str], drop: Collection[str] = ()) -> tuple[Tensor, Tensor]:
        """Context (B, M, Dc) and pooled (B, Dp); equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        context, pooled = self.text.encode(distinct, drop)
        index = torch.tensor([distinct.index(p) for p in prompts], device=context.device)
        return context[index], pooled[index]

    def remarks(self, prompts: list[str]) -> list[str]:
        """What the user should know about the prompts."""
        remarks = []
        if unknown := self.text.tokenizers.unknown_words(prompts):
            words = ", ".join(map(repr, unknown))
            remarks.append(f"unknown to this model, which has seen no such word: {words}")
        remarks += [
            f"too long, cut at the end: {p!r}"
            for p in self.text.truncated(list(dict.fromkeys(prompts)))
        ]
        return remarks

    def noise(self, first: int, count: int, seed: int) -> Tensor:
        """Noise (count, C, h, w) of images first, first + 1, ..."""
        config = self.config
        side = config.image_size // config.vae.factor
        shape = (config.mmdit.latent_channels, side, side)
        return torch.stack([
            torch.randn(shape, generator=rng(seed, "noise", i)) for i in range(first, first + count)
        ])  # fmt: skip

    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents (B, C, h, w) to images uint8 (B, H, W) or (B, H, W, C)."""
        x = self.vae.decode(self.vae.denormalise(latents))
        cut = self.config.padding
        return to_uint8(x[:, :, cut : x.shape[2] - cut, cut : x.shape[3] - cut]).cpu().numpy()

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | list[str],
        *,
        negative: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        drop: Collection[str] = (),
        output: str = "image",
        callback: Callback | None = None,
        progress: bool = False,
    ) -> np.ndarray | Tensor:
        """One image for each prompt: uint8 (B, H, W), or (B, H, W, C) in colour; with
        output="latent" the normalised latents (B, C, h, w) instead.

        What is None follows the config. `callback` sees every step of every batch of images;
        `progress` shows a bar. Warns of words no caption had, and of prompts that are cut.
        Raises InputError for values that make no sense.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        default = self.config.sampling
        steps = default.steps if steps is None else steps
        guidance = default.guidance if guidance is None else guidance
        shift = default.shift if shift is None else shift
        sampler = default.sampler if sampler is None else sampler
        check_options(prompts, negative, steps, guidance, shift, sampler, output)
        for message in self.remarks([*prompts, negative]):
            warnings.warn(message, stacklevel=3)  # past no_grad's wrapper
        device = self.mmdit.pos_embed.device
        ts = schedule(steps, shift).to(device)
        if not (ts.diff() < 0).all():
            raise InputError(f"shift {shift} leaves no room between {steps} steps")
        results = []
        for first in tqdm(range(0, len(prompts), BATCH), "sampling", disable=not progress):
            batch = prompts[first : first + BATCH]
            with_prompt = self.encode_text(batch, drop)
            without = self.encode_text([negative] * len(batch), drop)
            velocity = guided(self.mmdit, with_prompt, without, guidance)
            z = self.noise(first, len(batch), seed).to(device)
            results.append(SAMPLERS[sampler](velocity, z, ts, callback))
        if output == "latent":
            return torch.cat(results)
        images = [self.decode(z) for z in results]
        return np.concatenate(images)


def finished_config(run: Run) -> Config:
    """The config of a run with its measured latents. Raises InputError if it is unfinished."""
    config = config_from_dict(run.identity["config"], run.folder / "run.json")
    for stage in ("autoencoder", "clip", "t5", "flow"):
        if stage not in run.stages:
            raise InputError(f"{run.folder}: unfinished (no {stage} yet); go on with the command "
                             f"that began it, `python train_mnist.py --config {config.name} "
                             f"--out {run.folder} ...`")  # fmt: skip
    try:
        measured = run.stages["autoencoder"]
        vae = replace(config.vae, shift=measured["shift"], scale=measured["scale"])
    except (KeyError, TypeError):
        raise InputError(f"{run.folder / 'run.json'}: damaged: no shift and scale") from None
    return replace(config, vae=vae)


def check_options(
    prompts: list[str],
    negative: str,
    steps: int,
    guidance: float,
    shift: float,
    sampler: str,
    output: str,
) -> None:
    """Raises InputError for any value that makes no sense."""
    if not prompts:
        raise InputError("no prompts given")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if not 0 <= guidance < float("inf"):
        raise InputError(f"guidance must be a number from 0 up, got {guidance}")
    if not 0 < shift < float("inf"):
        raise InputError(f"shift must be a number above 0, got {shift}")
    if output not in ("image", "latent"):
        raise InputError(f"output must be image or latent, got {output!r}")
    if sampler not in SAMPLERS:
        raise InputError(f"no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    if negative and guidance == 1:
        raise InputError("a negative prompt has no effect at guidance 1, which is no guidance")
