"""Command line for the experiments.

python -m nanosd3.claims list                    names, verdicts, minutes, claims
python -m nanosd3.claims x-fm-3 --seeds 3        run one; --fast: in seconds, to see how it works
python -m nanosd3.claims all                     run those that have not run yet
python -m nanosd3.claims page --out runs/claims  copy results in, and build the page

An experiment prints its claim and the rule that will decide, runs, and writes a record and a plot.
Stopped with Ctrl-C, it resumes its training when it is run again.
"""

import argparse
import sys
from pathlib import Path

from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.page import PAGE, committed, copy_results, write_page
from nanosd3.claims.records import EMPHASIS, carry_out, finished, paths_of, read_record
from nanosd3.cli import Parser, positive, run_main
from nanosd3.errors import InputError, shown
from nanosd3.machine.device import set_up
from nanosd3.machine.signals import sigterm_interrupts
from nanosd3.torch_settings import usual_settings

OUT, RUN, SEEDS = Path("runs/claims"), Path("runs/mnist"), 3


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises InputError for unknown names and for options that the
    command would ignore."""
    parser = Parser("python -m nanosd3.claims", "Put the claims of papers to the test.")
    add = parser.add_argument
    add("name", metavar="NAME", help="an experiment, `list`, `all` or `page`")
    add("--seeds", type=positive, metavar="N", help=f"repetitions (default: {SEEDS})")
    add("--fast", action="store_true", default=None, help="in seconds; the results mean nothing")
    add("--run", type=Path, help=f"a finished run of train_mnist.py (default: {RUN})")
    add("--out", type=Path, metavar="FOLDER", help=f"records and networks (default: {OUT})")
    add("--threads", type=positive, help="CPU threads (default: the usable cores, at most 8)")
    args = parser.parse_args(arguments)
    if args.name not in (*EXPERIMENTS, "list", "all", "page"):
        raise InputError(
            f"NAME: no experiment {shown(args.name)}; `python -m nanosd3.claims list` shows all"
        )
    if args.name in ("list", "page"):
        for option in ("seeds", "fast", "run", "threads"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option}: means nothing to `{args.name}`; leave it out")
    return args


def conditions_of(args: argparse.Namespace) -> Conditions:
    """What the options say, and the defaults for the rest."""
    out = args.out or OUT
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; choose a folder")
    seeds = tuple(range(args.seeds or SEEDS))
    return Conditions(seeds, bool(args.fast), args.run or RUN, out)


def show_list(out: Path) -> None:
    """Print every experiment with its verdict: the one in the folder `out`, or else the page's."""
    verdicts = {name: record["verdict"] for name, record in committed(EXPERIMENTS).items()}
    for name in EXPERIMENTS:
        file, _ = paths_of(out, name)
        if file.exists():
            verdicts[name] = read_record(file)["verdict"]
    width = max(map(len, EXPERIMENTS))
    for name, experiment in EXPERIMENTS.items():
        word = EMPHASIS.get(verdicts.get(name, ""), "not run yet")
        print(f"{name:{width}} {word:12} {experiment.minutes:4g} min  {experiment.claim}")
        print(f"{'':{width + 22}}{experiment.source}")


def run_one(name: str, conditions: Conditions) -> None:
    """Run an experiment, unless its record is there."""
    experiment = EXPERIMENTS[name]
    if record := finished(experiment, conditions):
        file, _ = paths_of(conditions.records, name)
        print(f"{name}: {EMPHASIS[record['verdict']]}, by {file}; delete it to run it again")
        return
    carry_out(experiment, conditions)


@usual_settings()
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.name == "list":
        show_list(args.out or OUT)
        return 0
    if args.name == "page":
        names = copy_results(EXPERIMENTS, args.out) if args.out else []
        write_page(EXPERIMENTS)
        print(f"wrote {PAGE}" + (f", with new results of {', '.join(names)}" if names else ""))
        return 0
    conditions = conditions_of(args)
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    set_up(args.threads)
    with sigterm_interrupts():
        for name in names:
            run_one(name, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
