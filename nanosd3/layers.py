"""The parts an MMDiT block is made of.

Everything here is small on purpose: a linear layer, a norm, a modulation, an MLP, two embedders,
one attention call. The text encoders share Linear and RMSNorm and nothing else: they have
conventions of their own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

HEAD_DIM = 64  # SD3's heads are all 64 wide: depth d means width 64 d and d heads
TIMESTEP_SCALE = 1000  # t in [0, 1] becomes 0..1000 here and nowhere else
TIMESTEP_FEATURES = 256


@cache
def onednn_multiplies_faster() -> bool:
    """Whether float32 products should go to oneDNN instead of MKL, which PyTorch takes by itself.

    MKL leaves half of AVX-512's speed unused on processors that are not Intel's (measured on AMD:
    200 against 400 GFLOP/s). Elsewhere there is nothing to gain.
    """
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and wide and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def eager() -> bool:
    """Whether operations run as they are written: no compiler, no function transform (torch.func),
    no forward-mode derivative is at work. Those know PyTorch's own operations best."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias, by oneDNN; float32 on CPU, no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`product`, whose gradients are products too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g_rows, x_rows = (a.reshape(-1, a.shape[-1]) for a in (g, x))  # (tokens, out), (tokens, in)
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(g, weight.T) if for_x else None,
            product(g_rows.T, x_rows.T) if for_weight else None,
            g_rows.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias: F.linear by the faster library."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() == 0
    if plain or not (eager() and onednn_multiplies_faster()):
        return F.linear(x, weight, bias)
    multiply = Product.apply if torch.is_grad_enabled() else product
    return multiply(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, multiplied by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@contextmanager
def recomputed(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """While open, `output` = function(*inputs) is not kept for gradients, but computed again when
    they are taken: for what is cheap to compute, large, and made of what is kept anyway."""
    if not (torch.is_grad_enabled() and eager()):
        yield
        return
    place, size, kept = output.data_ptr(), output.numel(), [x.detach() for x in inputs]

    def pack(saved: Tensor) -> Tensor | tuple:
        same = saved.data_ptr() == place and saved.numel() == size
        return (saved.shape, saved.stride()) if same else saved

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return function(*kept).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), times a learned weight: LayerNorm without mean and bias.

    On queries and keys (each head's 64 features) it bounds the attention logits; without it
    they grow in long bfloat16 runs until the softmax saturates (paper, section 5.3.2).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then x (1 + scale) + shift; x (B, L, D), others (B, D).

    This is adaLN: what a LayerNorm would have learned once, the timestep and the pooled text
    decide for every image (DiT, arXiv 2212.09748, section 3.2).
    """

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    normed = norm(x)
    with recomputed(normed, norm, x):
        return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation; where no gradient is asked for, in the memory of x."""
    if torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    return torch.ops.aten.gelu_(x, approximate="tanh")


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear, with a hidden layer four times as wide."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        a = gelu(h)
        with recomputed(a, partial(F.gelu, approximate="tanh"), h):
            return self.fc2(a)


def timestep_embedding(t: Tensor) -> Tensor:
    """Cosines, then sines, of 1000 t at 128 frequencies from 1 down to 1/10000; (B, 256).

    The slowest turns by 0.1 radian over all of time, the fastest 160 times. Without the factor
    1000 all but a few would stand still: the commonest mistake in reimplementations.
    """
    half = TIMESTEP_FEATURES // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
    angle = (t.float() * TIMESTEP_SCALE)[:, None] * frequency  # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: brings time features or the pooled text to the model's width."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(features, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def split_heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(B, L, parts*D), all of q, then of k, then of v, to `parts` tensors (B, heads, L, 64)."""
    B, L, _ = x.shape
    return x.view(B, L, parts, -1, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / 8) v over (B, heads, L, 64), heads joined again: (B, L, D).

    No mask: padded text takes part, as it did when the official models were trained.
    """
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
