"""JupyterLab in a real browser: a notebook runs, a slider is moved, and the picture changes."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from support.browser import CHROMIUM, Page, open_page

ROOT = Path(__file__).parents[2]
NEEDED = ("jupyterlab", "ipywidgets", "websocket")
MISSING = [name for name in NEEDED if find_spec(name) is None] + ["Chromium"] * (not CHROMIUM)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of JupyterLab on a copy of the notebooks, without what the user configured."""
    folder = tmp_path_factory.mktemp("lab")
    skipped = shutil.ignore_patterns("cache", "src", "__pycache__")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=skipped)
    pictures = Path("nanosd3", "assets", "pictures")
    shutil.copytree(ROOT / pictures, folder / pictures)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    settings = {
        "JUPYTER_CONFIG_DIR": folder / "config", "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTER_DATA_DIR": folder / "data", "NANOSD3_CACHE": folder / "cache",
        "NANOSD3_FAST": 1, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT,
    }  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    environment.pop("NANOSD3_STATIC", None)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}", "--expose-app-in-browser",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(f"{address}/api?token={token}", server)
            # Without what was open before: JupyterLab would open it again.
            yield f"{address}/lab/tree/notebooks/{{}}?token={token}&reset"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address: str, server: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            urlopen(address).close()
            return
        except URLError:
            time.sleep(0.3)
    pytest.fail("JupyterLab did not start")


APP = "window.jupyterapp"
NOTEBOOK = f"[...({APP}?.shell?.widgets('main') ?? [])].find(w => w.title.label.endsWith('.ipynb'))"
CELLS = f"{NOTEBOOK}.content.widgets"
# The controls in a cell: the handle of a slider, the line below them, and the picture.
TURNED = "[...document.querySelectorAll('.widget-vbox')].at(-1)"
HANDLE = f"[...{TURNED}.querySelectorAll('.widget-hslider')]"
SAID = f"{TURNED}.querySelector(':scope > .widget-label').textContent"
PICTURE = f"{TURNED}.querySelector('img')?.src"


def run_all(page: Page) -> None:
    """Run all cells of the notebook that was opened; the last one that is to be turned in view."""
    page.wait(f"{NOTEBOOK}?.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate(f"{APP}.shell.activateById({NOTEBOOK}.id)")
    page.evaluate(f"{APP}.commands.execute('notebook:run-all-cells'), null")
    number = page.evaluate(f"{CELLS}.findIndex(c => /^turn\\(/m.test(c.model.sharedModel.source))")
    page.wait(f"{CELLS}[{number}].model.executionCount !== null", 500)
    page.evaluate(f"{NOTEBOOK}.content.scrollToItem({number}, 'start')")
    page.wait(f"document.querySelector('.widget-vbox') && {PICTURE} && !{SAID}")


def move(page: Page, slider: str, key: str) -> str:
    """Move a slider with a key: the number beside it once the picture has been drawn."""
    handle = f"{HANDLE}.find(s => s.textContent.includes('{slider}'))"
    page.evaluate(f"window.said = []; window.before = {PICTURE}")
    page.evaluate(
        f"new MutationObserver(() => window.said.push({SAID}))"
        f".observe({TURNED}, {{subtree: true, childList: true, characterData: true}})"
    )
    page.evaluate(f"{handle}.querySelector('.noUi-handle').focus()")
    page.press(key)
    page.wait(f"{PICTURE} && {PICTURE} !== window.before && !{SAID}")
    assert "Drawing ..." in page.evaluate("window.said")
    return page.evaluate(f"{handle}.querySelector('.widget-readout').textContent")


MOVES = {  # slider, key, the number beside it afterwards
    "00_tour": [("t", "ArrowLeft", "0.75"), ("seed", "ArrowRight", "2")],
    "02_timesteps": [("mean", "ArrowRight", "0.10"), ("shift", "ArrowRight", "1.20")],
}


@pytest.mark.parametrize("name", MOVES)
def test_a_slider_changes_the_picture(server, tmp_path, name):
    with open_page(server.format(f"{name}.ipynb"), tmp_path / "profile") as page:
        run_all(page)
        for slider, key, number in MOVES[name]:
            assert move(page, slider, key) == number
        page.evaluate("0")
        assert page.errors == []
