"""How fast is image generation, how much memory does it need, and where does the time go?

Weights are random, which changes none of this. The time of an image is the sum of its parts, each
measured warm: text encoders, sampling steps, decoder. Utilisation is the FLOPs of the formula
(costs.py) per second, as a share of what the largest matrix product reaches on this machine.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from nanosd3.components import COMPONENTS
from nanosd3.config_types import Config
from nanosd3.lazy_modules import LazyModules
from nanosd3.machine.matmul import multiplication_speed, seconds
from nanosd3.measure.costs import forward_flops
from nanosd3.measure.cuda.result import (
    Check,
    Row,
    Setting,
    at_least,
    at_most,
)
from nanosd3.measure.random_models import forward_pass, random_inputs, text_tokens
from nanosd3.pipeline import Pipeline
from nanosd3.samplers import Callback
from nanosd3.text import Tokenizers

PROMPT = "a photo of a cat"
BF16 = torch.bfloat16
MEMORY = 24.0  # GB of a GPU that sd3.5-large should fit on
SAMPLING_UTILISATION = 0.5  # of the transformer


def staged(setting: Setting, config: Config) -> Pipeline:
    """A model with random weights; parts are created on the device when they are needed."""
    makers: dict[str, Callable[[], nn.Module]] = {
        part: partial(setting.random_model, config, part, BF16) for part in COMPONENTS
    }
    small = config.training is not None  # has a vocabulary of its own
    tokenizers = Tokenizers.train([PROMPT], config.text) if small else Tokenizers.official()
    return Pipeline(config, tokenizers, LazyModules(makers, setting.device, staged=True))


class StepTimer:
    """A sampler callback that records when each step begins, and how many images it is for: the
    pipeline computes a large batch in parts."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.steps: list[tuple[int, int, float]] = []  # number, images, time

    def __call__(self, step: int, t: Tensor, z: Tensor, x0: Tensor) -> None:
        self.setting.synchronize()
        self.steps.append((step, len(z), time.perf_counter()))

    @property
    def images(self) -> int:
        """Images computed at once."""
        return self.steps[0][1]

    def step_seconds(self) -> float:
        """The median time of a step of `images` images, without the first."""
        steps = [
            b[2] - a[2] for a, b in pairwise(self.steps) if b[0] == a[0] + 1 and a[1] == self.images
        ]
        return statistics.median(steps[1:] or steps)


@torch.no_grad()
def image(
    setting: Setting,
    name: str,
    steps: int,
    batch: int = 1,
    compiled: bool = False,
    memory: float | None = None,
) -> Iterator[Row]:
    """Time and memory of 1024x1024 images from a whole model with staged text encoders; `memory`
    is the goal in GB."""
    config = setting.model(name)
    setting.require_memory(24)
    pipeline, timer = staged(setting, config), StepTimer(setting)
    side = setting.image_size(1024) - 2 * config.padding
    prompts = [PROMPT] * batch

    def generate(steps: int, callback: Callback | None = None) -> None:
        pipeline(prompts, steps=steps, sampler="euler", height=side, width=side, callback=callback)

    label = f"{config.name}, batch {batch}" + ", compiled" * compiled
    if compiled:
        pipeline.parts.staged = False  # keep the compiled blocks
        label += f" with {setting.compile(pipeline.mmdit.joint_blocks)}"
        generate(2)
    cuda = setting.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    whole = seconds(lambda: generate(steps, timer), setting.device)
    if cuda:
        peak = torch.cuda.max_memory_allocated(setting.device) / 1e9
        if memory is None:
            yield Row(f"{label}: peak memory", peak, "GB")
        else:
            yield setting.goal(at_most(f"{label}: peak memory", peak, memory, "GB"))
    yield Row(f"{label}: the whole call, including random initialisation", whole, "s")
    step = timer.step_seconds()
    tokens = setting.patches(config, 1024)
    images = timer.images
    flops = forward_flops(config.mmdit, 2 * images, tokens, tokens, text_tokens(config))
    speed = multiplication_speed(setting.device, BF16)
    label += f", {images} at once" * (images < batch)
    yield Row(f"{label}: a step with guidance", 1e3 * step, "ms")
    yield Row("matrix product, bfloat16", speed / 1e12, "TFLOP/s")
    share = flops / step / speed
    yield setting.goal(
        at_least(f"{label}: FLOPs utilisation of a step", share, SAMPLING_UTILISATION)
    )
    if batch == 1 and not compiled:
        yield from other_parts(setting, pipeline, config, label, steps * step)
    else:
        yield Row(f"{label}: sampling per image", steps * step / images, "s")


