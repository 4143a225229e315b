"""A student's way without what POSIX alone has: train, generate, a notebook cell, grade.

That a hand-in is graded that way is tested in tests/exercises/test_hand_ins.py.
"""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
import torch
from support import without_posix

import train_mnist
from nanosd3 import generate
from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES
from nanosd3.exercises.grader import grading, recording, sandbox, workers
from nanosd3.exercises.grader.grading import missing_limits
from nanosd3.exercises.grader.notebook_cells import parsed
from nanosd3.machine import device
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import export
from nanosd3.storage.run import Run

ROOT = Path(__file__).parents[1]


def test_train_and_generate(tiny_run, tmp_path, hidden_posix, unobserved, monkeypatch, capsys):
    """The last stage of training, an interruption and a resume, and a picture."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    unfinished = Run.read(run)
    unfinished.stages = {k: v for k, v in unfinished.stages.items() if k not in ("flow", "samples")}
    unfinished.write()
    for name in ("flow.safetensors", "metrics.json"):
        (run / name).unlink()
    command = ["--config", "tiny", "--out", str(run)]
    with monkeypatch.context() as patch:
        patch.setattr(train_mnist, "report_digits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_mnist.main(command)
    assert train_mnist.main(command) == 0
    out = capsys.readouterr().out
    assert out.count(f"{run}: cannot be locked on this system; do not train in it twice") == 2
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["peak_memory_gb"] is None  # not reported by such a system
    picture = tmp_path / "seven.png"
    assert generate.main(["a 7", "--model", str(run), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 100
    assert_names_fit([path.relative_to(tmp_path) for path in tmp_path.rglob("*")])


def assert_names_fit(paths):
    """File names that Windows can store, of which no two differ in case only."""
    for path in paths:
        assert not re.search(r'[<>:"|?*\\\x00-\x1f]|[. ](/|$)', path.as_posix()), path
        reserved = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"
        assert not any(re.fullmatch(reserved, part, re.IGNORECASE) for part in path.parts), path
    assert len({str(path).casefold() for path in paths}) == len(paths)


@pytest.mark.parametrize("page", ["", "notebooks", "nanosd3/exercises"])
def test_commands_of_students_work_in_any_shell(page):
    """No continued lines, no `NAME=value command`, no single quotes: cmd.exe has none of them."""
    text = (ROOT / page / "README.md").read_text(encoding="utf-8")
    blocks = [part for part in text.split("```")[1::2] if not part.startswith("python\n")]
    commands = [line for block in blocks for line in block.splitlines()]
    commands += re.findall(r"`([^`]+)`", text)
    for line in commands:
        assert not re.search(r"\\$|^\w+=\S+ \w|^python.*'|/dev/|^cp |^rm |&&", line), line


def test_file_names():
    assert_names_fit([p.relative_to(ROOT) for p in ROOT.glob("*")])
    for folder in ("nanosd3", "notebooks/src", "tests"):
        assert_names_fit([p.relative_to(ROOT) for p in (ROOT / folder).rglob("*")])


def interrupted(*_):
    raise KeyboardInterrupt


def test_weights_are_exported(tmp_path, official_file, hidden_posix):
    export(open_checkpoint(official_file), "single", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size > 0


def test_a_notebook_cell(hidden_posix, monkeypatch, capsys):
    """The first cell, the helper module, and a cell with an exercise."""
    book = nbformat.read(ROOT / "notebooks" / "02_timesteps.ipynb", as_version=4)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    exercise = next(cell for cell in cells if "def shift(" in cell)
    monkeypatch.chdir(ROOT / "notebooks")
    names: dict = {}
    lines = ("from lab import begin_job, pick, trained", "from nanosd3.exercises import check")
    with matplotlib.rc_context():  # notebooks have a style of their own
        for cell in (cells[0], *lines, exercise):
            exec(compile(parsed(cell)[0], "cell", "exec"), names)
    torch.set_num_threads(1)
    assert capsys.readouterr().out.endswith("· shift (0/1): not attempted yet\n")


def test_what_the_system_lacks_is_said(tmp_path, hidden_posix, capsys):
    assert missing_limits() == "memory and file sizes"
    assert device.cores() >= 1 and device.peak_memory(device.set_up(1)) is None
    assert device.memory_found()[1] == "(not reported by this system)"
    with Run.open(tmp_path / "run", {"config": {"name": "x"}}).alone():
        pass
    assert "cannot be locked on this system" in capsys.readouterr().out


def test_here_nothing_is_lacking(tmp_path, capsys, monkeypatch):
    assert missing_limits() == ""
    monkeypatch.setattr("sys.platform", "darwin")
    assert missing_limits() == "memory"


def test_a_limit_that_is_refused_does_not_prevent_the_others(monkeypatch, tmp_path):
    """macOS has the limit of memory in name only."""
    given = []

    def setrlimit(limit, value):
        if limit == 1:
            raise ValueError("current limit exceeds maximum limit")
        given.append((limit, value))

    limits = SimpleNamespace(RLIMIT_AS=1, RLIMIT_FSIZE=2, setrlimit=setrlimit)  # and no CORE
    monkeypatch.setitem(sys.modules, "resource", limits)
    monkeypatch.setattr(sys, "addaudithook", lambda hook: None)
    sandbox.restrict_process(str(tmp_path), recording.PACKAGE, False, 2**33)
    assert given == [(2, (2**28, 2**28))]


def test_answers_run_where_torch_is_installed_for_one_user(tmp_path, monkeypatch):
    """The process finds packages of this user and in PYTHONPATH, but not the package's folder, and
    nothing else of the environment."""
    started = {}
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda command, **o: started.update(o, c=command)
    )
    given = {"APPDATA": "a", "HOME": "h", "SECRET": "s", "PYTHONWARNINGS": "error"}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT), "/somewhere", ""])
    monkeypatch.setattr(os, "environ", given)
    for program in (workers.PROGRAM, workers.FORK_SERVER):
        workers.start_python([program], tmp_path, {}, 0)
        assert started["env"].keys() == {"APPDATA", "HOME", "PYTHONPATH", *workers.SETTINGS}
        assert started["env"]["PYTHONPATH"] == os.path.abspath("/somewhere")
        assert "-P" in started["c"] and not {"-E", "-I", "-s"} & set(started["c"])


@pytest.mark.parametrize("forks", [True, False])
def test_a_process_that_does_not_start_is_no_fault_of_the_student(tmp_path, monkeypatch, forks):
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit(3)")
    monkeypatch.setattr(workers, "FORK_SERVER" if forks else "PROGRAM", program)
    monkeypatch.setattr(workers, "_server", [])
    if not forks:
        monkeypatch.delattr(os, "fork")
    (tmp_path / "hw.py").write_text("x = 1")
    with pytest.raises(InputError, match="has ended with exit status 3"):
        grading.grade(tmp_path / "hw.py", [EXERCISES["shift"]])


def test_no_module_needs_posix_to_be_imported():
    """Such imports are inside functions, where a missing module is caught."""
    sources = [*(ROOT / "nanosd3").rglob("*.py"), *ROOT.glob("*.py"), *ROOT.glob("notebooks/*.py")]
    for path in sources:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & set(without_posix.MODULES), path
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
                continue
            for inner in ast.walk(node):  # nor at import time otherwise
                if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                    posix = {*without_posix.OS, *without_posix.SIGNALS.split()}
                    assert inner.value.id not in ("os", "signal") or inner.attr not in posix, path
