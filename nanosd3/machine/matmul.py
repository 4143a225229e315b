"""Matrix products through the faster library.

A transformer spends nearly all its time in matrix products. This module makes them faster and
changes the results only in the last bits: `linear` could be replaced by F.linear. A reader
interested in the model can skip it.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction, FunctionCtx


@cache
def onednn_multiplies_faster() -> bool:
    """Whether to send float32 products to oneDNN instead of MKL, PyTorch's default.

    On AMD processors with AVX-512, MKL reaches only half of oneDNN's speed (200 against
    400 GFLOP/s). Elsewhere there is nothing to gain.
    """
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and wide and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def eager() -> bool:
    """Whether operations run in plain eager mode: no torch.compile, torch.func transform,
    forward-mode differentiation or autocast, all of which need PyTorch's standard operations."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_autocast_enabled("cuda"):
        return False
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear through oneDNN: x (..., in), weight (out, in); float32 on CPU, without gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """`onednn_linear` with gradients, which are oneDNN products too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: BackwardCFunction, g: Tensor) -> tuple[Tensor | None, ...]:
        saved: Sequence[Tensor] = ctx.saved_tensors  # PyTorch's stubs say there is only one
        needed: Sequence[bool] = ctx.needs_input_grad
        x, weight = saved
        g_rows, x_rows = (a.reshape(-1, a.shape[-1]) for a in (g, x))  # (tokens, out), (tokens, in)
        for_x, for_weight, for_bias = needed
        return (
            differentiable(g, weight.T) if for_x else None,
            differentiable(g_rows.T, x_rows.T) if for_weight else None,
            g_rows.sum(0) if for_bias else None,
        )


def differentiable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`onednn_linear` with gradients if enabled: in a backward pass, only with create_graph."""
    multiply = OneDNNLinear.apply if torch.is_grad_enabled() else onednn_linear
    return multiply(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear through the faster library: x (..., in), weight (out, in), bias (out,)."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() == 0
    if plain or not (eager() and onednn_multiplies_faster()):
        return F.linear(x, weight, bias)
    return differentiable(x, weight, bias)


def multiplication_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: this machine's practical peak."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: linear(a, b), device) for _ in range(10))
    return 2 * n**3 / best


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Duration of a call in seconds, including the GPU work it launches."""
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
