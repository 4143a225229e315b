"""Outputs are kept, tidied, small, and known to be older than the code when they are."""

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_output
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import build
import execute

SOURCE = """# %% [markdown]
# # 01 · One

# %%
first = 1
print("one")

# %% [markdown]
# Between.

# %%
print(first + 1)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of one notebook, and nothing else, to build in."""
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.delenv("NANOSD3_FAST", raising=False)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "01_one.py").write_text(SOURCE)
    return tmp_path


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "src" / "01_one.py"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def fill(folder: Path) -> None:
    """Pretend that the notebook was executed: each cell printed its own number."""
    path = folder / "01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for i, cell in enumerate(build.code_cells(notebook)):
        cell.outputs, cell.execution_count = [new_output("stream", text=f"{i}\n")], i + 1
    notebook.metadata[build.MARK] = build.digest(notebook)
    build.write(notebook, path)


def printed(folder: Path) -> list[str]:
    cells = build.code_cells(nbformat.read(folder / "01_one.ipynb", as_version=4))
    return ["".join(output.text for output in cell.outputs) for cell in cells]


def test_a_build_keeps_outputs_and_names_what_is_older(folder, capsys):
    def built() -> str:
        assert build.main(["--out", str(folder)]) == 0
        return capsys.readouterr().out

    assert built() == "01_one.ipynb: no outputs\n"
    fill(folder)
    before = (folder / "01_one.ipynb").read_bytes()
    assert built() == "01_one.ipynb\n"
    assert (folder / "01_one.ipynb").read_bytes() == before

    edit(folder, "Between.", "Between.\n# More.\n\n# %% [markdown]\n# A cell of its own.")
    assert built() == "01_one.ipynb\n" and printed(folder) == ["0\n", "1\n", "2\n"]

    edit(folder, "first + 1", "first + 2")
    assert built() == "01_one.ipynb: outputs older than the code\n"
    assert printed(folder) == ["0\n", "1\n", ""]
    edit(folder, "first + 2", "first + 1\n\n# %%\nfirst")
    assert "older" in built() and printed(folder) == ["0\n", "1\n", "", ""]


def test_an_inserted_cell_takes_no_outputs_of_others(folder):
    build.main([])
    fill(folder)
    edit(folder, "# %%\nfirst = 1", "# %%\nzero = 0\n\n# %%\nfirst = 1")
    build.main([])
    assert printed(folder) == ["0\n", "", "1\n", "2\n"]


def test_a_file_that_is_no_notebook_is_replaced(folder):
    (folder / "01_one.ipynb").write_text("<html>")
    build.main([])
    assert printed(folder) == ["", "", ""]


def test_which_are_executed():
    states = {"00_a": "", "01_b": "no outputs", "02_c": "outputs older than the code"}
    assert build.chosen([], states) == ["01_b", "02_c"]
    assert build.chosen(["all"], states) == ["00_a", "01_b", "02_c"]
    assert build.chosen(["02", "00_a.ipynb"], states) == ["00_a", "02_c"]
    with pytest.raises(ValueError, match="no notebook 07; there are 00_a, 01_b, 02_c"):
        build.chosen(["00", "07"], states)


def test_a_model_that_learned_nothing_draws_no_outputs(folder, monkeypatch, capsys):
    monkeypatch.setenv("NANOSD3_FAST", "1")
    with pytest.raises(SystemExit, match="2"):
        build.main(["--execute"])
    assert "NANOSD3_FAST" in capsys.readouterr().err
    monkeypatch.setenv("NANOSD3_FAST", "0")
    assert build.main(["--execute", "99"]) == 2
    assert capsys.readouterr().err == "build.py: no notebook 99; there are 01_one\n"