def other_parts(
    setting: Setting, pipeline: Pipeline, config: Config, label: str, sampling: float
) -> Iterator[Row]:
    """Times of the text encoders and the decoder, and the sum with `sampling` seconds."""
    pipeline.parts.release("mmdit")
    total = sampling
    for part in ("clip_l", "clip_g", "t5", "vae"):
        module = setting.random_model(config, part, BF16)
        like = next(module.parameters())
        inputs = random_inputs(config, part, setting.image_size(1024), 1, like)
        forward = forward_pass(module, part, inputs)
        forward()
        took = statistics.median(seconds(forward, setting.device) for _ in range(3))
        total += took * (1 if part == "vae" else 2)  # the prompt and the negative prompt
        yield Row(f"{label}: {part}", 1e3 * took, "ms")
        del module, forward
    yield Row(f"{label}: seconds per image", total, "s")


def large(setting: Setting) -> Iterator[Row]:
    """sd3.5-large (8.06B), 1024x1024, 50 steps with guidance, bfloat16."""
    return image(setting, "sd3.5-large", setting.repeats(50), memory=MEMORY)


def medium(setting: Setting) -> Iterator[Row]:
    """sd3-medium, 1024x1024, 28 steps with guidance, bfloat16."""
    return image(setting, "sd3-medium", setting.repeats(28))


def medium_35(setting: Setting) -> Iterator[Row]:
    """sd3.5-medium, 1024x1024, 28 steps with guidance, bfloat16."""
    return image(setting, "sd3.5-medium", setting.repeats(28))


def compiled(setting: Setting) -> Iterator[Row]:
    """sd3-medium and sd3.5-large with compiled blocks."""
    for name in ("sd3-medium", "sd3.5-large"):
        yield from image(setting, name, setting.repeats(8), compiled=True)


def batches(setting: Setting) -> Iterator[Row]:
    """Batches of four images, a few steps of each model."""
    for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large"):
        yield from image(setting, name, setting.repeats(4), batch=4)


# --- where the time goes ------------------------------------------------------------------------

KINDS = {  # of operations, by substrings of their names; the first match counts
    "attention": ("attention", "flash"),
    "products": ("mm", "linear", "conv"),
    "norms": ("norm",),
    "copies": ("copy", "cat", "contiguous", "clone"),
    "elementwise": (),
}


def kind_of(operation: str) -> str:
    """The kind of an operation."""
    return next(k for k, words in KINDS.items() if not words or any(w in operation for w in words))


@torch.no_grad()
def profile(setting: Setting) -> Iterator[Row]:
    """Where the time goes in sd3-medium's transformer: 1024x1024, batch 2, bfloat16."""
    config = setting.model("sd3-medium")
    setting.require_memory(12)
    module = setting.random_model(config, "mmdit", BF16)
    like = next(module.parameters())
    inputs = random_inputs(config, "mmdit", setting.image_size(1024), 2, like)
    forward = forward_pass(module, "mmdit", inputs)
    forward()
    cuda = setting.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * cuda]) as profiler:
        seconds(forward, setting.device)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    totals = dict.fromkeys(KINDS, 0.0)
    events = profiler.key_averages()
    for event in events:
        if event.key.startswith("aten::"):
            totals[kind_of(event.key)] += getattr(event, key)
    table = events.table(sort_by=key, row_limit=40, max_name_column_width=60)
    (setting.folder / "cuda-profile.txt").write_text(table, encoding="utf-8")
    for kind, spent in totals.items():
        yield Row(f"{config.name}: {kind}", spent / sum(totals.values()), "of the time")


SAMPLING = (
    Check("large", large, 90),
    Check("medium", medium, 45),
    Check("medium-3.5", medium_35, 45),
    Check("profile", profile, 30),
    Check("compiled", compiled, 120),
    Check("batches", batches, 90),
)
