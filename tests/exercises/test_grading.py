"""Grading files of answers: right ones, broken ones, and attempts to cheat."""

import csv
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from support.commands import refused

from nanosd3 import flow, patchify
from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES, __main__
from nanosd3.exercises.grader import grading
from nanosd3.exercises.grader.checker import Verdict

HEAD = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import Tensor\n"
RIGHT = HEAD + "".join(
    inspect.getsource(function)
    for function in (flow.interpolate, flow.velocity_target, flow.shift)
)  # fmt: skip
NAMES = ("interpolate", "velocity_target", "shift")
CHOSEN = [EXERCISES[name] for name in NAMES]


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """A function that grades source code and returns {name: verdict}."""
    monkeypatch.setattr(grading, "EXERCISE_LIMIT", 4)
    monkeypatch.setattr(grading, "LOAD_LIMIT", 4)

    def grade(source: str, open_book: bool = False) -> dict:
        file = tmp_path / "hw.py"
        file.write_text(source)
        return {v.name: v for v in grading.grade(file, CHOSEN, open_book)}

    return grade


def test_right_answers_and_the_hint_of_a_wrong_one(verdicts):
    results = verdicts(RIGHT.replace("return noise - x0", "return x0 - noise"))
    assert {results[name].status for name in ("interpolate", "shift")} == {"right"}
    wrong = results["velocity_target"]
    assert wrong.points == 0 and "which way does yours point?" in wrong.message


def written(name: str, body: str) -> str:
    """An answer with this body."""
    body = textwrap.indent(textwrap.dedent(body), "    ")
    return f"\n\ndef {name}({', '.join(EXERCISES[name].names)}):\n{body}\n"


def replaced(name: str, body: str) -> str:
    """The right answers, except for one with this body."""
    return RIGHT + written(name, body)


def assert_is_bad(verdict: Verdict, message: str) -> None:
    assert verdict.points == 0 and message in verdict.message
    refused = message in ("closed book", "not allowed")
    late = message.endswith("was stopped")
    assert verdict.status == ("refused" if refused else "timed out" if late else "wrong")


def test_an_answer_that_ends_its_process_spoils_only_itself(verdicts):
    """One that is stopped, and one that stops itself."""
    results = verdicts(
        replaced("velocity_target", "while True: pass") + written("shift", "import os; os._exit(0)")
    )
    assert_is_bad(results["velocity_target"], "took more than 4 s and was stopped")
    assert_is_bad(results["shift"], "ended the program")
    assert results["interpolate"].points == 1


BAD_ANSWERS = {
    "raise SystemExit(0)": "raised SystemExit",
    "import nanosd3.flow; return nanosd3.flow.velocity_target(x0, noise)": "closed book",
    "return __import__('nanosd3.flow').flow.velocity_target(x0, noise)": "closed book",
    f"return open({str(Path(flow.__file__))!r}).read()": "closed book",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "not allowed",
    "open('OUTSIDE', 'w')": "not allowed",
    "import subprocess; subprocess.run(['true'])": "not allowed",
    "import os; os.system('true')": "not allowed",
    "import os; os.fork()": "not allowed",
    "import os; os.remove('cases.pt')": "not allowed",
    "return torch.empty(10**12)": "raised",
    "return [torch.save][0]": "returned an object of type",
    "a = []; a.append(a); return a": "raised RecursionError",
    "import gc; gc.get_objects()": "not allowed",
    "import io, pathlib; io.FileIO(pathlib.Path('OUTSIDE'), 'w')": "not allowed",
    "import sqlite3; sqlite3.connect('OUTSIDE')": "not allowed",
    "import os; os.mkdir('OUTSIDE')": "not allowed",
    "return torch.zeros(2**24)": "raised",
    "raise ValueError('\\x1b[2J' + 10**6 * 'x')": "raised ValueError",
}
OTHERS = [name for name in EXERCISES if name not in NAMES][: len(BAD_ANSWERS)]


