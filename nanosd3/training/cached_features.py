"""Latents of all images and features of all captions, computed once and cached on disk.

The encoders are frozen while the transformer trains, so their output for an image or a caption
never changes. It is written to shards (storage/shards.py) and read from there row by row through
memory maps; the encoders need not stay in memory. Cache keys are derived from content: an image
that changes is encoded again, and outputs of different encoders are never mixed.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanosd3.config_types import Config
from nanosd3.data.sources import Source, caption_key
from nanosd3.lazy_modules import LazyModules
from nanosd3.machine.distributed import ProcessGroup
from nanosd3.pipeline import Pipeline, images_at_once
from nanosd3.storage.files import discard
from nanosd3.storage.shards import Shards, fill_shards
from nanosd3.text import ENCODERS
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job

CAPTION_BATCH = 64  # captions encoded at a time
SHARD = 4096  # rows in a shard, at most
SHARD_BYTES = 2**28  # of a shard, roughly: it is in memory twice while it is written


@dataclass(frozen=True)
class Encoders:
    """What a source is encoded with."""

    config: Config  # its vae has the `shift` and `scale` that normalise the latents
    name: str  # a cache key: encoders with different weights have different names
    open: Callable[[], Pipeline]  # without a transformer; weights are read when first used


class Features:
    """The cached encoder outputs for a source's images and captions, and for some prompts.

    Also a mapping from text to (context, pooled), as `Pipeline.encoded_text` expects.
    """

    def __init__(self, folder: Path, source: Source, encoders: Encoders):
        name = hashlib.sha256(encoders.name.encode()).hexdigest()[:16]
        self.folder, self.source, self.encoders = folder / name, source, encoders
        self.latent_rows = Shards(self.folder / "latents")
        self.text_rows = Shards(self.folder / "text")

    def latents(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation (B, C, h, w) of images of one size, given by index
        in the source; not normalised."""
        rows = self.latent_rows.rows([self.source.key(i) for i in index.tolist()])
        return rows["mean"].float(), rows["std"].float()

    def normalise(self, z: Tensor) -> Tensor:
        """Normalise latents as the autoencoder does, without opening it."""
        vae = self.encoders.config.vae
        return (z - vae.shift) * vae.scale

    def latents_and_noise(self, index: Tensor, step_rng: StepRNG) -> tuple[Tensor, Tensor]:
        """What a training step starts from: normalised latents x0 (B, C, h, w) of images of one
        size, drawn from their posteriors, and noise of the same shape."""
        mean, std = self.latents(index)
        noise, posterior = step_rng.noise((2, *mean.shape[1:])).unbind(1)
        return self.normalise(mean + std * posterior), noise

    def text(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, M, Dc) and pooled (B, Dp) of captions, by their index in `source.texts`."""
        keys = [caption_key(self.source.texts[i]) for i in captions.tolist()]
        rows = self.text_rows.rows(keys)
        return rows["context"].float(), rows["pooled"].float()

    def __contains__(self, text: str) -> bool:
        return not self.text_rows.missing([caption_key(text)])

    def __getitem__(self, text: str) -> tuple[Tensor, Tensor]:
        """Context (M, Dc) and pooled (Dp) of a text that is in the cache."""
        rows = self.text_rows.rows([caption_key(text)])
        return rows["context"][0].float(), rows["pooled"][0].float()

    @cached_property
    def opened(self) -> Pipeline:
        """The encoders, opened once for all pipelines."""
        return self.encoders.open()

    def pipeline(self, mmdit: nn.Module, device: torch.device) -> Pipeline:
        """The full model with this transformer. It takes cached texts from here, so they need no
        text encoder. The autoencoder is read once and shared by all such pipelines."""
        encoders = self.opened
        sources = encoders.parts.sources() | {"mmdit": mmdit, "vae": lambda: encoders.vae}
        parts = LazyModules(sources, device, staged=True)
        pipeline = Pipeline(self.encoders.config, encoders.text.tokenizers, parts)
        pipeline.encoded_text = self
        return pipeline

    def forget(self) -> None:
        """Delete the whole cache, including the outputs of other encoders."""
        self.latent_rows.close()
        self.text_rows.close()
        discard(self.folder.parent)


def encoded(
    folder: Path,
    source: Source,
    encoders: Encoders,
    prompts: list[str],
    group: ProcessGroup,
    images: bool = True,
) -> Features:
    """The features of a source and some prompts; the main process computes what is missing (of the
    texts only, unless `images`)."""
    if group.is_main:
        fill_cache(Features(folder, source, encoders), [*prompts, ""], images)
    group.barrier()
    return Features(folder, source, encoders)


def fill_cache(features: Features, prompts: list[str], images: bool) -> None:
    """Compute and store what is missing. The encoders are opened only if anything is."""
    source = features.source
    texts = {caption_key(text): text for text in (*source.texts, *prompts)}
    sizes = source.groups(range(source.count)) if images else []
    groups = [{source.key(i): i for i in group.tolist()} for group in sizes]
    images_missing = any(features.latent_rows.missing(list(numbers)) for numbers in groups)
    if not images_missing and not features.text_rows.missing(list(texts)):
        return
    pipeline = features.encoders.open()
    if long := pipeline.text.truncated(source.texts):
        print(f"text: {len(long)} of {len(source.texts)} captions are truncated; one is {long[0]}")

    def encode_images(numbers: dict[str, int], pixels: int, keys: list[str]) -> dict[str, Tensor]:
        index = torch.tensor([numbers[key] for key in keys])
        size = images_at_once(pipeline.config.vae, pixels)
        parts = (pipeline.posterior(source.pixels(batch)) for batch in index.split(size))
        return collected(("mean", "std"), ((m.half(), s.half()) for m, s in parts))

    def encode_texts(keys: list[str]) -> dict[str, Tensor]:
        captions = [texts[key] for key in keys]
        starts = range(0, len(captions), CAPTION_BATCH)
        parts = (pipeline.text.encode(captions[i : i + CAPTION_BATCH]) for i in starts)
        return collected(("context", "pooled"), parts)

    rows = rows_in_shard(text_bytes(features.encoders.config))
    fill_shards(features.text_rows, list(texts), encode_texts, rows, "captions")
    for name in ENCODERS:  # done: images are encoded without them in memory
        pipeline.parts.free(name)
    for numbers in groups:
        one = torch.tensor([next(iter(numbers.values()))])
        pixels = source.pixels(one)[0, 0].numel()
        rows = rows_in_shard(latent_bytes(features.encoders.config, pixels))
        encode = partial(encode_images, numbers, pixels)
        fill_shards(features.latent_rows, list(numbers), encode, rows, "images")


def collected(names: tuple[str, str], parts: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Two tensors of rows, computed part by part; each part moves to the CPU at once."""
    on_cpu = [(a.cpu(), b.cpu()) for a, b in parts]
    a, b = (torch.cat(rows) for rows in zip(*on_cpu, strict=True))
    return dict(zip(names, (a, b), strict=True))


def text_bytes(config: Config) -> int:
    """Size of a text's row, if it is in float32."""
    tokens = config.text.clip_l.length + config.text.t5.length
    return 4 * (tokens * config.mmdit.context_dim + config.mmdit.pooled_dim)


def latent_bytes(config: Config, pixels: int) -> int:
    """Size of an image's row: mean and deviation, in float16."""
    return 2 * 2 * config.vae.latent_channels * pixels // config.vae.factor**2


def rows_in_shard(row_bytes: int) -> int:
    return min(SHARD, max(1, SHARD_BYTES // row_bytes))


def get_features(job: Job, encoders: Encoders, prompts: list[str], images: bool = True) -> Features:
    """The features of the job's images and captions and of `prompts`, computed where missing;
    without `images`, only those of texts."""
    return encoded(job.run.folder / "cache", job.source, encoders, prompts, job.group, images)


def end_job(job: Job, features: Features) -> None:
    """Mark the job as finished, then delete its cache: if deleting fails, the job still counts as
    done."""
    job.run.finish("samples", {})
    features.forget()
