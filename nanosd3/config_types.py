"""The fields of a config: sizes of the networks, sampling defaults, training recipes.

The classes have no default dimensions; a config gives them all (config.py). `config_from_dict`
reads a config that was written as JSON, naming the first field that does not fit.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from nanosd3.errors import InputError, shown


@dataclass(frozen=True)
class MMDiTConfig:
    """The velocity network. Width is 64 x depth, with `depth` heads of 64."""

    depth: int
    latent_channels: int
    patch_size: int
    context_dim: int  # features of a text token
    pooled_dim: int  # features of the pooled text vector
    grid: int  # side of the stored position buffer, in patches
    grid_sample: int  # side of the images trained on, in patches
    grid_span: int  # the positions of that side run from 0 up to this
    qk_norm: bool
    dual_attention: tuple[int, ...]  # blocks with a second, image-only attention

    @property
    def width(self) -> int:
        return 64 * self.depth


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder."""

    image_channels: int
    channels: tuple[int, ...]  # width at each resolution, finest first
    blocks: int  # residual blocks a level in the encoder; the decoder has one more
    latent_channels: int
    norm_groups: int
    shift: float  # mean of the latents
    scale: float  # 1 / their standard deviation

    @property
    def factor(self) -> int:
        """How many times smaller than the image the latents are, in height and in width."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class CLIPConfig:
    width: int
    layers: int
    heads: int
    activation: str  # "quick_gelu" or "gelu"
    vocab: int  # the last id is the end-of-text token
    length: int  # tokens, padded or truncated to it
    projection: bool  # multiply the pooled vector by a learned matrix
    pad: int  # id that fills up to `length`; -1: the end-of-text token


@dataclass(frozen=True)
class T5Config:
    width: int
    layers: int
    heads: int
    head_dim: int
    hidden: int  # of the gated MLP
    vocab: int
    length: int  # tokens, padded or truncated to it: part of the model's input definition


@dataclass(frozen=True)
class TextConfig:
    clip_l: CLIPConfig
    clip_g: CLIPConfig
    t5: T5Config
    empty_is_zero: bool  # encode "" as zeros, the input seen when all encoders were dropped


@dataclass(frozen=True)
class Sampling:
    """What `Pipeline` does unless told otherwise."""

    steps: int
    guidance: float
    shift: float
    sampler: str


@dataclass(frozen=True)
class Recipe:
    """One training stage: linear warm-up, then decay."""

    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    decay: str = "cosine"  # to a hundredth, or "constant"
    optimizer: str = "adamw"  # or "muon", for the transformer


@dataclass(frozen=True)
class Training:
    """Training from scratch on a small image set."""

    train_images: int  # the first so many of each set are used
    test_images: int
    judge: Recipe
    autoencoder: Recipe
    clip: Recipe
    t5: Recipe
    flow: Recipe
    kl_weight: float  # of the KL term, both losses summed over an image
    time_mean: float  # logit-normal density of the timesteps
    time_std: float
    encoder_dropout: float  # each text encoder zeroed independently (paper, appendix B.3)
    ema_decay: float  # warmed up as (1 + step) / (10 + step)
    evaluate: int  # prompted samples for the metrics


@dataclass(frozen=True)
class Config:
    name: str
    image_size: int  # pixels, trained at
    padding: int  # pixels of background added on each side for the model, and cut off again
    mmdit: MMDiTConfig
    vae: VAEConfig
    text: TextConfig
    sampling: Sampling
    training: Training | None  # None: `trainable` has a recipe for it


def config_from_dict(content: object, path: Path) -> Config:
    """The config that `dataclasses.asdict` turned into `content`, read from the file `path`.

    Raises InputError naming the file and the first field that is missing, unknown or invalid.
    Fields with a default may be missing: files from earlier versions lack them.
    """

    def build(kind: type, value: object, name: str) -> object:
        if isinstance(kind, types.UnionType):  # Training | None
            return None if value is None else build(typing.get_args(kind)[0], value, name)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise InputError(f"{path}: {name} should be an object")
            fields = typing.get_type_hints(kind)
            given = {f.name: f.default for f in dataclasses.fields(kind)}
            value = {n: x for n, x in given.items() if x is not dataclasses.MISSING} | value
            for wrong in sorted(set(fields) ^ set(value)):
                state = "is missing" if wrong in fields else "is unknown"
                raise InputError(f"{path}: {name}.{ascii(wrong)[1:-1][:60]} {state}")
            return kind(**{f: build(t, value[f], f"{name}.{f}") for f, t in fields.items()})
        if typing.get_origin(kind) is tuple:
            kind, value = tuple, tuple(value) if isinstance(value, list) else value
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind:
            raise InputError(
                f"{path}: {name} should be of type {kind.__name__}, got {shown(value)}"
            )
        return value

    return typing.cast(Config, build(Config, content, "config"))
