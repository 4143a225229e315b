"""The grades of a class: which files to grade, and the table of results."""

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanosd3.exercises.grader.checker import Verdict
from nanosd3.exercises.grader.exercise import Exercise
from nanosd3.exercises.grader.hand_ins import SUFFIXES
from nanosd3.exercises.grader.predictions import plain

STATES = ("right", "wrong", "timed out", "refused", "not attempted")
NOT_GRADED = "not graded"  # for no fault of the file
SHOWN = 10  # names in a list


@dataclass(frozen=True)
class Row:
    """A file: its verdicts, in the order of the exercises, and why it is not graded, if so."""

    file: str
    verdicts: Sequence[Verdict]
    error: str = ""
    notes: Sequence[str] = ()
    predictions: str = ""  # "5 of 6"; empty where none were asked for

    @property
    def is_graded(self) -> bool:
        """False for a file without verdicts for no fault of its own, which has no score."""
        return all(v.status != NOT_GRADED for v in self.verdicts)


def failed_row(
    file: str, exercises: Sequence[Exercise], status: str, error: str, predictions: str = ""
) -> Row:
    """The row of a file that cannot be read ("refused"), or was not graded (NOT_GRADED)."""
    verdicts = [Verdict(e.name, status, 0, e.points, error) for e in exercises]
    return Row(file, verdicts, error, predictions=predictions)


def find_hand_ins(folder: Path, written: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files of answers in a folder and its subfolders, and the names of everything else there
    except the tables that are being `written`. Links to folders are not followed."""
    files, left_out = [], []
    tables = [path.resolve() for path in written]

    def unreadable(error: OSError) -> None:
        left_out.append(f"{Path(error.filename).relative_to(folder).as_posix()}/")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(place)
        entered = [n for n in folders if not is_machinery(n) and not (here / n).is_symlink()]
        skipped = [here / name for name in folders if name not in entered]
        left_out += [f"{path.relative_to(folder).as_posix()}/" for path in skipped]
        folders[:] = entered
        for name in names:
            path = here / name
            if path.suffix.lower() in SUFFIXES and not is_machinery(name) and not is_special(path):
                files.append(path)
            elif path.resolve() not in tables:
                left_out.append(path.relative_to(folder).as_posix())
    return sorted(files), sorted(left_out)


def is_machinery(name: str) -> bool:
    """Whether a name is one of the system's or of a program's, such as .ipynb_checkpoints."""
    return name.startswith(".") or name in ("__pycache__", "__MACOSX")


def is_special(path: Path) -> bool:
    """Whether a path is a pipe, a socket or a device, reading which might never end."""
    return path.exists() and not path.is_file()


def listed(names: Sequence[str]) -> str:
    """The first few names, for a line of text."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def states(rows: Sequence[Row], exercises: Sequence[Exercise]) -> list[Counter[str]]:
    """How often each state occurs, for each exercise."""
    return [Counter(row.verdicts[i].status for row in rows) for i in range(len(exercises))]


def to_csv(rows: Sequence[Row], exercises: Sequence[Exercise]) -> bytes:
    """The table: a row per file with the points of right answers and the states of others, and
    below it a row per state with the number of files in it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    head = ["file", "score", "out_of", "predictions", "error"]
    writer.writerow([*head, *(e.name for e in exercises), "notes"])
    out_of = sum(e.points for e in exercises)
    for row in rows:
        cells = [v.points if v.status == "right" else v.status for v in row.verdicts]
        score = sum(v.points for v in row.verdicts) if row.is_graded else ""
        notes = "; ".join(row.notes)
        first = [plain(row.file), score, out_of, row.predictions, plain(row.error)]
        writer.writerow([*first, *cells, plain(notes)])
    counts = states(rows, exercises)
    for state in STATES:
        writer.writerow(
            [f"(files: {state})", "", "", "", "", *(count[state] for count in counts), ""]
        )
    return buffer.getvalue().encode(errors="replace")


def to_text(rows: Sequence[Row], exercises: Sequence[Exercise]) -> str:
    """How many files have which state, for the exercises that anybody attempted."""
    lines = [" " * 22 + "".join(f"{state:>15}" for state in STATES)]
    untouched = []
    for exercise, count in zip(exercises, states(rows, exercises), strict=True):
        if count["not attempted"] == len(rows):
            untouched.append(exercise.name)
            continue
        lines.append(f"{exercise.name:22}" + "".join(f"{count[state]:15}" for state in STATES))
    if untouched:
        lines.append(f"attempted by nobody: {len(untouched)} ({listed(untouched)})")
    errors = [f"not graded: {row.error}" for row in rows if row.error]
    lines += errors[:SHOWN]
    if len(errors) > SHOWN:
        lines.append(f"and {len(errors) - SHOWN} more; see the column 'error'")
    return "\n".join(lines)
