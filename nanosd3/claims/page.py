"""The page of verdicts, nanosd3/claims/README.md, built from the records in results/."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from nanosd3.claims.experiment import Experiment
from nanosd3.claims.records import RESULTS, check_declaration, paths_of, read_record
from nanosd3.errors import InputError
from nanosd3.storage.files import write_file

PAGE = Path(__file__).parent / "README.md"
HEAD = """# Claims, put to the test

Experiments that test what papers claim, each in minutes on a CPU. Claim, measurement and rule
were written before the run whose results are shown, and the rule, a function in the code, gave the
verdict: *supported*, *refuted*, or *undecided* at this budget. Pilots on other seeds set sizes and
rates. Where a mistake was found after a first run, the rule was mended and everything ran again;
[LOG](../../LOG.md) says where. A verdict holds for small networks on handwritten digits and says
nothing about larger ones; a refuted claim may well hold for them. Nor is one verdict strong
evidence: of two methods that are alike, the mean difference of three seeds exceeds its spread in
23% of studies (Student's t, two degrees of freedom), and more often in one of several comparisons.
One seed decides nothing.

```
python -m nanosd3.claims list
python -m nanosd3.claims x-fm-3
```

`all` runs everything that has not run yet, `--seeds N` takes other numbers of seeds, `--fast` shows
in seconds how an experiment works. Most train in the latents of a finished main job
(`python train_mnist.py`), which `--run` names. This page is built from the JSON files in
[results](results) by `python -m nanosd3.claims page`.
"""


def copy_results(experiments: Mapping[str, Experiment], out: Path) -> list[str]:
    """Copy the records and plots in a folder to the page's, and return their names.

    Raises InputError if there are none, or if one ran with another rule than the code has now.
    """
    if not out.is_dir():
        raise InputError(f"{out}: no such folder; experiments write to --out, runs/claims")
    there = [name for name in experiments if all(path.exists() for path in paths_of(out, name))]
    for name in there:
        file, _ = paths_of(out, name)
        record = read_record(file)
        check_declaration(record, experiments[name], file)
        if record["fast"]:
            raise InputError(f"{file}: comes from --fast, which means nothing; run it in full")
    if not there:
        raise InputError(f"{out}: has no results of experiments")
    RESULTS.mkdir(exist_ok=True)
    for name in there:
        for path, kept in zip(paths_of(out, name), paths_of(RESULTS, name), strict=True):
            shutil.copyfile(path, kept)
    return there


def committed(experiments: Mapping[str, Experiment]) -> dict[str, dict]:
    """The page's records by name, in the order of the catalogue, with today's remarks and sources:
    unlike the rule, they may say what has been learned since."""
    found = {}
    for name, experiment in experiments.items():
        file, _ = paths_of(RESULTS, name)
        if file.exists():
            today = {"remark": experiment.remark, "source": experiment.source}
            found[name] = read_record(file) | today
    return found


def page(experiments: Mapping[str, Experiment], records: Mapping[str, dict]) -> str:
    """The text of the page. Experiments that have not run are named, too."""
    rows = []
    for name, experiment in experiments.items():
        if name in records:
            rows.append(
                f"| [{name}](#{name}) | {experiment.claim} | **{records[name]['verdict']}** |"
            )
        else:
            rows.append(f"| {name} | {experiment.claim} | not run yet |")
    overview = ["| | claim | verdict |", "| --- | --- | --- |", *rows]
    tables = first_alike({name: str(r["results"]["table"]) for name, r in records.items()})
    plots = first_alike({name: paths_of(RESULTS, name)[1].read_bytes() for name in records})
    sections = [section(record, tables[name], plots[name]) for name, record in records.items()]
    return "\n".join([HEAD, "\n".join(overview) + "\n", *sections])


def first_alike(contents: Mapping[str, str | bytes]) -> dict[str, str]:
    """For each name the first one that has the same content."""
    first: dict[str | bytes, str] = {}
    return {name: first.setdefault(content, name) for name, content in contents.items()}


def figures_of(table: dict) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [table["columns"], *table["rows"]]]
    lines.insert(1, "| --- " * len(table["columns"]) + "|")
    return "\n".join(lines)


def section(record: dict, shown_by: str, drawn_by: str) -> str:
    """One experiment: what was said, the verdict, the figures and the plot. A table or plot that
    another experiment already shows is linked."""
    machine, name = record["machine"], record["name"]
    table = (
        figures_of(record["results"]["table"])
        if shown_by == name
        else f"Measured together with [{shown_by}](#{shown_by}), whose table has the figures."
    )
    plot = (
        f"![Plot for the claim: {record['claim']}](results/{name}.png)"
        if drawn_by == name
        else f"The plot of [{drawn_by}](#{drawn_by}) shows this, too."
    )
    seconds = f"{record['thread_seconds']:.0f} s of one core"
    if "training_seconds" in record["results"]:
        trained = record["results"]["training_seconds"]
        seconds += f" (training its networks, now or before: {trained:.0f} s)"
    seeds = ", ".join(map(str, record["seeds"]))
    remark = f"\n{record['remark']}\n" if record["remark"] else ""
    return f"""## {name}

**Claim.** {record["claim"]} *({record["source"]})*

**Measured.** {record["measured"]}

**Rule.** {record["rule"]}

**Verdict: {record["verdict"]}.**
{remark}
{table}

{plot}

Seeds {seeds}; {seconds} on {machine["processor"]}, torch {machine["torch"]}, commit
{machine["commit"]}.
"""


def write_page(experiments: Mapping[str, Experiment]) -> None:
    write_file(PAGE, page(experiments, committed(experiments)).encode())
