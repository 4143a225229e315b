"""The training loop, once, for every stage.

A stage brings a module and a function that gives the losses of some rows of a step's batch; `fit`
does the rest: AdamW, warm-up and decay, gradients accumulated over parts and averaged over
processes, clipping, EMA, log, progress bar, resume; Ctrl-C and SIGTERM stop it between two steps,
with everything saved.

Resuming is exact because nothing hidden is carried from step to step: what a step draws (its
images, noise, timesteps) comes from generators named after the step, and everything else (weights,
optimizer, EMA) is in the saved state. On CPU, with the same number of threads and processes, a run
interrupted and continued gives the same losses and weights, bit for bit, as one that was not. With
another number of processes it gives the same but for rounding.

A step whose loss or gradient is not finite is skipped, weights and averages untouched, and counted;
after a few in a row the run stops and says where the first such number arose.
"""

import copy
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanosd3 import states
from nanosd3.checkpoint import Run
from nanosd3.config import Recipe
from nanosd3.parallel import Placed, local, whole
from nanosd3.runtime import InputError, rng

SAVE_EVERY = 500  # steps; a crash loses no more than these (Ctrl-C loses nothing)
CLIP_NORM = 1.0  # largest gradient norm; longer ones are shortened to it
DECAYS = ("cosine", "constant")
PATIENCE = 3  # steps in a row that are not finite, at which a run is given up


@dataclass(frozen=True)
class Draw:
    """A step's random numbers, and the rows of its batch that are wanted of them."""

    name: tuple[int | str, ...]  # seed, stage, step
    rows: range

    def generator(self) -> torch.Generator:
        """What the whole step is drawn from, by every process alike."""
        return rng(*self.name)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Gaussian noise (rows, *shape). Each row has a stream of its own, so that nobody draws the
        noise of the others, which is most of a batch's numbers."""
        return torch.stack([torch.randn(*shape, generator=rng(*self.name, i)) for i in self.rows])

    def of(self, batch: Tensor) -> Tensor:
        """The wanted rows of what was drawn for the batch."""
        return batch[self.rows.start : self.rows.stop]


# To the losses (rows,) of the wanted rows, or the loss () of them all, and numbers for the log.
StepLoss = Callable[[Draw], tuple[Tensor, dict]]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the state of the unfinished stage was saved. SIGTERM is how a
    cluster asks for its machines back: to have obeyed is success, exit status 0."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.status = 0 if signum == signal.SIGTERM else 130


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """While open, Ctrl-C and SIGTERM only raise a flag, which is asked between two steps: the
    number of the signal, or 0. A second Ctrl-C stops at once. (Signals reach the main thread
    alone; elsewhere nothing changes.)"""
    stop = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def handler(signum: int, frame: object) -> None:
        nonlocal stop
        if stop:
            raise KeyboardInterrupt
        stop = signum

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stop
    finally:
        for signum, handler_before in before.items():
            signal.signal(signum, handler_before)


