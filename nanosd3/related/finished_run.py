"""A finished run of train_mnist.py, as related systems use it: its frozen encoders, its transformer
as a teacher, its images and its classifier."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.config_types import Config
from nanosd3.data.sources import Digits
from nanosd3.official.own_runs import finished_config
from nanosd3.pipeline import Pipeline
from nanosd3.storage.files import sha256, write_file
from nanosd3.storage.run import WEIGHT_FILES, WEIGHTS, Run
from nanosd3.training.cached_features import Encoders
from nanosd3.training.evaluation import Scorer, open_scorer
from nanosd3.training.stages import Job

TEXT_DROPOUT = 0.1  # share of the training samples without text, for guidance


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a related system uses of a finished run."""

    run: Run
    config: Config  # with the measured shift and scale of the latents
    source: Digits
    scorer: Scorer
    pipeline: Pipeline
    device: torch.device
    measured: dict = field(default_factory=dict)  # by scoring.py

    @property
    def fingerprint(self) -> str:
        """A fingerprint of all weights that a system may use."""
        return f"{self.encoders_name}-{sha256(self.run.folder / 'flow.safetensors')}"

    @property
    def encoders_identity(self) -> dict:
        """Where its encoders come from, if it did not train them; the system's are the same."""
        keys = (WEIGHTS, "encoders")
        return {key: self.run.identity[key] for key in keys if key in self.run.identity}

    @property
    def encoders_name(self) -> str:
        """The cache key of its autoencoder and text encoders."""
        if WEIGHTS in self.run.identity:
            return self.run.identity["encoders"]
        files = (self.run.folder / f"{name}.safetensors" for name in ("autoencoder", "text"))
        return "-".join(sha256(file) for file in files)

    def encoders(self, config: Config) -> Encoders:
        """Its autoencoder and text encoders, for a system of this config."""
        config = replace(config, vae=self.config.vae)
        return Encoders(config, self.encoders_name, lambda: self.pipeline)

    def copy_encoders_to(self, job: Job) -> None:
        """Copy its frozen networks into another run, and mark their stages as finished."""
        names = [f"{name}.safetensors" for name in WEIGHT_FILES if name != "flow"]
        for path in (self.run.folder / name for name in (*names, "tokenizers.json")):
            if path.exists():
                write_file(job.run.folder / path.name, path.read_bytes())
        for stage in ("judge", "autoencoder", "clip", "t5"):
            if stage in self.run.stages and stage not in job.run.stages:
                job.run.finish(stage, self.run.stages[stage])


def open_finished_run(folder: Path, data: Path | None, device: torch.device) -> FinishedRun:
    """The run in a folder. Raises InputError if it is not one of train_mnist.py, or unfinished."""
    run = Run.read(folder)
    config = finished_config(run)
    scorer = open_scorer(run, data, device)
    pipeline = Pipeline.load(folder, device)
    return FinishedRun(run, config, scorer.source, scorer, pipeline, device)


def repeated(t: Tensor, batch: int) -> Tensor:
    """Times (n,) repeated for a batch (B,) that holds the same images several times."""
    return t.repeat(batch // len(t))
