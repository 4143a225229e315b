"""The PyTorch settings under which networks and images are made, whatever the caller's are.

A caller may have set another default dtype or device for its own tensors, or inference mode, for
good or for a while.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def usual_settings() -> Iterator[None]:
    """While open, tensors are made in float32, on the CPU and outside of inference mode, unless a
    call says otherwise: the caller's settings are put aside. Gradients stay on or off.

    As a decorator it keeps them out of a function's results: noise drawn in float64 is different
    noise, and nothing made in inference mode can be used in training.
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
