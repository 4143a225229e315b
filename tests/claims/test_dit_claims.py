"""DiT's experiments: what the rules say of results made up for it, and that each runs."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims.dit_blocks import DIT_BLOCKS, GATES
from nanosd3.claims.dit_compute import CELLS, DIT_COMPUTE
from nanosd3.claims.dit_loss_swap import ARMS, LOSS_SWAP, middle_levels
from nanosd3.claims.experiment import rank_correlation
from nanosd3.cli import run_main


def errors_of(zero: float, gates: float, adaln: float, cross: float, context: float) -> dict:
    """Results with these errors, which differ a little from seed to seed."""
    values = {"adaln_zero": zero, "adaln_gates": gates, "adaln": adaln,
              "cross_attention": cross, "in_context": context}  # fmt: skip
    wobble = {"adaln_zero": (-1, 0, 1)}
    return {"errors": {name: [e + 0.001 * w for w in wobble.get(name, (0, 0, 0))]
                       for name, e in values.items()}}  # fmt: skip


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (errors_of(0.17, 0.175, 0.18, 0.19, 0.19), "supported"),
        (errors_of(0.17, 0.175, 0.18, 0.18, 0.19), "undecided"),  # adaLN is not below all others
        (errors_of(0.1795, 0.175, 0.18, 0.19, 0.19), "undecided"),  # within the spread
        (errors_of(0.185, 0.175, 0.18, 0.19, 0.19), "refuted"),
        (errors_of(0.18, 0.175, 0.19, 0.175, 0.19), "refuted"),  # cross-attention is the lowest
    ],
)
def test_rule_of_blocks(results, word):
    assert DIT_BLOCKS.decide(results) == word


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (errors_of(0.17, 0.178, 0.18, 0, 0), "supported"),
        (errors_of(0.17, 0.185, 0.18, 0, 0), "supported"),  # gates alone do harm
        (errors_of(0.17, 0.172, 0.18, 0, 0), "refuted"),  # the gates do most of it
        (errors_of(0.17, 0.1705, 0.171, 0, 0), "undecided"),
    ],
)
def test_rule_of_gates(results, word):
    assert GATES.decide(results) == word


def cells(correlations: list[float], **changes: list[float]) -> dict:
    errors = {f"{w}/{p}": [1 / w + p / 10 + 0.001 * i for i in (0, 1, 2)] for w, p in CELLS}
    return {"errors": list((errors | changes).values()), "rank_correlations": correlations}


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (cells([-0.9, -0.8, -1.0]), "supported"),
        (cells([-0.9, -0.79, -1.0]), "undecided"),
        (cells([-0.4, -0.5, -0.4]), "refuted"),
        (cells([-0.9, -0.9, -0.9], **{"64/1": [0.5, 0.5, 0.5]}), "refuted"),
        (cells([-0.9, -0.9, -0.9], **{"64/1": [0.1, 0.4, 0.3]}), "undecided"),
    ],
)
def test_rule_of_compute(results, word):
    assert DIT_COMPUTE.decide(results) == word


def test_rank_correlation():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randn(2, 8, generator=generator).tolist()
        assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def ratios(flow: list[float], ddpm: list[float], **changes: list[float]) -> dict:
    """The flow's ratios after 5 evaluations and DDPM's after 50; all others say nothing."""
    found = {}
    for objective, density in ARMS:
        arm = f"{objective}, {density}"
        mine = flow if objective == "flow" else ddpm
        after = [1000.0] * 3
        value = changes.get(arm, mine)
        found[arm] = [value, after, after] if objective == "flow" else [after, after, value]
    return {"ratios": found}


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (ratios([3, 4, 5], [9, 12, 15]), "supported"),
        (ratios([3, 4, 5.1], [9, 12, 15]), "undecided"),
        (ratios([3, 4, 5], [9, 12, 15], **{"ddpm, logit-normal": [4, 12, 15]}), "undecided"),
        (ratios([3, 4, 5], [9, 12, 15], **{"ddpm, even steps": [3, 4, 5]}), "refuted"),
        (ratios([9, 9, 9], [8, 8, 10]), "refuted"),
    ],
)
def test_rule_of_the_loss_swap(results, word):
    assert LOSS_SWAP.decide(results) == word


def test_densities():
    u = torch.tensor([0.1, 0.5, 0.9])
    assert middle_levels(u)[1].item() == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item())
    assert (middle_levels(u).diff() > 0).all()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dit-claims")


def quickly(name: str, out: Path, tiny_run: Path) -> dict:
    """The results of an experiment in its fast form."""
    words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    assert (out / "fast" / f"{name}.png").exists()
    record = json.loads((out / "fast" / f"{name}.json").read_text())
    results = record["results"]
    assert results["table"]["rows"] and results["training_seconds"] > 0
    return results


def networks(out: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in (out / "fast" / "networks").rglob("dit.safetensors")}


def test_blocks_run_once_for_both(tiny_run, out):
    """What one experiment has trained, the other finds."""
    first = quickly("x-dit-1", out, tiny_run)
    before = networks(out)
    assert len(before) == 10 and len({e for each in first["errors"].values() for e in each}) == 10
    assert quickly("x-dit-1-gates", out, tiny_run) == first
    assert networks(out) == before


@pytest.mark.parametrize("name", ["x-dit-2", "x-dit-5"])
def test_others_run(tiny_run, out, name):
    quickly(name, out, tiny_run)
