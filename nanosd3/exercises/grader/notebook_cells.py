"""The cells of Jupyter notebooks, and the Python in them."""

import ast
import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanosd3.errors import InputError
from nanosd3.storage.files import parse_json
from nanosd3.storage.user_files import decode_text

PYTHON_MAGICS = ("%%time", "%%capture")  # first lines of cells that are still Python
MOST_MAGICS = 100  # lines in a cell that are IPython's
IPYTHON = re.compile(
    r"^(\s*)([%!?].*|\S+\?\s*|(pip|conda)\s.*|[\w, ]+=\s*[%!].*)$"
)  # its own lines
_lock = threading.Lock()


@dataclass(frozen=True)
class Cell:
    """A cell of code or of text."""

    is_code: bool
    text: str


def read_cells(file: Path, content: bytes) -> list[Cell]:
    """The cells of a notebook. Raises InputError if it is not one."""
    text = decode_text(content, file)
    try:
        notebook: Any = parse_json(text, file)
        return [
            Cell(
                cell["cell_type"] == "code",
                "".join(cell["source"]).replace("\r\n", "\n").replace("\r", "\n"),
            )
            for cell in notebook["cells"]
        ]
    except (InputError, KeyError, TypeError):
        raise InputError(
            f"{file}: not a Jupyter notebook of format 4; open it in Jupyter and save it again"
        ) from None


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """For parsing Python: warnings about its style are ignored, and one thread parses at a time.

    Threads share the filters of warnings, and CPython may fail with a SystemError if two threads
    build syntax trees at once (python/cpython#106905).
    """
    with _lock, warnings.catch_warnings(action="ignore"):
        yield


def parsed(cell: str) -> tuple[ast.Module, list[str]]:
    """A cell's syntax tree and lines, with IPython's own lines (%magic, !shell, help?, pip install)
    replaced by `pass`. Raises SyntaxError if it is not Python."""
    lines = cell.split("\n")
    if lines[0].startswith("%%") and not lines[0].startswith(PYTHON_MAGICS):
        return ast.Module([], []), []  # another language
    with parsing():
        for _ in range(MOST_MAGICS):
            try:
                return ast.parse("\n".join(lines)), lines
            except SyntaxError as error:
                at = (error.lineno or 1) - 1
                line, number = IPYTHON.subn(r"\1pass", lines[at])
                if not number:
                    raise
                end = at
                while lines[end].endswith("\\") and end + 1 < len(lines):
                    end += 1
                lines[at : end + 1] = [line] + [""] * (end - at)  # with all that continues it
    raise SyntaxError("too many lines that are not Python")
