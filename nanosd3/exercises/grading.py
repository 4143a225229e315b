"""Grading files of answers: each in a process of its own that can do nothing but answer.

The file never meets the grader. It runs in worker.py, shut in, with time limits from outside; it
gets inputs and leaves a record of outputs, and only the record is judged, here, against the
package. So an answer that loops is stopped and the others go on, an answer that exits, prints or
patches changes nothing but its own record, and the reference's values are nowhere to be found
(the package itself may not be imported or read: closed book).
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

from nanosd3.exercises.base import Exercise
from nanosd3.exercises.checker import Verdict, assess
from nanosd3.exercises.worker import PACKAGE

SECONDS = 10  # for one exercise
LOADING = 30  # for the file itself
STARTING = 120  # for Python and torch, on a busy machine
TOTAL = 300  # for one file, with all its restarts
MEMORY = 8 * 2**30  # of addresses; torch alone takes some four
LARGEST = 2**26  # bytes of a record
WORKER = Path(__file__).with_name("worker.py")


def grade(file: Path, exercises: list[Exercise], open_book: bool = False) -> list[Verdict]:
    """The verdict on each exercise. Raises OSError if the file cannot be read."""
    with tempfile.TemporaryDirectory(prefix="grading-") as name:
        folder = Path(name)
        shutil.copyfile(file, folder / "answer.py")
        cases = {
            e.name: {"cases": [c.arguments for c in e.drawn()], "differentiable": e.differentiable}
            for e in exercises
        }
        failed: dict[str, str] = {}
        end = time.monotonic() + TOTAL
        while left := [e for e in exercises if not answered(folder, e.name, failed)]:
            if time.monotonic() > end:
                fail(left, f"the file as a whole took more than {TOTAL} s", failed)
                break
            torch.save({e.name: cases[e.name] for e in left}, folder / "cases.pt")
            run_worker(folder, left, open_book, failed)
        return [verdict_on(exercise, folder, failed) for exercise in exercises]


def answered(folder: Path, name: str, failed: dict[str, str]) -> bool:
    return name in failed or is_file(folder / f"{name}.pt")


def is_file(path: Path) -> bool:
    """Whether it is one, and no pipe, folder or link that an answer has put there."""
    return path.is_file() and not path.is_symlink()


def run_worker(folder: Path, left: list[Exercise], open_book: bool, failed: dict[str, str]) -> None:
    """Run the worker until it has answered all, or one exercise takes too long or ends it; that
    one then counts as answered, with the reason in `failed`."""
    for name in ("begun", "loaded", *(f"{e.name}.pt" for e in left)):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    command = [sys.executable, "-I", str(WORKER), str(folder), PACKAGE,
               "open" if open_book else "closed", str(MEMORY)]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "SYSTEMROOT")}
    clean |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    process = subprocess.Popen(
        command, cwd=folder, env=clean, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def reached(name: str, seconds: float) -> bool:
        """Wait for a file of the worker."""
        end = time.monotonic() + seconds
        while not is_file(folder / name):
            if process.poll() is not None and not is_file(folder / name):
                return False
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    try:
        if not reached("begun", STARTING) or not reached("loaded", LOADING):
            reason = "running the file, before any exercise, " + why(process, LOADING)
            fail(left, reason, failed)
            return
        for exercise in left:
            if not reached(f"{exercise.name}.pt", SECONDS):
                fail([exercise], why(process, SECONDS), failed)
                return
        process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:  # all is answered; what it still does is of no interest
        pass
    finally:
        with contextlib.suppress(OSError, AttributeError):  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def why(process: subprocess.Popen, seconds: int) -> str:
    if process.poll() is None:
        return f"took more than {seconds} s and was stopped"
    return "ended the program; an answer returns its result"


def fail(exercises: list[Exercise], reason: str, failed: dict[str, str]) -> None:
    """Mark exercises as answered, by nothing."""
    failed.update({exercise.name: reason for exercise in exercises})


def verdict_on(exercise: Exercise, folder: Path, failed: dict[str, str]) -> Verdict:
    if exercise.name in failed:
        return Verdict(exercise.name, "wrong", 0, exercise.points, failed[exercise.name])
    try:
        path = folder / f"{exercise.name}.pt"
        if path.stat().st_size > LARGEST:
            return Verdict(exercise.name, "wrong", 0, exercise.points, "returned far too much")
        found = torch.load(path, weights_only=True)
    except Exception:  # whatever an answer wrote over its record
        found = {}
    return assess(exercise, found)
