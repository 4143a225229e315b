"""How fast images are made, in how much memory, and where the time goes.

The weights are random, which changes neither. Seconds of an image are those of its parts, each
measured warm: text, steps, decoding. Share of the peak is the arithmetic of the formula (costs.py)
over what the largest matrix product of this machine does in the time.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from nanosd3.config import Config
from nanosd3.costs import forward_flops
from nanosd3.layouts import COMPONENTS
from nanosd3.measure.cuda.result import (
    Check,
    Row,
    Setting,
    Unavailable,
    at_least,
    at_most,
    relative_error,
)
from nanosd3.pairs import (
    forward_of,
    inputs,
    peak_memory,
    text_tokens,
    theirs,
)
from nanosd3.parts import Parts
from nanosd3.pipeline import Pipeline
from nanosd3.products import multiplication_speed, seconds
from nanosd3.text import ENCODERS, Tokenizers

PROMPT = "a photo of a cat"
BF16 = torch.bfloat16
MEMORY = 24.0  # GB of a card that 3.5 large should fit into
PAIRS = 5
PEAK_SHARE = 0.5  # of the matrix peak, in the transformer
AGAINST = 0.95  # of diffusers' time


def staged(setting: Setting, config: Config) -> Pipeline:
    """A randomly filled model whose parts are made on the device when they are needed."""
    makers: dict[str, Callable[[], nn.Module]] = {
        part: partial(setting.filled, config, part, BF16) for part in COMPONENTS
    }
    own = config.training is not None  # and so a vocabulary of its own
    tokenizers = Tokenizers.train([PROMPT], config.text) if own else Tokenizers.official()
    return Pipeline(config, tokenizers, Parts(makers, setting.device, staged=True))


class Clock:
    """A sampler's callback that takes the time of its steps."""

    def __init__(self, setting: Setting):
        self.setting, self.times = setting, []

    def __call__(self, step: int, t: Tensor, z: Tensor, x0: Tensor) -> None:
        self.setting.synchronize()
        self.times.append(time.perf_counter())

    def step(self) -> float:
        """Seconds of a step: the median, the first left out."""
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
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
    """Seconds and memory of images of 1024x1024 by a whole model, text encoders staged."""
    config, side = setting.model(name), setting.pixels(1024)
    setting.needs(24)
    pipeline = staged(setting, config)
    border = 2 * config.padding
    how = {"steps": steps, "sampler": "euler", "height": side - border, "width": side - border}
    prompts, clock = [PROMPT] * batch, Clock(setting)
    label = f"{config.name}, {batch} at once" + ", compiled" * compiled
    if compiled:
        pipeline.parts.staged = False  # what is compiled stays
        label += f" by {setting.compile(pipeline.mmdit.joint_blocks)}"
        pipeline(prompts, **{**how, "steps": 2})
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    whole = seconds(lambda: pipeline(prompts, callback=clock, **how), setting.device)
    if setting.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(setting.device) / 1e9
        yield (Row(f"{label}: peak memory", peak, "GB") if memory is None
               else setting.goal(at_most(f"{label}: peak memory", peak, memory, "GB")))  # fmt: skip
    yield Row(f"{label}: the whole call, weights made at random in it", whole, "s")
    tokens = setting.patches(config, 1024)
    flops = forward_flops(config.mmdit, 2 * batch, tokens, tokens, text_tokens(config))
    peak_flops = multiplication_speed(setting.device, BF16)
    yield Row(f"{label}: a step with guidance", 1e3 * clock.step(), "ms")
    yield Row("matrix product, bfloat16", peak_flops / 1e12, "TFLOP/s")
    share = flops / clock.step() / peak_flops
    yield setting.goal(at_least(f"{label}: share of that speed in a step", share, PEAK_SHARE))
    if batch == 1 and not compiled:
        yield from other_parts(setting, pipeline, config, label, steps * clock.step())
    else:
        yield Row(f"{label}: steps of an image", steps * clock.step() / batch, "s")


def other_parts(
    setting: Setting, pipeline: Pipeline, config: Config, label: str, sampling: float
) -> Iterator[Row]:
    """The text encoders' and the decoder's share, and the sum."""
    pipeline.parts.release("mmdit")
    total = sampling
    for part in ("clip_l", "clip_g", "t5", "vae"):
        module = setting.filled(config, part, BF16)
        given = inputs(config, part, setting.pixels(1024), 1, next(module.parameters()))
        forward = forward_of(module, part, given, foreign=False)
        forward()
        took = statistics.median(seconds(forward, setting.device) for _ in range(3))
        total += took * (1 if part == "vae" else 2)  # the prompt, and no text
        yield Row(f"{label}: {part}", 1e3 * took, "ms")
        del module, forward
    yield Row(f"{label}: seconds an image", total, "s")


def large(setting: Setting) -> Iterator[Row]:
    """sd3.5-large (8.06B), 1024x1024, 50 steps with guidance, bfloat16."""
    return image(setting, "sd3.5-large", setting.count(50), memory=MEMORY)


def medium(setting: Setting) -> Iterator[Row]:
    """sd3-medium, 1024x1024, 28 steps with guidance, bfloat16."""
    return image(setting, "sd3-medium", setting.count(28))


def medium_35(setting: Setting) -> Iterator[Row]:
    """sd3.5-medium, 1024x1024, 28 steps with guidance, bfloat16."""
    return image(setting, "sd3.5-medium", setting.count(28))


def compiled(setting: Setting) -> Iterator[Row]:
    """sd3-medium and sd3.5-large again, with compiled blocks."""
    for name in ("sd3-medium", "sd3.5-large"):
        yield from image(setting, name, setting.count(8), compiled=True)


