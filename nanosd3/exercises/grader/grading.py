"""Grade files of answers, each in a restricted process of its own.

Student code runs in a process of its own, sandbox.py, restricted from inside and with time limits
from outside; it gets inputs and leaves a record of outputs, and only that record is judged, here,
against the package. An answer that loops is stopped and the others go on; an answer that exits,
prints or patches changes nothing but its own record; and the reference values are out of reach,
since the package may be neither imported nor read (closed book).
"""

import re
import shutil
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
from nanosd3.exercises.grader.workers import START_LIMIT, Worker, did_not_start, start_worker

# Time limits in seconds
LOAD_LIMIT = 30  # for running the file itself
EXERCISE_LIMIT = 10
FILE_LIMIT = 300  # for one file, including restarts

RECORD_LIMIT = 2**26  # bytes
SPACE_NEEDED = 2**20  # bytes on the disk; with less, records may be missing


@dataclass(frozen=True)
class Failure:
    """Why an exercise has no record."""

    status: str  # of the verdict
    reason: str


def grade(file: Path, exercises: list[Exercise], open_book: bool = False) -> list[Verdict]:
    """Grade a file: one verdict per exercise. Raises InputError if the file cannot be read or
    compiled, if no process can be started for it, or if the disk is full."""
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
            try:
                torch.save({e.name: cases[e.name] for e in left}, folder / "cases.pt")
                run_worker(folder, left, open_book, failed)
            finally:  # whatever has failed
                check_space(folder)
        return [verdict_on(exercise, folder, failed, hand_in) for exercise in exercises]


def missing_limits() -> str:
    """What this system cannot limit while an answer runs, in words; "" if nothing."""
    try:
        import resource  # noqa: F401
    except ImportError:  # Windows
        return "memory and file sizes"
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
    worker = start_worker(folder, open_book)

    def reached(name: str, seconds: float) -> bool:
        """Wait until the worker has written a file; False if it ends or time runs out."""
        end = time.monotonic() + seconds
        while not is_file(folder / name):
            if worker.poll() is not None and not is_file(folder / name):
                return False
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    try:
        if not reached("begun", START_LIMIT):
            raise did_not_start(worker.poll())
        if not reached("loaded", LOAD_LIMIT):
            fail(left, why_stopped(worker, LOAD_LIMIT, "running the file itself "), failed)
            return
        for exercise in left:
            if not reached(f"{exercise.name}.pt", EXERCISE_LIMIT):
                fail([exercise], why_stopped(worker, EXERCISE_LIMIT), failed)
                return
        worker.wait(EXERCISE_LIMIT)  # everything is recorded; no need to wait longer
    finally:
        worker.stop()


def check_space(folder: Path) -> None:
    """Raise InputError if the disk is full: what failed then is no answer's fault."""
    if shutil.disk_usage(folder).free < SPACE_NEEDED:
        raise InputError(
            f"no space left on the disk with {folder.parent}; free some, or set TMPDIR"
        )


def why_stopped(worker: Worker, seconds: int, what: str = "") -> Failure:
    if worker.poll() is None:
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
