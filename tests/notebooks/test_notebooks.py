"""The notebooks match their sources, are of readable size, and run with nothing solved."""

import ast
import copy
import math
import os
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import nbclient
import nbformat
import pytest
import torch

from nanosd3.exercises import EXERCISES
from nanosd3.exercises.grader.checker import close, judge, result_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))

import build  # noqa: E402

SOURCES = build.sources()
NAMES = [source.stem for source in SOURCES]
NUMBERS = [f"{i:02d}" for i in range(18)]
TURN = re.compile(r"^turn\(", re.MULTILINE)
SHOW = re.compile(r'^show\("(\w+)"\)$', re.MULTILINE)
CHECK = re.compile(r'^(?:\w+ = )?check\("(\w+)", (\w+)\)$', re.MULTILINE)


@pytest.fixture(scope="module", params=SOURCES, ids=NAMES)
def source(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def notebook(source):
    return nbformat.reads(build.build(source), as_version=4)


def code_of(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def set_in(source: Path) -> list[str]:
    """The exercises that a notebook sets."""
    return [name for name, _ in CHECK.findall(source.read_text())]


def prose_of(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_all_are_there():
    assert [name[:2] for name in NAMES] == NUMBERS


def test_committed_notebooks_match_their_sources(source):
    """All but the outputs, which a build keeps (tests/notebooks/test_build.py)."""
    committed = nbformat.read(FOLDER / f"{source.stem}.ipynb", as_version=4)
    for cell in build.code_cells(committed):
        cell.outputs, cell.execution_count = [], None
    committed.metadata.pop(build.MARK, None)
    assert build.text_of(committed) == build.build(source), "run `python notebooks/build.py`"
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == NAMES


def test_size(notebook):
    cells, code = len(notebook.cells), code_of(notebook)
    assert 25 <= cells <= 55  # a third of them fields for predictions, tasks, answers, rewards,
    assert sum(len(text.splitlines()) for text in code) <= 250  # of which 30 to 50 lines are theirs
    assert max(len(text.splitlines()) for text in code) <= 20
    assert all(len(line) <= 100 for text in code for line in text.splitlines())


def test_shape(notebook, source):
    """A question first, predictions, exercises, and what was left out with references."""
    prose, code = prose_of(notebook), "\n".join(code_of(notebook))
    first = notebook.cells[0].source
    assert first.startswith(f"# {source.stem[:2]} · ") and "?**" in first
    assert notebook.cells[1].source == build.install()
    assert prose.count("**PREDICT.**") >= 3
    assert "What was left out" in prose and "2403.03206" in prose
    checked = CHECK.findall(code)
    assert 2 <= len(checked) <= 5
    for name, answer in checked:
        assert name == answer and name in EXERCISES and f'show("{name}")' in code
    for node in ast.walk(ast.parse("\n".join(code_of(notebook)[1:]))):
        if isinstance(node, ast.FunctionDef) and node.name in dict(checked):
            names = tuple(a.arg for a in node.args.args)
            if isinstance(node.body[0], ast.Raise):  # a stub
                assert names == EXERCISES[node.name].names


def test_tasks_stand_open_above_their_stubs(notebook):
    """What `show` prints is not folded with the answer to a prediction."""
    code = build.code_cells(notebook)
    for cell, after in pairwise(code):
        for name in SHOW.findall(cell.source):
            assert not cell.metadata.get("jupyter"), name
            assert f"def {name}(" in after.source, name


def test_stubs_overwrite_nothing(notebook):
    """A cell above still works when it is run again after the exercises."""
    bound: list[str] = []
    for code in code_of(notebook)[1:]:
        tree = ast.parse(code)
        names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        names += [a.asname or a.name for n in ast.walk(tree)
                  if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]  # fmt: skip
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in EXERCISES:
                assert node.name not in bound, node.name
        bound += names


def test_ties_to_the_package(notebook):
    """The notebook's own code is compared with the package's functions."""
    assert re.search(r"assert_close|^assert ", "\n".join(code_of(notebook)), re.MULTILINE)


def functions_of(source: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(source.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_no_notebook_prints_an_answer():
    """No function that a notebook defines solves an exercise that a notebook sets."""
    used = {name for s in SOURCES for name in set_in(s)}
    case_of = {name: EXERCISES[name].drawn()[1] for name in used}
    expected = {name: result_of(EXERCISES[name].reference, case) for name, case in case_of.items()}
    compared = 0
    for node in (node for source in SOURCES for node in functions_of(source)):
        names = {"math": math, "torch": torch, "F": torch.nn.functional, "pairwise": pairwise,
                 "NormalDist": NormalDist, "Counter": Counter}  # fmt: skip
        node.decorator_list, node.args.defaults = [], []
        exec(compile(ast.Module([node], []), "notebook", "exec"), names)
        function, count = names[node.name], len(node.args.args)
        for name, case in case_of.items():
            if count == len(case.arguments) and not isinstance(node.body[0], ast.Raise):
                compared += 1
                if close(result_of(function, case), expected[name], EXERCISES[name].tolerance):
                    assert judge(EXERCISES[name], function).status != "right", node.name
    assert compared > 300


def test_flow_needs_no_package():
    text = next(s for s in SOURCES if s.stem.startswith("01")).read_text()
    before = text[: text.index("## Exercises")]
    assert not re.search(r"^\s*(from|import) (nanosd3|lab)\b", before, re.MULTILINE)


def test_no_exercise_in_two_notebooks():
    used = [name for s in SOURCES for name in set_in(s)]
    assert len(set(used)) == len(used)


def test_teachers_page(capsys):
    """The tables match the exercise registry and the notebooks, and the example runs."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    place = {name: s.stem[:2] for s in SOURCES for name in set_in(s)}
    for e in EXERCISES.values():
        mistakes = ", ".join(mutant.name.replace("_", " ") for mutant in e.mutants)
        start = re.escape(f"| `{e.name}` | {e.topic} | {e.points} | {place.get(e.name, '')} |")
        assert re.search(f"^{start} .* \\| {mistakes} \\|$", page, re.MULTILINE), e.name
    assert f"{sum(e.points for e in EXERCISES.values())} in all" in page
    assert all(f"]({name}.ipynb) |" in page for name in NAMES)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "right\n"


def test_things_to_turn():
    """In five notebooks; their files hold pictures in place of controls."""
    found = [s.stem[:2] for s in SOURCES if TURN.search(s.read_text())]
    assert found == ["00", "02", "03", "06", "10"]
    for source in SOURCES:
        committed = nbformat.read(FOLDER / f"{source.stem}.ipynb", as_version=4)
        assert "widgets" not in committed.metadata
        kinds = [(TURN.search(cell.source), kind) for cell in build.code_cells(committed)
                 for output in cell.outputs for kind in output.get("data", {})]  # fmt: skip
        assert not any("widget" in kind for _, kind in kinds)
        assert {kind for turned, kind in kinds if turned} <= {"text/plain", "image/png"}


def test_the_tests_named_in_the_gallery_exist():
    text = next(s for s in SOURCES if s.stem.startswith("10")).read_text()
    named = set(re.findall(r"`([\w/]+\.py)::(test_\w+)`", text))
    assert len(named) >= 13
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M)


WITH_REFERENCE = """
from nanosd3.exercises import EXERCISES
from nanosd3.exercises.grader import recording
recording.devices_of = lambda *_: ["meta"]  # the same in every notebook, and slow to import
check("{name}", EXERCISES["{name}"].reference)
"""
WITH_SOLUTION = '\n{name}, solved = EXERCISES["{name}"].reference, True\n'


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client with one kernel for all notebooks, which imports the libraries once."""
    cache = str(tmp_path_factory.mktemp("cache"))
    settings = {"NANOSD3_FAST": "1", "NANOSD3_CACHE": cache, "OMP_NUM_THREADS": "1"}
    settings["NANOSD3_STATIC"] = "1"
    resources = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=1000, resources=resources)
    with client.setup_kernel(env={**os.environ, **settings}):
        yield client


EMPTY = """%reset -f
%config InlineBackend.print_figure_kwargs = {"bbox_inches": None, "dpi": 20}
import figures, functools, lab, matplotlib.pyplot, torch
from nanosd3.training import train_flow
if not hasattr(lab.load_images, "cache_info"):
    lab.load_images = functools.cache(lab.load_images)  # unpacked once for all notebooks
matplotlib.pyplot.close("all")
matplotlib.rcParams["figure.constrained_layout.use"] = False  # the pictures are not looked at
train_flow.VALIDATIONS = 2
torch.set_grad_enabled(True)
del figures, functools, lab, matplotlib, torch, train_flow"""


def test_runs(notebook, source, client):
    """Runs from top to bottom, in fast mode, with no names left by another. In every exercise's own
    cell the stub is not attempted, and the reference gets its tick. A cell that draws with an
    answer says so if there is none, and draws with the reference."""
    notebook, checks, rewards = copy.deepcopy(notebook), {}, {}
    notebook.cells.insert(0, nbformat.v4.new_code_cell(EMPTY))
    for cell in notebook.cells:
        if match := CHECK.search(cell.source):
            checks[match[1]] = EXERCISES[match[1]]
            cell.source += WITH_REFERENCE.format(name=match[1])
        elif re.search(r"^if solved:|^reward\(", cell.source, re.MULTILINE):
            name = list(checks)[-1]
            rewards[name] = cell
            cell.source += WITH_SOLUTION.format(name=name) + cell.source
    client.nb = notebook
    for i, cell in enumerate(notebook.cells):
        client.execute_cell(cell, i)
    printed = "\n".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    words = " ".join(printed.split())  # lines are wrapped
    assert list(checks) == set_in(source)
    for name, exercise in checks.items():
        assert f"· {name} (0/{exercise.points}): not attempted yet" in words
        right = f"✓ {name} ({exercise.points}/{exercise.points}): {exercise.why}"
        assert " ".join(right.split()) in words
    for name, cell in rewards.items():
        assert any(f"Solve `{name}`" in output.get("text", "") for output in cell.outputs), name
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), name
    for cell in notebook.cells:
        if TURN.search(cell.source):  # without controls: one picture, then the task that it shows
            picture, *tasks = cell.outputs
            assert "image/png" in picture.data
            assert [task.text.split(":")[0] for task in tasks] == SHOW.findall(cell.source)
    for name in SHOW.findall(source.read_text()):
        assert EXERCISES[name].signature in printed
