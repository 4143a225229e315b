"""Start the processes that run files of answers: through fork_server.py where possible, elsewhere
each on its own."""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nanosd3.errors import InputError
from nanosd3.exercises.grader.recording import PACKAGE

PROGRAM = Path(__file__).with_name("sandbox.py")
FORK_SERVER = Path(__file__).with_name("fork_server.py")
START_LIMIT = 120  # seconds for Python and torch, on a busy machine
MEMORY_LIMIT = 8 * 2**30  # bytes of address space; torch alone takes about four GiB

# What Python, torch and their libraries need to start, on any system. HOME and APPDATA lead to
# packages installed for one user, which is where pip puts them when it may not write elsewhere.
ENVIRONMENT = (
    *("PATH", "LANG", "HOME", "SYSTEMROOT", "WINDIR", "APPDATA", "USERPROFILE", "USERNAME"),
    *("PROCESSOR_ARCHITECTURE", "NUMBER_OF_PROCESSORS", "LD_LIBRARY_PATH"),
)
# Plots need no screen, and nothing is compiled: that would take minutes, and a compiler.
SETTINGS = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "TORCH_COMPILE_DISABLE": "1"}


class Worker:
    """A process that runs a file of answers."""

    def __init__(self, pid: int, poll: Callable[[], int | None], kill: Callable[[], None]):
        self.pid = pid
        self.poll_process, self.kill_process = poll, kill
        self.status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.status is None:
            self.status = self.poll_process()
        return self.status

    def wait(self, seconds: float) -> None:
        """Wait until it ends, but no longer than this."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)

    def stop(self) -> None:
        """End it, and its children."""
        with contextlib.suppress(OSError):
            if self.status is None:
                self.kill_process()  # so that it starts no more, and while it has no group yet
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(InputError):  # a server that failed knows nothing of it
            self.wait(START_LIMIT)


class ForkServer:
    """A running fork_server.py. Threads may share it."""

    def __init__(self) -> None:
        pipe, folder = subprocess.PIPE, Path(tempfile.gettempdir())
        self.process = start_python([FORK_SERVER], folder, {}, pipe)
        self.turn = threading.Lock()
        self.failed = False
        self.owner = os.getpid()
        atexit.register(self.close)

    def ask(self, *request: str | int) -> int | None:
        """The reply to a request. Raises InputError if there is none."""
        to, replies = self.process.stdin, self.process.stdout
        assert to and replies
        with self.turn:
            if self.failed:
                raise did_not_start(self.process.poll())
            try:
                to.write(json.dumps(request).encode() + b"\n")
                to.flush()
                if not select.select([replies], [], [], START_LIMIT)[0]:
                    raise TimeoutError
                reply = json.loads(replies.readline())
            except BaseException as error:
                self.failed = True  # a late reply would pass for that to the next request
                if not isinstance(error, OSError | ValueError):
                    raise
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1)
                raise did_not_start(self.process.poll()) from error
        if isinstance(reply, str):
            raise InputError(f"no process can be started for the answers ({reply}); grade again")
        return reply

    def start(self, arguments: list[str]) -> Worker:
        pid = self.ask("start", *arguments)
        assert pid is not None
        kill = partial(os.kill, pid, signal.SIGKILL)
        return Worker(pid, partial(self.ask, "poll", pid), kill)

    def is_usable(self) -> bool:
        """Whether it runs, and is this process's: a fork of the process that started it would read
        that one's replies."""
        return self.is_own() and not self.failed and self.process.poll() is None

    def is_own(self) -> bool:
        return self.owner == os.getpid()

    def close(self) -> None:
        atexit.unregister(self.close)
        if self.is_own():
            self.process.kill()
            self.process.communicate()


_server: list[ForkServer] = []  # the one in use, if any
_starting = threading.Lock()


def fork_server() -> ForkServer:
    """The server of this process, started at its first use."""
    with _starting:
        if _server and not _server[0].is_usable():
            _server.pop().close()
        if not _server:
            _server.append(ForkServer())
        return _server[0]


def start_worker(folder: Path, open_book: bool) -> Worker:
    """Run the answers in a folder in a session of their own. Raises InputError if no process can be
    started."""
    arguments = [str(folder), PACKAGE, "open" if open_book else "closed", str(MEMORY_LIMIT)]
    if hasattr(os, "fork") and sys.platform != "darwin":  # libraries of macOS do not survive a fork
        return fork_server().start(arguments)
    environment = {"TMPDIR": str(folder), "MPLCONFIGDIR": str(folder)}
    process = start_python([PROGRAM, *arguments], folder, environment, subprocess.DEVNULL)
    return Worker(process.pid, process.poll, process.kill)


def start_python(
    command: Sequence[str | Path], folder: Path, environment: dict[str, str], streams: int
) -> subprocess.Popen:
    """Start a Python program in a folder, in a session of its own and with a minimal environment;
    `streams` are its input and output, as `subprocess` names them."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    kept["PYTHONPATH"] = os.pathsep.join(libraries())
    return subprocess.Popen(
        [sys.executable, "-P", *map(str, command)],
        cwd=folder,
        env=kept | SETTINGS | environment,
        stdin=streams,
        stdout=streams,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def libraries() -> list[str]:
    """The folders in PYTHONPATH, from which torch may come, but for the one of this package."""
    own = os.path.dirname(os.path.realpath(PACKAGE))
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(f) for f in folders if f and os.path.realpath(f) != own]


def did_not_start(status: int | None) -> InputError:
    """The error for a process that has ended too early, or has not begun."""
    if status is None:
        return InputError(
            f"the process that runs answers did not start within {START_LIMIT} s; grade again when "
            "the machine is less busy"
        )
    return InputError(
        f"the process that runs answers has ended with exit status {status}; grade again"
    )
