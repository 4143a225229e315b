"""`python -m nanosd3.bench cuda`: every check in turn, each in its own time.

Checks run in a process of their own. One that takes too long, or that leaves the GPU in an error,
ends with it, and the next gets a new one. Results are written after every row, so a command that
is killed keeps what it has. A goal of speed or size that is missed
is a finding, and no failure; a wrong answer is one.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import nanosd3
from nanosd3.checkpoint import write_json
from nanosd3.config import CONFIGS
from nanosd3.measure.cuda import correct, sampling, training
from nanosd3.measure.cuda.result import Check, Row, Setting, Unavailable
from nanosd3.runtime import InputError, Parser, out_of_memory, positive, set_up


def in_order() -> tuple[Check, ...]:
    """All checks, those worth most first."""
    checks = {c.name: c for c in (*correct.CHECKS, *sampling.CHECKS, *training.CHECKS)}
    first = ("small-networks", "samplers", "large", "medium", "steps", "main-job", "picture",
             "full-networks", "diffusers", "profile", "resume", "parallel")  # fmt: skip
    return tuple(checks[name] for name in first) + tuple(
        check for name, check in checks.items() if name not in first
    )


CHECKS = in_order()
START, GRACE = 120, 10  # seconds that a process may take to start and to end
SIGNS = {
    "passed": "ok",
    "missed": "missed",
    "wrong": "WRONG",
    "skipped": "skipped",
    "failed": "FAILED",
}


# --- the process that measures ------------------------------------------------------------------


def work(connection: Connection, setting: Setting, log: Path, threads: int | None) -> None:
    """Make the checks whose names come in; send each row, then a word and a reason."""
    with contextlib.suppress(OSError, AttributeError):  # so that its own children end with it
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's matter
    with open(log, "a", encoding="utf-8") as file:  # libraries write past Python's streams
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    set_up(threads)
    connection.send(("ready", ""))
    by_name = {check.name: check for check in CHECKS}
    while name := connection.recv():
        print(f"--- {name}", flush=True)
        connection.send(outcome(by_name[name], setting, connection))
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def outcome(check: Check, setting: Setting, connection: Connection) -> tuple[str, str]:
    """How a check ended, and why, after its rows were sent."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the loop's own tests use it
    missed = wrong = 0
    try:
        for row in check.rows(setting):
            missed, wrong = missed + (not row.met), wrong + (not row.met and not row.goal)
            connection.send(("row", row))
        setting.synchronize()
    except Unavailable as reason:
        return "skipped", str(reason)
    except Exception as error:
        if out_of_memory(error):
            return "skipped", "out of memory"
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if wrong:
        return "wrong", f"{wrong} of its answers"
    return ("missed", f"{missed} of its goals") if missed else ("passed", "")


class Worker:
    """That process, seen from the command."""

    def __init__(
        self, setting: Setting, log: Path, threads: int | None, environment: dict[str, str]
    ):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.environment = environment
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, setting, log, threads))
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        other.close()
        self.ready = self.busy = False

    def ask(self, check: Check, seconds: float) -> Iterable[tuple[str, object]]:
        """What the check sends, until it has ended or its time is up."""
        end, self.busy = time.monotonic() + seconds, True
        try:
            if not self.ready and self.connection.poll(START):
                self.connection.recv()
                self.ready, end = True, time.monotonic() + seconds
            self.connection.send(check.name)
            while self.connection.poll(max(0.0, end - time.monotonic())):
                yield (message := self.connection.recv())
                if message[0] != "row":
                    self.busy = False
                    return
            yield "failed", f"stopped after {seconds:.0f} s"
        except (EOFError, OSError):
            self.process.join(5)
            yield "failed", f"its process ended with status {self.process.exitcode}"

    def end(self) -> None:
        """End it, with all that it has started; if it is busy, at once."""
        with contextlib.suppress(OSError):
            self.connection.send("")
        self.process.join(0 if self.busy else GRACE)
        if self.process.pid and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


# --- the command --------------------------------------------------------------------------------


