"""Is it right on the GPU? The same weights and inputs there and on the CPU.

The CPU's answer in float64 is the reference where the network is small, in float32 where it is
not. Errors are |difference| / |reference|. What float32 and bfloat16 may differ by is a few times
what rounding costs at that depth; a wrong layout, scale or mask costs a hundred times more.
"""

import copy
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanosd3.checkpoint import Run
from nanosd3.config import CONFIGS, Config, Recipe
from nanosd3.flow import flow_loss, interpolate
from nanosd3.layouts import COMPONENTS
from nanosd3.loop import Draw, Interrupted, StepLoss, fit, make_ema
from nanosd3.measure.cuda.result import (
    Check,
    Row,
    Setting,
    Unavailable,
    at_most,
    relative_error,
)
from nanosd3.mmdit import MMDiT
from nanosd3.pairs import forward_of, inputs, randomly_filled, text_tokens, with_layers
from nanosd3.parallel import Compute, Placed, Team
from nanosd3.parts import Parts
from nanosd3.pipeline import Pipeline
from nanosd3.runtime import rng
from nanosd3.samplers import SAMPLERS
from nanosd3.text import Tokenizers

CPU = torch.device("cpu")
SMALL = ("tiny", "mnist")
STEPS = 12  # of the short trainings
STOPPED = 5  # the step after which one of them is interrupted
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def networks(
    setting: Setting, config: Config, reference: torch.dtype, limits: dict[torch.dtype, float]
) -> Iterator[Row]:
    """The error of each part of a model on the device, in each type."""
    for part in COMPONENTS:
        exact = setting.filled(config, part, torch.float32).cpu()
        given = inputs(config, part, setting.pixels(config.image_size), 2, torch.zeros(()))
        expected = answer(exact, part, given, CPU, reference)
        for dtype, limit in limits.items():
            got = answer(exact, part, given, setting.device, dtype)
            yield at_most(f"{config.name}: {part}, {TYPES[dtype]}", relative_error(got, expected),
                          limit)  # fmt: skip


