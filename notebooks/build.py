"""Build the notebooks from their sources: `python notebooks/build.py`.

The sources in notebooks/src are plain Python in the percent format: easy to read, diff and search.
Each is converted to an .ipynb file next to this script, with cell ids derived from cell positions,
so the build is deterministic; a test compares the committed files with it.

`--execute` runs the notebooks whose outputs are older than their code, or those that are named
(`--execute 01 06`, `--execute all`), and keeps the outputs. A build without it keeps the outputs of
cells whose code has not changed and names the notebooks that should be executed again. `--site
FOLDER` makes pages to read in a browser. `--lesson` trains the model they use, into `lesson`.

The same first cell is inserted after every title. It makes the package importable. If REPOSITORY is
set, it also clones it on Colab, where only the notebook itself is present.
"""

import argparse
import hashlib
import os
import re
import sys
from difflib import SequenceMatcher
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

HERE = Path(__file__).parent.resolve()
REPOSITORY = ""  # URL of your published copy; Colab clones the package from it

COLAB = """
if "google.colab" in sys.modules and not os.path.exists("lab.py"):
    !git clone --quiet --depth 1 {repository} nanosd3
    %cd nanosd3/notebooks
"""
INSTALL = """import os, sys
{colab}
sys.path[:0] = [os.path.abspath(".."), os.path.abspath(".")]
import nanosd3  # before torch: on a busy machine, threads that wait then leave it their core"""
FORMATTER_PRAGMA = re.compile(r"  # fmt: skip$", re.MULTILINE)  # clutter for a reader
QUESTION, EXPLANATION = "**PREDICT.**", "<details>"  # an explanation is folded
COVER = "Predicted? Then see what happened"  # above folded outputs; also the summary on the site
MARK = "nanosd3_executed"  # in the metadata: the digest of the code that made the outputs
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """The notebook sources, in order."""
    return sorted((HERE / "src").glob("*.py"))


def install(repository: str = REPOSITORY) -> str:
    """The code of the first cell."""
    return INSTALL.format(colab=COLAB.format(repository=repository) if repository else "")


