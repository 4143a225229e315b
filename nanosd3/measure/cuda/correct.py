"""Are the answers right on a GPU? The same weights and inputs there and on a CPU.

The reference is the CPU in float64 for small networks and in float32 for large ones. Errors are
|difference| / |reference|. Limits are a few times the rounding error at that depth; a wrong layout,
scale or mask gives errors a hundred times larger.
"""

import copy
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanosd3.components import COMPONENTS
from nanosd3.config import CONFIGS
from nanosd3.config_types import Config, Recipe
from nanosd3.flow import flow_loss, interpolate
from nanosd3.lazy_modules import LazyModules
from nanosd3.machine.distributed import CPU, Compute, ParallelModel, ProcessGroup
from nanosd3.machine.signals import Interrupted
from nanosd3.measure.cuda.result import Check, Row, Setting, Unavailable, at_most, relative_error
from nanosd3.measure.random_models import (
    forward_pass,
    random_inputs,
    random_model,
    text_tokens,
    with_layers,
)
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.random_streams import rng
from nanosd3.samplers import SAMPLERS
from nanosd3.storage.run import Run
from nanosd3.text import Tokenizers
from nanosd3.training.ema import make_ema
from nanosd3.training.loop import StepLoss, StepRNG, fit

SMALL_CONFIGS = ("tiny", "mnist")
TRAINING_STEPS = 12
INTERRUPTED_AT = 5  # step
TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def networks(
    setting: Setting, config: Config, reference: torch.dtype, limits: dict[torch.dtype, float]
) -> Iterator[Row]:
    """The error of each part of a model on the device, for each dtype in `limits`."""
    for part in COMPONENTS:
        model = setting.random_model(config, part, torch.float32).cpu()
        size = setting.image_size(config.image_size)
        inputs = random_inputs(config, part, size, 2, like=torch.zeros(()))
        exact = output(model, part, inputs, CPU, reference)
        for dtype, limit in limits.items():
            error = relative_error(output(model, part, inputs, setting.device, dtype), exact)
            yield at_most(f"{config.name}: {part}, {TYPE_NAMES[dtype]}", error, limit)