@contextmanager
def obeying() -> Iterator[None]:
    """While open, SIGTERM stops the program as Ctrl-C does, but as a success: between the stages'
    steps, where `interruptible` does not save a state, what is finished is on the disk."""

    def handler(signum: int, frame: object) -> None:
        raise Interrupted("stopped; the same command goes on from there", signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(steps: range, label: str, total: int, shown: bool = True) -> tqdm:
    """A progress bar; written rarely where nobody watches it live."""
    how = {"leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 10, "disable": not shown}
    return tqdm(steps, label, total, initial=steps.start, **how)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant, or half a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.decay == "constant":
        return recipe.lr
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_ema(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """ema = d ema + (1 - d) weights, d = min(decay, (1 + step) / (10 + step)).

    Without that warm-up a short run's average would still be mostly its initial weights:
    0.9999 ^ 3000 = 0.74.
    """
    d = min(decay, (1 + step) / (10 + step))
    averages, weights = ([local(p) for p in m.parameters()] for m in (ema, module))
    torch._foreach_lerp_(averages, weights, 1 - d)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: not for biases, norms and other vectors."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, its moments made at once: all that a state has to hold is there from the start."""
    groups = decay_groups(module, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def held(
    module: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> dict[str, Tensor]:
    """All tensors that change in training, by name: what a state consists of."""
    tensors = {}
    for name, parameter in module.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, moment in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = moment
    for name, parameter in ema.named_parameters() if ema else ():
        tensors[f"{states.AVERAGE}{name}"] = parameter.detach()
    return tensors


def gradients(
    placed: Placed, loss_of: StepLoss, name: tuple[int | str, ...], batch: int
) -> tuple[float, dict]:
    """Put the gradients of a step in place; the mean loss of its batch, and numbers for the log."""
    team, shares = placed.team, placed.team.shares(batch, placed.compute.accumulate)
    seen = []
    for i, rows in enumerate(shares):
        with placed.exchanging(i == len(shares) - 1):
            losses, extra = loss_of(Draw(name, rows))
            (losses.mean() * (len(rows) * team.size / batch)).backward()
        seen.append(losses.detach().reshape(-1))
    return team.gathered(torch.cat(seen)).mean().item(), extra


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
    placed: Placed | None = None,
) -> None:
    """Train `module` in place by `recipe`, from the saved state of `stage` if there is one.

    `placed` says how it is computed and by whom, if not plainly by this process. `watch(step)` is
    called after every step. Raises Interrupted after Ctrl-C, with the state saved; InputError if
    the state does not fit the module or the loss is not finite.
    """
    placed = placed or Placed(module)
    team, optimizer = placed.team, make_optimizer(module, recipe)
    tensors = held(module, optimizer, ema)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    start, skipped = restore(run, stage, tensors, placed)
    with interruptible() as stopped:
        bar = progress(range(start, recipe.steps), stage, recipe.steps, team.leads)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            name = (seed, stage, step)
            loss, extra = gradients(placed, loss_of, name, recipe.batch)
            norm = float(whole(nn.utils.clip_grad_norm_(trained, CLIP_NORM)))
            if math.isfinite(norm + loss):
                skipped, entry = 0, {"loss": loss, "grad_norm": norm, **extra}
                optimizer.step()
                if ema:
                    update_ema(ema, module, step, ema_decay)
            else:
                skipped, entry = skipped + 1, {"skipped": skipped + 1}
            if team.leads:
                run.log(stage=stage, step=step, **entry)
            if skipped == PATIENCE:
                where = partial(loss_of, Draw(name, team.shares(recipe.batch)[0]))
                raise given_up(stage, step, first_not_finite(module, where))
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if watch:
                watch(step)
            signum = team.largest(stopped())
            if signum or (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
                states.save(run.folder, stage, step + 1, tensors, team, skipped=skipped)
            if signum:
                done = f"{stage}: stopped after step {step + 1} of {recipe.steps}"
                raise Interrupted(f"{done}; the same command goes on from there", signum)
        bar.close()
    say_skipped(run, stage)


def say_skipped(run: Run, stage: str) -> None:
    count = sum("skipped" in entry for entry in run.read_log() if entry["stage"] == stage)
    if count:
        print(f"  {stage}: {count} steps skipped, whose loss or gradient was not finite")


def given_up(stage: str, step: int, where: str) -> InputError:
    return InputError(f"{stage}: steps {step - PATIENCE + 1} to {step} are not finite, {where}; "
                      "the saved state is sound, a lower lr may help")  # fmt: skip


def first_not_finite(module: nn.Module, step: Callable[[], tuple[Tensor, dict]]) -> str:
    """Where in a step the first number arises that is not finite, in words."""
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(part: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if not all(local(x).isfinite().all() for x in tensors if isinstance(x, Tensor)):
                found.append(f"first in the output of {name}")

        return hook

    for name, parameter in module.named_parameters():
        if not local(parameter).isfinite().all():
            return f"the weight {name}"
    hooks = [m.register_forward_hook(look(name)) for name, m in module.named_modules() if name]
    with torch.no_grad():
        losses, _ = step()
    for hook in hooks:
        hook.remove()
    if not found and not losses.isfinite().all():
        return "in the loss"
    in_gradients = [
        f"first in the gradient of {name}"
        for name, parameter in reversed(list(module.named_parameters()))
        if parameter.grad is not None and not local(parameter.grad).isfinite().all()
    ]
    return [*found, *in_gradients, "in the gradient's norm"][0]


def restore(run: Run, stage: str, tensors: dict[str, Tensor], placed: Placed) -> tuple[int, int]:
    """Fill the tensors from the saved state of `stage`; the step to go on from, 0 without one, and
    how many steps before it were skipped in a row."""
    numbers = states.load(run.folder, stage, tensors, placed.team)
    step, skipped = (int(numbers[key]) for key in ("step", "skipped")) if numbers else (0, 0)
    if numbers:
        print(f"  going on from step {step}")
    if placed.team.leads:
        if not numbers:
            states.forget(run.folder)  # those of a finished stage, if it was killed right then
        run.rewind_log(stage, step)
    placed.team.wait()
    return step, skipped
