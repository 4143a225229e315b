"""Command lines: bad input gives one line and exit status 2, never a traceback."""

import argparse
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from nanosd3.errors import InputError, elided, shortened, shown
from nanosd3.machine.device import out_of_memory, torchrun_number


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError, one line without usage, and does not accept
    abbreviated options."""

    def __init__(self, name: str, description: str):
        super().__init__(name, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{shortened(message, 500)} (see --help)")


def unicode_text(text: str) -> str:
    """Text from a UTF-8 terminal, whatever the locale is set to; an argparse `type`."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {text!r}") from None


LARGEST_OPTION = 10**9  # anything more would run for years, or out of memory
MOST_IMAGES = 100_000  # per prompt, in one command


def positive(text: str, largest: int = LARGEST_OPTION) -> int:
    """Parse an integer of at least 1; an argparse `type`."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {shown(text)}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {shown(number)}")
    if number > largest:
        raise argparse.ArgumentTypeError(f"must be at most {largest}, got {shown(number)}")
    return number


def image_count(text: str) -> int:
    """Parse a number of images; an argparse `type`."""
    return positive(text, MOST_IMAGES)


def command_line(*words: object) -> str:
    """A command to copy into the shell, quoted where necessary."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def print_any_text() -> None:
    """Let stdout and stderr print characters that their encoding lacks, as escapes like \\u732b."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # they are None without a console on Windows
            stream.reconfigure(errors="backslashreplace")


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command line as `status_of` does.

    Under torchrun it exits the process immediately: during Python's shutdown, threads that still
    listen to other ranks might abort it.
    """
    status = status_of(main)
    if torchrun_number("RANK") is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def status_of(main: Callable[[], int | None]) -> int:
    """Run a command line and return its exit status.

    Bad input and insufficient memory give one line and status 2; Ctrl-C gives 130, or the `status`
    of the exception; none prints a traceback, whatever characters the streams can encode. Under
    torchrun only rank 0 prints to stdout.
    """
    if torchrun_number("RANK"):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    print_any_text()
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {elided(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else "\ninterrupted", file=sys.stderr)
        return getattr(stop, "status", 130)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        advice = "request fewer or smaller images at once, or choose a smaller --config"
        advice += " (for training: --weights, which leaves out autoencoder and text encoders; for "
        advice += "the transformer --accumulate, --checkpointing, --parallel fsdp)"
        print(f"error: out of memory; {advice}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head`: the reader is gone, so there is no one to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # such as a path that may not be accessed
        path = os.fsdecode(error.filename or "file")
        print(f"error: {elided(f'{path}: {error.strerror or error}')}", file=sys.stderr)
        return 2