@pytest.fixture(scope="module")
def among_others(tmp_path_factory) -> tuple[dict, Path]:
    """The verdicts on one file: the right answers, and every bad one as another exercise."""
    folder = tmp_path_factory.mktemp("graded")
    outside, source = folder / "was-here", RIGHT
    for name, body in zip(OTHERS, BAD_ANSWERS, strict=True):
        source += written(name, body.replace("OUTSIDE", str(outside)))
    (folder / "hw.py").write_text(source)
    exercises = [EXERCISES[name] for name in (*NAMES, *OTHERS)]
    return {v.name: v for v in grading.grade(folder / "hw.py", exercises)}, outside


@pytest.mark.parametrize(("name", "body"), list(zip(OTHERS, BAD_ANSWERS, strict=True)))
def test_a_bad_answer_spoils_only_itself(among_others, name, body):
    results, outside = among_others
    assert_is_bad(results[name], BAD_ANSWERS[body])
    assert all(results[right].points == 1 for right in NAMES)
    assert not outside.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("while True: pass", "took more than 4 s"),
        ("import os\nos._exit(0)", "ended the program"),
        ("import sys\nsys.exit()", "stopped early with SystemExit in line 2"),
        ("1 / 0", "stopped early with ZeroDivisionError in line 1"),
        ("from nanosd3.flow import *", "closed book"),
    ],
)
def test_a_file_that_cannot_be_run(verdicts, source, message):
    results = verdicts(source)
    assert all(v.points == 0 and message in v.message for v in results.values()), results
    status = {"took more": "timed out", "closed bo": "refused"}.get(message[:9], "wrong")
    assert {v.status for v in results.values()} == {status}


CHEATS = [
    """
    import torch, json
    torch.allclose = lambda *a, **k: True
    torch.equal = lambda *a, **k: True
    torch.Tensor.__eq__ = lambda self, other: True
    print(json.dumps({"score": 30, "out_of": 30}))
    """,
    """
    import sys
    for module in list(sys.modules.values()):
        for name in ("record", "outcome", "judge", "assess", "grade"):
            if name in vars(module):
                setattr(module, name, lambda *a, **k: {"status": "right", "points": 30})
    """,
    """
    import torch
    for name in ("interpolate", "velocity_target", "shift"):
        torch.save({"values": [], "gradients": [], "after": [], "points": 9}, name + ".pt")
    """,
    """
    class Always:
        def __eq__(self, other): return True
        def __call__(self, *a): return self
    interpolate = velocity_target = shift = Always()
    """,
]


@pytest.mark.parametrize("cheat", CHEATS, ids=["patches", "checker", "records", "object"])
def test_cheats_are_worth_nothing(verdicts, cheat):
    stubs = "\n".join(
        f"def {e.name}(*a):\n    return a[0] * 0 + 7" for e in CHOSEN if e.name not in cheat[-60:]
    )
    results = verdicts(stubs + "\n" + textwrap.dedent(cheat))
    assert sum(v.points for v in results.values()) == 0, results


ESCAPES = [
    "import __main__, os; __main__.FORBIDDEN = (); os.system('touch OUTSIDE')",
    "import __main__; __main__.isinstance = lambda *a: False; open('OUTSIDE', 'w')",
    "import __main__; __main__.os.path.realpath = lambda p: '.'; open('OUTSIDE', 'w')",
]


def test_the_hook_cannot_be_disabled(verdicts, tmp_path):
    """By none of three answers, for itself or for those that run after it."""
    outside = tmp_path / "was-here"
    source = RIGHT
    for name, body in zip(NAMES, ESCAPES, strict=True):
        source += written(name, body.replace("OUTSIDE", str(outside)))
    results = verdicts(source)
    assert all("not allowed" in v.message for v in results.values()), results
    assert not outside.exists()


@pytest.mark.parametrize(
    "lines",
    [
        [
            "os.makedirs('loaded')",
            "os.mkfifo('interpolate.pt')",
            "os.symlink('/dev/zero', 'shift.pt')",
        ],
        ["os.mkfifo('loaded')"],
    ],
)
def test_unexpected_files_do_not_stop_the_grader(verdicts, lines):
    tried = "".join(f"try:\n    {line}\nexcept OSError: pass\n" for line in lines)
    results = verdicts(f"import os\n{tried}{RIGHT}")
    assert len(results) == 3 and all(isinstance(v.points, int) for v in results.values())


def at_once(lines: str) -> str:
    """One statement, of which nothing counts after a line that fails."""
    return "if True:\n" + textwrap.indent(lines, "    ")


