"""A training stage: initialised from the seed, trained once, saved, and loaded from then on."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanosd3.config_types import Config, Training
from nanosd3.data.sources import Source
from nanosd3.errors import InputError
from nanosd3.machine.accelerate import accelerate
from nanosd3.machine.distributed import SINGLE_PROCESS, Compute, ProcessGroup
from nanosd3.random_streams import rng
from nanosd3.storage import training_state
from nanosd3.storage.files import Module, load_weights, save_weights
from nanosd3.storage.run import Run
from nanosd3.training.ema import make_ema
from nanosd3.training.loop import StepLoss, fit

CHUNK = 500  # small images per inference batch


def training_of(config: Config) -> Training:
    """The training recipe of a config that has one."""
    assert config.training is not None, f"{config.name}: pass it through `trainable` first"
    return config.training


@dataclass(frozen=True)
class Job:
    """What every stage needs: where to write, what to train on, and how.

    `config` has a training recipe: official configs get theirs from `nanosd3.config.trainable`.
    """

    run: Run
    config: Config
    source: Source
    device: torch.device
    seed: int
    group: ProcessGroup = SINGLE_PROCESS
    compute: Compute = Compute()  # noqa: RUF009 - frozen

    @property
    def training(self) -> Training:
        """The config's training recipe."""
        return training_of(self.config)


def build(job: Job, name: str, make: Callable[[], Module]) -> Module:
    """Make a module whose initial weights depend only on the seed and on `name`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(job.seed, name, "init").initial_seed())
        module = make()
    accelerate(module, keep_activations=job.compute.checkpointing)  # in place
    return module


def finish_or_load(job: Job, stage: str, module: nn.Module, train: Callable[[], dict]) -> dict:
    """Train a stage in the main process and save its weights, or load them if it is finished.

    `train` trains `module` in place and returns the stage's results. Returns those results and
    the seconds spent in this process, as stored in run.json. Leaves `module` frozen.
    """
    path = job.run.folder / f"{stage}.safetensors"
    if stage in job.run.stages:
        load_weights(module, path)
    elif job.group.is_main:
        begin = time.perf_counter()
        results = train()
        save_weights(module, path)
        finish(job, stage, results, begin)
    job.group.barrier()
    if stage not in job.run.stages:  # the main process has just trained it
        job.run.stages = Run.read(job.run.folder).stages
        load_weights(module, path)
    module.requires_grad_(False).eval()
    return job.run.stages[stage]


def fit_average(
    job: Job,
    stage: str,
    module: nn.Module,
    loss_of: StepLoss,
    decay: float,
    watch: Callable[[int, nn.Module], None] | None = None,
    average: nn.Module | None = None,
) -> dict:
    """Train a module by the transformer's recipe, and replace its weights with their moving
    average. Returns the loss, and the CPU seconds since the last resume.

    `watch(step, average)` is called after every step. `average` is a copy of the module to keep the
    average in, if the loss needs it.
    """
    ema, begin = average or make_ema(module), time.process_time()
    after = (lambda step: watch(step, ema)) if watch else None
    fit(job.run, stage, module, loss_of, job.training.flow, job.seed, ema, decay, after)
    module.load_state_dict(ema.state_dict())
    seconds = round(time.process_time() - begin, 1)
    return {"loss": last_loss(job, stage), "thread_seconds": seconds}


def finish(job: Job, stage: str, results: dict, begin: float) -> None:
    """Mark a stage as finished and delete its saved states."""
    job.run.finish(stage, results | {"seconds": round(time.perf_counter() - begin, 1)})
    training_state.forget(job.run.folder)


def last_loss(job: Job, stage: str) -> float:
    """Mean loss over the last tenth of a stage's steps. Raises InputError if none is logged."""
    losses = [entry["loss"] for entry in job.run.read_log(stage)]
    if not losses:
        path = job.run.folder / "log.jsonl"
        raise InputError(f"{path}: has no loss of {stage}; start over with --fresh")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function` to CHUNK rows of `x` at a time and concatenate the results."""
    return torch.cat([function(chunk) for chunk in x.split(CHUNK)])