def test_execution(folder, capsys):
    """Outputs come from a kernel; a second run gives the same file; one failure leaves the old
    file, is explained in a line, and does not stop the others."""
    target = folder / "01_one.ipynb"
    assert build.main(["--execute"]) == 0
    said = capsys.readouterr().out
    assert "01_one: running ...\n" in said and " s, 0 pictures, 0 kB\n" in said
    assert said.endswith("01_one.ipynb\n") and printed(folder) == ["", "one\n", "2\n"]
    first = target.read_bytes()
    assert build.main(["--execute"]) == 0
    assert "running" not in capsys.readouterr().out  # it is current
    assert build.main(["--execute", "all"]) == 0
    assert target.read_bytes() == first
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []

    capsys.readouterr()
    edit(folder, "first + 1", "first / 0")
    (folder / "src" / "02_two.py").write_text(SOURCE)
    assert build.main(["--execute"]) == 1
    said = capsys.readouterr().out
    assert "01_one: cell 4 (print(first / 0)): ZeroDivisionError: division by zero\n" in said
    assert said.endswith("01_one.ipynb: outputs older than the code\n02_two.ipynb\n")
    assert printed(folder) == ["", "one\n", ""]


ASKED = """# %% [markdown]
# # 01 · One

# %%
before

# %% [markdown]
# **PREDICT.** What?

# %%
guess_1 = "..."

# %% [markdown]
# A step between.

# %%
answer

# %% [markdown]
# <details><summary>What happened</summary> ... </details>
#
# **PREDICT.** And then?

# %%
second

# %% [markdown]
# No fold.

# %%
after

# %% [markdown]
# **PREDICT.** Last?

# %%
last
"""


def test_answers_are_folded_until_they_are_asked_for(folder):
    """The outputs between a question and its explanation, or the next text."""
    source = folder / "src" / "01_one.py"
    source.write_text(ASKED)
    cells = build.code_cells(build.convert(source))
    hidden = [
        cell.source for cell in cells if cell.metadata.get("jupyter") == {"outputs_hidden": True}
    ]
    assert hidden == ["answer", "second", "last"]


def test_the_first_line_of_what_is_folded_is_no_answer(folder):
    """JupyterLab shows it. It is there once, however often a notebook is built."""
    (folder / "src" / "01_one.py").write_text(ASKED)
    for _ in range(2):
        assert build.main([]) == 0
        fill(folder)
    build.main([])
    for cell in build.code_cells(nbformat.read(folder / "01_one.ipynb", as_version=4)):
        folded = "jupyter" in cell.metadata
        plain = [output.get("data", {}).get("text/plain") for output in cell.outputs]
        assert plain == ([build.COVER, None] if folded else [None]), cell.source


# --- tidying ------------------------------------------------------------------------------------


def test_text_is_the_same_on_every_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOSD3_CACHE", str(tmp_path / "models"))
    assert execute.tidy_text(f"{tmp_path.resolve()}/models/full/x.json") == "cache/full/x.json"
    assert execute.tidy_text(f"{execute.HERE}/cache/full") == "cache/full"
    assert execute.tidy_text(f"{execute.HERE.parent}/runs") == "nanosd3/runs"
    assert execute.tidy_text(f"{Path.home()}/x {Path.home()}-y") == f"~/x {Path.home()}-y"
    assert execute.tidy_text("<Axes at 0x7f3a>") == "<Axes>"
    assert execute.tidy_text("10%\r50%\r100%\r\ndone\n") == "100%\ndone\n"
    assert execute.tidy_text("\x1b[31mred\x1b[0m") == "red"


