"""Build the notebooks from their sources: `python notebooks/build.py`.

The sources in notebooks/src are plain Python in the percent format, which can be read, compared
and searched. The .ipynb files beside this one are made of them, without outputs, and with cell
ids taken from the cells' positions, so that two builds are the same byte for byte; tests compare.
Behind the title goes the same first cell everywhere: it makes the package importable, also on
Colab, which has only the notebook and fetches the rest from REPOSITORY.
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
REPOSITORY = ""  # of your published copy; Colab fetches the package from it

INSTALL = """# Run this first. (On Colab it fetches the package; elsewhere nothing is installed.)
import os, sys
if "google.colab" in sys.modules and not os.path.exists("lab.py"):
    repository = {repository!r}
    assert repository, "put the address of the repository between the quotes above"
    !git clone --quiet --depth 1 {{repository}} nanosd3
    %cd nanosd3/notebooks
sys.path[:0] = [os.path.abspath(".."), os.path.abspath(".")]"""
FOR_TOOLS = re.compile(r"  # fmt: skip$", re.MULTILINE)  # of no use to a reader
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    return sorted((HERE / "src").glob("*.py"))


def build(source: Path) -> str:
    """The notebook of one source, as text."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL.format(repository=REPOSITORY)))
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
        if cell.cell_type == "code":
            cell.source = FOR_TOOLS.sub("", cell.source)
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
