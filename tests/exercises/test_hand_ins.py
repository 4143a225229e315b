"""What is read from hand-ins, Python and notebooks, and what is graded of a class's folder."""

import ast
import contextlib
import csv
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.commands import refused

from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES, __main__, guess
from nanosd3.exercises.grader import grading, progress, workers
from nanosd3.exercises.grader.checker import Verdict
from nanosd3.exercises.grader.hand_ins import read_hand_in

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
STUB = 'raise NotImplementedError("your code here")'


def notebook(path: Path, *cells: str) -> Path:
    """A notebook with these code cells, and text between them."""
    text = {"cell_type": "markdown", "source": "def shift(t, alpha): return 'no code'"}
    code = [{"cell_type": "code", "source": c.splitlines(keepends=True)} for c in cells]
    both = [cell for c in code for cell in (c, text)]
    path.write_text(json.dumps({"cells": both, "nbformat": 4, "metadata": {}}), encoding="utf-8")
    return path


def read(path: Path, *cells: str, open_book: bool = False):
    return read_hand_in(notebook(path / "hw.ipynb", *cells), list(EXERCISES), open_book)


def run(hand_in) -> dict:
    names: dict = {}
    exec(compile(hand_in.source, "hw", "exec"), names)
    return names


# --- notebooks ----------------------------------------------------------------------------------

STUDENT = (
    "%matplotlib inline\nimport math, sys\nfrom lab import trained\nlesson = trained()",
    "!pip install einops\nraise SystemExit('the rest is not run')",
    "from functools import cache\nSCALE: float = 2.0\nunused = lesson.pipeline",
    "%%bash\necho def shift\ndef shift(): pass",
    "@cache\ndef half(x):\n    lesson = x / SCALE\n    return lesson",
    '%%time\ndef shift(t, alpha):\n    """% is no magic\n% here"""\n    return half(t)\n'
    'check("shift", shift)',
    "cosmap = lambda u: math.pi * u\nshift?",
    "print(open('/etc/passwd'))\nx = (1",
)


def test_only_the_answers_of_a_notebook_are_run_and_what_they_need(tmp_path):
    hand_in = read(tmp_path, *STUDENT)
    names = run(hand_in)
    assert (names["shift"](3.0, None), names["cosmap"](0)) == (1.5, 0)
    assert "lesson" not in names and "trained" not in names and "unused" not in names
    assert hand_in.answered == hand_in.exercises == ("cosmap", "shift")
    assert hand_in.notes == ("2 of 8 code cells define answers; the others are not run",)
    line = hand_in.source.decode().splitlines().index("    return half(t)") + 1
    assert hand_in.place(line) == "code cell 6, line 5"


