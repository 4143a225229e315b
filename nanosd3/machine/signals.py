"""Ctrl-C and SIGTERM: stop between two steps, with everything saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM, once everything is saved.

    `status` is the exit status: 130 after Ctrl-C, but 0 after SIGTERM, because that is how a
    cluster reclaims its machines, and a clean shutdown counts as success.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.status = 0 if signum == signal.SIGTERM else 130


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """While open, Ctrl-C and SIGTERM only set a flag.

    Yields a function that returns the signal's number, or 0; the training loop polls it between
    steps. A second signal interrupts immediately. Outside the main thread, which alone can handle
    signals, nothing changes.
    """
    received = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def handler(signum: int, frame: object) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = signum

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for signum, previous_handler in previous.items():
            signal.signal(signum, previous_handler)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """While open, SIGTERM stops the program as Ctrl-C does, but with exit status 0.

    For the code around the training loops, where there is no step to finish first: everything
    completed so far is already on disk.
    """

    def handler(signum: int, frame: object) -> None:
        raise Interrupted("stopped; rerun the same command to resume", signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