def test_noise_is_dropped_and_words_of_pictures_are_kept():
    widget = {execute.WIDGET: {"model_id": "1"}, "text/plain": "IntSlider()"}
    words = {"image/png": {"alt": "A digit.", "width": 640}}
    picture = {"image/png": encoded(np.zeros((4, 4, 3))), "text/plain": "<Figure at 0x12>"}
    outputs = execute.tidy_outputs([
        new_output("stream", name="stderr", text="99%|#####| 3.1 it/s"),
        new_output("stream", text="a"), new_output("stream", text="b\n"),
        new_output("display_data", data=widget),
        new_output("stream", text="c\n"), new_output("display_data", picture, metadata=words),
        new_output("stream", text="\n"),
        new_output("execute_result", {"text/plain": "3"}, execution_count=7),
    ])  # fmt: skip
    assert [output.output_type for output in outputs] == [
        "stream",
        "display_data",
        "execute_result",
    ]
    assert outputs[0].text == "ab\nc\n"
    assert outputs[1].metadata == {"image/png": {"alt": "A digit."}}
    assert outputs[1].data["text/plain"] == "<Figure>"


def encoded(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_pictures_get_smaller_and_look_the_same():
    grey = np.zeros((64, 64, 4), np.uint8)
    grey[8:40, 8:40, 3] = np.arange(32) * 8  # black, more and more opaque, on white
    plot = np.full((64, 64, 4), 255, np.uint8)
    plot[10:20, :, :3], plot[30:40, :, :3] = (0, 114, 178), (163, 0, 79)
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    photo[..., 3] = 255
    sparks = np.full((64, 64, 4), 255, np.uint8)  # few pixels, of which each counts
    sparks[::10, ::10] = photo[::10, ::10]
    for pixels, mode in ((grey, "LP"), (plot, "P"), (photo, "RGB"), (sparks, ("P", "RGB"))):
        content = base64.b64decode(encoded(pixels))
        small = execute.small_png(content)
        assert len(small) <= len(content)
        with Image.open(io.BytesIO(small)) as picture:
            assert picture.mode in mode or picture.mode == mode
            seen = np.asarray(picture.convert("RGB")).astype(int)
        alpha = pixels[..., 3:] / 255.0
        wanted = pixels[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(seen - wanted).max() <= execute.VISIBLE + 1


# --- the committed notebooks --------------------------------------------------------------------


def test_committed_outputs_are_small_and_name_no_folder_of_a_machine():
    """Those that there are: a notebook that was never executed is named by a build, not here."""
    home = Path(__file__).parents[2] / "notebooks"
    sizes = [path.stat().st_size for path in home.glob("*.ipynb")]
    assert sum(sizes) < 8_000_000
    for path in home.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for place, picture in execute.pictures(notebook).items():
            assert len(picture) < execute.PICTURE_LIMIT, f"{path.name}, cell {place}"
        for cell in build.code_cells(notebook):
            for output in cell.outputs:
                assert output.get("name") != "stderr" and output.output_type != "error", path.name
                described = [about.get("alt") for about in output.get("metadata", {}).values()]
                kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
                assert len(described) == len(kinds) and all(described), path.name
                # The value of a cell's last line: nobody asked for it.
                assert output.output_type != "execute_result", f"{path.name}: {cell.source[-80:]}"
                text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
                assert not any(part in text for part in ("/home/", "/tmp/", "/root/", " at 0x"))


def test_the_first_cell_clones_only_where_there_is_something_to_clone():
    assert len(build.install("").splitlines()) == 4
    assert "colab" not in build.install("") and "clone" not in build.install("")
    assert "clone --quiet --depth 1 https://host/x nanosd3" in build.install("https://host/x")


def test_a_folder_and_a_stream_of_other_alphabets(tmp_path):
    """The path is printed, whatever the stream can encode."""
    folder = tmp_path / "é"
    text = Path(build.__file__).read_text()
    assert text.count('glob("*.py")') == 1
    one = text.replace('glob("*.py")', 'glob("00*.py")')  # of all notebooks, which takes long
    one = one.replace("Path(__file__)", f"Path({build.__file__!r})")
    done = subprocess.run(
        [sys.executable, "-c", one, "--out", str(folder), "--site", str(folder / "site")],
        cwd=build.HERE,
        capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("index.html") and "\\xe9" in done.stdout
