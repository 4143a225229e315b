"""Run a notebook, and tidy its outputs: the same run gives the same file on any machine.

It drops stderr (progress bars, warnings), cell timings, widget state, and this machine's addresses
and folders in printed text. Pictures are re-encoded as small as they get without a visible
difference; their descriptions in words (`figures.finish`) are kept.
"""

import base64
import copy
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import numpy as np
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

from nanosd3.storage.files import remove, replacing

HERE = Path(__file__).parent.resolve()
PICTURE_LIMIT = 100_000  # bytes of a picture
CELL_TIMEOUT = 3600  # seconds
VISIBLE = 12  # of 255: smaller differences, on average far smaller, go unnoticed
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours of a terminal
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
WIDGET = "application/vnd.jupyter.widget-view+json"


def prepare(threads: int | None) -> bool:
    """Load the model of the lessons once, so that its features are in the cache."""
    return with_lab("from lab import trained; trained().features", environment(threads))


def make_lesson(folder: Path, threads: int | None) -> bool:
    """Train the model of the lessons and put its run into `folder`; False if that fails."""
    with tempfile.TemporaryDirectory() as cache:
        code = "from lab import begin_job, train; train(begin_job())"
        if not with_lab(code, environment(threads) | {"NANOSD3_CACHE": cache}):
            return False
        run = next(Path(cache).glob("*/model"))
        (run / "text.safetensors").unlink()  # clip and t5 again, ready for use
        with replacing(folder) as temporary:
            temporary.mkdir()
            for path in sorted(run.iterdir()):
                if path.suffix in (".json", ".safetensors") or path.name == "log.jsonl":
                    shutil.copyfile(path, temporary / path.name)
            if folder.exists():
                remove(folder)
    return True


def with_lab(code: str, env: dict[str, str]) -> bool:
    """Run Python code that imports lab.py in a process of its own; True if it succeeds."""
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = ['..', '.']; {code}"]
    return subprocess.run(command, cwd=HERE, env=env).returncode == 0


def environment(threads: int | None) -> dict[str, str]:
    """The environment of a kernel. NANOSD3_STATIC asks for pictures in place of widgets."""
    names = {"NANOSD3_STATIC": "1"}
    if threads:
        names |= {"NANOSD3_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return os.environ | names


def run(notebook: NotebookNode, threads: int | None = None) -> str:
    """Execute all cells in a fresh kernel and replace the outputs, or return why not."""
    fresh = copy.deepcopy(notebook)
    client = nbclient.NotebookClient(
        fresh,
        timeout=CELL_TIMEOUT,
        startup_timeout=600,
        extra_arguments=["--log-level=ERROR"],
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(HERE)}},
    )
    number = 0
    try:
        with client.setup_kernel(env=environment(threads)):
            for number, cell in enumerate(fresh.cells):
                client.execute_cell(cell, number)
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        first = fresh.cells[number].source.split("\n")[0]
        return f"cell {number} ({first}): {reason(error)}"
    tidy(fresh)
    for cell, done in zip(notebook.cells, fresh.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return ""


def reason(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, CellExecutionError):
        return f"{error.ename}: {error.evalue}".split("\n")[0]
    return str(error).split("\n")[0] or type(error).__name__


def execute(notebook: NotebookNode, name: str, threads: int | None) -> bool:
    """Run a notebook and say in a line how it went; False if it failed."""
    print(f"{name}: running ...", flush=True)
    start = time.perf_counter()
    if error := run(notebook, threads):
        print(f"{name}: {error}", flush=True)
        return False
    sizes = pictures(notebook)
    kilobytes = sum(map(len, sizes.values())) // 1000
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.0f} s, {len(sizes)} pictures, {kilobytes} kB", flush=True)
    return True


def pictures(notebook: NotebookNode) -> dict[str, bytes]:
    """The pictures in the outputs, by the number of their cell and of their output."""
    found = {}
    for i, cell in enumerate(notebook.cells):
        for j, output in enumerate(cell.get("outputs", [])):
            for kind, data in output.get("data", {}).items():
                if kind.startswith("image/"):
                    svg = kind == "image/svg+xml"
                    found[f"{i}.{j}"] = data.encode() if svg else base64.b64decode(data)
    return found


# --- tidying ------------------------------------------------------------------------------------


def tidy(notebook: NotebookNode) -> None:
    """Remove from the outputs what differs between runs and machines, and make pictures small."""
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy_outputs(cell.outputs)
            if cell.source.strip():
                count += 1
            cell.execution_count = count if cell.source.strip() else None


def tidy_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        printed = output.output_type == "stream"
        if WIDGET in output.get("data", {}) or (printed and output.name == "stderr"):
            continue
        if printed and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = tidy_text(output.text)
        elif "data" in output:
            tidy_data(output)
    return [o for o in kept if o.output_type != "stream" or o.text.strip()]


def tidy_data(output: NotebookNode) -> None:
    data, about = output.data, output.get("metadata", {})
    output.metadata = NotebookNode()
    for kind in data:
        if kind.startswith("text/"):
            data[kind] = tidy_text(data[kind])
    if "image/png" in data:
        picture = small_png(base64.b64decode(data["image/png"]))
        data["image/png"] = base64.b64encode(picture).decode()
    for kind in data:
        if "alt" in about.get(kind, {}):
            output.metadata[kind] = NotebookNode(alt=about[kind]["alt"])
    if output.output_type == "execute_result":
        output.execution_count = None


def tidy_text(text: str) -> str:
    """Printed text as a terminal leaves it, with names in place of this machine's folders."""
    text = ADDRESS.sub("", ESCAPES.sub("", text))
    text = "\n".join(line.rstrip("\r").split("\r")[-1] for line in text.split("\n"))
    cache = os.environ.get("NANOSD3_CACHE")
    folders = [
        (Path(cache).resolve() if cache else None, "cache"),
        (HERE / "cache", "cache"),
        (HERE.parent, "nanosd3"),
        (Path(tempfile.gettempdir()), "tmp"),
        (Path.home(), "~"),
    ]
    for folder, name in folders:
        if folder is not None and folder != Path(folder.anchor):
            text = re.sub(rf"{re.escape(str(folder))}(?![\w-])", name, text)
    return text


def small_png(content: bytes) -> bytes:
    """The same picture in fewer bytes: without transparency, and in grey or with a palette if
    nobody sees the difference. Animated ones (films.py) are left alone."""
    with Image.open(io.BytesIO(content)) as opened:
        if getattr(opened, "is_animated", False):
            return content
        picture = opened.convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(page, picture).convert("RGB")
    pixels = np.asarray(picture).astype(int)
    if (np.ptp(pixels, axis=2) == 0).all():
        picture = picture.convert("L")
    candidates = [picture]
    for colours in (256, 128, 64, 32, 16):
        fewer = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        change = np.abs(np.asarray(fewer.convert("RGB")).astype(int) - pixels)
        if change.max() <= VISIBLE and change.mean() <= VISIBLE / 12:
            candidates.append(fewer)
    return min((png(candidate) for candidate in candidates), key=len)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()