@pytest.mark.parametrize(
    ("cells", "names", "note"),
    [
        ((f"def shift(t, alpha):\n    {STUB}", "def shift(t, alpha): return 2"), {"shift": 2},
         "shift is defined more than once; the last one counts"),
        (("def f(): return 1", "def shift(t, a): return f()", "def f(): return 3"),
         {"shift": 1}, "1 of 3"),
        (("def shift(t, a): return g()", "def g(): return 4"), {"shift": 4}, "1 of 2"),
        (("from os import *", "def shift(t, a): return len(sep)"), {"shift": 1}, "1 of 2"),
        (("class Answer:\n    k = 5\n    def __call__(self, t, a): return self.k",
          "def shift(t, a): return Answer()(t, a)"), {"shift": 5}, "1 of 2"),
        (("def logit_normal_slowly(t): ...", "def shift(t, a): return 7"), {"shift": 7}, "1 of 2"),
        (("def patchfy(t, a): return 6",), {}, "patchfy is not an exercise; rename"),
        (("x = 1", "from __future__ import annotations\ndef shift(t: T, a) -> T: return 8"),
         {"shift": 8}, "1 of 2"),
        (('s = """\n%time\n"""\ndef shift(t, a): return s',), {"shift": "\n%time\n"}, "1 of 1"),
        (("if True:\n    !ls\nlimit = 9", "def shift(t, a): return limit"), {"shift": 9}, "1 of 2"),
        (("k = 4", "k = k / 2", "k = k + 1", "def shift(t, a): return k"), {"shift": 3}, "1 of 4"),
        (("pip install einops\n!pip install \\\n  einops \\\n  numpy\nfiles = !ls\nx, y = %magic\n"
          "shift? \nk = 2\ndef shift(t, a): return k",), {"shift": 2}, "1 of 1"),
        (("k = 4; k = k / 2", "def shift(t, a): return k"), {"shift": 2}, "1 of 2"),
        (("k = 4\nk *= 2", "def shift(t, a): return k"), {"shift": 8}, "1 of 2"),
        (("k = []\nk.append(3)", "def shift(t, a): return k"), {"shift": [3]}, "1 of 2"),
        (("k = {}\nfor i in range(2):\n    k[i] = i", "def shift(t, a): return k"),
         {"shift": {0: 0, 1: 1}}, "1 of 2"),
        (("try:\n    import math as m\nexcept ImportError:\n    m = 0",
          "def shift(t, a): return m.floor(m.pi)"), {"shift": 3}, "1 of 2"),
        (("def f(): return f.k\nf.k = 6", "def shift(t, a): return f()"), {"shift": 6}, "1 of 2"),
        (("import math", "math.nothing()", "def shift(t, a): return math.floor(2.5)"),
         {"shift": 2}, "1 of 3"),
        (("def mine(t, a): return 9", "shift = mine\ncheck('shift', shift)"), {"shift": 9}, "1 of"),
        ((f"def shift(t, alpha):\n    {STUB}", "class Mine:\n    def __call__(s, t, a): return 4",
          "shift = Mine()\ncheck('shift', shift)"), {"shift": 4}, "1 of 3"),
        (("from functools import cache", "def shift(t, a): return [5]\nshift = cache(shift)\n"
          "check('shift', shift)"), {"shift": [5]}, "1 of 2"),
        (("def shift(t, a): return 1\ncheck('shift', shift)", "shift = 3.0"), {"shift": 1}, "1 of"),
        (("def shift(t, a):\n    if a is None:\n        return 7\n"
          "    raise NotImplementedError('other a')",), {"shift": 7}, "1 of 1"),
    ],
)  # fmt: skip
def test_what_an_answer_uses(tmp_path, cells, names, note):
    hand_in = read(tmp_path, *cells)
    found = run(hand_in)
    assert {name: found[name](None, None) for name in hand_in.answered} == names
    assert any(note in line for line in hand_in.notes), hand_in.notes


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (("from nanosd3.flow import interpolate as mix", "def shift(t, a): return mix(t, t, a)"),
         "closed book: the answer uses mix, imported from the package nanosd3"),
        (("import nanosd3.flow", "f = nanosd3.flow.shift", "def shift(t, a): return f(t, a)"),
         "closed book: the answer uses nanosd3, imported"),
        (("from lab import trained\nlesson = trained()", "def shift(t, a): return lesson"),
         "the answer uses trained from lab.py, which grading does not have"),
        (("a = 1\ndef shift(t, alpha):\n    return (t",), "code cell 1, line 3: '(' was never"),
        (("def shift(t, alpha):\nreturn t",), "code cell 1, line 2: expected an indented block"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_run_spoils_only_itself(tmp_path, cells, reason):
    hand_in = read(tmp_path, *cells, "def cosmap(u): return u")
    assert list(hand_in.refused) == ["shift"] and reason in hand_in.refused["shift"]
    assert run(hand_in)["cosmap"](2) == 2 and "shift" in hand_in.answered


def test_an_open_book_may_be_used(tmp_path):
    cells = ("from nanosd3.flow import interpolate as mix", "def shift(t, a): return mix")
    hand_in = read(tmp_path, *cells, open_book=True)
    assert not hand_in.refused and callable(run(hand_in)["shift"](0, 0))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_our_notebooks_ask_for_their_exercises_and_answer_none(path):
    hand_in = read_hand_in(path, list(EXERCISES))
    answers = run(hand_in)
    assert {e.name for e in __main__.asked(path, hand_in, [])} == set(hand_in.exercises)
    assert 2 <= len(hand_in.exercises) <= 5 and not hand_in.answered and not hand_in.refused
    assert hand_in.source.decode().count(STUB) == len(hand_in.exercises)
    assert len(hand_in.notes) == 1
    for name in hand_in.exercises:
        with pytest.raises(NotImplementedError):
            answers[name](*EXERCISES[name].names)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"cells": 3}', b'{"cells": [{"cell_type": "code"}]}',
     b'{"worksheets": []}', b"[" * 100_000],
)  # fmt: skip
def test_no_notebook(tmp_path, content):
    (tmp_path / "a.ipynb").write_bytes(content)
    with pytest.raises(InputError, match="not a Jupyter notebook of format 4"):
        read_hand_in(tmp_path / "a.ipynb", list(EXERCISES))


