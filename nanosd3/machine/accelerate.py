"""The same networks, faster on a CPU and with less memory for the backward pass.

The model classes are plain PyTorch. `accelerate(model)` replaces some of a model's layers, in
place, with subclasses that compute the same function (up to the last bits of float32):

    Linear    float32 products through oneDNN where it is faster (matmul)
    MLP, Stream    cheap intermediate results are recomputed in the backward pass, not saved
    MLP, GatedMLP, Attention, ResBlock    without gradients, activations and norms overwrite inputs
    Encoder, Decoder, GroupNorm, Up    the autoencoder in channels-last memory (channels_last)

Importing the model gives the plain one; training, the pipeline and the benchmarks accelerate the
models they build. State dictionaries do not change. Without gradients, a forward hook must copy any
output it keeps: the next layer may overwrite it. Whole blocks are checkpointed
(`checkpoint_blocks`) and compiled (`compile_blocks`) on request.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils.checkpoint import checkpoint

from nanosd3.layers import MLP, modulate
from nanosd3.machine.channels_last import (
    ChannelsLastDecoder,
    ChannelsLastEncoder,
    ChannelsLastGroupNorm,
    ChannelsLastUp,
    InPlaceResBlock,
)
from nanosd3.machine.matmul import eager, linear
from nanosd3.mmdit import QKV, Attention, Modulation, Stream
from nanosd3.t5 import GatedMLP
from nanosd3.vae import Decoder, Encoder, ResBlock, Up

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides

tanh_gelu = partial(F.gelu, approximate="tanh")


def accelerate(model: nn.Module, keep_activations: bool = False) -> nn.Module:
    """Replace a model's layers with their faster versions, in place, and return the model.

    `keep_activations` turns off recomputation inside layers, for models whose blocks are
    checkpointed as a whole.
    """
    faster = FASTER if keep_activations else FASTER | RECOMPUTING
    for module in model.modules():
        module.__class__ = faster.get(type(module), type(module))
        if isinstance(module, Encoder | Decoder):
            convert_conv2d_weight_memory_format(module, torch.channels_last)
    return model


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Save only the inputs of blocks for the backward pass and recompute the rest, block by
    block."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile blocks in place with torch.compile, each by itself: equal blocks share the code."""
    for block in blocks:
        block.compile(backend=backend)


class FastLinear(nn.Linear):
    """nn.Linear through the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@contextmanager
def recomputed(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """While open, autograd does not save `output` = function(*inputs) but recomputes it in the
    backward pass.

    For an output that is large, cheap to compute, and a function of tensors saved anyway.
    """
    place, size, kept = output.data_ptr(), output.numel(), [x.detach() for x in inputs]

    def pack(saved: Tensor) -> Tensor | Layout:
        same = saved.data_ptr() == place and saved.numel() == size
        return (saved.shape, saved.stride()) if same else saved

    def unpack(packed: Tensor | Layout) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return function(*kept).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class RecomputingMLP(MLP):
    """An MLP that saves its hidden layer for the backward pass, but not its GELU."""

    def forward(self, x: Tensor) -> Tensor:
        if not eager():
            return super().forward(x)
        h = self.fc1(x)
        if not torch.is_grad_enabled():
            return self.fc2(torch.ops.aten.gelu_(h, approximate="tanh"))
        activation = tanh_gelu(h)
        with recomputed(activation, tanh_gelu, h):
            return self.fc2(activation)


class RecomputingStream(Stream):
    """A stream that saves the input of its modulated norms, but not the normalised tokens."""

    def modulated(self, x: Tensor, mod: Modulation) -> Tensor:
        if not (torch.is_grad_enabled() and eager()):
            return modulate(x, mod.shift, mod.scale)
        norm = partial(F.layer_norm, normalized_shape=x.shape[-1:], eps=1e-6)
        normed = norm(x)
        with recomputed(normed, norm, x):
            return torch.addcmul(mod.shift[:, None], normed, 1 + mod.scale[:, None])


class InPlaceAttention(Attention):
    """Attention that normalises queries and keys in place when no gradient is needed."""

    def project(self, x: Tensor) -> QKV:
        if torch.is_grad_enabled() or not eager():
            return super().project(x)
        q, k, v = self.heads(x)
        return None if q is None else q.copy_(self.ln_q(q)), k.copy_(self.ln_k(k)), v


class InPlaceGatedMLP(GatedMLP):
    """T5's MLP, with its activation in place when no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not eager():
            return super().forward(x)
        h = torch.ops.aten.gelu_(self.wi_0(x), approximate="tanh")
        return self.wo(h.mul_(self.wi_1(x)))


FASTER = {
    nn.Linear: FastLinear,
    Attention: InPlaceAttention,
    GatedMLP: InPlaceGatedMLP,
    Encoder: ChannelsLastEncoder,
    Decoder: ChannelsLastDecoder,
    nn.GroupNorm: ChannelsLastGroupNorm,
    ResBlock: InPlaceResBlock,
    Up: ChannelsLastUp,
}

RECOMPUTING = {MLP: RecomputingMLP, Stream: RecomputingStream}
