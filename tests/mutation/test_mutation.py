"""The faults fit the spine and reach all of it, and the program that plants them tells caught
from survived. The hunt itself takes half an hour: python tests/mutation/run.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mutation import run as mutation
from mutation.faults import FAULTS, Fault
from nanosd3.cli import run_main
from nanosd3.errors import InputError

SPINE = (
    *("flow.py", "samplers.py", "patchify.py", "embeddings.py", "layers.py", "mmdit.py"),
    "machine/matmul.py",
    "machine/accelerate.py",
    "machine/channels_last.py",
)
SOURCES = {
    file: (mutation.ROOT / "nanosd3" / file).read_text() for file in {f.file for f in FAULTS}
}
IN_SPINE = [fault for fault in FAULTS if fault.file in SPINE]


# --- the list -----------------------------------------------------------------------------------


def test_faults_fit():
    assert len(IN_SPINE) >= 120 and len(FAULTS) - len(IN_SPINE) >= 60
    assert {*SPINE} <= {*SOURCES} and len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        source = SOURCES[fault.file]
        assert source.count(fault.old) == 1, fault
        assert fault.new != fault.old and fault.what, fault
        compile(source.replace(fault.old, fault.new), fault.file, "exec")


def test_faults_are_no_misspelt_names(tmp_path):
    """A fault that ends in a NameError is caught by any test, and says nothing about them."""
    for i, fault in enumerate(FAULTS):
        source = SOURCES[fault.file].replace(fault.old, fault.new)
        (tmp_path / f"{i}.py").write_text(source)
    words = "ruff check --isolated --no-cache --select F821 --output-format concise ."
    command = [sys.executable, "-m", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_faults_reach_every_function():
    touched = {(f.file, mutation.place(f, SOURCES[f.file])[1]) for f in FAULTS}
    for file in SPINE:
        for name in mutation.functions(SOURCES[file]):
            assert (file, name) in touched, f"{file}: {name}"


def test_faults_are_spread_by_size():
    """No file has more than twice or less than half of its share."""
    lines = {file: SOURCES[file].count("\n") for file in SPINE}
    for file in SPINE:
        share = sum(f.file == file for f in IN_SPINE) / len(IN_SPINE)
        assert 0.5 < share / (lines[file] / sum(lines.values())) < 2, file


# --- the program, on a package of one line -------------------------------------------------------

TESTS = """
from nanosd3.flow import double

def test_double():
    assert double(2) == 4
"""
CAUGHT = Fault("flow.py", "2 * x", "3 * x", "three times")
SURVIVES = Fault("flow.py", "2 * x", "x**2", "square")
HANGS = Fault("flow.py", "return 2", "while x: pass\n    return 2", "never returns")


@pytest.fixture
def toy(tmp_path) -> Path:
    root = tmp_path / "toy"
    for name, text in {
        "nanosd3/__init__.py": "",
        "nanosd3/pytest_plugin.py": "",  # pytest's plugin, where nanosd3 is installed
        "nanosd3/flow.py": "def double(x):\n    return 2 * x\n",
        "nanosd3/rest.pyc": "ignored",
        "tests/model/test_flow.py": TESTS,
        "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\n',
        ".gitignore": "*.pyc\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "toy")
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=root, check=True)


def hunt(root: Path, faults: list[Fault], *words: str) -> int:
    return run_main(lambda: mutation.main(list(words), root, faults))


@pytest.mark.slow
def test_caught_and_survived(toy, capfd):
    assert hunt(toy, [CAUGHT]) == 0
    assert "1 of 1 faults caught (100.0%)" in capfd.readouterr().out
    assert hunt(toy, [CAUGHT, SURVIVES], "--verbose") == 1
    said = capfd.readouterr().out
    assert "1 of 2 faults caught (50.0%)" in said
    assert "survives: nanosd3/flow.py:2 double: square" in said
    assert "three times: FAILED tests/model/test_flow.py::test_double" in said
    assert hunt(toy, [CAUGHT, SURVIVES], "--only", "three") == 0
    assert hunt(toy, [CAUGHT, SURVIVES], "--only", "four") == 2


def test_a_hang_is_caught(toy, monkeypatch, capsys):
    monkeypatch.setattr(mutation, "baseline", lambda *_: 3.0)
    assert hunt(toy, [HANGS]) == 0
    assert "100.0%), 1 of them because the tests hung" in capsys.readouterr().out


@pytest.mark.slow
def test_tests_that_fail_anyway(toy, capsys):
    (toy / "tests/model/test_flow.py").write_text(TESTS.replace("== 4", "== 5"))
    assert hunt(toy, [CAUGHT]) == 2
    assert capsys.readouterr().err.startswith("error: the tests fail without any fault: FAILED")
    assert hunt(toy, [CAUGHT], "--head") == 0  # the commit is right
    assert hunt(toy, [CAUGHT._replace(old="4 * x")]) == 2
    assert "'4 * x' is 0 times in flow.py, not once" in capsys.readouterr().err


def test_the_copy_is_what_git_would_take(toy, tmp_path):
    (toy / "tests/test_new.py").write_text("")
    (toy / "pyproject.toml").unlink()
    for head, differ in ((False, {"tests/test_new.py"}), (True, {"pyproject.toml"})):
        to = tmp_path / str(head)
        to.mkdir()
        mutation.copy_tree(toy, to, head)
        files = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
        package = {f"nanosd3/{name}.py" for name in ("__init__", "flow", "pytest_plugin")}
        assert files - differ == package | {"tests/model/test_flow.py", ".gitignore"}
        assert differ <= files
    with pytest.raises(InputError, match="git archive"):
        mutation.copy_tree(tmp_path, tmp_path, head=True)


def test_ctrl_c(toy, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mutation, "baseline", lambda *_: 3.0)
    monkeypatch.setattr(mutation, "first_failure", interrupted)
    assert hunt(toy, [CAUGHT]) == 130
    assert "stopped after 0 of 1 faults, 0 survived" in capsys.readouterr().err


# --- and on the spine itself --------------------------------------------------------------------


@pytest.mark.slow
def test_the_spine_is_watched(tmp_path):
    """One real fault, one real test file; without the fault the file is as before."""
    copy = tmp_path / "copy"
    shutil.copytree(mutation.ROOT / "nanosd3", copy / "nanosd3")
    (copy / "tests/model").mkdir(parents=True)
    shutil.copy(mutation.ROOT / "tests/model/test_flow.py", copy / "tests/model")
    shutil.copy(mutation.ROOT / "pyproject.toml", copy)
    fault = next(f for f in FAULTS if f.what == "direction of the velocity")
    stages = mutation.stages_of(copy)
    assert stages("flow.py") == [["tests/model/test_flow.py"]]
    assert stages("official/folders.py") == [[]]
    failure = mutation.catch(fault, copy, stages, limit=300)
    assert failure and failure.startswith("FAILED tests/model/test_flow.py")
    assert (copy / "nanosd3/flow.py").read_text() == SOURCES["flow.py"]


def test_as_a_program(tmp_path):
    """The documented command, from any folder."""
    command = [sys.executable, mutation.ROOT / "tests/mutation/run.py", "--only", "no such fault"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --only no such fault: none of {len(FAULTS)} faults\n"
