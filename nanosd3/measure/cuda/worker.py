"""A worker process that runs checks.

If a check takes too long or leaves the GPU in an error state, the process is killed and the next
check gets a new one.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from nanosd3.machine.device import out_of_memory, set_up
from nanosd3.measure.cuda.result import Check, CheckState, Row, Setting, Unavailable

START, GRACE = 120, 10  # seconds for the process to start and to exit


def work(connection: Connection, setting: Setting, log: Path, threads: int | None) -> None:
    """Run the checks that are received; send each row, then the state and the reason."""
    with contextlib.suppress(OSError, AttributeError):  # a group, to be killed with its children
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    with open(log, "a", encoding="utf-8") as file:  # libraries bypass sys.stdout
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    set_up(threads)
    connection.send(("ready", ""))
    while check := connection.recv():
        print(f"--- {check.name}", flush=True)
        connection.send(outcome(check, setting, connection))
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def outcome(check: Check, setting: Setting, connection: Connection) -> tuple[CheckState, str]:
    """Run a check and send its rows; return its state and the reason for it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `resume` interrupts training
    missed = wrong = 0
    try:
        for row in check.rows(setting):
            missed += not row.met
            wrong += not row.met and not row.goal
            connection.send(("row", row))
        setting.synchronize()
    except Unavailable as reason:
        return "skipped", str(reason)
    except Exception as error:
        if out_of_memory(error):
            return "skipped", "out of memory"
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if wrong:
        return "wrong", f"wrong answers: {wrong}"
    return ("missed", f"missed goals: {missed}") if missed else ("passed", "")


class Worker:
    """The worker process, as seen from the main process."""

    def __init__(
        self, setting: Setting, log: Path, threads: int | None, environment: dict[str, str]
    ):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.environment = environment
        self.connection, child = context.Pipe()
        self.process = context.Process(target=work, args=(child, setting, log, threads))
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        child.close()
        self.ready = self.busy = False

    def run(self, check: Check, seconds: float) -> Iterator[tuple[CheckState, str] | Row]:
        """Run a check: yield its rows, then its state and the reason. Stop waiting after the time
        limit, which excludes the start of the process."""
        end, self.busy = time.monotonic() + seconds, True
        try:
            if not self.ready and self.connection.poll(START):
                self.connection.recv()
                self.ready, end = True, time.monotonic() + seconds
            self.connection.send(check)
            while self.connection.poll(max(0.0, end - time.monotonic())):
                kind, content = self.connection.recv()
                if kind != "row":
                    self.busy = False
                    yield kind, content
                    return
                yield content
            yield "failed", f"stopped after {seconds:.0f} s"
        except (EOFError, OSError):
            self.busy = False
            self.process.join(5)
            yield "failed", f"the worker process exited with status {self.process.exitcode}"

    def close(self) -> None:
        """End the worker and all its children; immediately if it is busy."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(0 if self.busy else GRACE)
        if self.process.pid and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()