def batches(setting: Setting) -> Iterator[Row]:
    """Four images at once, a few steps of each model."""
    for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large"):
        yield from image(setting, name, setting.count(4), batch=4)


# --- against diffusers --------------------------------------------------------------------------


@torch.no_grad()
def diffusers(setting: Setting) -> Iterator[Row]:
    """sd3-medium, 1024x1024, bfloat16, in pairs with diffusers on the same weights."""
    try:
        import diffusers as _  # noqa: F401
    except ImportError:
        raise Unavailable("diffusers is not installed") from None
    config = setting.model("sd3-medium")
    setting.needs(20)
    ours = {part: setting.filled(config, part, BF16) for part in ("mmdit", "vae")}
    others = {part: theirs(config, part, module) for part, module in ours.items()}
    for part, module in ours.items():
        like = next(module.parameters())
        given = inputs(config, part, setting.pixels(1024), 2, like)
        yield from pair(
            setting,
            part,
            forward_of(module, part, given, foreign=False),
            forward_of(others[part], part, given, foreign=True),
        )
    yield from pair(setting, "whole pipeline", *pipelines(setting, config, ours, others), 0.1)


def pair(
    setting: Setting,
    label: str,
    ours: Callable[[], Tensor],
    other: Callable[[], Tensor],
    error: float = 0.05,
) -> Iterator[Row]:
    """The ratios of two ways to compute the same, and how far apart they are."""
    yield at_most(f"{label}: difference", relative_error(ours(), other()), error)
    times = [(seconds(ours, setting.device), seconds(other, setting.device)) for _ in range(PAIRS)]
    ratio = statistics.median(a / b for a, b in times)
    yield setting.goal(at_most(f"{label}: time, over diffusers'", ratio, AGAINST))
    mine, their = (peak_memory(forward, setting.device) for forward in (ours, other))
    ratio = mine / their
    yield setting.goal(at_most(f"{label}: memory beyond weights, over diffusers'", ratio, 1.01))


def pipelines(
    setting: Setting, config: Config, ours: dict[str, nn.Module], others: dict[str, nn.Module]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Encoded text to pixels in [0, 1], Euler with guidance, by both."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    steps, side = setting.count(10), setting.pixels(1024)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(setting.device, BF16)

    shapes = (text_tokens(config), config.mmdit.context_dim), (config.mmdit.pooled_dim,)
    text = {words: tuple(random(*shape) for shape in shapes) for words in (PROMPT, "")}
    unread = {name: nn.Identity() for name in ENCODERS}  # the text is encoded already
    own = Pipeline(config, Tokenizers.official(), Parts({**ours, **unread}, setting.device))
    own.known = text
    noise = own.noise(1, 0, (side // config.vae.factor,) * 2)
    their = StableDiffusion3Pipeline(
        transformer=others["mmdit"], vae=others["vae"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.sampling.shift),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    their.set_progress_bar_config(disable=True)
    given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), text[PROMPT], strict=True))
    given |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), text[""],
                      strict=True))  # fmt: skip
    given = {name: x[None] for name, x in given.items()}
    border = config.padding

    def by_us() -> Tensor:
        drawn = own(PROMPT, steps=steps, guidance=5.0, sampler="euler", noise=noise,
                    height=side - 2 * border, width=side - 2 * border)  # fmt: skip
        return torch.from_numpy(drawn[0] / 255.0)

    def by_them() -> Tensor:
        drawn = their(
            **given, num_inference_steps=steps, guidance_scale=5.0, output_type="np",
            latents=noise.to(setting.device, BF16), height=side, width=side,
        ).images[0]  # fmt: skip
        drawn = torch.from_numpy(drawn[border : side - border, border : side - border])
        return drawn if config.vae.image_channels == 3 else drawn[..., 0]

    return by_us, by_them


# --- where the time goes ------------------------------------------------------------------------

KINDS = {  # of operations, by parts of their names; the first that fits
    "attention": ("attention", "flash"),
    "products": ("mm", "linear", "conv"),
    "norms": ("norm",),
    "copies": ("copy", "cat", "contiguous", "clone"),
    "elementwise": (),
}


def kind_of(operation: str) -> str:
    return next(k for k, parts in KINDS.items() if not parts or any(p in operation for p in parts))


@torch.no_grad()
def profile(setting: Setting) -> Iterator[Row]:
    """Shares of the time in a pass of sd3-medium's transformer, 1024x1024, batch 2, bfloat16."""
    config = setting.model("sd3-medium")
    setting.needs(12)
    module = setting.filled(config, "mmdit", BF16)
    given = inputs(config, "mmdit", setting.pixels(1024), 2, next(module.parameters()))
    forward = forward_of(module, "mmdit", given, foreign=False)
    forward()
    cuda = setting.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * cuda]) as profiler:
        seconds(forward, setting.device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    totals = dict.fromkeys(KINDS, 0.0)
    events = profiler.key_averages()
    for event in events:
        if event.key.startswith("aten::"):
            totals[kind_of(event.key)] += getattr(event, own)
    table = events.table(sort_by=own, row_limit=40, max_name_column_width=60)
    (setting.folder / "cuda-profile.txt").write_text(table, encoding="utf-8")
    for kind, spent in totals.items():
        yield Row(f"{config.name}: {kind}", spent / sum(totals.values()), "of the time")


CHECKS = (
    Check("large", large, 90),
    Check("medium", medium, 45),
    Check("medium-3.5", medium_35, 45),
    Check("diffusers", diffusers, 60),
    Check("profile", profile, 30),
    Check("compiled", compiled, 120),
    Check("batches", batches, 90),
)
