"""Command line for the exercises.

python -m nanosd3.exercises list
python -m nanosd3.exercises start hw.py --only flow             write a file of stubs
python -m nanosd3.exercises grade hw.py                         print a table of verdicts
python -m nanosd3.exercises grade-all FOLDER --csv grades.csv   one row per file
"""

import csv
import inspect
import io
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nanosd3.cli import Parser, run_main
from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES, MARKS
from nanosd3.exercises.grader.checker import Verdict
from nanosd3.exercises.grader.exercise import Exercise
from nanosd3.exercises.grader.grading import grade
from nanosd3.machine.device import cores
from nanosd3.storage.files import write_file


def select(only: list[str]) -> list[Exercise]:
    """The exercises with these names or topics, or all. Raises InputError for unknown names."""
    topics = {entry.topic for entry in EXERCISES.values()}
    for name in only:
        if name not in EXERCISES and name not in topics:
            raise InputError(
                f"--only {name}: no such exercise or topic; topics are "
                f"{', '.join(sorted(topics))}; `list` shows all exercises"
            )
    return [e for e in EXERCISES.values() if not only or e.name in only or e.topic in only]


def stub(exercise: Exercise) -> str:
    """The function to fill in: signature, task, and the specification as a comment."""
    task = exercise.task.replace("\n", "\n    ")
    specification = inspect.getsource(exercise.specification).rstrip().splitlines()
    lines = [
        exercise.signature,
        f'    """{task}\n    """',
        f"    # Points: {exercise.points}. The specification, in plain loops:",
        *(f"    # {line}".rstrip() for line in specification),
        '    raise NotImplementedError("your code here")',
    ]
    return "\n".join(lines)


def start(file: Path, only: list[str]) -> None:
    """Write a file of stubs."""
    if file.exists():
        raise InputError(f"{file}: already exists; choose another name")
    head = (
        '"""Answers. Fill in any functions, in any order, then run\n\n'
        f"    python -m nanosd3.exercises grade {file.name}\n\n"
        "The specifications say what to compute, but slowly, and would not pass themselves: an\n"
        "answer works on whole tensors, lets gradients through, does not modify its inputs, and\n"
        'returns results of the dtype and on the device of its inputs.\n"""\n\n'
        "import math\nfrom collections.abc import Callable\n\n"
        "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor"
    )
    write_file(file, ("\n\n\n".join([head, *map(stub, select(only))]) + "\n").encode())
    print(f"wrote {file}")


def check_readable(file: Path) -> None:
    """Raise InputError if a file cannot be read or compiled."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about the student's style
            compile(file.read_bytes(), str(file), "exec")  # bytes: it may declare its encoding
    except SyntaxError as error:
        line = f"line {error.lineno}: " if error.lineno else ""
        raise InputError(f"{file}: {line}{error.msg}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, MemoryError, RecursionError) as error:
        reason = type(error).__name__
        raise InputError(f"{file}: cannot be compiled ({reason}); simplify it") from None


def summary(verdicts: list[Verdict]) -> dict:
    """The output of --json."""
    return {
        "score": sum(v.points for v in verdicts),
        "out_of": sum(v.out_of for v in verdicts),
        "exercises": [vars(v) for v in verdicts],
    }


def show(verdicts: list[Verdict]) -> None:
    """Print a table of verdicts and the score."""
    for v in verdicts:
        print(f"{MARKS[v.status]} {v.name:22} {v.points:2}/{v.out_of:<2}  {v.message}")
    total = summary(verdicts)
    print(f"score: {total['score']} of {total['out_of']}")


def grade_all(folder: Path, target: Path, only: list[str], open_book: bool) -> None:
    """Grade all files in a folder and write a CSV table with one row per file."""
    files = sorted(folder.glob("*.py")) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: not a folder with files of answers (*.py)")
    if target.is_dir():
        raise InputError(f"--csv {target}: is a folder; name a file")
    exercises = select(only)

    def row(file: Path) -> list:
        name = file.name.encode(errors="replace").decode()
        name = f"'{name}" if name[0] in "=+-@" else name  # not a spreadsheet formula
        try:
            check_readable(file)
            verdicts = grade(file, exercises, open_book)
        except Exception as error:  # one bad file must not stop the rest
            out_of = sum(e.points for e in exercises)
            return [name, 0, out_of, f"{error}", *[0] * len(exercises)]
        total = summary(verdicts)
        return [name, total["score"], total["out_of"], "", *(v.points for v in verdicts)]

    with ThreadPoolExecutor(cores()) as pool:
        rows = list(tqdm(pool.map(row, files), "grading", total=len(files)))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["file", "score", "out_of", "error", *(e.name for e in exercises)])
    writer.writerows(rows)
    write_file(target, buffer.getvalue().encode(errors="replace"))
    print(f"graded {len(files)} files, wrote {target}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m nanosd3.exercises", "Self-grading exercises.")
    add = parser.add_argument
    add("command", choices=("list", "start", "grade", "grade-all"))
    add("path", type=Path, nargs="?", help="file of answers; grade-all: a folder of them")
    add("--only", nargs="+", default=[], metavar="NAME", help="topics or exercises (default: all)")
    add("--open-book", action="store_true", help="grade, grade-all: let answers import the package")
    add("--json", action="store_true", help="grade: print the score and all verdicts as JSON")
    add("--csv", type=Path, help="grade-all: the table to write (required)")
    args = parser.parse_args(arguments)
    if args.command == "list":
        for e in select(args.only):
            print(f"{e.topic:12}{e.name:22}{e.points:2} points, {'*' * e.difficulty}")
        return 0
    if args.path is None:
        raise InputError(f"{args.command} needs a path (see --help)")
    if bool(args.csv) != (args.command == "grade-all"):
        raise InputError("--csv FILE is required by grade-all and not used by other commands")
    if args.command == "start":
        start(args.path, args.only)
    elif args.command == "grade":
        check_readable(args.path)
        verdicts = grade(args.path, select(args.only), args.open_book)
        print(json.dumps(summary(verdicts))) if args.json else show(verdicts)
    else:
        grade_all(args.path, args.csv, args.only, args.open_book)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
