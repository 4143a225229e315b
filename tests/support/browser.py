"""A real browser, Chromium, driven through its DevTools protocol."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}


class Page:
    """A page in a browser: what is done to it, and what its console said."""

    def __init__(self, address: str):
        import websocket  # comes with jupyter_server

        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.count = 0
        self.errors: list[str] = []  # of the console: messages of scripts, not of the network
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The result of a method of the protocol; events are read on the way."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": arguments}
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            self.observe(answer.get("method", ""), answer.get("params", {}))
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def observe(self, event: str, about: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        if event == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            said = [str(a.get("value", a.get("description", ""))) for a in about["args"]]
            self.errors.append(" ".join(said))

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript, awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                         returnByValue=True)  # fmt: skip
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"not true after {seconds} s: {script}"
            time.sleep(0.2)
        return value

    def press(self, key: str) -> None:
        """Press a key of KEYS, on what has the focus."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)


@contextmanager
def open_page(address: str, profile: Path, size: str = "1280,1000") -> Iterator[Page]:
    """A page at an address, in a browser with a profile of its own."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
        "--disable-background-networking", "--no-first-run", f"--window-size={size}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}",
        "about:blank",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as browser:
        try:
            page = Page(first_page(profile / "DevToolsActivePort"))
            page.call("Emulation.setFocusEmulationEnabled", enabled=True)
            page.call("Page.navigate", url=address)
            yield page
        finally:
            browser.terminate()


def first_page(file: Path, seconds: float = 60) -> str:
    """The address of a browser's first page in the protocol; the browser writes its port down."""
    end = time.monotonic() + seconds
    while not (file.exists() and file.read_text().count("\n")):
        assert time.monotonic() < end, "the browser did not start"
        time.sleep(0.1)
    with urlopen(f"http://127.0.0.1:{file.read_text().split()[0]}/json/list") as answer:
        targets = json.load(answer)
    return next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
