"""Is image generation faster than with diffusers, and is the result the same? Both run in pairs."""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nanosd3.config_types import Config
from nanosd3.lazy_modules import LazyModules
from nanosd3.machine.matmul import seconds
from nanosd3.measure.compare_diffusers import reference_model, reference_pass
from nanosd3.measure.cuda.result import Check, Row, Setting, Unavailable, at_most, relative_error
from nanosd3.measure.cuda.sampling import BF16, PROMPT
from nanosd3.measure.meters import peak_bytes
from nanosd3.measure.random_models import Forward, forward_pass, random_inputs, text_tokens
from nanosd3.pipeline import Pipeline
from nanosd3.text import ENCODERS, Tokenizers

PAIRS = 5
TIME_RATIO = 0.95
MEMORY_RATIO = 1.01


@torch.no_grad()
def diffusers(setting: Setting) -> Iterator[Row]:
    """sd3-medium, 1024x1024, bfloat16, paired with diffusers on the same weights."""
    try:
        import diffusers as _  # noqa: F401
    except ImportError:
        raise Unavailable("diffusers is not installed") from None
    config = setting.model("sd3-medium")
    setting.require_memory(20)
    ours = {part: setting.random_model(config, part, BF16) for part in ("mmdit", "vae")}
    theirs = {part: reference_model(config, part, module) for part, module in ours.items()}
    for part, module in ours.items():
        like = next(module.parameters())
        inputs = random_inputs(config, part, setting.image_size(1024), 2, like)
        passes = forward_pass(module, part, inputs), reference_pass(theirs[part], part, inputs)
        yield from compare(setting, part, *passes)
    both = both_pipelines(setting, config, ours, theirs)
    yield from compare(setting, "whole pipeline", *both, limit=0.1)


def compare(
    setting: Setting, label: str, ours: Forward, theirs: Forward, limit: float = 0.05
) -> Iterator[Row]:
    """The difference of two implementations, and the ratios of their times and memory."""
    yield at_most(f"{label}: difference", relative_error(ours(), theirs()), limit)
    device = setting.device
    times = [(seconds(ours, device), seconds(theirs, device)) for _ in range(PAIRS)]
    ratio = statistics.median(a / b for a, b in times)
    yield setting.goal(at_most(f"{label}: time, relative to diffusers", ratio, TIME_RATIO))
    ratio = peak_bytes(ours, device) / peak_bytes(theirs, device)
    label += ": memory beyond weights, relative to diffusers"
    yield setting.goal(at_most(label, ratio, MEMORY_RATIO))


def both_pipelines(
    setting: Setting, config: Config, ours: dict[str, nn.Module], theirs: dict[str, nn.Module]
) -> tuple[Forward, Forward]:
    """From encoded text to pixels in [0, 1], with Euler steps and guidance, in both programs."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    steps, side, border = setting.repeats(10), setting.image_size(1024), config.padding
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(setting.device, BF16)

    def random_text() -> tuple[Tensor, Tensor]:
        context = random(text_tokens(config), config.mmdit.context_dim)
        return context, random(config.mmdit.pooled_dim)

    text = {PROMPT: random_text(), "": random_text()}
    encoders = {name: nn.Identity() for name in ENCODERS}  # unused: the text is encoded already
    parts = LazyModules({**ours, **encoders}, setting.device)
    pipeline = Pipeline(config, Tokenizers.official(), parts)
    pipeline.encoded_text = text
    noise = pipeline.noise(1, 0, (side // config.vae.factor,) * 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.sampling.shift)
    absent = {
        f"{kind}{i}": None for kind in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")
    }
    # Any: to type checkers diffusers' class is a placeholder without methods.
    reference: Any = StableDiffusion3Pipeline(
        transformer=theirs["mmdit"], vae=theirs["vae"], scheduler=scheduler, **absent
    )
    reference.set_progress_bar_config(disable=True)
    embeds = {
        "prompt_embeds": text[PROMPT][0][None],
        "pooled_prompt_embeds": text[PROMPT][1][None],
        "negative_prompt_embeds": text[""][0][None],
        "negative_pooled_prompt_embeds": text[""][1][None],
    }

    def generate() -> Tensor:
        size: dict[str, Any] = {"height": side - 2 * border, "width": side - 2 * border}
        images = pipeline(PROMPT, steps=steps, guidance=5.0, sampler="euler", noise=noise, **size)
        return torch.as_tensor(images[0] / 255.0)

    def reference_generate() -> Tensor:
        images = reference(
            **embeds,
            num_inference_steps=steps,
            guidance_scale=5.0,
            output_type="np",
            latents=noise.to(setting.device, BF16),
            height=side,
            width=side,
        ).images
        pixels = torch.from_numpy(images[0, border : side - border, border : side - border])
        return pixels if config.vae.image_channels == 3 else pixels[..., 0]

    return generate, reference_generate


DIFFUSERS = (Check("diffusers", diffusers, 60),)
