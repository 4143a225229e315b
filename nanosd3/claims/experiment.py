"""An experiment: a claim, what is measured, and the rule that decides, written before it runs.

A rule exists twice, in words and as a function of the results, so that neither can be bent to what
came out: the words are printed before anything runs and are stored with the results, and the
function gives the verdict. "Undecided" means at this budget: the difference is within what another
seed would change.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Literal, TypeVar

import torch

Verdict = Literal["supported", "refuted", "undecided"]


@dataclass(frozen=True)
class Conditions:
    """What an experiment runs under."""

    seeds: tuple[int, ...]
    fast: bool  # in seconds, to see that it works: the results mean nothing
    run: Path  # a finished run of train_mnist.py
    out: Path  # where networks are trained; what is finished there is not trained again

    @property
    def records(self) -> Path:
        """Where records go: those of `fast` have a folder of their own, and replace no others."""
        return self.out / "fast" if self.fast else self.out

    @property
    def networks(self) -> Path:
        """Where small networks are kept, beside the records."""
        return self.records / "networks"


Key = TypeVar("Key", Conditions, Path)
Found = TypeVar("Found")


def once(study: Callable[[Key], Found]) -> Callable[[Key], Found]:
    """Run a study that several experiments share, or open a run, once per process for each
    conditions or run, and again when another run is in the folder."""
    kept: dict[Key, tuple[bytes, Found]] = {}

    @wraps(study)
    def ask(key: Key) -> Found:
        folder = key.run if isinstance(key, Conditions) else key
        index = folder / "run.json"
        content = index.read_bytes() if index.is_file() else b""
        if key not in kept or kept[key][0] != content:
            kept[key] = content, study(key)
        return kept[key][1]

    return ask


@dataclass(frozen=True)
class Experiment:
    """All texts are sentences for the page.

    `run` returns results that JSON can hold, among them a "table" as `table_of` makes it, which the
    page shows, and "training_seconds" of a core if it trained (or found trained) networks. `plot`
    draws the results, and nothing but them.
    """

    name: str  # such as "x-fm-1"
    claim: str
    source: str
    measured: str
    rule: str  # that of `decide`, in words
    minutes: float  # on two cores, with three seeds
    run: Callable[[Conditions], dict]
    decide: Callable[[dict], Verdict]
    plot: Callable[[dict, Path], None]
    remark: str = ""  # on the verdict; may be written after the results

    @property
    def declaration(self) -> dict[str, str]:
        """What is said before it runs."""
        names = ("name", "claim", "source", "measured", "rule")
        return {name: getattr(self, name) for name in names}


def verdict(supported: bool, refuted: bool) -> Verdict:
    """Neither: undecided. Both: a mistake in the rule."""
    assert not (supported and refuted)
    return "supported" if supported else "refuted" if refuted else "undecided"


def lead(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float]:
    """By how much the first is lower, seed by seed: the mean over seeds, and its spread (the
    standard deviation; infinite for a single seed, so one seed decides nothing)."""
    differences = [b - a for a, b in zip(better, worse, strict=True)]
    alone = len(differences) < 2
    return statistics.mean(differences), float("inf") if alone else statistics.stdev(differences)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs. 0 if all are equal."""
    x = torch.tensor([a, b], dtype=torch.float64)
    ranks = (x[:, :, None] > x[:, None]).sum(2) + (x[:, :, None] == x[:, None]).sum(2) / 2
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num()) if len(a) > 1 else 0.0


def table_of(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> dict:
    """A table for the page; numbers are shown with three digits, lists as mean and range."""
    return {
        "columns": [str(column) for column in columns],
        "rows": [[cell(value) for value in row] for row in rows],
    }


def cell(value: object) -> str:
    """A value in a table: 0.1234 as 0.123, [1.0, 2.0] over seeds as 1.5 (1 to 2)."""
    if isinstance(value, list):
        low, middle, high = (cell(float(f(value))) for f in (min, statistics.mean, max))
        return middle if low == high else f"{middle} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
