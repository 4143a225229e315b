"""What a fair comparison needs: one model in this code and in diffusers, on the same weights and
inputs, and how to measure time, memory and arithmetic of either.

Memory is that of all tensors alive at the peak, which the profiler tells on CPU and the allocator
on a GPU. Arithmetic is counted in FLOP and compared with the fastest matrix product of the machine.
"""

import time
from collections.abc import Callable
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nanosd3.audit import on_meta
from nanosd3.config import Config
from nanosd3.export import diffusers_state, part_config
from nanosd3.parts import stored
from nanosd3.products import linear

Forward = Callable[[], Tensor]


def randomly_filled(
    config: Config, part: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A part with weights of a size at which signals neither die nor explode."""
    module = on_meta(config, part).to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.01)
    return module.requires_grad_(False).eval()


def theirs(config: Config, part: str, ours: nn.Module) -> nn.Module:
    """The same part in diffusers or transformers, on the very tensors of ours where the layouts
    allow it."""
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
    state = {k: stored(k, t, Path()) for k, t in ours.state_dict().items()}
    like = next(ours.parameters())
    read = {key: t.read().to(like.device) for key, t in diffusers_state(part, state).items()}
    if part == "t5":  # tied, and asked for under both names
        read["encoder.embed_tokens.weight"] = read["shared.weight"]
    other.load_state_dict(read, assign=True)
    for name, buffer in other.named_buffers():  # not stored, so still without memory
        if buffer.is_meta:
            module, _, leaf = name.rpartition(".")
            fresh = torch.arange(buffer.shape[-1], device=like.device)
            setattr(other.get_submodule(module), leaf, fresh.expand(buffer.shape))
    return other.requires_grad_(False).eval()


def inputs(config: Config, part: str, size: int, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """What a part is given: latents and text for images of `size`, batch as with guidance."""
    text, mmdit = config.text, config.mmdit
    side = size // config.vae.factor
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, mmdit.latent_channels, side, side, generator=draw).to(like)
    tokens = text.clip_l.length + text.t5.length
    if part == "mmdit":
        context = torch.randn(batch, tokens, mmdit.context_dim, generator=draw).to(like)
        pooled = torch.randn(batch, mmdit.pooled_dim, generator=draw).to(like)
        return latents, torch.full((batch,), 0.5, device=like.device), context, pooled
    if part == "vae":
        return (latents[:1],)
    clip = getattr(text, part)
    ids = torch.randint(clip.vocab - 1, (batch, clip.length), generator=draw)
    if part != "t5":
        ids[:, -1] = clip.vocab - 1
    return (ids.to(like.device),)


def forward_of(module: nn.Module, part: str, given: tuple[Tensor, ...], foreign: bool) -> Forward:
    """One pass, by the calling convention of whoever wrote the module."""
    if part == "vae":
        if foreign:
            return lambda: module.decode(*given).sample
        return lambda: module.decode(*given)
    if not foreign:
        return lambda: module(*given)[0] if part.startswith("clip") else module(*given)
    if part == "mmdit":
        z, t, context, pooled = given
        return lambda: module(z, context, pooled, 1000 * t).sample
    if part == "t5":
        return lambda: module(*given).last_hidden_state
    return lambda: module(*given, output_hidden_states=True).hidden_states[-2]


def seconds(forward: Forward, device: torch.device) -> float:
    begin = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory(forward: Forward, device: torch.device) -> int:
    """Bytes of tensors alive at the peak of one pass, beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        forward()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)))


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product: what this machine gives at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: linear(a, b), device) for _ in range(10))
    return 2 * n**3 / best


def count_flops(forward: Forward) -> int:
    """Additions and multiplications of a pass, and of what it does backwards."""

    def by_onednn(x: tuple, weight: tuple, *_: object, **__: object) -> int:
        return 2 * prod(x) * weight[0]

    known = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        known = {torch.ops.mkldnn._linear_pointwise: by_onednn}
    # The counter knows the attention that has gradients.
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        forward()
    return counter.get_total_flops()
