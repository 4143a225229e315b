"""Two data sets of digits for the same small transformer: latents, and pixels without a network.

Latents are the finished main job's. Pixels are the digits without their border, halved to 12 x 12,
with mean 0 and deviation 1. Both have 16 patches per image and are read by the same classifier.
"""

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import open_encoded, open_main_run
from nanosd3.config_types import MMDiTConfig
from nanosd3.data.mnist import SIDE
from nanosd3.data.sources import Digits
from nanosd3.random_streams import rng
from nanosd3.related.finished_run import FinishedRun
from nanosd3.training.cached_features import Features
from nanosd3.training.evaluation import Draw, Scorer, draw_prompts, to_digits
from nanosd3.training.loop import StepRNG

EDGE, PATCH_OF_HALVED = 2, 3


def halved(digits: Tensor) -> Tensor:
    """Digits uint8 (n, 28, 28) without their border, (n, 1, 12, 12) between 0 and 1."""
    x = digits[:, None, EDGE:-EDGE, EDGE:-EDGE].float() / 255
    return F.avg_pool2d(x, 2)


def doubled(pixels: Tensor) -> Tensor:
    """Back to digits uint8 (n, 28, 28), a little blurred."""
    x = F.interpolate(255 * pixels, scale_factor=2, mode="bilinear", align_corners=False)
    return F.pad(x, (EDGE,) * 4)[:, 0].round().clamp(0, 255).to(torch.uint8)


class HalvedScorer(Scorer):
    """Compares with real images that were halved as well."""

    @cached_property
    def test(self) -> Tensor:
        return self.features(doubled(halved(self.source.images.test_images)))

    def floor(self, draw: Draw) -> float:
        return self.distance(doubled(halved(self.source.images.train_images[draw.chosen])))


@dataclass(frozen=True, eq=False)
class Latents:
    """The latents of the finished main job's autoencoder."""

    conditions: Conditions
    finished: FinishedRun
    features: Features
    name = "latents"

    @property
    def mmdit(self) -> MMDiTConfig:
        """One block, 16 patches an image."""
        return replace(self.finished.config.mmdit, depth=1, dual_attention=())

    @property
    def scorer(self) -> Scorer:
        return self.finished.scorer

    def x0_and_noise(self, index: Tensor, step_rng: StepRNG) -> tuple[Tensor, Tensor]:
        """What a training step starts from, (B, C, h, w) each."""
        return self.features.latents_and_noise(index, step_rng)

    def to_digits(self, samples: Tensor) -> Tensor:
        """Samples to digits uint8 (B, 28, 28)."""
        return to_digits(torch.from_numpy(self.finished.pipeline.decode(samples)))


@dataclass(frozen=True, eq=False)
class HalvedPixels(Latents):
    """The halved digits."""

    name = "pixels"

    @property
    def mmdit(self) -> MMDiTConfig:
        side = (SIDE // 2 - EDGE) // PATCH_OF_HALVED
        grid = replace(super().mmdit, grid=side, grid_sample=side, grid_span=side)
        return replace(grid, latent_channels=1, patch_size=PATCH_OF_HALVED)

    @cached_property
    def scorer(self) -> Scorer:
        of = self.finished.scorer
        return HalvedScorer(of.source, of.classifier, of.device)

    @cached_property
    def pixels(self) -> Tensor:
        """Of all images."""
        return halved(self.finished.source.all_images)

    @cached_property
    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        return self.pixels.mean(), self.pixels.std()

    def normalised(self, pixels: Tensor) -> Tensor:
        """Halved digits as a network sees them."""
        mean, std = self.mean_and_std
        return (pixels - mean) / std

    def x0_and_noise(self, index: Tensor, step_rng: StepRNG) -> tuple[Tensor, Tensor]:
        x0 = self.normalised(self.pixels[index])
        return x0, step_rng.noise(x0.shape[1:])

    def to_digits(self, samples: Tensor) -> Tensor:
        mean, std = self.mean_and_std
        return doubled(samples * std + mean)


def with_captions(source: Digits, kept: list[bool]) -> Digits:
    """The same images, with those of their captions whose texts are `kept`: as many of each."""
    captions = source.described.captions
    chosen = captions.choices[torch.tensor(kept)[captions.choices]]
    choices = chosen.view(*captions.choices.shape[:3], -1)
    other = copy(source)
    other.described = replace(source.described, captions=replace(captions, choices=choices))
    return other


def open_latents(conditions: Conditions) -> Latents:
    """The latents, encoded once. Raises InputError if there is no finished run."""
    return Latents(conditions, *open_encoded(conditions))


def open_data_sets(conditions: Conditions) -> list[Latents]:
    """Both data sets. Raises InputError if there is no finished run."""
    latents = open_latents(conditions)
    return [latents, HalvedPixels(conditions, latents.finished, latents.features)]


def open_pixel_data(conditions: Conditions) -> HalvedPixels:
    """The pixels alone: nothing is encoded. Raises InputError if there is no finished run."""
    finished = open_main_run(conditions)
    encoders = finished.encoders(finished.config)
    features = Features(conditions.out / "cache", finished.source, encoders)
    return HalvedPixels(conditions, finished, features)


@dataclass(frozen=True)
class SampleInputs:
    """What samples are drawn from, the same for all networks."""

    draw: Draw  # of prompts
    pooled: Tensor  # their text
    noise: Tensor
    floor: float  # Frechet distance of as many real images


def sample_inputs(data: Latents, seed: int, count: int) -> SampleInputs:
    draw, config = draw_prompts(data.finished.source, count, seed), data.mmdit
    pooled = torch.stack([data.features[text][1] for text in draw.prompts])
    shape = config.latent_channels, *(config.grid_sample * config.patch_size,) * 2
    noise = torch.randn(len(draw.prompts), *shape, generator=rng(seed, "samples"))
    return SampleInputs(draw, pooled, noise, data.scorer.floor(draw))


def scores_of_samples(data: Latents, samples: Tensor, inputs: SampleInputs) -> tuple[float, float]:
    """Share of samples classified as prompted; Frechet distance over that of real images."""
    accuracy, distance = data.scorer.score(data.to_digits(samples), inputs.draw)
    return accuracy, distance / inputs.floor