ODD_BUT_INNOCENT = (
    "\ufefffrom __future__ import annotations\n"
    + at_once(
        "from dataclasses import dataclass\n"
        "import os\n"
        "import sys\n"
        "from torch.nn.functional import *\n"
        "os.environ['KMP_DUPLICATE_LIB_OK'] = 'TRUE'\n"
        f"{RIGHT}\n"
        "@dataclass\n"
        "class Point:\n"
        "    x: int\n"
        "\n"
        "sys.exit()\n"
    )
).replace("\n", "\r\n")
FOLDERS = at_once("import os\nos.makedirs('figures/new', exist_ok=True)\n" + RIGHT)


@pytest.mark.parametrize(
    "text",
    [
        ODD_BUT_INNOCENT,
        RIGHT + "\ninput('done?')\n",
        "1 / 0\n" + FOLDERS,
        RIGHT + "\nvelocity_target = torch.rsub\n",
        "import torch\n" + RIGHT.replace("def shift", "@torch.jit.ignore\ndef shift"),
    ],
    ids=["many", "input", "an error, and folders", "a function of torch", "a decorator of torch"],
)
def test_innocent_files_keep_their_points(verdicts, text):
    assert {v.status for v in verdicts(text).values()} == {"right"}


def test_an_answer_may_refuse_input_by_any_error(tmp_path):
    """As a stub does, which refuses everything."""
    source = inspect.getsource(patchify.patchify)
    source = re.sub(r"raise ValueError.*", "raise NotImplementedError", source)
    (tmp_path / "hw.py").write_text(HEAD + source)
    [verdict] = grading.grade(tmp_path / "hw.py", [EXERCISES["patchify"]])
    assert verdict.status == "right", verdict


