"""Muses of several seeds, trained as by their command: what the experiments on Muse share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.related.command import parse, study_in
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.related.muse import cosine_share
from nanosd3.related.muse_editing import TokenPainter
from nanosd3.related.train_muse import MUSE_STAGE, MuseSystem, trained_painter

SHORT_STEPS = 600  # of the transformer: three seeds in the time that an experiment may take
MUSE_TRAINED = (
    f"A Muse of the digits, trained as by `python -m nanosd3.related muse --steps {SHORT_STEPS}`"
)


@dataclass(frozen=True)
class TrainedMuse:
    """A Muse, and how long its two stages were trained."""

    finished: FinishedRun
    painter: TokenPainter
    token_seconds: float
    seconds: float


@cache
def opened(run: Path) -> FinishedRun:
    """A finished main job, opened once."""
    return open_finished_run(run, None, torch.device("cpu"))


def trained_muse(
    conditions: Conditions,
    seed: int,
    steps: int | None = None,
    share_of: Callable[[Tensor], Tensor] = cosine_share,
    stage: str = MUSE_STAGE,
) -> TrainedMuse:
    """The Muse of a seed, trained now or before; with other shares of hidden tokens, in stages of
    their own, on the same tokens."""
    finished = opened(conditions.run)
    words = ["--run", str(conditions.run), "--seed", str(seed)]
    words += ["--config", "tiny"] if conditions.fast else []
    words += ["--steps", str(steps)] if steps and not conditions.fast else []
    system = MuseSystem()
    args = parse(system, words)
    folder = (
        conditions.out / "networks" / f"muse-{'fast-' * conditions.fast}{steps or 'all'}-{seed}"
    )
    print(f"{stage}, seed {seed}", flush=True)
    with torch.enable_grad(), study_in(folder, system, args, finished) as study:
        assert study is not None
        painter = trained_painter(study, share_of, stage)
        stages = study.job.run.stages
    return TrainedMuse(finished, painter, stages["tokens"]["seconds"], stages[stage]["seconds"])