@torch.no_grad()
def answer(
    module: torch.nn.Module,
    part: str,
    given: tuple[Tensor, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """What a copy of the module says on this device and in this type. Time stays float32."""
    module = copy.deepcopy(module).to(device, dtype)

    def moved(i: int, x: Tensor) -> Tensor:
        is_time = part == "mmdit" and i == 1
        return x.to(device, dtype if x.is_floating_point() and not is_time else None)

    return forward_of(module, part, tuple(moved(i, x) for i, x in enumerate(given)), False)()


def small_networks(setting: Setting) -> Iterator[Row]:
    """Small networks against float64 on the CPU."""
    limits = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
    for name in SMALL:
        yield from networks(setting, CONFIGS[name], torch.float64, limits)


def full_networks(setting: Setting) -> Iterator[Row]:
    """sd3-medium, depth 24, against float32 on the CPU; text encoders of 4 layers, 256x256."""
    config = setting.model("sd3-medium")
    if setting.full:
        setting.needs(20)
        config = with_layers(config, 4)
    limits = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
    yield from networks(setting, config, torch.float32, limits)


def random_pipeline(config: Config, device: torch.device) -> Pipeline:
    """A whole model with random weights, the same on every device."""
    parts = {name: randomly_filled(config, name, CPU, torch.float32).to(device)
             for name in COMPONENTS}  # fmt: skip
    tokenizers = Tokenizers.train(["a photo of a cat", "the digit 3"], config.text)
    return Pipeline(config, tokenizers, Parts(parts, device))


def samplers(setting: Setting) -> Iterator[Row]:
    """The same seed draws the same noise, and every sampler ends where it does on the CPU."""
    here, there = (random_pipeline(CONFIGS["tiny"], d) for d in (CPU, setting.device))
    starts: dict[Pipeline, Tensor] = {}
    for name in SAMPLERS:
        ends = []
        for pipeline in (here, there):

            def record(
                step: int, t: Tensor, z: Tensor, x0: Tensor, of: Pipeline = pipeline
            ) -> None:
                if step == 0:
                    starts[of] = z.cpu()

            ends.append(pipeline(["a cat", "3"], sampler=name, steps=6, seed=5, output="latent",
                                 callback=record))  # fmt: skip
        if name == "euler":
            different = (starts[here] != starts[there]).sum().item()
            yield at_most("numbers of the first noise that differ", different, 0)
        yield at_most(f"{name}: latents, float32", relative_error(ends[1], ends[0]), 1e-4)


def picture(setting: Setting) -> Iterator[Row]:
    """Pictures of a finished mnist run, on the device and on the CPU."""
    run = setting.run or setting.folder / "mnist"
    if not (run / "metrics.json").exists():
        raise Unavailable(f"no finished run in {run} (see --run)")
    prompts = [f"the digit {digit}" for digit in range(10)]
    on_cpu, on_device = (Pipeline.load(run, d)(prompts, seed=3).astype(int)
                         for d in (CPU, setting.device))  # fmt: skip
    yield at_most("largest difference of a pixel", abs(on_cpu - on_device).max().item(), 2,
                  "levels of 255")  # fmt: skip


# --- training -----------------------------------------------------------------------------------


def small_flow(
    config: Config, network: torch.nn.Module, device: torch.device, batch: int
) -> StepLoss:
    """The flow's loss on latents and text that are noise."""
    mmdit, tokens = config.mmdit, text_tokens(config)
    side = config.image_size // config.vae.factor

    def loss_of(draw: Draw) -> tuple[Tensor, dict]:
        generator = draw.generator()
        x0 = draw.noise((mmdit.latent_channels, side, side)).to(device)
        noise = draw.of(torch.randn(batch, *x0.shape[1:], generator=generator)).to(device)
        t = draw.of(torch.rand(batch, generator=generator)).to(device)
        context = draw.of(torch.randn(batch, tokens, mmdit.context_dim, generator=generator))
        pooled = draw.of(torch.randn(batch, mmdit.pooled_dim, generator=generator))
        velocity = network(interpolate(x0, noise, t), t, context.to(device), pooled.to(device))
        return flow_loss(velocity, x0, noise), {}

    return loss_of


def train(
    setting: Setting,
    folder: Path,
    stop: int = -1,
    team: Team | None = None,
    compute: Compute | None = None,
) -> tuple[list[float], dict[str, Tensor]]:
    """A short training of the tiny network, from the state in the folder if there is one; its
    losses and its weights. At step `stop` it gets a signal, as from Ctrl-C."""
    config = CONFIGS["tiny"]
    recipe = Recipe(STEPS, batch=16, lr=2e-3, warmup=2, weight_decay=0.0)
    if not (folder / "run.json").exists():
        folder.mkdir(exist_ok=True)
        Run(folder, {"config": {}}, {}).write()
    run = Run.read(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng("weights").initial_seed())
        model = MMDiT(config.mmdit).to(setting.device)
    ema = make_ema(model)
    team = team or Team(device=setting.device)
    network = Placed(model, team, compute or Compute(), model.joint_blocks)

    def watch(step: int) -> None:
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    loss_of = small_flow(config, network, setting.device, recipe.batch)
    fit(run, "flow", model, loss_of, recipe, 0, ema, 0.99, watch, network)
    losses = [entry["loss"] for entry in run.read_log("flow")]
    weights = {name: p.detach() for name, p in ema.named_parameters()}
    return losses, weights


def interrupted(setting: Setting, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The same training, stopped and resumed."""
    try:
        train(setting, folder, stop=STOPPED)
    except Interrupted:
        return train(setting, folder)
    raise AssertionError("the training was not interrupted")


@contextmanager
def deterministic() -> Iterator[None]:
    """While open, PyTorch uses algorithms whose sums have one order, or refuses."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def resume(setting: Setting) -> Iterator[Row]:
    """A training in float32 that is stopped and resumed against one that is not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with deterministic():
            losses, weights = train(setting, folder / "whole")
            resumed, again = interrupted(setting, folder / "parts")
        different = sum((weights[k] != again[k]).sum().item() for k in weights)
        yield at_most("deterministic algorithms: weights that differ", different, 0)
        yield at_most("deterministic algorithms: losses that differ",
                      sum(a != b for a, b in zip(losses, resumed, strict=True)), 0)  # fmt: skip
        losses, _ = train(setting, folder / "default")
        resumed, _ = interrupted(setting, folder / "default parts")
        worst = max(abs(a - b) / a for a, b in zip(losses, resumed, strict=True))
        yield at_most("default algorithms: largest difference of a loss", worst, 1e-4)


def parallel(setting: Setting) -> Iterator[Row]:
    """DDP and FSDP2 in a group of one process, and bfloat16, against plain training."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, _ = train(setting, folder / "plain")
        where = setting.device
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        try:
            for mode in ("ddp", "fsdp"):
                losses, _ = train(setting, folder / mode, team=Team(0, 1, mode, where))
                worst = max(abs(a - b) / a for a, b in zip(plain, losses, strict=True))
                yield at_most(f"{mode}: largest difference of a loss", worst, 1e-4)
        finally:
            dist.destroy_process_group()
        losses, _ = train(setting, folder / "bfloat16", compute=Compute("bfloat16"))
        worst = max(abs(a - b) / a for a, b in zip(plain, losses, strict=True))
        yield at_most("bfloat16: largest difference of a loss", worst, 0.02)


CHECKS = (
    Check("small-networks", small_networks, 40),
    Check("samplers", samplers, 30),
    Check("full-networks", full_networks, 90),
    Check("picture", picture, 30),
    Check("parallel", parallel, 40),
    # Without this variable cuBLAS has no deterministic mode.
    Check("resume", resume, 40, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
)
