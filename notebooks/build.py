"""Build the notebooks from their sources: `python notebooks/build.py`.

The sources in notebooks/src are plain Python in the percent format: easy to read, diff and search.
Each is converted to an .ipynb file next to this script, without outputs and with cell ids derived
from cell positions, so the build is deterministic; a test compares the committed files with it.

The same first cell is inserted after every title. It makes the package importable, and on Colab,
where only the notebook itself is present, it clones the rest from REPOSITORY.
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
REPOSITORY = ""  # URL of your published copy; Colab clones the package from it

INSTALL = """# Run this first. (On Colab it clones the package; elsewhere it installs nothing.)
import os, sys
if "google.colab" in sys.modules and not os.path.exists("lab.py"):
    repository = {repository!r}
    assert repository, "put the URL of the repository between the quotes above"
    !git clone --quiet --depth 1 {{repository}} nanosd3
    %cd nanosd3/notebooks
sys.path[:0] = [os.path.abspath(".."), os.path.abspath(".")]
import nanosd3  # before torch: on a busy machine, threads that wait then leave it their core"""
FORMATTER_PRAGMA = re.compile(r"  # fmt: skip$", re.MULTILINE)  # clutter for a reader
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """The notebook sources, in order."""
    return sorted((HERE / "src").glob("*.py"))


def build(source: Path) -> str:
    """Convert one source file to the text of its .ipynb file."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL.format(repository=REPOSITORY)))
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
        if cell.cell_type == "code":
            cell.source = FORMATTER_PRAGMA.sub("", cell.source)
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> int:
    for source in sources():
        target = HERE / f"{source.stem}.ipynb"
        target.write_text(build(source), encoding="utf-8")
        print(target.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
