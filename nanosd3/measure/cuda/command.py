"""`python -m nanosd3.bench cuda`: run all checks, each with a time limit.

Results are written after every row, so an interrupted command keeps what it has. A missed speed or
size goal is reported but is not a failure; a wrong answer is.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch

import nanosd3
from nanosd3.cli import Parser, positive
from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.measure.cuda import against_diffusers, correct, sampling, training
from nanosd3.measure.cuda.result import Check, CheckState, Row, Setting
from nanosd3.measure.cuda.worker import Worker
from nanosd3.storage.files import write_json


class Result(TypedDict):
    """The outcome of a check, as written to the results file."""

    name: str
    title: str
    state: CheckState
    reason: str
    seconds: float
    rows: list[dict]


def in_order() -> tuple[Check, ...]:
    """All checks, most valuable first."""
    checks = {
        check.name: check
        for check in (
            *correct.CORRECTNESS,
            *sampling.SAMPLING,
            *against_diffusers.DIFFUSERS,
            *training.TRAINING,
        )
    }
    first = "small-networks samplers large medium steps main-job picture full-networks diffusers"
    names = [*first.split(), "profile", "resume", "parallel"]
    others = [name for name in checks if name not in names]
    return tuple(checks[name] for name in names + others)


CHECKS = in_order()
SIGNS: dict[CheckState, str] = {
    "passed": "ok",
    "missed": "missed",
    "wrong": "WRONG",
    "skipped": "skipped",
    "failed": "FAILED",
}


def describe_machine(setting: Setting) -> dict[str, str | None]:
    """The device, the versions and the commit."""
    root = Path(nanosd3.__file__).parent.parent
    commit = None
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() if not done.returncode else None
    cuda = setting.device.type == "cuda"
    cpu = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(setting.device) if cuda else cpu,
        "config": setting.config,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "nanosd3": nanosd3.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def run(
    checks: Iterable[Check], setting: Setting, budget: float, out: Path, threads: int | None
) -> list[Result]:
    """Run checks until the budget in seconds is used up. `out` is written after every row."""
    results: list[Result] = []
    content = {**describe_machine(setting), "checks": results}
    begin, log = time.monotonic(), out.with_suffix(".log")
    worker: Worker | None = None
    try:
        for check in checks:
            result: Result = {
                "name": check.name,
                "title": check.title,
                "state": "skipped",
                "reason": "budget used up",
                "seconds": 0.0,
                "rows": [],
            }
            results.append(result)
            left = budget - (time.monotonic() - begin)
            if left > 1:
                if worker and worker.environment != check.environment:
                    worker.close()
                    worker = None
                worker = worker or Worker(setting, log, threads, check.environment)
                start = time.monotonic()
                for message in worker.run(check, min(check.seconds, left)):
                    if isinstance(message, Row):
                        result["rows"].append(asdict(message))
                        result["state"], result["reason"] = "failed", "not finished"
                    else:
                        result["state"], result["reason"] = message
                        if worker.busy and left < check.seconds:  # not the check's fault
                            result["state"] = "skipped"
                            result["reason"] += ": budget used up"
                    result["seconds"] = round(time.monotonic() - start, 1)
                    write_json(out, json_safe(content))
                if result["state"] == "failed" or worker.busy:
                    worker.close()
                    worker = None
            write_json(out, json_safe(content))
            status = f"{SIGNS[result['state']]:8}{check.name:18}{result['seconds']:7.1f} s  "
            print(status + (result["reason"] or check.title), flush=True)
    finally:
        if worker:
            worker.close()
    return results


def json_safe(content: dict) -> dict:
    """The content with NaN and infinities as strings, since JSON has no such numbers."""
    return json.loads(json.dumps(content), parse_constant=str)


def results_table(results: list[Result]) -> str:
    """All rows as a Markdown table."""
    lines = ["| check | what | value | aim |", "| --- | --- | --- | --- |"]
    for result in results:
        for row in result["rows"]:
            aim = row["aim"] and row["aim"] + (" met" if row["met"] else " **missed**")
            value = f"{row['value']:.3g}" if row["value"] < 1e4 else f"{row['value']:,.0f}"
            value = f"{value} {row['unit']}".rstrip()
            lines.append(f"| {result['name']} | {row['what']} | {value} | {aim} |")
        if result["state"] in ("skipped", "failed"):
            lines.append(f"| {result['name']} | {result['state']}: {result['reason']} | | |")
    return "\n".join(lines)


# --- the command line ---------------------------------------------------------------------------


def parser() -> Parser:
    """The options of the command."""
    made = Parser("python -m nanosd3.bench cuda", "Check and measure everything on a GPU.")
    add = made.add_argument
    names = [check.name for check in CHECKS]
    small = [name for name, config in CONFIGS.items() if config.training]
    default = "(default: %(default)s)"
    add("--budget", type=positive, default=300, help=f"seconds in total {default}")
    add("--only", nargs="+", metavar="NAME", choices=names, help="some of " + ", ".join(names))
    add("--out", type=Path, default=Path("cuda.json"), help=f"results file {default}")
    add("--run", type=Path, help="finished run of train_mnist.py to compare images of")
    add("--device", choices=("cuda", "cpu"), default="cuda", help=default)
    add("--config", choices=small, help="small model in place of the official ones")
    add("--threads", type=positive, help="CPU threads (default: the usable cores, at most 8)")
    return made


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting that the options describe. Raises InputError if they are inconsistent."""
    if args.out.suffix != ".json" or not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: expected a .json file in an existing folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available; try --device cpu --config tiny")
    if args.device == "cpu" and not args.config:
        raise InputError("--device cpu needs a small --config, such as tiny")
    if args.run and not (args.run / "metrics.json").exists():
        raise InputError(f"--run {args.run}: expected a finished run of train_mnist.py")
    return Setting(torch.device(args.device), args.out.parent, args.config, args.run)


def bench_cuda(args: argparse.Namespace) -> int:
    """Check and measure everything on a GPU; 1 if a check failed or an answer was wrong, else 0."""
    setting = setting_of(args)
    checks = [check for check in CHECKS if not args.only or check.name in args.only]
    results = run(checks, setting, args.budget, args.out, args.threads)
    log = args.out.with_suffix(".log")
    print(f"\n{results_table(results)}\n\n{args.out}: {len(results)} checks; output in {log}")
    return 1 if any(result["state"] in ("wrong", "failed") for result in results) else 0
