"""Ctrl-C in the middle of a training."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nanosd3.training import loop


@contextmanager
def interrupted_after(last: int) -> Iterator[None]:
    """While open, Ctrl-C comes in the step `last` of a training with a moving average."""
    original = loop.update_ema

    def stop(ema, module, step, decay):
        original(ema, module, step, decay)
        if step == last:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update_ema", stop)
        yield
