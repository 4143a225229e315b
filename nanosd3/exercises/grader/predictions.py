"""What a student expected: the predictions written in a notebook before its cells were run.

After each question, a text cell with **PREDICT.**, comes a cell with the field for the answer:
`guess("...")`, or `guess_1 = "..."` where the package is not imported yet. They are read from the
notebook's source and never run.
"""

import ast
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nanosd3.exercises.grader.notebook_cells import Cell, parsed

QUESTION = "**PREDICT.**"
FIELD = re.compile(r"^guess(_\w+)?$")
MOST = 2000  # characters of a prediction or a question


@dataclass(frozen=True)
class Predictions:
    """The predictions of a notebook: (question, text); the text is empty if nothing is written."""

    found: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # what was not understood

    @property
    def written(self) -> int:
        """How many questions have a prediction."""
        return sum(bool(text) for _, text in self.found)

    def __str__(self) -> str:
        return f"{self.written} of {len(self.found)}" if self.found else ""


def is_written(text: str) -> bool:
    """Whether a prediction is more than the empty field."""
    return text.strip() not in ("", "...", "…")


def find_predictions(cells: list[Cell]) -> Predictions:
    """The predictions in a notebook's cells: one per question, joined from all fields after it."""
    questions: list[str] = []
    written: list[list[str]] = []
    unclear = []
    number = 0
    for cell in cells:
        if not cell.is_code:
            if QUESTION in cell.text:
                questions.append(first_question(cell.text.split(QUESTION, 1)[1]))
                written.append([])
            continue
        number += 1
        for text in fields(cell.text):
            if not questions:
                questions.append("")
                written.append([])
            if text is None:
                unclear.append(str(number))
            elif is_written(text):
                written[-1].append(one_line(text))
    note = f"predictions that are not text in quotes, in code cells {', '.join(unclear[:10])}"
    texts = [one_line(" / ".join(parts)) for parts in written]
    return Predictions(tuple(zip(questions, texts, strict=True)), (note,) if unclear else ())


def fields(cell: str) -> Iterator[str | None]:
    """The text in each answer field of a cell of code, None where it is not a literal."""
    if "guess" not in cell:
        return
    try:
        body = parsed(cell)[0].body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        for _ in re.findall(r"^guess(?:\(|_\w+ *=)", cell, re.MULTILINE):
            yield None
        return
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Name) and call.func.id == "guess":
                given = [*call.args, *(k.value for k in call.keywords)]
                yield literal(given[0]) if len(given) == 1 else None
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if FIELD.match(node.targets[0].id):
                yield literal(node.value)


def literal(node: ast.expr) -> str | None:
    """The text of a string literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return None


def first_question(text: str) -> str:
    """The question and the text before it, or the first sentence if nothing is asked."""
    text = one_line(re.split(r"\n\s*\n", text.strip())[0])
    end = re.search(r"\?(?=\s|$)", text) or re.search(r"[.!](?=\s|$)", text)
    return text[: end.end()] if end else text


def one_line(text: str) -> str:
    """Text without line breaks and control characters, truncated if very long."""
    text = " ".join(text[: 4 * MOST].split())
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


def to_csv(hand_ins: dict[str, Predictions]) -> bytes:
    """All written predictions, one per row, with the files in this order."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["file", "question", "prediction"])
    for file, predictions in hand_ins.items():
        rows = [(file, *found) for found in predictions.found if found[1]]
        writer.writerows([plain(cell) for cell in row] for row in rows)
    return buffer.getvalue().encode(errors="replace")


def plain(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