def about(setting: Setting) -> dict:
    """The machine, the versions and the commit."""
    root = Path(nanosd3.__file__).parent.parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True,
        check=False,
    ) if (root / ".git").exists() else None  # fmt: skip
    cuda = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if cuda else platform.processor() or
        platform.machine(),
        "config": setting.config,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "nanosd3": nanosd3.__version__,
        "commit": described.stdout.strip() if described and not described.returncode else None,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def run(
    checks: Iterable[Check], setting: Setting, budget: float, out: Path, threads: int | None
) -> list[dict]:
    """Make checks until the budget is spent; what each found. `out` is written after every row."""
    content = {**about(setting), "checks": (results := [])}
    begin, worker = time.monotonic(), None
    try:
        for check in checks:
            entry = {"name": check.name, "title": check.title, "state": "skipped",
                     "reason": "the budget was spent", "seconds": 0.0, "rows": []}  # fmt: skip
            results.append(entry)
            left = budget - (time.monotonic() - begin)
            if left > 1:
                if worker and worker.environment != check.environment:
                    worker.end()
                    worker = None
                log = out.with_suffix(".log")
                worker = worker or Worker(setting, log, threads, check.environment)
                start = time.monotonic()
                for kind, message in worker.ask(check, min(check.seconds, left)):
                    if isinstance(message, Row):
                        entry["rows"].append(asdict(message))
                        entry |= {"state": "failed", "reason": "not finished"}
                    else:
                        entry |= {"state": kind, "reason": message}
                    entry["seconds"] = round(time.monotonic() - start, 1)
                    write_json(out, plain(content))
                if entry["state"] == "failed":
                    worker.end()
                    worker = None
            write_json(out, plain(content))
            print(f"{SIGNS[entry['state']]:8}{check.name:18}{entry['seconds']:7.1f} s  "
                  f"{entry['reason'] or check.title}", flush=True)  # fmt: skip
    finally:
        if worker:
            worker.end()
    return results


def plain(content: dict) -> dict:
    """The content with numbers that JSON does not have as text."""
    return json.loads(json.dumps(content), parse_constant=str)


def table(results: list[dict]) -> str:
    """All rows as a Markdown table."""
    lines = ["| check | what | value | aim |", "| --- | --- | --- | --- |"]
    for entry in results:
        for row in entry["rows"]:
            aim = row["aim"] and row["aim"] + (" met" if row["met"] else " **missed**")
            value = f"{row['value']:.3g}" if row["value"] < 1e4 else f"{row['value']:,.0f}"
            value = f"{value} {row['unit']}".rstrip()
            lines.append(f"| {entry['name']} | {row['what']} | {value} | {aim} |")
        if entry["state"] in ("skipped", "failed"):
            lines.append(f"| {entry['name']} | {entry['state']}: {entry['reason']} | | |")
    return "\n".join(lines)


def parser() -> Parser:
    made = Parser("python -m nanosd3.bench cuda", "Check and measure everything on a GPU.")
    add = made.add_argument
    add("--budget", type=positive, default=300, help="seconds in all (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", choices=[c.name for c in CHECKS],
        help="some of: " + ", ".join(c.name for c in CHECKS))  # fmt: skip
    add("--out", type=Path, default=Path("cuda.json"), help="results (default: %(default)s)")
    add("--run", type=Path, help="a finished run of train_mnist.py, to compare pictures of")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    small = [name for name, config in CONFIGS.items() if config.training]
    add("--config", choices=small, help="a small model in place of the official ones")
    add("--threads", type=positive, help="CPU threads (default: all usable cores)")
    return made


def setting_of(args: argparse.Namespace) -> Setting:
    """Raises InputError for what is not there or does not go together."""
    if args.out.suffix != ".json" or not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: expected a .json in a folder that exists")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available; try --device cpu --config tiny")
    if args.device == "cpu" and not args.config:
        raise InputError("--device cpu needs a small --config, such as tiny")
    if args.run and not (args.run / "metrics.json").exists():
        raise InputError(f"--run {args.run}: holds no finished run of train_mnist.py")
    return Setting(torch.device(args.device), args.out.parent, args.config, args.run)


def bench_cuda(args: argparse.Namespace) -> int:
    """Check and measure everything on a GPU; 1 if a check failed or an answer was wrong, else 0."""
    setting = setting_of(args)
    chosen = [check for check in CHECKS if not args.only or check.name in args.only]
    results = run(chosen, setting, args.budget, args.out, args.threads)
    log = args.out.with_suffix(".log")
    print(f"\n{table(results)}\n\n{args.out}: {len(results)} checks; {log}: what they printed")
    return 1 if any(entry["state"] in ("wrong", "failed") for entry in results) else 0
