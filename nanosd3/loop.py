"""The training loop, once, for every stage.

A stage brings a module and a function that gives the loss of one step; `fit` does the rest:
AdamW, warm-up and cosine decay, gradient clipping, EMA, log, progress bar, resume; Ctrl-C and
SIGTERM stop it between two steps, with everything saved.

Resuming is exact because nothing hidden is carried from step to step: what a step draws (its
images, noise, timesteps) comes from a generator named after the step, and everything else
(weights, optimizer, EMA) is in the saved state. On CPU, with the same number of threads, a run
interrupted and continued gives the same losses and weights, bit for bit, as one that was not.

A step whose loss or gradient is not finite is skipped, weights and averages untouched, and counted;
after a few in a row the run stops and says where the first such number arose.
"""

import copy
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanosd3.checkpoint import Run, check_state
from nanosd3.config import Recipe
from nanosd3.runtime import InputError, rng

SAVE_EVERY = 500  # steps; a crash loses no more than these (Ctrl-C loses nothing)
CLIP_NORM = 1.0  # largest gradient norm; longer ones are shortened to it
PATIENCE = 3  # steps in a row that are not finite, at which a run is given up

# From (step, generator) to the loss () and further numbers for the log.
StepLoss = Callable[[int, torch.Generator], tuple[Tensor, dict]]


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


def progress(steps: range, label: str, total: int) -> tqdm:
    """A progress bar; written rarely where nobody watches it live."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(steps, label, total, initial=steps.start, leave=False, mininterval=interval)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
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
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - d)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: not for biases, norms and other vectors."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


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
) -> None:
    """Train `module` in place by `recipe`, from the saved state of `stage` if there is one.

    `watch(step)` is called after every step. Raises Interrupted after Ctrl-C, with the state
    saved; InputError if the state does not fit the module or the loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        decay_groups(module, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.99), fused=True
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    start, skipped = restore(run, stage, module, optimizer, ema)
    run.rewind_log(stage, start)

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"ema": ema.state_dict()} if ema else {}
        run.save_state(stage, step, state | {"skipped": skipped})

    with interruptible() as stopped:
        bar = progress(range(start, recipe.steps), stage, recipe.steps)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            loss, extra = loss_of(step, rng(seed, stage, step))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            if torch.isfinite(norm + loss.detach()):
                skipped = 0
                optimizer.step()
                if ema:
                    update_ema(ema, module, step, ema_decay)
                run.log(stage=stage, step=step, loss=loss.item(), grad_norm=norm.item(), **extra)
            else:
                skipped += 1
                run.log(stage=stage, step=step, skipped=skipped)
                if skipped == PATIENCE:
                    where = first_not_finite(module, partial(loss_of, step, rng(seed, stage, step)))
                    raise InputError(f"{stage}: steps {step - PATIENCE + 1} to {step} are not "
                                     f"finite, {where}; the saved state is sound, a lower lr "
                                     "may help")  # fmt: skip
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if watch:
                watch(step)
            if stopped() or (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
                save(step + 1)
            if stopped():
                done = f"{stage}: stopped after step {step + 1} of {recipe.steps}"
                raise Interrupted(f"{done}; the same command goes on from there", stopped())
        bar.close()
    say_skipped(run, stage)


def say_skipped(run: Run, stage: str) -> None:
    count = sum("skipped" in entry for entry in run.read_log() if entry["stage"] == stage)
    if count:
        print(f"  {stage}: {count} steps skipped, whose loss or gradient was not finite")


def first_not_finite(module: nn.Module, step: Callable[[], tuple[Tensor, dict]]) -> str:
    """Where in a step the first number arises that is not finite, in words."""
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(part: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if not all(x.isfinite().all() for x in tensors if isinstance(x, Tensor)):
                found.append(f"first in the output of {name}")

        return hook

    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    hooks = [m.register_forward_hook(look(name)) for name, m in module.named_modules() if name]
    with torch.no_grad():
        loss, _ = step()
    for hook in hooks:
        hook.remove()
    if not found and not loss.isfinite():
        return "in the loss"
    gradients = [n for n, p in module.named_parameters()
                 if p.grad is not None and not p.grad.isfinite().all()]  # fmt: skip
    return (found + [f"first in the gradient of {name}" for name in gradients[::-1]])[0]


def restore(
    run: Run, stage: str, module: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> tuple[int, int]:
    """Load the saved state of `stage` into all three; the step to go on from, 0 without one, and
    how many steps before it were skipped in a row."""
    saved = run.load_state(stage)
    if saved is None:
        return 0, 0
    path, state = saved
    advice = "delete it to repeat the stage"
    for part, name in ((module, "module"), (ema, "ema")):
        if part is not None:
            if not isinstance(state.get(name), dict):
                raise InputError(f"{path}: no {name} in it; {advice}")
            check_state(path, part.state_dict(), state[name])
            part.load_state_dict(state[name])
    try:
        step, skipped = int(state["step"]), int(state["skipped"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            if moments["exp_avg"].shape != parameter.shape:
                raise ValueError("moments of other shapes")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its optimizer does not fit ({error}); {advice}") from None
    print(f"  going on from step {step}")
    return step, skipped
