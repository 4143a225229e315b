"""Grade files of answers, each in a restricted process of its own.

Student code runs in a process of its own, sandbox.py, restricted from inside and with time limits
from outside; it gets inputs and leaves a record of outputs, and only that record is judged, here,
against the package. An answer that loops is stopped and the others go on; an answer that exits,
prints or patches changes nothing but its own record; and the reference values are out of reach,
since the package may be neither imported nor read (closed book).
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanosd3.errors import InputError
from nanosd3.exercises.grader.checker import Verdict, assess
from nanosd3.exercises.grader.exercise import Exercise
from nanosd3.exercises.grader.hand_ins import HandIn, read_hand_in
from nanosd3.exercises.grader.sandbox import PACKAGE

WORKER = Path(__file__).with_name("sandbox.py")

# Time limits in seconds
START_LIMIT = 120  # for Python and torch, on a busy machine
LOAD_LIMIT = 30  # for running the file itself
EXERCISE_LIMIT = 10
FILE_LIMIT = 300  # for one file, including restarts

# Sizes in bytes
MEMORY_LIMIT = 8 * 2**30  # of address space; torch alone takes about four GiB
RECORD_LIMIT = 2**26

# What Python, torch and their libraries need to start, on any system. HOME and APPDATA lead to
# packages installed for one user, which is where pip puts them when it may not write elsewhere.
ENVIRONMENT = (
    *("PATH", "LANG", "HOME", "SYSTEMROOT", "WINDIR", "APPDATA", "USERPROFILE", "USERNAME"),
    *("PROCESSOR_ARCHITECTURE", "NUMBER_OF_PROCESSORS"),
)


@dataclass(frozen=True)
class Failure:
    """Why an exercise has no record."""

    status: str  # of the verdict
    reason: str


def grade(file: Path, exercises: list[Exercise], open_book: bool = False) -> list[Verdict]:
    """Grade a file: one verdict per exercise. Raises InputError if the file cannot be read or
    compiled, or if no process can be started for it."""
    hand_in = read_hand_in(file, [e.name for e in exercises], open_book)
    with tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "answer.py").write_bytes(hand_in.source)
        cases = {
            e.name: {"cases": [c.arguments for c in e.drawn()], "differentiable": e.differentiable}
            for e in exercises
        }
        failed = {name: Failure("refused", reason) for name, reason in hand_in.refused.items()}
        end = time.monotonic() + FILE_LIMIT
        while left := [e for e in exercises if not is_done(folder, e.name, failed)]:
            if time.monotonic() > end:
                reason = f"the file as a whole took more than {FILE_LIMIT} s"
                fail(left, Failure("timed out", reason), failed)
                break
            torch.save({e.name: cases[e.name] for e in left}, folder / "cases.pt")
            run_worker(folder, left, open_book, failed)
        return [verdict_on(exercise, folder, failed, hand_in) for exercise in exercises]


def missing_limits() -> str:
    """What this system cannot limit while an answer runs, in words; "" if nothing."""
    try:
        import resource  # noqa: F401
    except ImportError:  # Windows
        return "memory and the size of files"
    return "memory" if sys.platform == "darwin" else ""


def is_done(folder: Path, name: str, failed: dict[str, Failure]) -> bool:
    return name in failed or is_file(folder / f"{name}.pt")


def is_file(path: Path) -> bool:
    """Whether it is a regular file, not a pipe, folder or link that an answer has created."""
    return path.is_file() and not path.is_symlink()


def run_worker(
    folder: Path, left: list[Exercise], open_book: bool, failed: dict[str, Failure]
) -> None:
    """Run the worker until all exercises are done, or until one times out or ends the process;
    that one gets its reason in `failed`."""
    for name in ("begun", "loaded", *(f"{e.name}.pt" for e in left)):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    process = start_worker(folder, open_book)

    def reached(name: str, seconds: float) -> bool:
        """Wait until the worker has written a file; False if it ends or time runs out."""
        end = time.monotonic() + seconds
        while not is_file(folder / name):
            if process.poll() is not None and not is_file(folder / name):
                return False
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    try:
        if not reached("begun", START_LIMIT):
            status = "still starting" if process.poll() is None else f"exit status {process.poll()}"
            raise InputError(
                f"the process that runs answers did not start within {START_LIMIT} s ({status}); "
                "grade again when the machine is less busy"
            )
        if not reached("loaded", LOAD_LIMIT):
            fail(left, why_stopped(process, LOAD_LIMIT, "running the file itself "), failed)
            return
        for exercise in left:
            if not reached(f"{exercise.name}.pt", EXERCISE_LIMIT):
                fail([exercise], why_stopped(process, EXERCISE_LIMIT), failed)
                return
        process.wait(timeout=EXERCISE_LIMIT)
    except subprocess.TimeoutExpired:  # everything is recorded; no need to wait longer
        pass
    finally:
        if hasattr(os, "killpg"):  # and its children
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def start_worker(folder: Path, open_book: bool) -> subprocess.Popen:
    """Start sandbox.py in its own session, with a minimal environment."""
    book = "open" if open_book else "closed"
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-E", "-P", str(WORKER), str(folder), PACKAGE, book, str(MEMORY_LIMIT)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def why_stopped(process: subprocess.Popen, seconds: int, what: str = "") -> Failure:
    if process.poll() is None:
        return Failure("timed out", f"{what}took more than {seconds} s and was stopped")
    return Failure("wrong", f"{what}ended the program; an answer must return its result")


def fail(exercises: list[Exercise], failure: Failure, failed: dict[str, Failure]) -> None:
    """Mark exercises as failed."""
    failed.update({exercise.name: failure for exercise in exercises})


def verdict_on(
    exercise: Exercise, folder: Path, failed: dict[str, Failure], hand_in: HandIn
) -> Verdict:
    if failure := failed.get(exercise.name):
        return Verdict(exercise.name, failure.status, 0, exercise.points, failure.reason)
    try:
        path = folder / f"{exercise.name}.pt"
        if path.stat().st_size > RECORD_LIMIT:
            reason = f"returned too much (more than {RECORD_LIMIT // 2**20} MiB over all tests)"
            return Verdict(exercise.name, "wrong", 0, exercise.points, reason)
        recorded = torch.load(path, weights_only=True)
    except Exception:  # an answer may have overwritten its record with anything
        recorded = {}
    verdict = assess(exercise, recorded)
    message = re.sub(r"\bline (\d+)(?=:)", lambda m: hand_in.place(int(m[1])), verdict.message)
    refused = re.search(r"(raised|stopped early with) ForbiddenError", message)
    return replace(verdict, message=message, status="refused" if refused else verdict.status)
