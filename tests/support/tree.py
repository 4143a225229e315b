"""Write the map of the package in README.md from docstrings: `python tests/support/tree.py`.

Order: the layout in nanosd3/__init__.py, and each folder's own list. Text: first sentences.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanosd3"
README = ROOT / "README.md"
BEGIN, END = "<!-- map: python tests/support/tree.py -->\n", "<!-- end of the map -->\n"


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def first_sentence(path: Path) -> str:
    paragraph = " ".join(docstring(path).split("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) (?=[A-Z])", paragraph)[0]


def listed(path: Path, heading: str) -> list[list[str]]:
    """The words of each indented line under a heading of a docstring."""
    rest = docstring(path).partition(heading)[2].split("\n\n")[0].splitlines()[1:]
    return [line.split() for line in rest if line.startswith("    ")]


def folder_lines(folder: Path) -> list[str]:
    """A folder with the names of its modules, then the folders in it."""
    order = [words[0] for words in listed(folder / "__init__.py", "Modules")]
    order += sorted(path.stem for path in folder.glob("[a-z]*.py"))
    names = [name for name in dict.fromkeys(order) if (folder / f"{name}.py").exists()]
    name, what = folder.relative_to(PACKAGE), first_sentence(folder / "__init__.py")
    line = f"- [**{name}/**](nanosd3/{name}): {what} *{', '.join(names)}*"
    inner = sorted(path.parent for path in folder.glob("*/__init__.py"))
    return [line, *(one for path in inner for one in folder_lines(path))]


def tree() -> str:
    """A line for each module and folder."""
    lines: list[str] = []
    for name in (name for row in listed(PACKAGE / "__init__.py", "Layout") for name in row):
        path = PACKAGE / f"{name}.py"
        if path.exists():
            lines.append(f"- [{name}](nanosd3/{name}.py): {first_sentence(path)}")
        elif name.count("/") == 1:  # inner folders follow the outer ones
            lines += folder_lines(PACKAGE / name)
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + tree() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
