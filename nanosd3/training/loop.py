"""The training loop shared by all stages.

A stage supplies a module and a function that returns the losses of part of a step's batch. `fit`
does the rest: the optimizers, warm-up and decay of the learning rate, gradients accumulated over
microbatches and averaged over ranks, clipping, EMA, the log, a progress bar, checkpoints. Ctrl-C
and SIGTERM stop it after the current step, with a checkpoint saved.

Resuming is exact because no hidden state is carried from step to step. Everything random in a step
(which images, noise, timesteps) comes from generators named after the step, and everything else
that changes (weights, optimizer moments, EMA) is in the checkpoint. On CPU, with the same number of
threads and ranks, an interrupted and resumed run has the same losses and weights, bit for bit, as
an uninterrupted one. With another number of ranks it agrees up to rounding.

A step with a non-finite loss or gradient is skipped: weights and EMA stay as they are, and the log
counts it. After a few in a row the run stops and reports where the first non-finite number arose.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanosd3.config_types import Recipe
from nanosd3.machine.distributed import ParallelModel, gather_full
from nanosd3.machine.signals import Interrupted, interruptible
from nanosd3.random_streams import rng
from nanosd3.storage import training_state
from nanosd3.storage.run import Run
from nanosd3.training.ema import update_ema
from nanosd3.training.not_finite import PATIENCE, first_not_finite, not_finite_error
from nanosd3.training.optimizer import CLIP_NORM, learning_rate, make_optimizers

SAVE_EVERY = 500  # steps between saved states, the most a crash can lose (Ctrl-C loses nothing)


@dataclass(frozen=True)
class StepRNG:
    """The random numbers of one training step, for some rows of its batch (a microbatch).

    All streams are named after the step (random_streams.py), so a row gets the same numbers
    whichever rank computes it, in whatever microbatch, before or after a resume. There are two
    kinds of draw:

        cheap, a few values per row (indices, timesteps, dropout): draw them for the whole batch
            from `generator()`, then keep this microbatch's rows with `take`
        expensive (the noise of the latents): `noise` draws this microbatch's rows only
    """

    name: tuple[int | str, ...]  # seed, stage, step
    rows: range  # of the batch

    def generator(self) -> torch.Generator:
        """A new generator for the whole batch, in the same state on every rank."""
        return rng(*self.name)

    def take(self, batch: Tensor) -> Tensor:
        """This microbatch's rows of a tensor drawn for the whole batch."""
        return batch[self.rows.start : self.rows.stop]

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Gaussian noise (rows, *shape) for this microbatch, from one stream per row."""
        return torch.stack([torch.randn(*shape, generator=rng(*self.name, i)) for i in self.rows])


# Returns the loss of each row of the microbatch (rows,) or their mean (), and values to log.
StepLoss = Callable[[StepRNG], tuple[Tensor, dict]]


def progress(steps: range, label: str, total: int, shown: bool = True) -> tqdm:
    """A progress bar over `steps`, refreshed rarely when stderr is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10
    options = {"leave": False, "mininterval": interval, "disable": not shown}
    return tqdm(steps, label, total, initial=steps.start, **options)


def state_tensors(
    module: nn.Module, optimizers: list[torch.optim.Optimizer], ema: nn.Module | None
) -> dict[str, Tensor]:
    """Every tensor that training changes, by name: the content of a checkpoint."""
    tensors = {}
    moments = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    for name, parameter in module.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, moment in moments.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = moment
    for name, parameter in ema.named_parameters() if ema else ():
        tensors[f"{training_state.AVERAGE}{name}"] = parameter.detach()
    return tensors


def microbatches(parallel: ParallelModel, name: tuple[int | str, ...], batch: int) -> list[StepRNG]:
    """The random numbers of this process's microbatches of a step."""
    rows = parallel.group.microbatches(batch, parallel.compute.accumulate)
    return [StepRNG(name, microbatch) for microbatch in rows]


