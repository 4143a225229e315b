"""Hand-ins: files of answers, as Python (.py) or as Jupyter notebooks (.ipynb).

A Python file is run as it is. Of a notebook only the answers and what they need are run: the
imports, functions and constants they use, wherever in the notebook these are. Everything else in
it, such as training, plots and the notebook's own text, would take minutes and prove nothing.
"""

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from nanosd3.errors import InputError
from nanosd3.exercises.grader.notebook_cells import Cell, parsed, parsing, read_cells
from nanosd3.exercises.grader.predictions import Predictions, find_predictions
from nanosd3.exercises.grader.statements import (
    Statement,
    bindings,
    why_not_run,
    with_needs,
)
from nanosd3.storage.files import read_regular
from nanosd3.storage.user_files import decode_text

SUFFIXES = (".py", ".ipynb")
MARK = "# exercises: "  # the line of a file of stubs that names what it was made for


@dataclass(frozen=True)
class HandIn:
    """A file of answers, ready to run."""

    source: bytes
    exercises: tuple[str, ...] = ()  # names or topics that the file says it is for
    answered: tuple[str, ...] = ()  # exercises to which it has more than a stub
    refused: dict[str, str] = field(default_factory=dict)  # why an answer cannot be run
    notes: tuple[str, ...] = ()  # what is not graded
    places: tuple[str, ...] = ()  # where in the notebook each line of `source` is from
    predictions: Predictions | None = None  # of a notebook

    def place(self, line: int) -> str:
        """A line of the source in words: "line 3", or where it is in the notebook."""
        return self.places[line - 1] if 0 < line <= len(self.places) else f"line {line}"


def read_hand_in(file: Path, names: Collection[str], open_book: bool = False) -> HandIn:
    """Read a file of answers to the exercises `names`.

    Raises InputError if it cannot be read or compiled.
    """
    content = read_regular(file)
    if file.suffix.lower() == ".ipynb":
        return of_notebook(read_cells(file, content), names, open_book)
    text, tree = compiled(file, content)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    mark = re.search(rf"^{MARK}(.+)$", text, re.MULTILINE)
    return HandIn(
        content,
        exercises=tuple(mark[1].split()) if mark else (),
        answered=in_order(names, [node.name for node in functions if not is_stub(node)]),
        notes=near_misses(functions, names),
    )


def compiled(file: Path, content: bytes) -> tuple[str, ast.Module]:
    """Text and syntax tree of a Python file, which may declare its encoding. Raises InputError if
    it cannot be compiled."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    except SyntaxError:
        encoding = "utf-8"  # an invalid or unknown one is reported below
    text = decode_text(content, file, encoding.removesuffix("-sig"))
    try:
        with parsing():
            compile(content, str(file), "exec")
            return text, ast.parse(content)
    except SyntaxError as error:
        line = f"line {error.lineno}: " if error.lineno else ""
        raise InputError(f"{file}: {line}{error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        reason = type(error).__name__
        raise InputError(f"{file}: cannot be compiled ({reason}); simplify it") from None


def in_order(names: Collection[str], found: Collection[str]) -> tuple[str, ...]:
    """Those of `names` that are found, in the order of `names`."""
    return tuple(name for name in names if name in found)


def is_stub(node: ast.stmt) -> bool:
    """Whether it is a function still to be written: a docstring, `...`, or an error."""
    return isinstance(node, ast.FunctionDef) and all(map(does_nothing, node.body))


def does_nothing(node: ast.stmt) -> bool:
    """Whether a statement of a stub does nothing, or says that something is to be written."""
    unwritten = isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return unwritten or constant or isinstance(node, ast.Pass)


def near_misses(functions: list[ast.FunctionDef], names: Collection[str]) -> tuple[str, ...]:
    """A note on each function whose name is almost that of an exercise without an answer."""
    written = [node.name for node in functions if not is_stub(node)]
    missing = [name for name in names if name not in written]
    notes = []
    for name in written:
        close = difflib.get_close_matches(name.lower(), missing, 1, 0.85)
        if name not in names and close:
            notes.append(f"{name} is not an exercise; rename it if it answers {close[0]}")
    return tuple(notes)


# --- notebooks ----------------------------------------------------------------------------------


def of_notebook(notebook: list[Cell], names: Collection[str], open_book: bool) -> HandIn:
    """The answers in a notebook, with what they need, and its predictions. If an exercise is
    answered twice, the last answer counts, as in the notebook itself."""
    cells = [cell.text for cell in notebook if cell.is_code]
    statements: list[Statement] = []
    refused: dict[str, str] = {}
    for number, cell in enumerate(cells, 1):
        try:
            statements += bindings(*parsed(cell), number)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            where = f"code cell {number}, line {getattr(error, 'lineno', None) or 1}"
            reason = f"{where}: {getattr(error, 'msg', None) or type(error).__name__}"
            refused |= dict.fromkeys(re.findall(r"^def (\w+)", cell, re.MULTILINE), reason)
    last_check = last_checks(cells)
    given = [
        (name, s)
        for s in statements
        for name in sorted(s.binds.intersection(names))
        if s.is_function or (s.cell <= last_check.get(name, 0) and not s.is_import)
    ]
    answers = dict(given)  # the last ones
    refused = {name: why for name, why in refused.items() if name in names and name not in answers}
    taken = [s for s in statements if "__future__" in s.modules]
    for name, answer in answers.items():
        needed = with_needs(answer, statements)
        if why := why_not_run(needed, open_book):
            refused[name] = why
        else:
            taken += needed
    taken.sort(key=lambda s: ("__future__" not in s.modules, s.place))
    lines = {(s.cell, s.line + i): text for s in taken for i, text in enumerate(s.text)}
    used = len({s.cell for s in answers.values()})
    notes = [f"{used} of {len(cells)} code cells define answers; the others are not run"]
    functions = [(name, s.node) for name, s in given if s.is_function]
    twice = [name for name in answers if [n for n, _ in functions].count(name) > 1]
    notes += [f"{name} is defined more than once; the last one counts" for name in twice]
    written = [name for name, answer in answers.items() if not is_stub(answer.node)]
    defined = [s.node for s in statements if isinstance(s.node, ast.FunctionDef)]
    predictions = find_predictions(notebook)
    return HandIn(
        "".join(f"{line}\n" for line in lines.values()).encode(errors="replace"),
        exercises=in_order(names, {*last_check, *answers, *refused}),
        answered=in_order(names, {*written, *refused}),
        refused=refused,
        notes=(*notes, *near_misses(defined, names), *predictions.notes),
        predictions=predictions,
        places=tuple(f"code cell {cell}, line {line}" for cell, line in lines),
    )


def last_checks(cells: list[str]) -> dict[str, int]:
    """The last code cell, counted from 1, in which each exercise is checked."""
    pattern = re.compile(r"""^(?:\w+ = )?check\(["'](\w+)["']""", re.MULTILINE)
    return {name: i for i, cell in enumerate(cells, 1) for name in pattern.findall(cell)}
