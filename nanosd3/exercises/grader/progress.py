"""What is done in a folder of notebooks: exercises solved and predictions written."""

from collections.abc import Mapping
from pathlib import Path

from nanosd3.errors import InputError
from nanosd3.exercises.grader.exercise import Exercise
from nanosd3.exercises.grader.grading import grade
from nanosd3.exercises.grader.hand_ins import read_hand_in
from nanosd3.exercises.grader.predictions import Predictions


def progress(folder: Path, exercises: Mapping[str, Exercise], open_book: bool) -> str:
    """A table of the notebooks in a folder that set exercises or ask for predictions.

    Only exercises that have an answer are graded. Raises InputError if there is no such notebook.
    """
    files = [file for file in sorted(folder.glob("*.ipynb")) if not file.name.startswith(".")]
    rows, solved, asked, written, questions = [], 0, 0, 0, 0
    for file in files:
        try:
            hand_in = read_hand_in(file, list(exercises), open_book)
            answered = [exercises[name] for name in hand_in.answered if name in hand_in.exercises]
            verdicts = grade(file, answered, open_book) if answered else []
        except InputError as error:
            rows.append(f"{file.stem:24}{error}")
            continue
        right = {verdict.name for verdict in verdicts if verdict.status == "right"}
        left = ", ".join(name for name in hand_in.exercises if name not in right)
        predictions = hand_in.predictions or Predictions()
        counts = f"{len(right)} of {len(hand_in.exercises)}"
        if hand_in.exercises or predictions.found:
            rows.append(f"{file.stem:24}{counts:12}{predictions!s:14}{left}".rstrip())
        solved, asked = solved + len(right), asked + len(hand_in.exercises)
        written, questions = written + predictions.written, questions + len(predictions.found)
    if not rows:
        raise InputError(f"{folder}: not a folder with notebooks that set exercises")
    total = f"{f'{solved} of {asked}':12}{written} of {questions}"
    head = f"{'notebook':24}{'exercises':12}{'predictions':14}to be solved"
    return "\n".join([head, *rows, f"{'all':24}{total}"])