# --- predictions --------------------------------------------------------------------------------


def asking(path: Path, *cells: str) -> Path:
    """A notebook of these cells: of text where they begin with #, else of code."""
    both = [{"cell_type": "markdown" if c.startswith("#") else "code", "source": c} for c in cells]
    path.write_text(json.dumps({"cells": both, "nbformat": 4, "metadata": {}}), encoding="utf-8")
    return path


def predicted(path: Path, *cells: str):
    return read_hand_in(asking(path / "hw.ipynb", *cells), list(EXERCISES)).predictions


def test_predictions_belong_to_their_questions(tmp_path):
    found = predicted(
        tmp_path,
        "# Write where you see **PREDICT**.",
        "# A line.\n#\n**PREDICT.** Will the loss\ngo to zero? Or to 1.5 or so?",
        "%%time\nguess('No:\\n it  cannot.')\nraise SystemExit",
        "# **PREDICT.** Which is 1.5 times as large",
        'guess_2 = "..."',
        "# **PREDICT.** Where? And why?",
        "x = 1",
        'guess("é" "t")\nguess(text="é")',
        "# No question.",
        'guess_3 = """far\nout"""',
        "# **PREDICT.** Last.",
    )
    assert found.found == (
        ("Will the loss go to zero?", "No: it cannot."),
        ("Which is 1.5 times as large", ""),
        ("Where?", "ét / é / far out"),
        ("Last.", ""),
    )
    assert str(found) == "2 of 4" and not found.notes


@pytest.mark.parametrize("empty", ['guess("")', 'guess("...")', 'guess(" … ")', 'guess_1 = " "'])
def test_an_empty_field_is_no_prediction(tmp_path, empty):
    assert str(predicted(tmp_path, "# **PREDICT.** What?", empty)) == "0 of 1"


@pytest.mark.parametrize(
    "field",
    ["guess(it is)", "guess(answer)", "guess(f'{exit()}')", "guess('a' + 'b')", "guess()",
     "guess('a', 'b')", "guess(b'a')", "guess(3)", "guess(*'a')", "guess_1 = 3",
     "guess('it's')", f"guess({'(' * 100_000}", "guess('a')" + "+guess('b')" * 100_000],
    ids=range(13),
)  # fmt: skip
def test_what_is_not_text_is_not_run_and_not_counted(tmp_path, field):
    found = predicted(tmp_path, "# **PREDICT.** What?", field)
    assert str(found) == "0 of 1"
    if "+guess" not in field:  # that is no field
        assert found.notes == ("predictions that are not text in quotes, in code cells 1",)


def test_hostile_predictions(tmp_path):
    long = "a" * 10**6
    field = f'guess("=1+1\\x1b[2J\\0\\ud800{long}")'
    found = predicted(tmp_path, "# **PREDICT.** " + long, *["guess_1 = 1"] * 50, field)
    question, text = found.found[0]
    assert len(question) == len(text) == 2000 and text.isprintable()
    assert text.startswith("=1+1[2Ja") and text.endswith("a…")
    assert found.notes[0].endswith("code cells 1, 2, 3, 4, 5, 6, 7, 8, 9, 10")


