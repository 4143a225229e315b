"""Backbones, trained briefly in the main job's latents, with the pooled text and without it.

Captions name a digit, often its stroke and its slant. The pooled text has all of that in one vector
that modulates every block, so backbones are compared without it: then they depend on the tokens.
All have one head of width 64 and the same images, captions, noise and recipe, except for the
learning rate: each has the better of two.
"""

from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import network_job
from nanosd3.claims.sd3_variants import VARIANT_AVERAGE, TrainedVariant, train_variant
from nanosd3.config_types import MMDiTConfig, Recipe
from nanosd3.mmdit import MMDiT
from nanosd3.related.backbones import BACKBONES, BackboneConfig
from nanosd3.related.finished_run import FinishedRun
from nanosd3.training.cached_features import Features
from nanosd3.training.stages import build, training_of

BACKBONE_RECIPE = Recipe(steps=250, batch=64, lr=1e-2, warmup=25, weight_decay=0.0)
FAST_BACKBONE = replace(BACKBONE_RECIPE, steps=2, batch=8, warmup=0)
# The better of 4e-3 and 1e-2, by the validation loss after half the steps with another seed.
BACKBONE_RATES = {
    "mmdit": 1e-2,
    "cross": 1e-2,
    "uvit": 1e-2,
    "dit": 1e-2,
}


@dataclass(frozen=True)
class BackboneArm:
    """A backbone to compare."""

    kind: str  # of BACKBONES
    depth: int = 2

    @property
    def lr(self) -> float:
        return BACKBONE_RATES[self.kind.rstrip("3")]

    def config(self, config: MMDiTConfig, clip_tokens: int) -> BackboneConfig:
        """Its sizes, otherwise those of the main job's transformer."""
        sizes = asdict(config) | {"depth": self.depth, "dual_attention": ()}
        return BackboneConfig(**sizes, heads=1, clip_tokens=clip_tokens)


class ZeroEmbedder(nn.Module):
    """In place of an embedder: zeros, whatever the input."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.dim)


def make_backbone(arm: BackboneArm, config: BackboneConfig, pooled: bool) -> MMDiT:
    """A fresh network; without `pooled` the pooled text has no effect."""
    model = BACKBONES[arm.kind](config)
    if not pooled:
        model.register_module("y_embedder", ZeroEmbedder(config.width))
    return model


def trained_backbone(
    conditions: Conditions,
    finished: FinishedRun,
    features: Features,
    arm: BackboneArm,
    pooled: bool,
    seed: int,
) -> TrainedVariant:
    """The network of an arm and a seed, trained now or before."""
    recipe = replace(FAST_BACKBONE if conditions.fast else BACKBONE_RECIPE, lr=arm.lr)
    training = replace(training_of(finished.config), flow=recipe, ema_decay=VARIANT_AVERAGE)
    sizes = arm.config(finished.config.mmdit, finished.config.text.clip_l.length)
    config = replace(finished.config, training=training, mmdit=sizes)
    name = f"{arm.kind}-{arm.depth}-{'pooled' if pooled else 'tokens'}"
    job = network_job(conditions, finished, name, config, seed, backbone=arm.kind, pooled=pooled)
    model = build(job, "flow", lambda: make_backbone(arm, sizes, pooled))
    with job.run.alone():
        if "flow" not in job.run.stages:
            print(f"{name}, seed {seed}", flush=True)
        train_variant(job, features, model, recipe)
    return TrainedVariant(model, job, features)
