"""Run an experiment, and write its record: declaration, results and verdict."""

import json
import platform
import subprocess
import time
from pathlib import Path

import torch

import nanosd3
from nanosd3.claims.experiment import Conditions, Experiment
from nanosd3.errors import InputError
from nanosd3.storage.files import check_writable, read_json, write_json

RESULTS = Path(__file__).parent / "results"  # those of the page
FIELDS = {"name", "claim", "source", "measured", "rule", "verdict", "minutes", "seeds", "fast",
          "thread_seconds", "results", "machine"}  # fmt: skip
EMPHASIS = {"supported": "SUPPORTED", "refuted": "REFUTED", "undecided": "UNDECIDED"}


def paths_of(folder: Path, name: str) -> tuple[Path, Path]:
    """The JSON file and the plot of an experiment."""
    return folder / f"{name}.json", folder / f"{name}.png"


def declared(experiment: Experiment) -> str:
    """The declaration, to be printed before the run."""
    lines = [f"{key:9} {text}" for key, text in experiment.declaration.items()]
    return "\n".join(lines)


def carry_out(experiment: Experiment, conditions: Conditions) -> dict:
    """Print the declaration, run, decide, draw, and write the record, which is returned. A single
    seed decides nothing: the rules compare with the spread over seeds."""
    file, plot = paths_of(conditions.records, experiment.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    check_writable(file)
    print(declared(experiment), flush=True)
    begin = time.process_time()
    results = json.loads(json.dumps(experiment.run(conditions), allow_nan=False))
    record = {
        **experiment.declaration,
        "verdict": experiment.decide(results) if len(conditions.seeds) > 1 else "undecided",
        "minutes": experiment.minutes,
        "seeds": list(conditions.seeds),
        "fast": conditions.fast,
        "thread_seconds": round(time.process_time() - begin, 1),
        "machine": describe_host(),
        "results": results,
    }
    experiment.plot(results, plot)
    write_json(file, record)  # last: a record stands for a finished experiment
    print(f"{'verdict':9} {EMPHASIS[record['verdict']]}, see {file} and {plot}", flush=True)
    return record


def finished(experiment: Experiment, conditions: Conditions) -> dict | None:
    """The record of an experiment that has run under these conditions.

    Raises InputError if the record there has another rule or other seeds.
    """
    file, plot = paths_of(conditions.records, experiment.name)
    if not (file.exists() and plot.exists()):
        return None
    record = read_record(file)
    check_declaration(record, experiment, file)
    if record["seeds"] != list(conditions.seeds):
        raise InputError(
            f"{file}: has {len(record['seeds'])} seeds, --seeds asks for "
            f"{len(conditions.seeds)}; choose another folder with --out, or delete the file"
        )
    return record


def read_record(file: Path) -> dict:
    """A record. Raises InputError naming the file if it is not one."""
    record = read_json(file)
    if missing := sorted(FIELDS - set(record)):
        raise InputError(f"{file}: not a record of an experiment: it has no {missing[0]}")
    if record["verdict"] not in EMPHASIS:
        raise InputError(f"{file}: verdict must be one of {', '.join(EMPHASIS)}")
    return record


def check_declaration(record: dict, experiment: Experiment, file: Path) -> None:
    """Raise InputError if the claim, what is measured or the rule is not what the record says. The
    source of a claim may be given more precisely later."""
    declaration = {k: text for k, text in experiment.declaration.items() if k != "source"}
    for key, text in declaration.items():
        if record.get(key) != text:
            raise InputError(
                f"{file}: ran with another {key} than the code now declares; delete the file and "
                "run the experiment again"
            )


def describe_host() -> dict[str, str | int]:
    """Processor, threads, torch and the commit."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this code, with "-dirty" if it was changed since; its version if git knows no
    commit."""
    root = Path(nanosd3.__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return nanosd3.__version__
    found = (root / ".git").exists() and done.returncode == 0
    return done.stdout.strip() if found else nanosd3.__version__
