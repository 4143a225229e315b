"""The house: imports point down, nothing runs at import time, files and lines stay readable."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanosd3"


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The words of each indented row below a heading."""
    block = text.split(heading, 1)[1].split("\n\n")[0].splitlines()[1:]
    return [line.split() for line in block if line.startswith("    ")]


ROWS = rows_of(docstring(PACKAGE / "__init__.py"), "Layout: ")
FOLDERS = [name.rstrip("/") for row in ROWS for name in row if name.endswith("/")]


def modules() -> dict[str, Path]:
    """All modules by name, such as `flow` and `storage/run`."""
    paths = (path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
    return {str(path.relative_to(PACKAGE).with_suffix("")): path for path in paths}


MODULES = modules()


def place(name: str) -> tuple[int, int]:
    """The row of a module or of its folder, and its place inside that folder."""
    folder = max((f for f in FOLDERS if name.startswith(f"{f}/")), key=len, default=None)
    if folder is None:
        return next(i for i, row in enumerate(ROWS) if name in row), 0
    row = next(i for i, row in enumerate(ROWS) if f"{folder}/" in row)
    inside = rows_of(docstring(PACKAGE / folder / "__init__.py"), "Modules, ")
    listed = [words[0] for words in inside]
    return row, listed.index(name.removeprefix(f"{folder}/"))


@cache
def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanosd3"):
            base = node.module.removeprefix("nanosd3").lstrip(".").replace(".", "/")
            names = [f"{base}/{alias.name}".lstrip("/") for alias in node.names]
            found |= {base} if base in MODULES else set(names) & set(MODULES)
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("nanosd3.")]
            found |= {name.removeprefix("nanosd3.").replace(".", "/") for name in names}
    return found


ORDERED = [name for name in MODULES if not name.startswith("exercises/")]


@pytest.mark.parametrize("name", ORDERED)
def test_imports_point_down(name):
    for other in imports_of(MODULES[name]):
        assert place(other) < place(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ORDERED])
def test_nothing_imports_the_exercises(name):
    assert not any(name in imports_of(MODULES[other]) for other in ORDERED)
    grader = "exercises/grader/"
    if name.startswith(grader) and name != f"{grader}student_tests":
        assert all(other.startswith(grader) for other in imports_of(MODULES[name])
                   if other.startswith("exercises/"))  # fmt: skip


def test_every_module_and_folder_is_listed():
    for name in ORDERED:
        place(name)
    listed = {name.rstrip("/") for row in ROWS for name in row}
    assert all((PACKAGE / name).is_dir() or name in MODULES for name in listed)
    for folder in FOLDERS:
        text = docstring(PACKAGE / folder / "__init__.py")
        if folder != "exercises":
            inside = [words[0] for words in rows_of(text, "Modules, ")]
            assert all((PACKAGE / folder / f"{n}.py").exists() or (PACKAGE / folder / n).is_dir()
                       for n in inside)  # fmt: skip


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_init_imports_nothing(path):
    if path.parent.name == "exercises":  # whose `check` and `show` notebooks import
        return
    imports = [n for n in ast.walk(ast.parse(path.read_text()))
               if isinstance(n, ast.Import | ast.ImportFrom)]  # fmt: skip
    names = {alias.name for node in imports for alias in node.names}
    assert names == ({"os", "sys"} if path.parent == PACKAGE else set())  # for OpenMP's setting


SLOW = ("matplotlib", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor")


def test_importing_prints_nothing_and_leaves_what_takes_long_for_later():
    names = ", ".join(f"nanosd3.{name.replace('/', '.')}" for name in ORDERED)
    code = f"import sys, {names}; assert not sys.modules.keys() & {set(SLOW)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def sources() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]


def test_files_of_tests_have_names_of_their_own():
    """Pytest imports them by these names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_drawn_examples_are_the_same_and_have_no_deadline():
    current = settings()
    assert current.deadline is None and current.derandomize
    assert HealthCheck.too_slow in current.suppress_health_check


def test_sizes():
    core = ("flow", "samplers", "patchify", "layers", "mmdit")
    assert sum(len(MODULES[name].read_text().splitlines()) for name in core) < 700
    for path in sources():
        content = path.read_text(encoding="utf-8").splitlines()
        assert all(len(line) <= 100 for line in content), path
        if path.is_relative_to(PACKAGE):
            assert len(content) <= 300, path
            for node in ast.walk(ast.parse("\n".join(content))):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("name", ORDERED)
def test_public_functions_are_typed(name):
    """Every argument and result of what has no leading underscore carries its type."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None, f"{name}.{node.name}"
            for argument in node.args.args + node.args.kwonlyargs:
                typed = argument.annotation is not None or argument.arg in ("self", "cls")
                assert typed, f"{name}.{node.name}({argument.arg})"


def test_no_path_of_a_machine():
    """Nothing in the package names a folder that only its author has."""
    for path in sources():
        assert not re.search(r"/(home|Users)/\w+/", path.read_text(encoding="utf-8")), path


def test_one_meaning_for_a_name():
    """No public name stands for different things in two modules. `main` and `parse` belong to
    every command; minimal.py is a page of its own."""
    where: dict[str, list[str]] = {}
    for name in ORDERED:
        if name == "minimal":
            continue
        for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            made = [t.id for t in targets if isinstance(t, ast.Name)]
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                made = [node.name]
            for public in made:
                if not public.startswith("_") and public not in ("main", "parse"):
                    where.setdefault(public, []).append(name)
    assert {public: names for public, names in where.items() if len(names) > 1} == {}
