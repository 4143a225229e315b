"""Command line for the exercises.

python -m nanosd3.exercises list
python -m nanosd3.exercises start hw.py --only flow             write a file of stubs
python -m nanosd3.exercises grade hw.py                         print a table of verdicts
python -m nanosd3.exercises grade-all FOLDER --csv grades.csv   one row per file
python -m nanosd3.exercises status FOLDER                       what is done in its notebooks

Files of answers are .py files or notebooks (.ipynb); grade-all looks into subfolders too. Without
--only, grading asks for the exercises that the files name, or for all.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nanosd3.cli import Parser, run_main
from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES, MARKS
from nanosd3.exercises.grader.checker import Verdict
from nanosd3.exercises.grader.exercise import Exercise
from nanosd3.exercises.grader.gradebook import (
    NOT_GRADED,
    Row,
    failed_row,
    find_hand_ins,
    listed,
    to_csv,
    to_text,
)
from nanosd3.exercises.grader.grading import grade, missing_limits
from nanosd3.exercises.grader.hand_ins import MARK, SUFFIXES, HandIn, read_hand_in
from nanosd3.exercises.grader.predictions import to_csv as predictions_csv
from nanosd3.exercises.grader.progress import progress
from nanosd3.machine.device import cores
from nanosd3.storage.files import check_writable, write_file


def select(only: Sequence[str], origin: str = "--only") -> list[Exercise]:
    """The exercises with these names or topics, or all. Raises InputError for an unknown name,
    with `origin`, where it comes from."""
    topics = {entry.topic for entry in EXERCISES.values()}
    for name in only:
        if name not in EXERCISES and name not in topics:
            raise InputError(
                f"{origin} {name}: no such exercise or topic; topics are "
                f"{', '.join(sorted(topics))}; `list` shows all exercises"
            )
    return [e for e in EXERCISES.values() if not only or e.name in only or e.topic in only]


def stub(exercise: Exercise) -> str:
    """The function to fill in: signature, task, and the specification as a comment."""
    task = exercise.task.replace("\n", "\n    ")
    heading, *specification = exercise.shown().splitlines()
    lines = [
        exercise.signature,
        f'    """{task}\n    """',
        f"    # Points: {exercise.points}. {heading}",
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
        "The specifications say what to compute, but are too slow to pass themselves. An answer\n"
        "works on whole tensors, lets gradients through, does not modify its inputs, and returns\n"
        'results of the dtype and on the device of its inputs.\n"""\n\n'
        "import math\nfrom collections.abc import Callable\n\n"
        "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor"
    )
    if only:  # `grade` then asks for these, too
        head += f"\n\n{MARK}{' '.join(only)}"
    write_file(file, ("\n\n\n".join([head, *map(stub, select(only))]) + "\n").encode())
    print(f"wrote {file}")


def summary(verdicts: list[Verdict]) -> dict:
    """The output of --json."""
    return {
        "score": sum(v.points for v in verdicts),
        "out_of": sum(v.out_of for v in verdicts),
        "exercises": [vars(v) for v in verdicts],
    }


def asked(file: Path, hand_in: HandIn, only: Sequence[str]) -> list[Exercise]:
    """The exercises to grade: those in `only`, or those that the file names, or all. A file of
    stubs may name topics; a notebook names exercises, and `attention` is both."""
    if only or not hand_in.exercises or file.suffix.lower() != ".ipynb":
        return select(only or hand_in.exercises, "--only" if only else f"{file}: {MARK.strip()}")
    return [e for e in EXERCISES.values() if e.name in hand_in.exercises]


def read_ones(hand_ins: dict[Path, HandIn | InputError]) -> list[tuple[Path, HandIn]]:
    """Those of a class's files that could be read."""
    return [(file, h) for file, h in hand_ins.items() if isinstance(h, HandIn)]


