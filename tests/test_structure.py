"""The house: imports point down, nothing runs at import time, files and lines stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanosd3"
LAYERS = [  # as the package docstring lists them
    set(row.split())
    for row in (
        "runtime products",
        "config patchify layers flow samplers tokenizers parts images parallel buckets",
        "mmdit vae clip t5 data metrics options layouts weightfiles costs folders",
        "text accelerate checkpoint sizes sources footprint",
        "pipeline states shards speed figures",
        "loop features found",
        "stages audit",
        "train_text report export",
        "weights pairs",
        "jobs generate growth student",
        "measure",
        "train bench",
    )
]


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nanosd3"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nanosd3.")}
    return found


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def level(module: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if module in row)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for other in imports_of(PACKAGE / f"{module}.py"):
        assert level(other) < level(module), f"{module} imports {other}"


def test_docstring_lists_the_layers():
    text = (PACKAGE / "__init__.py").read_text()
    listed = text.split("rows above its own\n")[1].split("\n\n")[0]
    assert [set(line.split()) for line in listed.splitlines()] == LAYERS
    assert {*MODULES, "measure"} == set().union(*LAYERS)


def test_init_imports_nothing():
    assert not [n for n in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
                if isinstance(n, ast.Import | ast.ImportFrom)]  # fmt: skip


def test_importing_prints_nothing_and_leaves_matplotlib_alone():
    names = ", ".join(f"nanosd3.{m}" for m in MODULES)
    code = f"import sys, {names}; assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def sources() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]


def test_sizes():
    spine = ("flow", "samplers", "patchify", "layers", "mmdit")
    lines = {path: path.read_text().splitlines() for path in sources()}
    assert sum(len(lines[PACKAGE / f"{name}.py"]) for name in spine) < 1000
    for path, content in lines.items():
        assert all(len(line) <= 100 for line in content), path
        if path.parent == PACKAGE:
            assert len(content) <= 400, path
            for node in ast.walk(ast.parse("\n".join(content))):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_are_typed(module):
    """Every argument and result of what has no leading underscore carries its type."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None, f"{module}.{node.name}"
            for argument in node.args.args + node.args.kwonlyargs:
                typed = argument.annotation is not None or argument.arg in ("self", "cls")
                assert typed, f"{module}.{node.name}({argument.arg})"
