"""The settings of PyTorch under which networks and images are made, whatever the caller's are.

Whoever calls may have set another default dtype or device for tensors of its own, or inference
mode, for good or for a while.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def usual_settings() -> Iterator[None]:
    """While open, tensors are made in float32, on the CPU and outside of inference mode, unless a
    call says otherwise: what the caller has set is put aside. Gradients stay on or off.

    As a decorator it keeps that out of a function's results: noise drawn in float64 is other noise,
    and nothing that was made in inference mode can be trained with.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which turns gradients on
            stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
