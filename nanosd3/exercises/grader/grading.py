"""Grade files of answers, each in a restricted process of its own.

Student code never meets the grader. It runs in sandbox.py, restricted from inside and with time
limits from outside; it gets inputs and leaves a record of outputs, and only that record is judged,
here, against the package. An answer that loops is stopped and the others go on; an answer that
exits, prints or patches changes nothing but its own record; and the reference values are out of
reach, since the package may be neither imported nor read (closed book).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanosd3.exercises.grader.checker import Verdict, assess
from nanosd3.exercises.grader.exercise import Exercise
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


def grade(file: Path, exercises: list[Exercise], open_book: bool = False) -> list[Verdict]:
    """Grade a file: one verdict per exercise. Raises OSError if the file cannot be read."""
    with tempfile.TemporaryDirectory(prefix="grading-") as name:
        folder = Path(name)
        shutil.copyfile(file, folder / "answer.py")
        cases = {
            e.name: {"cases": [c.arguments for c in e.drawn()], "differentiable": e.differentiable}
            for e in exercises
        }
        failed: dict[str, str] = {}  # why, by exercise
        end = time.monotonic() + FILE_LIMIT
        while left := [e for e in exercises if not is_done(folder, e.name, failed)]:
            if time.monotonic() > end:
                fail(left, f"the file as a whole took more than {FILE_LIMIT} s", failed)
                break
            torch.save({e.name: cases[e.name] for e in left}, folder / "cases.pt")
            run_worker(folder, left, open_book, failed)
        return [verdict_on(exercise, folder, failed) for exercise in exercises]


def is_done(folder: Path, name: str, failed: dict[str, str]) -> bool:
    return name in failed or is_file(folder / f"{name}.pt")


def is_file(path: Path) -> bool:
    """Whether it is a regular file, not a pipe, folder or link that an answer has created."""
    return path.is_file() and not path.is_symlink()


def run_worker(folder: Path, left: list[Exercise], open_book: bool, failed: dict[str, str]) -> None:
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
        if not reached("begun", START_LIMIT) or not reached("loaded", LOAD_LIMIT):
            reason = "running the file, before any exercise, " + why_stopped(process, LOAD_LIMIT)
            fail(left, reason, failed)
            return
        for exercise in left:
            if not reached(f"{exercise.name}.pt", EXERCISE_LIMIT):
                fail([exercise], why_stopped(process, EXERCISE_LIMIT), failed)
                return
        process.wait(timeout=EXERCISE_LIMIT)
    except subprocess.TimeoutExpired:  # everything is recorded; no need to wait longer
        pass
    finally:
        with contextlib.suppress(OSError, AttributeError):  # and its children
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def start_worker(folder: Path, open_book: bool) -> subprocess.Popen:
    """Start sandbox.py in its own session, with a minimal environment."""
    book = "open" if open_book else "closed"
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "SYSTEMROOT")}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-I", str(WORKER), str(folder), PACKAGE, book, str(MEMORY_LIMIT)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def why_stopped(process: subprocess.Popen, seconds: int) -> str:
    if process.poll() is None:
        return f"took more than {seconds} s and was stopped"
    return "ended the program; an answer must return its result"


def fail(exercises: list[Exercise], reason: str, failed: dict[str, str]) -> None:
    """Mark exercises as failed."""
    failed.update({exercise.name: reason for exercise in exercises})


def verdict_on(exercise: Exercise, folder: Path, failed: dict[str, str]) -> Verdict:
    if exercise.name in failed:
        return Verdict(exercise.name, "wrong", 0, exercise.points, failed[exercise.name])
    try:
        path = folder / f"{exercise.name}.pt"
        if path.stat().st_size > RECORD_LIMIT:
            reason = f"returned too much (more than {RECORD_LIMIT // 2**20} MiB over all tests)"
            return Verdict(exercise.name, "wrong", 0, exercise.points, reason)
        recorded = torch.load(path, weights_only=True)
    except Exception:  # an answer may have overwritten its record with anything
        recorded = {}
    return assess(exercise, recorded)