@torch.no_grad()
def output(
    module: torch.nn.Module,
    part: str,
    inputs: tuple[Tensor, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The output of a copy of the module with this device and dtype. Time stays float32."""
    module = copy.deepcopy(module).to(device, dtype)

    def move(i: int, x: Tensor) -> Tensor:
        is_time = part == "mmdit" and i == 1
        return x.to(device, dtype if x.is_floating_point() and not is_time else None)

    return forward_pass(module, part, tuple(move(i, x) for i, x in enumerate(inputs)))()


def small_networks(setting: Setting) -> Iterator[Row]:
    """Small networks against float64 on the CPU."""
    limits = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
    for name in SMALL_CONFIGS:
        yield from networks(setting, CONFIGS[name], torch.float64, limits)


def full_networks(setting: Setting) -> Iterator[Row]:
    """sd3-medium, depth 24, against float32 on the CPU; text encoders of 4 layers, 256x256."""
    config = setting.model("sd3-medium")
    if setting.full:
        setting.require_memory(20)
        config = with_layers(config, 4)
    limits = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
    yield from networks(setting, config, torch.float32, limits)


def random_pipeline(config: Config, device: torch.device) -> Pipeline:
    """A complete model with random weights, the same on every device."""
    parts = {name: random_model(config, name, CPU, torch.float32).to(device) for name in COMPONENTS}
    tokenizers = Tokenizers.train(["a photo of a cat", "the digit 3"], config.text)
    return Pipeline(config, tokenizers, LazyModules(parts, device))


def samplers(setting: Setting) -> Iterator[Row]:
    """Equal seeds give equal noise, and every sampler ends at the latents of the CPU."""
    pipelines = [random_pipeline(CONFIGS["tiny"], device) for device in (CPU, setting.device)]
    for name in SAMPLERS:
        starts: list[Tensor] = []
        ends: list[Tensor] = []
        for pipeline in pipelines:

            def record(
                step: int, t: Tensor, z: Tensor, x0: Tensor, starts: list[Tensor] = starts
            ) -> None:
                if step == 0:
                    starts.append(z.cpu())

            latents = pipeline(
                ["a cat", "3"], sampler=name, steps=6, seed=5, output="latent", callback=record
            )
            assert isinstance(latents, Tensor)
            ends.append(latents)
        if name == "euler":
            different = (starts[0] != starts[1]).sum().item()
            yield at_most("values of the initial noise that differ", different, 0)
        yield at_most(f"{name}: latents, float32", relative_error(ends[1], ends[0]), 1e-4)


def picture(setting: Setting) -> Iterator[Row]:
    """Images of a finished mnist run, on the device and on the CPU."""
    run = setting.run or setting.folder / "mnist"
    if not (run / "metrics.json").exists():
        raise Unavailable(f"no finished run in {run} (see --run)")
    prompts = [f"the digit {digit}" for digit in range(10)]
    images = [
        np.asarray(Pipeline.load(run, device)(prompts, seed=3)).astype(int)
        for device in (CPU, setting.device)
    ]
    largest = abs(images[0] - images[1]).max().item()
    yield at_most("largest difference of a pixel", largest, 2, "levels of 255")


# --- training -----------------------------------------------------------------------------------


def noise_loss(
    config: Config, network: torch.nn.Module, device: torch.device, batch: int
) -> StepLoss:
    """The flow matching loss with noise in place of latents and text."""
    mmdit, tokens = config.mmdit, text_tokens(config)
    side = config.image_size // config.vae.factor

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator = step_rng.generator()
        x0 = step_rng.noise((mmdit.latent_channels, side, side)).to(device)
        noise = step_rng.take(torch.randn(batch, *x0.shape[1:], generator=generator)).to(device)
        t = step_rng.take(torch.rand(batch, generator=generator)).to(device)
        context = step_rng.take(torch.randn(batch, tokens, mmdit.context_dim, generator=generator))
        pooled = step_rng.take(torch.randn(batch, mmdit.pooled_dim, generator=generator))
        velocity = network(interpolate(x0, noise, t), t, context.to(device), pooled.to(device))
        return flow_loss(velocity, x0, noise), {}

    return loss_of


ShortTraining = tuple[list[float], dict[str, Tensor]]  # losses and averaged weights


def short_training(
    setting: Setting,
    folder: Path,
    interrupt_at: int = -1,
    group: ProcessGroup | None = None,
    compute: Compute | None = None,
) -> ShortTraining:
    """Train the tiny network for some steps, resuming from the state in `folder` if there is one;
    return losses and averaged weights. SIGINT, as from Ctrl-C, is raised at step `interrupt_at`."""
    config = CONFIGS["tiny"]
    recipe = Recipe(TRAINING_STEPS, batch=16, lr=2e-3, warmup=2, weight_decay=0.0)
    if not (folder / "run.json").exists():
        folder.mkdir(exist_ok=True)
        Run(folder, {"config": {}}, {}).write()
    run = Run.read(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng("weights").initial_seed())
        model = MMDiT(config.mmdit).to(setting.device)
    ema = make_ema(model)
    group = group or ProcessGroup(device=setting.device)
    network = ParallelModel(model, group, compute or Compute(), list(model.joint_blocks))

    def watch(step: int) -> None:
        if step == interrupt_at:
            signal.raise_signal(signal.SIGINT)

    loss_of = noise_loss(config, network, setting.device, recipe.batch)
    fit(run, "flow", model, loss_of, recipe, 0, ema, 0.99, watch, network)
    losses = [entry["loss"] for entry in run.read_log("flow")]
    weights = {name: p.detach() for name, p in ema.named_parameters()}
    return losses, weights


def interrupted_training(setting: Setting, folder: Path) -> ShortTraining:
    """The same training, interrupted and resumed."""
    try:
        short_training(setting, folder, interrupt_at=INTERRUPTED_AT)
    except Interrupted:
        return short_training(setting, folder)
    raise AssertionError("the training was not interrupted")


def largest_change(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of a loss."""
    return max(abs(a - b) / a for a, b in zip(losses, others, strict=True))


@contextmanager
def deterministic() -> Iterator[None]:
    """Make PyTorch use deterministic algorithms, or raise an error where it has none."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def resume(setting: Setting) -> Iterator[Row]:
    """A float32 training run that is interrupted and resumed, against one that is not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with deterministic():
            losses, weights = short_training(setting, folder / "whole")
            resumed, others = interrupted_training(setting, folder / "parts")
        different = sum((weights[k] != others[k]).sum().item() for k in weights)
        yield at_most("deterministic algorithms: weights that differ", different, 0)
        different = sum(a != b for a, b in zip(losses, resumed, strict=True))
        yield at_most("deterministic algorithms: losses that differ", different, 0)
        losses, _ = short_training(setting, folder / "default")
        resumed, _ = interrupted_training(setting, folder / "default parts")
        worst = largest_change(losses, resumed)
        yield at_most("default algorithms: largest difference of a loss", worst, 1e-4)


def parallel(setting: Setting) -> Iterator[Row]:
    """DDP and FSDP2 with a single process, and bfloat16, against plain training."""
    with tempfile.TemporaryDirectory() as name:
        folder, device = Path(name), setting.device
        plain, _ = short_training(setting, folder / "plain")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        try:
            for mode in ("ddp", "fsdp"):
                group = ProcessGroup(0, 1, mode, device)
                losses, _ = short_training(setting, folder / mode, group=group)
                worst = largest_change(plain, losses)
                yield at_most(f"{mode}: largest difference of a loss", worst, 1e-4)
        finally:
            dist.destroy_process_group()
        losses, _ = short_training(setting, folder / "bfloat16", compute=Compute("bfloat16"))
        worst = largest_change(plain, losses)
        yield at_most("bfloat16: largest difference of a loss", worst, 0.02)


CORRECTNESS = (
    Check("small-networks", small_networks, 40),
    Check("samplers", samplers, 30),
    Check("full-networks", full_networks, 90),
    Check("picture", picture, 30),
    Check("parallel", parallel, 40),
    # Without this variable cuBLAS has no deterministic mode.
    Check("resume", resume, 40, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
)
