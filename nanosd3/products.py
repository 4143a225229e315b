"""Matrix products by the faster library.

Nearly all the time of a transformer is products. This file changes how long they take, never the
numbers (but for the last bits): `linear` could be F.linear. It is no part of the lesson.
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx


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
    no forward-mode derivative, no autocast is at work. Those know PyTorch's own operations best."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_autocast_enabled("cuda"):
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


def multiplication_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product: what this machine gives at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: linear(a, b), device) for _ in range(10))
    return 2 * n**3 / best


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with all that it set going on a GPU."""
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
