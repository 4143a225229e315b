"""How fast is training, and does the memory formula hold?

A step is forward, loss, backward, gradient clipping, AdamW and EMA, as in the training loop, on
random latents and text. The batch is the largest power of two that fits according to the formula.
FLOPs utilisation counts the FLOPs of the formula (costs.py) without recomputation.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import nanosd3
from nanosd3.config_types import Config
from nanosd3.data.scenes import SCENE_CONFIGS
from nanosd3.machine.distributed import Compute, ParallelModel, ProcessGroup
from nanosd3.machine.matmul import multiplication_speed, seconds
from nanosd3.measure.costs import training_flops
from nanosd3.measure.cuda.result import Check, Row, Setting, Unavailable, at_least, at_most
from nanosd3.measure.meters import training_step
from nanosd3.measure.random_models import random_inputs, text_tokens
from nanosd3.measure.training_memory import memory
from nanosd3.mmdit import MMDiT
from nanosd3.storage.files import read_json
from nanosd3.training.ema import make_ema, update_ema

LARGEST_BATCH = 64
USABLE = 0.85  # share of the free memory
TRAINING_UTILISATION = 0.45
TOLERANCE = 0.1  # of the predicted memory
TIMED_STEPS = 6


def predicted_bytes(
    setting: Setting, config: Config, batch: int, size: int, compute: Compute, shards: int = 0
) -> float:
    """Memory of a step in one process, by the formula; `shards` processes share the weights."""
    side = setting.patches(config, size)
    predicted = memory(
        config.mmdit,
        batch,
        side,
        side,
        text_tokens(config),
        precision=compute.precision,
        checkpointing=compute.checkpointing,
        processes=max(1, shards),
        sharded=shards > 0,
    )
    return predicted.total


def fitting_batch(setting: Setting, config: Config, size: int, compute: Compute) -> int:
    """The largest batch that should fit. Raises Unavailable if none does."""
    if setting.device.type != "cuda" or not setting.full:
        return 2
    torch.cuda.empty_cache()
    usable = USABLE * torch.cuda.mem_get_info(setting.device)[0]
    batch = LARGEST_BATCH
    while predicted_bytes(setting, config, batch, size, compute) > usable:
        batch //= 2
        if not batch:
            needed = predicted_bytes(setting, config, 1, size, compute)
            raise Unavailable(
                f"a step of {config.name} needs {needed / 1e9:.0f} GB of GPU memory, only "
                f"{usable / 1e9:.0f} GB is usable"
            )
    return batch


def measure_step(
    setting: Setting, config: Config, batch: int, size: int, compute: Compute, group: ProcessGroup
) -> tuple[float, float]:
    """Seconds and peak memory in bytes (NaN on a CPU) of a step."""
    cuda = setting.device.type == "cuda"
    model = setting.random_model(config, "mmdit", torch.float32).requires_grad_().train()
    assert isinstance(model, MMDiT)
    blocks = list(model.joint_blocks)
    ema = make_ema(model)
    like = next(model.parameters())
    inputs = random_inputs(config, "mmdit", setting.image_size(size), batch, like)
    uncompiled = Compute(compute.precision, compute.checkpointing)
    network = ParallelModel(model, group, uncompiled, blocks)
    average = ParallelModel(ema, group)
    if compute.compiled:
        setting.compile(blocks)
    step = training_step(model, lambda: network(*inputs), target=torch.zeros_like(inputs[0]))

    def step_and_average(number: int) -> None:
        step()
        update_ema(average.module, model, number, 0.999)

    step_and_average(0)
    if cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    times = [
        seconds(partial(step_and_average, i), setting.device)
        for i in range(1, setting.repeats(TIMED_STEPS))
    ]
    peak = torch.cuda.max_memory_allocated(setting.device) if cuda else float("nan")
    return statistics.median(times), peak


def memory_rows(setting: Setting, label: str, peak: float, predicted: float) -> Iterator[Row]:
    """The measured peak in bytes and its distance from the formula; nothing on a CPU."""
    if setting.device.type == "cuda":
        yield Row(f"{label}: peak memory", peak / 1e9, "GB")
        error = abs(peak / predicted - 1)
        yield setting.goal(at_most(f"{label}: error of the memory formula", error, TOLERANCE))


def step_rows(setting: Setting, config: Config, size: int, compute: Compute) -> Iterator[Row]:
    """Time, throughput, utilisation and memory of a step."""
    batch = fitting_batch(setting, config, size, compute)
    group = ProcessGroup(device=setting.device)
    took, peak = measure_step(setting, config, batch, size, compute, group)
    side, text = setting.patches(config, size), text_tokens(config)
    flops = training_flops(config.mmdit, batch, side, side, text)
    options = ["checkpointing"] * compute.checkpointing + ["compiled"] * compute.compiled
    pixels = setting.image_size(size)
    label = ", ".join([f"{config.name} {pixels}x{pixels}, batch {batch}", *options])
    yield Row(f"{label}: time of a step", 1e3 * took, "ms")
    yield Row(f"{label}: tokens per second", batch * (side**2 + text) / took, "1/s")
    speed = multiplication_speed(setting.device, torch.bfloat16)
    share = flops / took / speed
    yield setting.goal(at_least(f"{label}: FLOPs utilisation", share, TRAINING_UTILISATION))
    predicted = predicted_bytes(setting, config, batch, size, compute)
    yield from memory_rows(setting, label, peak, predicted)


def steps(setting: Setting) -> Iterator[Row]:
    """Training steps of sd3-medium in bfloat16, with and without checkpointing."""
    config = setting.model("sd3-medium")
    for size, checkpointing in itertools.product((256, 1024), (False, True)):
        yield from step_rows(setting, config, size, Compute("bfloat16", checkpointing))


def compiled_steps(setting: Setting) -> Iterator[Row]:
    """Training steps of sd3-medium in bfloat16, with compiled blocks."""
    config = setting.model("sd3-medium")
    for size in (256, 1024):
        yield from step_rows(setting, config, size, Compute("bfloat16", compiled=True))


def sharded(setting: Setting) -> Iterator[Row]:
    """A checkpointed step of sd3.5-large: memory on one GPU, and on one of eight (simulated)."""
    config = setting.model("sd3.5-large")
    compute = Compute("bfloat16", checkpointing=True)
    alone = predicted_bytes(setting, config, 1, 1024, compute)
    yield Row(f"{config.name} 1024x1024, one process: memory by the formula", alone / 1e9, "GB")
    shared = predicted_bytes(setting, config, 1, 1024, compute, shards=8)
    yield Row(f"{config.name} 1024x1024, one of eight: memory by the formula", shared / 1e9, "GB")
    setting.require_memory(1.3 * shared / 1e9 + 35)  # the unsharded network exists first
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        raise Unavailable("this PyTorch cannot simulate a process group") from None
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        group = ProcessGroup(0, 8, "fsdp", setting.device)
        took, peak = measure_step(setting, config, 1, 1024, compute, group)
    finally:
        dist.destroy_process_group()
    yield Row("one of eight: time of a step without communication", 1e3 * took, "ms")
    yield from memory_rows(setting, "one of eight", peak, shared)


def train_mnist(setting: Setting, precision: str, folder: Path) -> Iterator[Row]:
    """Times, prompt accuracy and Frechet distance of a run of train_mnist.py."""
    if setting.config in SCENE_CONFIGS:
        raise Unavailable("scenes are measured otherwise; choose another --config")
    root = Path(nanosd3.__file__).parent.parent
    script = root / "train_mnist.py"
    if not script.exists():
        raise Unavailable(f"{script}: no such file; run from a checkout of the repository")
    command = [sys.executable, str(script), "--out", str(folder), "--fresh", "--no-turbo"]
    command += ["--config", setting.config or "mnist", "--threads", str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONPATH": str(root)}
    if setting.device.type == "cuda":
        command += ["--precision", precision]
    else:
        precision = "float32"
        environment["CUDA_VISIBLE_DEVICES"] = ""  # in case there is a GPU
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, check=False)
    took = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"train_mnist.py failed with exit status {done.returncode}")
    metrics = read_json(folder / "metrics.json")
    for stage, results in metrics["stages"].items():
        yield Row(f"{precision}: {stage}", results["seconds"], "s")
    accuracy, distance = metrics["prompt_accuracy"], metrics["frechet_ratio_to_real"]
    rows = (
        at_most(f"{precision}: the whole run", took, 60, "s"),
        at_least(f"{precision}: prompt accuracy", accuracy, 0.99),
        at_most(f"{precision}: Frechet distance, relative to real images", distance, 3.0),
    )
    yield from map(setting.goal, rows)


def main_job(setting: Setting) -> Iterator[Row]:
    """train_mnist.py from start to finish, with the default precision on GPUs."""
    return train_mnist(setting, "bfloat16", setting.folder / "mnist")


def main_job_float32(setting: Setting) -> Iterator[Row]:
    """train_mnist.py from start to finish, in float32."""
    if setting.device.type != "cuda":
        raise Unavailable("a CPU trains in float32 only: see main-job")
    return train_mnist(setting, "float32", setting.folder / "mnist-float32")


TRAINING = (
    Check("steps", steps, 90),
    Check("main-job", main_job, 240),
    Check("compiled-steps", compiled_steps, 120),
    Check("sharded", sharded, 60),
    Check("main-job-float32", main_job_float32, 240),
)