def test_an_answer_field_says_whether_it_is_filled_in(capsys):
    for text in ("", "...", " ", "It is 3.", 3):
        guess(text)
    assert capsys.readouterr().out == "No prediction yet.\n" * 3 + "Noted.\n" * 2


def test_predictions_are_collected(tmp_path, capsys, fake):
    folder, table = tmp_path / "class", tmp_path / "t.csv"
    folder.mkdir()
    questions = [
        "# **PREDICT.** We go. Where? Why?",
        "# **PREDICT.** =How?",
        'check("shift", shift)',
    ]
    asking(folder / "=a.ipynb", questions[0], 'guess("@home")', *questions[1:])
    asking(folder / "b.ipynb", questions[0], 'guess(" -é ")', questions[1], 'guess("so")')
    (folder / "c.py").write_text('guess_1 = "here"\n' + answer(shift="right"))
    (folder / "d.ipynb").write_bytes("guess('é')".encode("latin-1"))
    command = ["grade-all", folder, "--csv", table, "--predictions", folder / "p.csv"]
    for _ in range(2):  # the second time over the table of the first
        assert __main__.main(list(map(str, command))) == 0
    rows = {row["file"]: row for row in csv.DictReader(table.open(encoding="utf-8"))}
    counts = [rows[name]["predictions"] for name in ("'=a.ipynb", "b.ipynb", "c.py", "d.ipynb")]
    assert counts == ["1 of 2", "2 of 2", "", ""]
    assert list(csv.reader((folder / "p.csv").open(encoding="utf-8"))) == [
        ["file", "question", "prediction"],
        ["'=a.ipynb", "We go. Where?", "'@home"],
        ["b.ipynb", "We go. Where?", "'-é"],
        ["b.ipynb", "'=How?", "so"],
    ]
    assert f"left out 0; wrote {table} and {folder / 'p.csv'}" in capsys.readouterr().out
    assert __main__.main(["grade", str(folder / "=a.ipynb"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == "1 of 2"
    assert __main__.main(["grade", str(folder / "=a.ipynb")]) == 0
    assert "\npredictions: 1 of 2\nscore: 0 of 1\n" in capsys.readouterr().out
    assert __main__.main(["grade", str(folder / "c.py"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == ""
    line = refused(capsys, __main__.main, "grade", folder / "c.py", "--predictions", table)
    assert "--predictions FILE is used by grade-all only" in line
    line = refused(capsys, __main__.main, *command[:-1], folder)
    assert f"--predictions {folder}: is a folder" in line
    same = ("grade-all", folder, "--csv", table, "--predictions", folder / ".." / table.name)
    before = table.read_bytes()
    assert "is also the file of --csv; name another" in refused(capsys, __main__.main, *same)
    assert table.read_bytes() == before


def test_status(tmp_path, capsys, fake, monkeypatch):
    asking(tmp_path / "01.ipynb", "# **PREDICT.** A?", 'guess("b")', 'check("mode", mode)',
           answer(shift="right", mode="wrong"))  # fmt: skip
    asking(tmp_path / "02.ipynb", "# **PREDICT.** A?", "guess(3)", 'ok = check("heun", heun)')
    asking(tmp_path / "03.ipynb", "# Notes of mine.")
    (tmp_path / "04.ipynb").write_text("{")
    (tmp_path / "hw.py").write_text(answer(shift="right"))
    assert __main__.main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in (*lines[1:3], lines[4])] == [
        ["01", *"1 of 2 1 of 1".split(), "mode"],
        ["02", *"0 of 1 0 of 1".split(), "heun"],
        ["all", *"1 of 3 1 of 2".split()],
    ]
    assert "not a Jupyter notebook" in lines[3] and len(lines) == 5
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == lines[:3]
    line = refused(capsys, __main__.main, "status", tmp_path / "nowhere")
    assert "nowhere: not a folder with notebooks that set exercises" in line


# --- Python files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 'é'".encode("latin-1"), "line 1: is not valid UTF-8"),
        ("def shift(): pass".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b"x = 1\0", "holds a NUL"),
        (b"# coding: nonsense\n", "nonsense"),
        (b"x = (", "line 1: '(' was never closed"),
    ],
)
@pytest.mark.parametrize("name", ["a.py", "a.PY"])
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_hand_in(tmp_path / name, list(EXERCISES))
    assert message in str(raised.value) and name in str(raised.value)


@pytest.mark.parametrize(
    "content",
    ["# coding: latin-1\nx = 'é'".encode("latin-1"), "\ufeffx = 'é'\r\n".encode(), b"\xef\xbb\xbf"],
)
def test_files_of_any_declared_encoding(tmp_path, content):
    (tmp_path / "a.py").write_bytes(content)
    assert read_hand_in(tmp_path / "a.py", list(EXERCISES)).source == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
@pytest.mark.parametrize("name", ["a.py", "a.ipynb"])
def test_a_pipe_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is not a file"):
        read_hand_in(tmp_path / name, list(EXERCISES))


# --- what is graded -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.py", "a.ipynb"])
def test_one_thread_parses_at_a_time(tmp_path, monkeypatch, name):
    """CPython may fail if two build trees at once, and they share the filters of warnings."""
    parse, inside, most = ast.parse, [], []

    def slow(*arguments):
        inside.append(arguments)
        time.sleep(0.05)
        most.append(len(inside))
        inside.pop()
        return parse(*arguments)

    monkeypatch.setattr(ast, "parse", slow)
    file = tmp_path / name
    file.write_text("x = 1\n") if file.suffix == ".py" else notebook(file, "x = 1")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_hand_in, [file] * 4, [["shift"]] * 4))
    assert most == [1] * 4


@pytest.fixture
def fake(monkeypatch):
    """Grading without running anything: the status of an answer is what it returns, as text."""

    def grade(file: Path, exercises, open_book=False) -> list[Verdict]:
        hand_in = read_hand_in(file, [e.name for e in exercises], open_book)
        found, verdicts = run(hand_in), []
        for e in exercises:
            status = "not attempted"
            with contextlib.suppress(KeyError, TypeError):  # a stub expects arguments
                status = found[e.name]()
            verdicts.append(Verdict(e.name, status, e.points * (status == "right"), e.points, ""))
        return verdicts

    monkeypatch.setattr(__main__, "grade", grade)
    monkeypatch.setattr(progress, "grade", grade)


def answer(**statuses: str) -> str:
    return "".join(f"def {name}(): return {status!r}\n" for name, status in statuses.items())


def test_a_stub_file_keeps_its_exercises(tmp_path, capsys, fake):
    file = tmp_path / "hw.py"
    __main__.main(["start", str(file), "--only", "flow", "heun"])
    file.write_text(file.read_text() + answer(shift="right", patchify="right", patchfy="?"))
    capsys.readouterr()
    assert __main__.main(["grade", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("✓ shift ") and "· not attempted: 8 (interpolate, " in out
    assert "note: answers to exercises that were not asked for: patchify" in out
    assert out.endswith("score: 1 of 14\n")
    assert __main__.main(["grade", str(file), "--only", "patches", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(results["exercises"]) == 4 and results["notes"][-1].endswith("for: shift")
    file.write_text("# exercises: flow nonsense\n")
    line = refused(capsys, __main__.main, "grade", file)
    assert f"{file}: # exercises: nonsense: no such exercise or topic" in line


def test_without_only_all_are_asked_for(tmp_path, capsys, fake):
    file = tmp_path / "hw.py"
    __main__.main(["start", str(file)])
    __main__.main(["grade", str(file)])
    out = capsys.readouterr().out
    assert f"· not attempted: {len(EXERCISES)} (" in out and "bucket_sizes" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_a_notebook_asks_for_its_own(tmp_path, capsys, fake):
    file = notebook(tmp_path / "hw.ipynb", answer(shift="right"), 'check("mode", f)')
    assert __main__.main(["grade", str(file)]) == 0
    assert capsys.readouterr().out.endswith(
        "· not attempted: 1 (mode)\n"
        "note: 1 of 2 code cells define answers; the others are not run\nscore: 1 of 2\n"
    )


def hand_in_folder(folder: Path) -> Path:
    """A folder as a learning platform hands it out, with everything that is found in such."""
    for name in ("eve", "__MACOSX", "bob/.ipynb_checkpoints", "bob/__pycache__"):
        (folder / name).mkdir(parents=True)
    (folder / "ada.PY").write_text(answer(shift="right", mode="wrong"))
    (folder / "=1.py").write_text(answer(shift="timed out"))
    notebook(folder / "bob" / "04.IPYNB", answer(shift="right", mode="refused"))
    notebook(folder / "bob" / ".ipynb_checkpoints" / "04.ipynb", answer(shift="right"))
    (folder / "eve" / "é.py").write_text("def shift(:\n")
    for name in ("notes.txt", "hw.py.txt", "all.zip", "._ada.py", "__MACOSX/ada.py", "eve/hw"):
        (folder / name).write_text("")
    return folder


def test_a_class_with_all_that_is_handed_in(tmp_path, capsys, fake):
    folder = hand_in_folder(tmp_path / "class")
    table = folder / "grades.csv"
    for _ in range(2):  # the second time over the table of the first
        assert __main__.main(["grade-all", str(folder), "--csv", str(table)]) == 0
    rows = {row["file"]: row for row in csv.DictReader(table.open(encoding="utf-8"))}
    assert list(rows) == [
        "'=1.py", "ada.PY", "bob/04.IPYNB", "eve/é.py",
        *(f"(files: {s})" for s in ("right", "wrong", "timed out", "refused", "not attempted")),
    ]  # fmt: skip
    state = {name: (row["shift"], row["mode"]) for name, row in rows.items()}
    assert state["'=1.py"] == ("timed out", "not attempted")
    assert state["ada.PY"] == ("1", "wrong") and rows["ada.PY"]["score"] == "1"
    assert state["bob/04.IPYNB"] == ("1", "refused") and rows["ada.PY"]["out_of"] == "2"
    assert state["eve/é.py"] == ("refused", "refused") and rows["eve/é.py"]["score"] == "0"
    assert "line 1: invalid syntax" in rows["eve/é.py"]["error"]
    assert "1 of 1 code cells" in rows["bob/04.IPYNB"]["notes"]
    assert [state[f"(files: {s})"] for s in ("right", "wrong", "timed out", "refused")] == [
        ("2", "0"), ("0", "1"), ("1", "0"), ("1", "2"),
    ]  # fmt: skip
    assert state["(files: not attempted)"] == ("0", "1")
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == (
        "graded 3 files, refused 1, left out 8 (._ada.py, __MACOSX/, all.zip, "
        f"bob/.ipynb_checkpoints/, bob/__pycache__/, eve/hw, hw.py.txt, notes.txt); wrote {table}"
    )
    assert out[-2] == "asked for 2 exercises, going by the files; --only chooses others"
    shift = next(line for line in out if line.startswith("shift "))
    assert shift.split() == ["shift", "2", "0", "1", "1", "0"]
    assert any(line.startswith(f"not graded: {folder / 'eve' / 'é.py'}: line 1") for line in out)


def test_nobody_loses_a_point_by_what_others_hand_in(tmp_path, capsys, fake):
    """Asked for is what files name and what anybody answered; wrong names are said."""
    (tmp_path / "a.py").write_text("# exercises: shift\n" + answer(shift="right"))
    (tmp_path / "b.py").write_text(answer(patchify="right"))
    (tmp_path / "c.py").write_text("# exercises: shfit\n" + answer(shift="right"))
    for i in range(12):
        (tmp_path / f"d{i}.py").write_text("(")
    table = tmp_path / "t.csv"
    assert __main__.main(["grade-all", str(tmp_path), "--csv", str(table)]) == 0
    rows = {row["file"]: row for row in csv.DictReader(table.open())}
    assert [rows[f"{name}.py"]["score"] for name in "abc"] == ["1", "3", "1"]
    assert rows["a.py"]["out_of"] == "4" and "mode" not in rows["a.py"]
    assert "c.py: # exercises: shfit: no such exercise or topic" in rows["c.py"]["notes"]
    out = capsys.readouterr().out
    assert out.count("not graded: ") == 10 and "\nand 2 more; see the column 'error'\n" in out


def test_only_of_the_teacher_counts(tmp_path, capsys, fake):
    (tmp_path / "a.py").write_text("# exercises: flow\n" + answer(patchify="right", shift="right"))
    table = tmp_path / "t.csv"
    command = ["grade-all", str(tmp_path), "--csv", str(table), "--only", "patches"]
    assert __main__.main(command) == 0
    row = next(csv.DictReader(table.open()))
    assert (row["score"], row["out_of"]) == ("3", "12") and "shift" not in row
    assert row["notes"] == "answers to exercises that were not asked for: shift"
    assert "attempted by nobody: 3 (unpatchify, " in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_links_and_pipes_in_a_folder(tmp_path, capsys, fake):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "ada.py").write_text(answer(shift="right"))
    (folder / "loop").symlink_to(folder)
    (folder / "gone.py").symlink_to(tmp_path / "nowhere.py")
    os.mkfifo(folder / "pipe.py")
    table = tmp_path / "t.csv"
    command = ["grade-all", str(folder), "--csv", str(table), "--only", "shift"]
    assert __main__.main(command) == 0
    out = capsys.readouterr().out
    assert "graded 1 files, refused 1, left out 2 (loop/, pipe.py)" in out
    assert "gone.py: no such file" in out


def test_a_folder_of_other_files(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"{i:02d}.docx").touch()
    line = refused(capsys, __main__.main, "grade-all", tmp_path, "--csv", tmp_path / "t.csv")
    assert "not a folder with files of answers (*.py or *.ipynb)" in line
    assert "found only 00.docx, " in line and line.endswith("09.docx and 2 more")


# --- with the sandbox ---------------------------------------------------------------------------


def test_a_notebook_is_graded_without_posix(tmp_path, capsys, monkeypatch, hidden_posix):
    """Right, wrong, timed out, forbidden, broken: told apart, with the place in the notebook; and
    the limits that the system lacks are said."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import runpy, sys\nsys.path.append({str(Path(__file__).parents[1])!r})\n"
        "import pytest, torch\nfrom support import without_posix\n"
        "without_posix.hide(pytest.MonkeyPatch())\n"
        f"runpy.run_path({str(workers.PROGRAM)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(workers, "PROGRAM", program)
    monkeypatch.setattr(grading, "EXERCISE_LIMIT", 4)
    file = notebook(
        tmp_path / "hw.ipynb",
        "from lab import trained\ntrained()",
        "def velocity_target(x0, noise):\n    return noise - x0",
        "def cosmap(u):\n    return u.nonsense",
        "import socket\ndef mode(u, scale):\n    return socket.create_connection(('127.0.0.1', 9))",
        "def flow_loss(velocity, x0, noise):\n    return (t",
        "import time\ndef shift(t, alpha):\n    time.sleep(60)",
    )
    assert __main__.main(["grade", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "note: this system cannot limit an answer's memory and file sizes\n"
    rows = {row["name"]: row for row in json.loads(out)["exercises"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "velocity_target": "right", "cosmap": "wrong", "mode": "refused", "shift": "timed out",
        "flow_loss": "refused",
    }  # fmt: skip
    assert 'in code cell 3, line 2: "return u.nonsense"' in rows["cosmap"]["message"]
    assert "not allowed" in rows["mode"]["message"]