def test_lines_that_threads_run_count(verdicts):
    body = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(slowly, x0, noise).result()"""
    slow = "\ndef slowly(x0, noise):\n    for _ in range(50_000): pass\n    return noise - x0\n"
    results = verdicts(slow + replaced("velocity_target", body))
    assert "lines of Python" in results["velocity_target"].message


def test_names_imported_from_torch_are_no_answers(verdicts):
    results = verdicts("from torch.nn.functional import *")
    assert results["interpolate"].status == "not attempted"


def test_messages_are_fit_for_a_terminal(among_others):
    long = next(n for n, body in zip(OTHERS, BAD_ANSWERS, strict=True) if "10**6" in body)
    for verdict in among_others[0].values():
        assert len(verdict.message) < 500 and verdict.message.isprintable()
    assert "xxx" in among_others[0][long].message


def test_one_file_does_not_stop_a_class(tmp_path, capsys):
    (tmp_path / "a.py").write_text(RIGHT)
    (tmp_path / "deep.py").write_text("x = " + "-" * 100_000 + "1")
    (tmp_path / "long.py").write_text("x = " + "1+" * 100_000 + "1")
    (tmp_path / "=1+1.py").write_text(RIGHT)
    table = tmp_path / "t.csv"
    assert __main__.main(["grade-all", str(tmp_path), "--csv", str(table), "--only", *NAMES]) == 0
    rows = {row["file"]: row for row in csv.DictReader(table.open())}
    assert rows["a.py"]["score"] == rows["'=1+1.py"]["score"] == "3"
    assert rows["deep.py"]["score"] == rows["long.py"]["score"] == "0" and rows["deep.py"]["error"]


def test_open_book(verdicts):
    results = verdicts("from nanosd3.flow import interpolate, velocity_target, shift", True)
    assert {v.status for v in results.values()} == {"right"}


# --- the command line ---------------------------------------------------------------------------


def test_start_then_grade(tmp_path, capsys):
    file = tmp_path / "hw.py"
    assert __main__.main(["start", str(file), "--only", "flow", "attention"]) == 0
    names: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    assert "attention" in names and "patchify" not in names
    capsys.readouterr()
    assert __main__.main(["grade", str(file), "--only", "flow", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["score"] == 0 and results["out_of"] == 11
    assert {row["status"] for row in results["exercises"]} == {"not attempted"}
    file.write_text(RIGHT)
    assert __main__.main(["grade", str(file), "--only", "shift", "patchify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✓ shift") and lines[1] == "· not attempted: 1 (patchify)"
    assert lines[2].endswith("were not asked for: interpolate, velocity_target")
    assert lines[3] == "score: 1 of 4"


def test_every_stub_is_valid_python():
    for exercise in EXERCISES.values():
        names: dict = {"Tensor": torch.Tensor, "Callable": None}
        exec(compile(__main__.stub(exercise), "stub", "exec"), names)
        with pytest.raises(NotImplementedError, match="your code here"):
            names[exercise.name](*exercise.drawn()[0].arguments)


def test_a_class_is_graded(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "ada.py").write_text(RIGHT)
    (folder / "bob.py").write_text("def shift(t, alpha):\n    return alpha * t\n")
    (folder / "eve.py").write_text("def shift(:\n")
    table = tmp_path / "grades.csv"
    assert __main__.main(["grade-all", str(folder), "--csv", str(table), "--only", *NAMES]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [(row["file"], row["score"], row["out_of"]) for row in rows[:3]] == [
        ("ada.py", "3", "3"), ("bob.py", "0", "3"), ("eve.py", "0", "3"),
    ]  # fmt: skip
    assert "line 1: invalid syntax" in rows[2]["error"] and rows[0]["shift"] == "1"
    assert [row["shift"] for row in rows] == ["1", "wrong", "refused", *"11010"]
    assert [row["file"] for row in rows[3:]] == [
        f"(files: {s})" for s in ("right", "wrong", "timed out", "refused", "not attempted")
    ]


def test_what_is_not_the_file_s_fault_costs_no_points(tmp_path, capsys, monkeypatch):
    """It is tried once more, alone; then the file has no score, and the status says so."""
    (tmp_path / "a.py").write_text(RIGHT)
    (tmp_path / "b.py").write_text(RIGHT)
    table, tried = tmp_path / "t.csv", []

    def full(folder):
        tried.append(folder)
        if len(tried) % 2 == 0 or len(tried) > 3:
            raise InputError("no space left on the disk")

    monkeypatch.setattr(grading, "check_space", full)
    monkeypatch.setattr(__main__, "cores", lambda: 1)
    command = ["grade-all", str(tmp_path), "--csv", str(table), "--only", *NAMES]
    assert __main__.main(command) == 0 and len(tried) == 3
    assert __main__.main(command) == 1 and len(tried) == 7
    rows = list(csv.DictReader(table.open()))
    assert [(row["score"], row["shift"]) for row in rows[:2]] == [("", "not graded")] * 2
    assert "could not grade 2: try again" in capsys.readouterr().out


def test_a_full_disk_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(RIGHT)
    monkeypatch.setattr(grading, "SPACE_NEEDED", 2**60)
    with pytest.raises(InputError, match="no space left on the disk"):
        grading.grade(tmp_path / "a.py", CHOSEN)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody may write")
def test_a_table_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.py").write_text(RIGHT)
    monkeypatch.setattr(__main__, "grade", None)
    command = ("grade-all", tmp_path, "--csv", Path("/proc/grades.csv"))
    assert "cannot be written" in refused(capsys, __main__.main, *command)


def test_bad_input(capsys, tmp_path):
    ask = lambda *options: refused(capsys, __main__.main, *options)  # noqa: E731
    (tmp_path / "a.py").write_text("x = (")
    assert "line 1" in ask("grade", tmp_path / "a.py")
    assert "no such file" in ask("grade", tmp_path / "b.py")
    assert "already exists" in ask("start", tmp_path / "a.py")
    assert "no such exercise or topic" in ask("start", tmp_path / "b.py", "--only", "x")
    assert "needs a path" in ask("grade")
    assert "--csv FILE is required by grade-all" in ask("grade-all", tmp_path)
    assert "not a folder with files of answers" in ask(
        "grade-all", tmp_path / "no", "--csv", tmp_path / "t.csv"
    )
    (tmp_path / "c.py").write_bytes(b"\xff\xfe")
    assert "c.py: is UTF-16 text; save it as UTF-8" in ask("grade", tmp_path / "c.py")
    assert "is a folder" in ask("grade-all", tmp_path, "--csv", tmp_path)