def convert(source: Path) -> NotebookNode:
    """The notebook of one source file, without outputs."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.cells.insert(1, nbformat.v4.new_code_cell(install()))
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
        if cell.cell_type == "code":
            cell.source = FORMATTER_PRAGMA.sub("", cell.source)
            cell.outputs, cell.execution_count = [], None
    hide_answers(notebook)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return notebook


def hide_answers(notebook: NotebookNode) -> None:
    """Fold the outputs between a question and the text that explains them (or else the next text);
    those of exercises stay open. JupyterLab unfolds them when the cell is run, the site when they
    are clicked."""
    texts = [cell.source for cell in notebook.cells]
    asked = False
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            field = cell.source.startswith("guess") or "solved" in cell.source
            if asked and not field:
                cell.metadata["jupyter"] = {"outputs_hidden": True}
            continue
        ahead = next((t for t in texts[i:] if QUESTION in t or EXPLANATION in t), "")
        explained = EXPLANATION in ahead.split(QUESTION)[0]
        asked = QUESTION in cell.source or (asked and explained and EXPLANATION not in cell.source)


def cover_answers(notebook: NotebookNode) -> None:
    """Put a line above folded outputs. JupyterLab shows the first line of what it folds, which
    would often be the answer."""
    for cell in code_cells(uncovered(notebook)):
        if cell.outputs and cell.metadata.get("jupyter", {}).get("outputs_hidden"):
            cell.outputs.insert(0, nbformat.v4.new_output("display_data", {"text/plain": COVER}))


def uncovered(notebook: NotebookNode) -> NotebookNode:
    """The notebook itself, without those lines."""
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if o.get("data") != {"text/plain": COVER}]
    return notebook


def text_of(notebook: NotebookNode) -> str:
    """The content of its file."""
    return nbformat.writes(notebook) + "\n"


def build(source: Path) -> str:
    """The content of the file of one notebook, without outputs."""
    return text_of(convert(source))


def write(notebook: NotebookNode, path: Path) -> None:
    """Write under a temporary name, then rename: never half a notebook."""
    cover_answers(notebook)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text_of(notebook), encoding="utf-8")
    os.replace(temporary, path)


# --- outputs ------------------------------------------------------------------------------------


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: NotebookNode) -> str:
    """A digest of the code, which an executed notebook carries in its metadata."""
    code = "\0".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def keep_outputs(notebook: NotebookNode, path: Path) -> None:
    """Copy the outputs of each cell whose code is the same in the file at `path`."""
    try:
        before = nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError):
        return
    if MARK in before.metadata:
        notebook.metadata[MARK] = before.metadata[MARK]
    old, new = code_cells(before), code_cells(notebook)
    matcher = SequenceMatcher(None, [c.source for c in old], [c.source for c in new], False)
    for a, b, size in matcher.get_matching_blocks():
        for was, cell in zip(old[a : a + size], new[b : b + size], strict=True):
            cell.outputs, cell.execution_count = was.outputs, was.execution_count


def state(notebook: NotebookNode) -> str:
    """What is wrong with the outputs: "", or why the notebook should be executed."""
    if MARK not in notebook.metadata:
        return "no outputs"
    return "" if notebook.metadata[MARK] == digest(notebook) else "outputs older than the code"


# --- the command --------------------------------------------------------------------------------


def chosen(names: list[str], states: dict[str, str]) -> list[str]:
    """The notebooks to execute: by number or name, "all", or those whose outputs are not current.

    Raises ValueError for any other name.
    """
    if not names:
        return [stem for stem, reason in states.items() if reason]
    if names == ["all"]:
        return list(states)
    found = {name: [stem for stem in states if stem.split("_")[0] == name or stem == name]
             for name in (Path(name).stem for name in names)}  # fmt: skip
    if missing := [name for name, stems in found.items() if not stems]:
        raise ValueError(f"no notebook {missing[0]}; there are {', '.join(states)}")
    return [stem for stem in states if any(stem in stems for stems in found.values())]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="build.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--execute", nargs="*", metavar="NUMBER", help="run them, keep outputs")
    parser.add_argument("--threads", type=int, help="CPU threads of an execution (default: all)")
    parser.add_argument("--out", type=Path, default=HERE, help="where notebooks are written")
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="make a site of them there")
    parser.add_argument("--lesson", action="store_true", help="train their model again")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    if (options.lesson or (options.execute is not None and options.out == HERE)) and fast():
        parser.error("NANOSD3_FAST is set: a model that learned nothing draws no outputs to keep; "
                     "unset it, or write elsewhere with --out")  # fmt: skip
    return options


def fast() -> bool:
    return os.environ.get("NANOSD3_FAST", "") not in ("", "0")


def run(notebooks: dict[str, NotebookNode], folder: Path, threads: int | None) -> bool:
    """Execute notebooks; each is written as soon as it is done. False if one failed."""
    import execute  # needs nbclient and a kernel; a build does not

    cells = [cell.source for n in notebooks.values() for cell in code_cells(n)]
    if any(re.search(r"^from lab import .*\btrained\b", code, re.MULTILINE) for code in cells):
        if not execute.prepare(threads):
            return False
    done = {}
    for stem, notebook in notebooks.items():
        done[stem] = execute.execute(notebook, stem, threads)
        if done[stem]:
            notebook.metadata[MARK] = digest(notebook)
            write(notebook, folder / f"{stem}.ipynb")
    return all(done.values())


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.lesson:
        import execute

        if not execute.make_lesson(HERE / "lesson", options.threads):
            return 1
    notebooks = {source.stem: convert(source) for source in sources()}
    for stem, notebook in notebooks.items():
        keep_outputs(notebook, options.out / f"{stem}.ipynb")
        write(notebook, options.out / f"{stem}.ipynb")
    failed = False
    if options.execute is not None:
        try:
            stems = chosen(options.execute, {s: state(n) for s, n in notebooks.items()})
        except ValueError as error:
            print(f"build.py: {error}", file=sys.stderr)
            return 2
        failed = not run({s: notebooks[s] for s in stems}, options.out, options.threads)
    for stem, notebook in notebooks.items():
        print(": ".join(filter(None, (f"{stem}.ipynb", state(notebook)))))
    if options.site:
        import pages

        pages.make(options.out, options.site)
        print(options.site / "index.html")
    return int(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    from nanosd3.cli import run_main  # folders of any name, streams of any encoding

    sys.exit(run_main(main))
