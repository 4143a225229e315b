"""Muses of several seeds, trained as their command does: what the experiments on Muse share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, once
from nanosd3.config_types import Recipe
from nanosd3.related.autoregressive import CausalMuse
from nanosd3.related.command import Study, parse, study_in
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.related.muse import Conditioning, cosine_share
from nanosd3.related.muse_editing import MusePipeline
from nanosd3.related.muse_system import MUSE_STAGE, MuseSystem, trained_muse_pipeline
from nanosd3.related.train_muse import train_causal
from nanosd3.training.stages import Job

CAUSAL = "causal"  # stage
SHORT_STEPS = 600  # of the transformer: three seeds in the time that an experiment may take
MUSE_TRAINED = (
    f"A Muse of the digits, trained as by `python -m nanosd3.related muse --steps {SHORT_STEPS}`"
)


@dataclass(frozen=True)
class TrainedMuse:
    """A Muse, and the seconds of a core that its two stages took."""

    finished: FinishedRun
    pipeline: MusePipeline
    token_seconds: float
    seconds: float


@once
def opened(run: Path) -> FinishedRun:
    """A finished main job, opened once."""
    return open_finished_run(run, None, torch.device("cpu"))


@once
def encoded_captions(run: Path) -> Conditioning:
    """The encodings of its captions."""
    finished = opened(run)
    return finished.pipeline.text.encode(finished.source.texts)


def with_recipes(job: Job, **recipes: Any) -> Job:
    """The job with other recipes for some of its stages."""
    training = replace(job.training, **recipes)
    return replace(job, config=replace(job.config, training=training))


def in_steps(recipe: Recipe, steps: int, size: str) -> Recipe:
    """A recipe with this many steps, a tenth of them for warm-up; the tiny one is short already."""
    return recipe if size == "tiny" else replace(recipe, steps=steps, warmup=steps // 10)


@contextmanager
def muse_study(conditions: Conditions, seed: int, steps: int | None) -> Iterator[Study]:
    """What the Muse of a seed is trained with, and where."""
    words = ["--run", str(conditions.run), "--seed", str(seed)]
    words += ["--config", "tiny"] if conditions.fast else []
    words += ["--steps", str(steps)] if steps and not conditions.fast else []
    system = MuseSystem()
    args = parse(system, words)
    folder = conditions.networks / f"muse-{steps or 'all'}-{seed}"
    finished = opened(conditions.run)
    with torch.enable_grad(), study_in(folder, system, args, finished) as study:
        assert study is not None
        yield study


def trained_muse(
    conditions: Conditions,
    seed: int,
    steps: int | None = None,
    share_of: Callable[[Tensor], Tensor] = cosine_share,
    stage: str = MUSE_STAGE,
) -> TrainedMuse:
    """The Muse of a seed, trained now or before; with other shares of hidden tokens, in stages of
    their own, on the same tokens."""
    print(f"{stage}, seed {seed}", flush=True)
    with muse_study(conditions, seed, steps) as study:
        pipeline = trained_muse_pipeline(study, share_of, stage)
        stages = study.job.run.stages
    seconds = (stages[name]["thread_seconds"] for name in ("tokens", stage))
    return TrainedMuse(opened(conditions.run), pipeline, *seconds)


def trained_causal(
    conditions: Conditions, seed: int, steps: int, trained: TrainedMuse
) -> tuple[CausalMuse, float]:
    """A transformer as large as the Muse that writes the same tokens one after the other, trained
    for as many steps, and the seconds of a core that it took."""
    print(f"{CAUSAL}, seed {seed}", flush=True)
    texts, muse = encoded_captions(conditions.run), trained.pipeline.muse
    with muse_study(conditions, seed, steps) as study:
        job, vq = study.job, trained.pipeline.vq
        causal = train_causal(job, study.finished.source, vq, texts, muse.config, CAUSAL)
        return causal, job.run.stages[CAUSAL]["thread_seconds"]