def named_by(hand_ins: dict[Path, HandIn | InputError]) -> list[str]:
    """The exercises that a class's files name, if any of them does, and all that are answered."""
    read = read_ones(hand_ins)
    found: set[str] = set()
    for file, hand_in in read:
        try:
            found.update(e.name for e in asked(file, hand_in, []) if hand_in.exercises)
        except InputError as error:  # a name that does not exist costs nobody a point
            hand_ins[file] = replace(hand_in, notes=(*hand_in.notes, str(error)))
    return sorted(found.union(*(h.answered for _, h in read))) if found else []


def not_graded(hand_in: HandIn, exercises: list[Exercise]) -> list[str]:
    """What is not graded in a file, in words."""
    outside = [n for n in hand_in.answered if n not in {e.name for e in exercises}]
    extra = [f"answers to exercises that were not asked for: {', '.join(outside)}"]
    return [*hand_in.notes, *(extra if outside else [])]


def show(verdicts: list[Verdict], notes: list[str], predictions: str) -> None:
    """Print a table of the attempted exercises, the names of the others, what is not graded in the
    file, the number of predictions and the score."""
    for v in verdicts:
        if v.status != "not attempted":
            print(f"{MARKS[v.status]} {v.name:22} {v.points:2}/{v.out_of:<2}  {v.message}")
    if left := [v.name for v in verdicts if v.status == "not attempted"]:
        text = f"{MARKS['not attempted']} not attempted: {len(left)} ({', '.join(left)})"
        print(textwrap.fill(text, 100, subsequent_indent="  "))
    for note in notes:
        print(f"note: {note}")
    if predictions:
        print(f"predictions: {predictions}")
    total = summary(verdicts)
    print(f"score: {total['score']} of {total['out_of']}")


def warn_of_missing_limits() -> None:
    """Say on stderr what this system cannot limit."""
    if missing := missing_limits():
        print(f"note: this system cannot limit an answer's {missing}", file=sys.stderr)


def grade_file(file: Path, only: list[str], open_book: bool, as_json: bool) -> None:
    """Grade a file and print the verdicts."""
    hand_in = read_hand_in(file, list(EXERCISES), open_book)
    exercises = asked(file, hand_in, only)
    warn_of_missing_limits()
    verdicts, notes = grade(file, exercises, open_book), not_graded(hand_in, exercises)
    predictions = str(hand_in.predictions or "")
    if as_json:
        print(json.dumps(summary(verdicts) | {"predictions": predictions, "notes": notes}))
    else:
        show(verdicts, notes, predictions)


def read_class(
    folder: Path, tables: Sequence[Path], open_book: bool
) -> tuple[dict[Path, HandIn | InputError], list[str]]:
    """The files of answers in a folder, and the names of the rest. Raises InputError if there are
    none."""
    files, left_out = find_hand_ins(folder, tables) if folder.is_dir() else ([], [])
    if not files:
        found = f"; found only {listed(left_out)}" if left_out else ""
        expected = " or ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise InputError(f"{folder}: not a folder with files of answers ({expected}){found}")
    hand_ins: dict[Path, HandIn | InputError] = {}
    for file in files:
        try:
            hand_ins[file] = read_hand_in(file, list(EXERCISES), open_book)
        except InputError as error:
            hand_ins[file] = error
    return hand_ins, left_out


