"""What a fair comparison needs: one model in this code and in diffusers, on the same weights and
inputs, a step of training either, and how to measure memory and arithmetic.

Memory is that of all tensors alive at the peak, which the profiler tells on CPU and the allocator
on a GPU. Arithmetic is counted in FLOP and compared with the fastest matrix product of the machine
(products.multiplication_speed).
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nanosd3.accelerate import accelerate
from nanosd3.audit import on_meta
from nanosd3.config import Config
from nanosd3.export import diffusers_state, part_config
from nanosd3.loop import CLIP_NORM
from nanosd3.parts import stored
from nanosd3.runtime import InputError
from nanosd3.text import ENCODERS

Forward = Callable[[], Tensor]


def randomly_filled(
    config: Config, part: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A part, accelerated, with weights of a size at which signals neither die nor explode."""
    module = accelerate(on_meta(config, part)).to_empty(device=device).to(dtype)
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


def with_depth(config: Config, depth: int) -> Config:
    """The config with another depth of the transformer, and so another width."""
    dual = tuple(i for i in config.mmdit.dual_attention if i < depth)
    return replace(config, mmdit=replace(config.mmdit, depth=depth, dual_attention=dual))


def with_layers(config: Config, layers: int) -> Config:
    """The config with text encoders of at most so many layers."""
    encoders = {name: getattr(config.text, name) for name in ENCODERS}
    few = {n: replace(e, layers=min(layers, e.layers)) for n, e in encoders.items()}
    return replace(config, text=replace(config.text, **few))


def side_of(config: Config, size: int) -> int:
    """Patches along a side of `size` pixels, padding included. Raises InputError for a size that
    the transformer does not take."""
    step = config.vae.factor * config.mmdit.patch_size
    if size % step or size > config.mmdit.grid * step:
        raise InputError(f"--size {size}: sizes of {config.name} go in steps of {step} up to "
                         f"{config.mmdit.grid * step}")  # fmt: skip
    return size // step


def text_tokens(config: Config) -> int:
    return config.text.clip_l.length + config.text.t5.length


def inputs(config: Config, part: str, size: int, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """What a part is given: latents and text for images of `size`, batch as with guidance."""
    text, mmdit = config.text, config.mmdit
    side = side_of(config, size) * mmdit.patch_size
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draw).to(like)

    latents = random(mmdit.latent_channels, side, side)
    if part == "mmdit":
        context, pooled = random(text_tokens(config), mmdit.context_dim), random(mmdit.pooled_dim)
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


def training_step(model: nn.Module, forward: Forward, target: Tensor) -> Callable[[], Tensor]:
    """One step as the loop makes it: forward, loss, backward, clipped gradient, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.99), fused=True)

    def step() -> Tensor:
        loss = (forward() - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


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
