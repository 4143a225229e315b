"""Latents of all images and features of all captions, computed once and read from the disk.

The encoders are frozen while the transformer trains, so what they say of an image or a caption is
always the same. It is written into shards (shards.py) and read from there, mapped into memory, row
by row; the encoders need not be in memory any more. What is kept under is made of content: an image
that changes is encoded again, and what other encoders said is never mixed in.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanosd3.config import Config
from nanosd3.parallel import Team
from nanosd3.parts import Parts
from nanosd3.pipeline import Pipeline, at_once
from nanosd3.shards import Shards, fill
from nanosd3.sources import Source, caption_key

CAPTIONS = 64  # encoded at once
SHARD = 4096  # rows of a shard, at most


@dataclass(frozen=True)
class Encoders:
    """Text encoders and autoencoder, trained by this run or another model's."""

    config: Config  # with the latents' measured mean and deviation
    name: str  # changes with what they say
    open: Callable[[], Pipeline]  # without a transformer; reads weights when they are needed


class Features:
    """What the encoders say of a source's images and captions, and of some further prompts."""

    def __init__(self, folder: Path, source: Source, encoders: Encoders):
        name = hashlib.sha256(encoders.name.encode()).hexdigest()[:16]
        self.folder, self.source, self.encoders = folder / name, source, encoders
        self.latent_rows = Shards(self.folder / "latents")
        self.text_rows = Shards(self.folder / "text")

    def latents(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, C, h, w) of images of one size, not normalised."""
        rows = self.latent_rows.rows([self.source.key(i) for i in index.tolist()])
        return rows["mean"].float(), rows["std"].float()

    def normalise(self, z: Tensor) -> Tensor:
        """As the autoencoder does, which is not here."""
        vae = self.encoders.config.vae
        return (z - vae.shift) * vae.scale

    def text(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, M, Dc) and pooled (B, Dp) of captions by their place in the source."""
        keys = [caption_key(self.source.texts[i]) for i in captions.tolist()]
        rows = self.text_rows.rows(keys)
        return rows["context"].float(), rows["pooled"].float()

    def __contains__(self, text: str) -> bool:
        return not self.text_rows.missing([caption_key(text)])

    def __getitem__(self, text: str) -> tuple[Tensor, Tensor]:
        """Context (M, Dc) and pooled (Dp) of any text that was encoded."""
        rows = self.text_rows.rows([caption_key(text)])
        return rows["context"][0].float(), rows["pooled"][0].float()

    def pipeline(self, mmdit: nn.Module, device: torch.device) -> Pipeline:
        """The model with this transformer, which asks here for the text it knows, so that of the
        encoders only the autoencoder is opened."""
        opened = self.encoders.open()
        parts = Parts({**opened.parts.sources(), "mmdit": mmdit}, device, staged=True)
        pipeline = Pipeline(self.encoders.config, opened.text.tokenizers, parts)
        pipeline.known = self
        return pipeline

    def forget(self) -> None:
        """Delete all that was computed, by other encoders as well."""
        shutil.rmtree(self.folder.parent)


def encoded(
    folder: Path, source: Source, encoders: Encoders, prompts: list[str], team: Team
) -> Features:
    """The features of a source and some prompts, computed by the first process where missing."""
    if team.leads:
        fill_in(Features(folder, source, encoders), [*prompts, ""])
    team.wait()
    return Features(folder, source, encoders)


def fill_in(features: Features, prompts: list[str]) -> None:
    """Compute what is missing and keep it. The encoders are opened only if anything is."""
    source = features.source
    texts = {caption_key(text): text for text in (*source.texts, *prompts)}
    groups = [{source.key(i): i for i in group.tolist()}
              for group in source.groups(range(source.count))]  # fmt: skip
    wanted = [(features.latent_rows, numbers) for numbers in groups]
    if not any(rows.missing(list(keys)) for rows, keys in [*wanted, (features.text_rows, texts)]):
        return
    pipeline = features.encoders.open()

    def of_images(numbers: dict[str, int], keys: list[str]) -> dict[str, Tensor]:
        index = torch.tensor([numbers[key] for key in keys])
        pixels = source.pixels(index[:1])[0, 0].numel()
        size = at_once(pixels * pipeline.config.vae.channels[0])
        parts = [pipeline.posterior(source.pixels(some)) for some in index.split(size)]
        mean, std = (torch.cat(x).half().cpu() for x in zip(*parts, strict=True))
        return {"mean": mean, "std": std}

    def of_texts(keys: list[str]) -> dict[str, Tensor]:
        parts = [pipeline.text.encode([texts[key] for key in keys[i : i + CAPTIONS]])
                 for i in range(0, len(keys), CAPTIONS)]  # fmt: skip
        context, pooled = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
        return {"context": context, "pooled": pooled}

    fill(features.text_rows, list(texts), of_texts, SHARD, "captions")
    for rows, numbers in wanted:
        fill(rows, list(numbers), partial(of_images, numbers), SHARD, "images")
