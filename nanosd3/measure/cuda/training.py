"""How fast training goes, and whether the formula for its memory is right.

A step is forward, loss, backward, clipped gradient, AdamW and the moving average, as in the loop,
on random latents and text. Its batch is the largest power of two that should fit by the formula.
FLOPs utilisation counts the arithmetic of the formula without recomputation.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import nanosd3
from nanosd3.config import Config
from nanosd3.costs import training_flops
from nanosd3.footprint import memory
from nanosd3.loop import make_ema, update_ema
from nanosd3.measure.cuda.result import Check, Row, Setting, Unavailable, at_least, at_most
from nanosd3.pairs import inputs, text_tokens, training_step
from nanosd3.parallel import Compute, Placed, Team
from nanosd3.products import multiplication_speed, seconds

LARGEST = 64  # batch
ROOM = 0.85  # of the free memory is used
UTILISATION = 0.45
NEAR = 0.1  # of the predicted memory
STEPS = 6


def memory_of(
    setting: Setting, config: Config, batch: int, size: int, compute: Compute, shards: int = 0
) -> float:
    """Bytes of a step in one process, by the formula."""
    side = setting.patches(config, size)
    return memory(
        config.mmdit, batch, side, side, text_tokens(config),
        precision=compute.precision, checkpointing=compute.checkpointing,
        processes=max(1, shards), sharded=shards > 0,
    ).total  # fmt: skip


def fitting_batch(setting: Setting, config: Config, size: int, compute: Compute) -> int:
    """The largest batch that should fit. Raises Unavailable if none does."""
    if setting.device.type != "cuda" or not setting.full:
        return 2
    torch.cuda.empty_cache()
    free = ROOM * torch.cuda.mem_get_info(setting.device)[0]
    batch = LARGEST
    while memory_of(setting, config, batch, size, compute) > free:
        batch //= 2
        if not batch:
            raise Unavailable(f"a step of {config.name} needs "
                              f"{memory_of(setting, config, 1, size, compute) / 1e9:.0f} GB, "
                              f"{free / 1e9:.0f} GB may be used")  # fmt: skip
    return batch


def measure(
    setting: Setting, config: Config, batch: int, size: int, compute: Compute, team: Team
) -> tuple[float, float]:
    """Seconds and peak memory in bytes (NaN on a CPU) of a step."""
    cuda = setting.device.type == "cuda"
    compiled = compute.compiled
    model = setting.filled(config, "mmdit", torch.float32).requires_grad_().train()
    ema = make_ema(model)
    given = inputs(config, "mmdit", setting.pixels(size), batch, next(model.parameters()))
    network = Placed(model, team, Compute(compute.precision, compute.checkpointing),
                     model.joint_blocks)  # fmt: skip
    average = Placed(ema, team)
    if compiled:
        setting.compile(model.joint_blocks)
    step = training_step(model, lambda: network(*given), torch.zeros_like(given[0]))

    def whole_step(number: int) -> None:
        step()
        update_ema(average.module, model, number, 0.999)

    whole_step(0)
    if cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    times = [seconds(lambda i=i: whole_step(i), setting.device)
             for i in range(1, setting.count(STEPS))]  # fmt: skip
    peak = torch.cuda.max_memory_allocated(setting.device) if cuda else float("nan")
    return statistics.median(times), peak


def step_rows(
    setting: Setting, config: Config, size: int, compute: Compute, batch: int = 0
) -> Iterator[Row]:
    """What a step takes, against its aims."""
    batch = batch or fitting_batch(setting, config, size, compute)
    team = Team(device=setting.device)
    took, peak = measure(setting, config, batch, size, compute, team)
    side, text = setting.patches(config, size), text_tokens(config)
    flops = training_flops(config.mmdit, batch, side, side, text)
    ways = ["checkpointing"] * compute.checkpointing + ["compiled"] * compute.compiled
    pixels = setting.pixels(size)
    label = ", ".join([f"{config.name} {pixels}x{pixels}, batch {batch}", *ways])
    yield Row(f"{label}: a step", 1e3 * took, "ms")
    yield Row(f"{label}: tokens a second", batch * (side**2 + text) / took, "1/s")
    best = multiplication_speed(setting.device, torch.bfloat16)
    share = flops / took / best
    yield setting.goal(at_least(f"{label}: FLOPs utilisation", share, UTILISATION))
    if setting.device.type == "cuda":
        said = memory_of(setting, config, batch, size, compute)
        yield Row(f"{label}: peak memory", peak / 1e9, "GB")
        distance = abs(peak / said - 1)
        yield setting.goal(at_most(f"{label}: its distance from the formula", distance, NEAR))


def steps(setting: Setting) -> Iterator[Row]:
    """Training steps of sd3-medium in bfloat16, with and without checkpointing."""
    config = setting.model("sd3-medium")
    for size, checkpointing in itertools.product((256, 1024), (False, True)):
        yield from step_rows(setting, config, size, Compute("bfloat16", checkpointing))


def compiled_steps(setting: Setting) -> Iterator[Row]:
    """The same with compiled blocks."""
    config = setting.model("sd3-medium")
    for size in (256, 1024):
        yield from step_rows(setting, config, size, Compute("bfloat16", compiled=True))


def sharded(setting: Setting) -> Iterator[Row]:
    """sd3.5-large with checkpointing: what one card holds, and one of eight (others pretended)."""
    config = setting.model("sd3.5-large")
    compute = Compute("bfloat16", checkpointing=True)
    alone = memory_of(setting, config, 1, 1024, compute)
    yield Row(f"{config.name} 1024x1024, one process: memory by the formula", alone / 1e9, "GB")
    said = memory_of(setting, config, 1, 1024, compute, shards=8)
    yield Row(f"{config.name} 1024x1024, one of eight: memory by the formula", said / 1e9, "GB")
    setting.needs(1.3 * said / 1e9 + 35)  # the whole network once, before it is cut
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        raise Unavailable("this PyTorch has no pretended process group") from None
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        team = Team(0, 8, "fsdp", setting.device)
        took, peak = measure(setting, config, 1, 1024, compute, team)
    finally:
        dist.destroy_process_group()
    yield Row("one of eight: a step without the exchange", 1e3 * took, "ms")
    if setting.device.type == "cuda":
        yield Row("one of eight: peak memory", peak / 1e9, "GB")
        distance = abs(peak / said - 1)
        yield setting.goal(at_most("one of eight: its distance from the formula", distance, NEAR))


def train_mnist(setting: Setting, precision: str, folder: Path) -> Iterator[Row]:
    """The stages, the accuracy and the distance of a run of train_mnist.py."""
    root = Path(nanosd3.__file__).parent.parent
    script = root / "train_mnist.py"
    if not script.exists():
        raise Unavailable(f"{script}: no such file; start from a checkout")
    command = [sys.executable, script, "--out", folder, "--fresh", "--config",
               setting.config or "mnist", "--threads", torch.get_num_threads()]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(root)}
    if setting.device.type == "cuda":
        command += ["--precision", precision]
    else:
        precision = "float32"
        environment["CUDA_VISIBLE_DEVICES"] = ""  # there may be a GPU all the same

    begin = time.perf_counter()
    done = subprocess.run([str(word) for word in command], env=environment, check=False)
    took = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"train_mnist.py ended with status {done.returncode}")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for stage, results in metrics["stages"].items():
        yield Row(f"{precision}: {stage}", results["seconds"], "s")
    rows = (
        at_most(f"{precision}: start to end", took, 60, "s"),
        at_least(f"{precision}: prompt accuracy", metrics["prompt_accuracy"], 0.99),
        at_most(f"{precision}: Frechet distance, over that of real images",
                metrics["frechet_ratio_to_real"], 3.0),
    )  # fmt: skip
    yield from map(setting.goal, rows)


def main_job(setting: Setting) -> Iterator[Row]:
    """train_mnist.py from start to end, with the GPU's default precision."""
    return train_mnist(setting, "bfloat16", setting.folder / "mnist")


def main_job_float32(setting: Setting) -> Iterator[Row]:
    """train_mnist.py again, in float32."""
    return train_mnist(setting, "float32", setting.folder / "mnist-float32")


CHECKS = (
    Check("steps", steps, 90),
    Check("main-job", main_job, 150),
    Check("compiled-steps", compiled_steps, 120),
    Check("sharded", sharded, 60),
    Check("main-job-float32", main_job_float32, 150),
)
