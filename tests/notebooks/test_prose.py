"""The text of the notebooks: predictions before answers, formulas that can be typeset."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import jupytext
import pytest
from matplotlib.mathtext import MathTextParser
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))

import build  # noqa: E402

WITH_FIELDS = [
    source for source in build.sources() if re.search(r"^guess", source.read_text(), re.M)
]
FIELD = re.compile(r'^guess(?:_\d+ = |\()"\.\.\."\)?(?:  # .*)?$')
CHECK = re.compile(r'^solved = check\("(\w+)", \1\)$', re.MULTILINE)
FOLDED = re.compile(r"^<details><summary>[^<]+</summary>\n\n.+?\n\n</details>$", re.M | re.S)
FORMULA = re.compile(r"^\$\$([^$]+)\$\$$|(?<!\$)\$([^$\n]+)\$(?!\$)", re.MULTILINE)
UNICODE_MATH = "αβγδεθλμπσφωΔΣ∑∫√∞≈≠≤≥±−×÷∈→←∂²³₀₁ₜ·"


@pytest.fixture(scope="module", params=WITH_FIELDS, ids=[s.stem for s in WITH_FIELDS])
def cells(request) -> list[NotebookNode]:
    return jupytext.read(request.param, fmt="py:percent").cells


def texts(cells: list[NotebookNode]) -> list[str]:
    """Text cells without what is code, in fences and between backticks."""
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    return [re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S) for text in prose]


def test_at_least_the_first_six_ask_before_they_answer():
    assert [source.stem[:2] for source in WITH_FIELDS][:6] == ["00", "01", "02", "03", "04", "05"]


def test_every_prediction_has_its_field_and_then_an_explanation(cells):
    """A question ends its cell, the field for the answer follows, and what happened is folded."""
    questions = [i for i, cell in enumerate(cells) if "**PREDICT.**" in cell.source]
    assert len(questions) >= 3
    for i, following in zip(questions, [*questions[1:], len(cells) - 1], strict=True):
        last = cells[i].source.split("\n\n")[-1]
        assert last.startswith("**PREDICT.**") and cells[i].source.count("**PREDICT.**") == 1
        assert FIELD.match(cells[i + 1].source), last
        assert any(FOLDED.search(cell.source) for cell in cells[i + 2 : following + 1]), last


def test_fields_are_empty_and_follow_questions(cells):
    for before, cell in pairwise(cells):
        if cell.cell_type == "code" and re.search(r"^guess", cell.source, re.M):
            assert FIELD.match(cell.source) and "**PREDICT.**" in before.source


def test_every_answer_draws(cells):
    """The cell after a check draws with the answer, or says what it would draw."""
    checks = [(i, m[1]) for i, c in enumerate(cells) if (m := CHECK.search(c.source))]
    assert len(checks) >= 3
    for i, name in checks:
        code = next(cell.source for cell in cells[i + 1 :] if cell.cell_type == "code")
        if not re.search(r"\bsolved\b", code):  # a helper of the reward comes first
            code = next(cell.source for cell in cells[i + 2 :] if cell.cell_type == "code")
        assert re.search(
            rf"^if solved:.*Solve `{name}`|^reward\(solved, \"{name}\"", code, re.M | re.S
        )


def test_folds_are_whole(cells):
    """With a blank line inside at both ends, or the text between them is not rendered."""
    for text in (cell.source for cell in cells if cell.cell_type == "markdown"):
        whole = FOLDED.findall(text)
        assert text.count("<details") == text.count("</details>") == len(whole)
        assert all(part.count("<details") == 1 for part in whole)


def test_formulas_can_be_typeset(cells):
    """Whole, set off or within a line, in a subset of LaTeX that every viewer has."""
    parser, found = MathTextParser("path"), 0
    for text in texts(cells):
        rest = FORMULA.sub("", text)
        assert "$" not in rest and not re.search(r"\\[a-zA-Z,]", rest), rest
        for display, inline in FORMULA.findall(text):
            formula = (display or inline).replace("\n", " ")
            assert "*" not in formula, formula
            formula = re.sub(r"\\[Bb]igg?(?![a-z])", "", formula)  # which matplotlib does not know
            parser.parse(f"${formula}$")  # raises ValueError
            found += 1
    assert found >= 10


def test_no_formulas_in_unicode(cells):
    for number, text in enumerate(texts(cells)):
        text = text if number else text.replace(" · ", " ", 1)  # of the title
        assert not set(text) & set(UNICODE_MATH), set(text) & set(UNICODE_MATH)