def gradients(
    parallel: ParallelModel, loss_of: StepLoss, name: tuple[int | str, ...], batch: int
) -> tuple[float, dict]:
    """Accumulate one step's gradients; return its mean loss over the batch, and values to log."""
    group, parts = parallel.group, microbatches(parallel, name, batch)
    computed = []
    for i, part in enumerate(parts):
        with parallel.syncing_gradients(i == len(parts) - 1):
            losses, extra = loss_of(part)
            # Gradients are summed over microbatches but averaged over ranks.
            (losses.mean() * (len(part.rows) * group.size / batch)).backward()
        computed.append(losses.detach().reshape(-1))
    return group.all_gather(torch.cat(computed)).mean().item(), extra


def fit(
    run: Run,
    stage: str,
    module: nn.Module,
    loss_of: StepLoss,
    recipe: Recipe,
    seed: int,
    ema: nn.Module | None = None,
    ema_decay: float = 0.0,
    watch: Callable[[int], None] | None = None,
    parallel: ParallelModel | None = None,
) -> None:
    """Train `module` in place by `recipe`, resuming from the checkpoint of `stage` if there is one.

    `parallel` wraps `module` to run it on several ranks or in another precision; by default it runs
    in this process, in float32. `watch(step)` is called after every step, on every rank. Raises
    Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved; InputError if the checkpoint does
    not fit the module or the loss stays non-finite.
    """
    parallel = parallel or ParallelModel(module)
    group, optimizers = parallel.group, make_optimizers(module, recipe)
    tensors = state_tensors(module, optimizers, ema)
    param_groups = [g for optimizer in optimizers for g in optimizer.param_groups]
    trained = [p for param_group in param_groups for p in param_group["params"]]
    start, skipped = restore(run, stage, tensors, parallel)
    module.zero_grad()  # gradients of whatever the caller did before
    steps = range(start, recipe.steps)
    with interruptible() as stopped, progress(steps, stage, recipe.steps, group.is_main) as bar:
        for step in bar:
            for param_group in param_groups:
                param_group["lr"] = param_group["lr_scale"] * learning_rate(step, recipe)
            name = (seed, stage, step)
            loss, extra = gradients(parallel, loss_of, name, recipe.batch)
            norm = float(gather_full(nn.utils.clip_grad_norm_(trained, CLIP_NORM)))
            if math.isfinite(norm + loss):
                skipped, entry = 0, {"loss": loss, "grad_norm": norm, **extra}
                for optimizer in optimizers:
                    optimizer.step()
                if ema:
                    update_ema(ema, module, step, ema_decay)
            else:
                skipped, entry = skipped + 1, {"skipped": skipped + 1}
            if group.is_main:
                run.log(stage=stage, step=step, **entry)
            if skipped == min(PATIENCE, recipe.steps):
                reruns = [partial(loss_of, m) for m in microbatches(parallel, name, recipe.batch)]
                raise not_finite_error(stage, step, skipped, first_not_finite(module, reruns))
            module.zero_grad()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if watch:
                watch(step)
            signum = group.all_reduce_max(stopped())
            if signum or (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
                training_state.save_state(
                    run.folder, stage, step + 1, tensors, group, skipped=skipped
                )
            if signum:
                done = f"{stage}: stopped after step {step + 1} of {recipe.steps}"
                raise Interrupted(f"{done}; rerun the same command to resume", signum)
    report_skipped(run, stage)


def report_skipped(run: Run, stage: str) -> None:
    """Print how many steps of `stage` were skipped, if any."""
    count = sum("skipped" in entry for entry in run.read_log() if entry["stage"] == stage)
    if count:
        print(f"  {stage}: {count} steps skipped (non-finite loss or gradient)")


def restore(
    run: Run, stage: str, tensors: dict[str, Tensor], parallel: ParallelModel
) -> tuple[int, int]:
    """Load the checkpoint of `stage` into `tensors`, if there is one.

    Returns the step to resume from (0 without a checkpoint) and how many steps in a row were
    skipped just before it.
    """
    numbers = training_state.load_state(run.folder, stage, tensors, parallel.group)
    step, skipped = (int(numbers[key]) for key in ("step", "skipped")) if numbers else (0, 0)
    if numbers:
        print(f"  resuming from step {step}")
    if parallel.group.is_main:
        if not numbers:  # left by a finished stage that was killed before deleting them
            training_state.forget(run.folder)
        run.rewind_log(stage, step)
    parallel.group.barrier()
    return step, skipped
