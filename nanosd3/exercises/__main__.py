"""The exercises at a terminal.

python -m nanosd3.exercises list
python -m nanosd3.exercises start hw.py --only flow     a file of stubs to fill in
python -m nanosd3.exercises grade hw.py                 a table of what came of it
python -m nanosd3.exercises grade-all FOLDER --csv grades.csv
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

from nanosd3.checkpoint import write_file
from nanosd3.exercises import EXERCISES, MARKS
from nanosd3.exercises.base import Exercise
from nanosd3.exercises.checker import Verdict
from nanosd3.exercises.grading import grade
from nanosd3.runtime import InputError, Parser, cores, run_main


def chosen(only: list[str]) -> list[Exercise]:
    """The exercises of these names or topics, or all. Raises InputError for unknown ones."""
    topics = {entry.topic for entry in EXERCISES.values()}
    for name in only:
        if name not in EXERCISES and name not in topics:
            raise InputError(f"--only {name}: no such exercise or topic; the topics are "
                             f"{', '.join(sorted(topics))}; `list` shows all")  # fmt: skip
    return [e for e in EXERCISES.values() if not only or e.name in only or e.topic in only]


def stub(exercise: Exercise) -> str:
    """What a student fills in: signature, task, and the specification in view."""
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
    if file.exists():
        raise InputError(f"{file}: exists already; choose another name")
    head = (
        '"""Answers. Fill in what you like, in any order, then\n\n'
        f"    python -m nanosd3.exercises grade {file.name}\n\n"
        "The specifications say what to compute, slowly, and would not pass themselves: an answer\n"
        "works with tensors, lets gradients through, leaves its inputs alone, and gives a result\n"
        'of the type and on the device of its inputs.\n"""\n\n'
        "import math\nfrom collections.abc import Callable\n\n"
        "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor"
    )
    write_file(file, ("\n\n\n".join([head, *map(stub, chosen(only))]) + "\n").encode())
    print(f"written: {file}")


def read_answers(file: Path) -> None:
    """Raises InputError if a file cannot be graded at all."""
    try:
        with warnings.catch_warnings(action="ignore"):  # on how it is written
            compile(file.read_bytes(), str(file), "exec")  # bytes: it may name its encoding
    except SyntaxError as error:
        line = f"line {error.lineno}: " if error.lineno else ""
        raise InputError(f"{file}: {line}{error.msg}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise InputError(f"{file}: cannot be compiled ({type(error).__name__})") from None


def summary(verdicts: list[Verdict]) -> dict:
    return {
        "score": sum(v.points for v in verdicts),
        "out_of": sum(v.out_of for v in verdicts),
        "exercises": [vars(v) for v in verdicts],
    }


def show(verdicts: list[Verdict]) -> None:
    for v in verdicts:
        print(f"{MARKS[v.status]} {v.name:22} {v.points:2}/{v.out_of:<2}  {v.message}")
    total = summary(verdicts)
    print(f"score: {total['score']} of {total['out_of']}")


def grade_all(folder: Path, target: Path, only: list[str], open_book: bool) -> None:
    """A row for each file of a folder."""
    files = sorted(folder.glob("*.py")) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: holds no answers (*.py)")
    if target.is_dir():
        raise InputError(f"--csv {target}: is a folder; name a file")
    exercises = chosen(only)

    def row(file: Path) -> list:
        name = file.name.encode(errors="replace").decode()
        name = f"'{name}" if name[0] in "=+-@" else name  # no formula for a spreadsheet
        try:
            read_answers(file)
            verdicts = grade(file, exercises, open_book)
        except Exception as error:  # one file must not stop the others
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
    print(f"{len(files)} files graded: {target}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m nanosd3.exercises", "Exercises that grade themselves.")
    add = parser.add_argument
    add("what", choices=("list", "start", "grade", "grade-all"))
    add("path", type=Path, nargs="?", help="file of answers; grade-all: folder of them")
    add("--only", nargs="+", default=[], metavar="NAME", help="topics or exercises (default: all)")
    add("--open-book", action="store_true", help="grade: answers may call the package")
    add("--json", action="store_true", help="grade: print an object with score and a row each")
    add("--csv", type=Path, help="grade-all: the table to write")
    args = parser.parse_args(arguments)
    if args.what == "list":
        for e in chosen(args.only):
            print(f"{e.topic:12}{e.name:22}{e.points:2} points, {'*' * e.difficulty}")
        return 0
    if args.path is None:
        raise InputError(f"{args.what} needs a path")
    if bool(args.csv) != (args.what == "grade-all"):
        raise InputError("--csv FILE belongs to grade-all, which needs it")
    if args.what == "start":
        start(args.path, args.only)
    elif args.what == "grade":
        read_answers(args.path)
        verdicts = grade(args.path, chosen(args.only), args.open_book)
        print(json.dumps(summary(verdicts))) if args.json else show(verdicts)
    else:
        grade_all(args.path, args.csv, args.only, args.open_book)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