def grade_all(
    folder: Path, target: Path, predictions: Path | None, only: list[str], open_book: bool
) -> int:
    """Grade all files of answers in a folder and its subfolders, and write a CSV table, and
    another of their predictions if asked for. Returns 1 if some could not be graded, else 0."""
    for option, table in (("--csv", target), ("--predictions", predictions)):
        if table and table.is_dir():
            raise InputError(f"{option} {table}: is a folder; name a file")
    if predictions and predictions.resolve() == target.resolve():
        raise InputError(f"--predictions {predictions}: is also the file of --csv; name another")
    tables = [target, predictions] if predictions else [target]
    for table in tables:
        if table.parent.is_dir():
            check_writable(table)
    hand_ins, left_out = read_class(folder, tables, open_book)
    exercises = select(only or named_by(hand_ins))
    warn_of_missing_limits()

    def row(file: Path) -> Row:
        name, hand_in = file.relative_to(folder).as_posix(), hand_ins[file]
        if isinstance(hand_in, InputError):
            return failed_row(name, exercises, "refused", str(hand_in))
        written = str(hand_in.predictions or "")
        try:
            verdicts = grade(file, exercises, open_book)
        except Exception as error:  # of the machine or the grader; it must not stop the rest
            return failed_row(name, exercises, NOT_GRADED, f"{file}: {error}", written)
        return Row(name, verdicts, notes=not_graded(hand_in, exercises), predictions=written)

    rows = rows_of(row, list(hand_ins))
    print(to_text(rows, exercises))
    write_file(target, to_csv(rows, exercises))
    if predictions:
        found = {f.relative_to(folder).as_posix(): h.predictions for f, h in read_ones(hand_ins)}
        write_file(predictions, predictions_csv({f: p for f, p in found.items() if p}))
    if not only:
        print(f"asked for {len(exercises)} exercises, going by the files; --only chooses others")
    refused = sum(bool(row.error and row.is_graded) for row in rows)
    missing = sum(not row.is_graded for row in rows)
    others = f" ({listed(left_out)})" if left_out else ""
    counts = f"graded {len(rows) - refused - missing} files, refused {refused}"
    counts += f", could not grade {missing}: try again" if missing else ""
    print(f"{counts}, left out {len(left_out)}{others}; wrote {' and '.join(map(str, tables))}")
    return 1 if missing else 0


def rows_of(row: Callable[[Path], Row], files: list[Path]) -> list[Row]:
    """The rows of a class, several at a time; then, alone, those of files that could not be graded
    beside others, such as one that had filled the disk."""
    with ThreadPoolExecutor(cores()) as pool:
        futures = {pool.submit(row, file): file for file in files}
        try:
            done = tqdm(as_completed(futures), "grading", total=len(files))
            rows = {futures[future]: future.result() for future in done}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for file in files:
        if not rows[file].is_graded:
            rows[file] = row(file)
    return [rows[file] for file in files]


def default_folder() -> Path:
    """The folder of the notebooks, seen from the repository or from within."""
    return Path("notebooks") if Path("notebooks").is_dir() else Path()


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m nanosd3.exercises", "Self-grading exercises.")
    add = parser.add_argument
    add("command", choices=("list", "start", "grade", "grade-all", "status"))
    add("path", type=Path, nargs="?", help="file of answers (.py or .ipynb), or a folder")
    add("--only", nargs="+", default=[], metavar="NAME", help="topics or exercises")
    add("--open-book", action="store_true", help="grade, grade-all: let answers import the package")
    add("--json", action="store_true", help="grade: print the score and all verdicts as JSON")
    add("--csv", type=Path, help="grade-all: the table to write (required)")
    add("--predictions", type=Path, help="grade-all: also write a table of predictions")
    args = parser.parse_args(arguments)
    if args.command == "list":
        for e in select(args.only):
            print(f"{e.topic:12}{e.name:22}{e.points:2} points, {'*' * e.difficulty}")
        return 0
    if args.path is None and args.command != "status":
        raise InputError(f"{args.command} needs a path (see --help)")
    if bool(args.csv) != (args.command == "grade-all"):
        raise InputError("--csv FILE is required by grade-all and not used by other commands")
    if args.predictions and not args.csv:
        raise InputError("--predictions FILE is used by grade-all only")
    if args.command == "status":
        print(progress(args.path or default_folder(), EXERCISES, args.open_book))
    elif args.command == "start":
        start(args.path, args.only)
    elif args.command == "grade":
        grade_file(args.path, args.only, args.open_book, args.json)
    else:
        return grade_all(args.path, args.csv, args.predictions, args.only, args.open_book)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
