"""Time, memory and outputs next to diffusers and transformers, on the same weights and inputs.

Machines are noisy: a time on its own means little; the ratio of two times measured back to back
means more. So both implementations run in turn, several times, and the median of the ratios counts.
Outputs are compared too: a fast wrong answer is not fast.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.machine.matmul import seconds
from nanosd3.measure.meters import count_flops, peak_bytes, training_step
from nanosd3.measure.random_models import (
    Forward,
    forward_pass,
    random_inputs,
    random_model,
    tensor_bytes,
)
from nanosd3.official.export import diffusers_state, part_config
from nanosd3.official.tensors import in_memory


@dataclass(frozen=True)
class Workload:
    """What is measured, and how often."""

    config: Config
    size: int  # pixels along each side of the images
    batch: int
    repeats: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    against: bool = False  # measure the reference implementation too


@dataclass(frozen=True)
class Ratios:
    """Ours over the reference implementation's."""

    time: float  # median over pairs
    memory: float  # at the peak, weights and optimizer state included
    activations: float  # at the peak, beyond those
    difference: float  # between the results, relative to ours


@dataclass(frozen=True)
class PassCost:
    """One forward pass of a part."""

    seconds: float  # the fastest
    flops: int
    ratios: Ratios | None


@dataclass(frozen=True)
class StepCost:
    """One training step of the transformer."""

    seconds: float  # the fastest
    flops: int
    fixed: int  # bytes of weights and AdamW's two moments
    peak: int  # bytes at the peak beyond those
    ratios: Ratios | None


def require_diffusers() -> None:
    """Raise InputError if the reference implementations are not installed."""
    for library in ("diffusers", "transformers"):
        if find_spec(library) is None:
            raise InputError(
                f"{library} is not installed, which --against compares with; "
                "install it with pip install -r requirements-dev.txt"
            )


def reference_model(config: Config, part: str, ours: nn.Module) -> nn.Module:
    """The same part in diffusers or transformers, sharing memory with the weights of `ours`.

    Weights of convolutions are copied to the usual layout: from ours it would take the faster one.
    """
    import diffusers
    import transformers

    settings = {k: v for k, v in part_config(config, part).items() if k != "architectures"}
    with torch.device("meta"):
        if part in ("mmdit", "vae"):
            kind = diffusers.SD3Transformer2DModel if part == "mmdit" else diffusers.AutoencoderKL
            other = kind.from_config(settings)
        elif part == "t5":
            other = transformers.T5EncoderModel(transformers.T5Config(**settings))
        else:
            other = transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**settings)
            )
    state = {k: in_memory(k, t, Path()) for k, t in ours.state_dict().items()}
    device = next(ours.parameters()).device
    stored = diffusers_state(part, state)
    weights = {key: tensor.read().to(device).contiguous() for key, tensor in stored.items()}
    if part == "t5":  # tied weights, expected under both names
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    other.load_state_dict(weights, assign=True)
    for name, buffer in other.named_buffers():  # position ids are not stored: still on meta
        if buffer.is_meta:
            module, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1], device=device)
            setattr(other.get_submodule(module), leaf, positions.expand(buffer.shape))
    return other.requires_grad_(False).eval()


def reference_pass(module: nn.Module, part: str, inputs: tuple[Tensor, ...]) -> Forward:
    """The counterpart of `forward_pass` for a `reference_model`."""
    if part == "vae":
        decode = cast(Callable[..., Any], module.decode)
        return lambda: decode(*inputs).sample
    if part == "mmdit":
        z, t, context, pooled = inputs
        return lambda: module(z, context, pooled, 1000 * t).sample
    if part == "t5":
        return lambda: module(*inputs).last_hidden_state
    return lambda: module(*inputs, output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def compare_pass(work: Workload, part: str) -> PassCost:
    """Measure a forward pass of a part."""
    model = random_model(work.config, part, work.device, work.dtype)
    inputs = random_inputs(work.config, part, work.size, work.batch, like=next(model.parameters()))
    passes = [forward_pass(model, part, inputs)]
    if work.against:
        passes.append(reference_pass(reference_model(work.config, part, model), part, inputs))
    if work.compiled:
        passes = [torch.compile(forward) for forward in passes]
    flops = count_flops(passes[0])
    outputs = [forward() for forward in passes]
    rows = [[seconds(forward, work.device) for forward in passes] for _ in range(work.repeats)]
    ratios = None
    if work.against:
        ours, theirs = outputs
        difference = (ours - theirs).abs().max() / ours.abs().max()
        peaks = [peak_bytes(forward, work.device) for forward in passes]
        ratios = make_ratios(rows, tensor_bytes(model), peaks, difference.item())
    return PassCost(min(row[0] for row in rows), flops, ratios)


def compare_training(work: Workload) -> StepCost:
    """Measure a training step of the transformer."""
    model = random_model(work.config, "mmdit", work.device, work.dtype)
    models = [model]
    if work.against:  # copied, since both are trained
        models.append(copy.deepcopy(reference_model(work.config, "mmdit", model)))
    inputs = random_inputs(
        work.config, "mmdit", work.size, work.batch, like=next(model.parameters())
    )
    shape = inputs[0].shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(work.device)
    steps = []
    for network, make_pass in zip(models, (forward_pass, reference_pass), strict=False):
        forward = make_pass(network.requires_grad_().train(), "mmdit", inputs)
        steps.append(training_step(network, forward, target))
    losses = [(step(), step())[1] for step in steps]  # the second depends on a gradient
    flops = count_flops(steps[0])
    rows = [[seconds(step, work.device) for step in steps] for _ in range(work.repeats)]
    fixed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    peaks = [peak_bytes(step, work.device) for step in steps]
    ratios = None
    if work.against:
        difference = abs(losses[0] - losses[1]) / losses[0]
        ratios = make_ratios(rows, fixed, peaks, difference.item())
    return StepCost(min(row[0] for row in rows), flops, fixed, peaks[0], ratios)


def make_ratios(rows: list[list[float]], fixed: int, peaks: list[int], difference: float) -> Ratios:
    """Ratios from rows of times and from peaks, ours first; `fixed` bytes are needed by both."""
    return Ratios(
        time=statistics.median(ours / theirs for ours, theirs in rows),
        memory=(fixed + peaks[0]) / (fixed + peaks[1]),
        activations=peaks[0] / peaks[1],
        difference=difference,
    )
