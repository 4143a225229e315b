"""The experiments on Muse: they run, and their rules come out in all three ways."""

import json
import math

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.muse_cascade import CASCADE_VARIANTS
from nanosd3.claims.muse_decoders import DECODERS
from nanosd3.claims.muse_edits import REPAINT_GUIDANCES, ROUNDS_MADE, TRUE_LABEL
from nanosd3.claims.muse_encoders import ENCODER_SCORES, TEXT_ENCODERS
from nanosd3.claims.muse_masks import SHARES_HIDDEN
from nanosd3.claims.muse_speed import FAST_FLOW_COUNTS, FAST_MUSE_COUNTS
from nanosd3.cli import run_main

FAMILY = [name for name in EXPERIMENTS if name.startswith("x-muse-")]


@pytest.fixture(scope="module")
def records(tiny_run, tmp_path_factory):
    """All of them, fast; those of speed with two seeds."""
    out = tmp_path_factory.mktemp("claims")
    for name in FAMILY:
        seeds = "2" if name.startswith("x-muse-2") else "1"
        words = [name, "--fast", "--seeds", seeds, "--run", str(tiny_run), "--out", str(out)]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / f"fast/{name}.png").stat().st_size > 4000
    return {name: json.loads((out / f"fast/{name}.json").read_text()) for name in FAMILY}


def test_all_run_fast(records):
    assert len(records) == 10
    for record in records.values():
        results = record["results"]
        table = results["table"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert results["training_seconds"] > 0


def test_what_they_measure(records):
    speed = records["x-muse-2"]["results"]["scores"]
    assert list(speed["muse"]) == [str(n) for n in FAST_MUSE_COUNTS]
    assert list(speed["flow"]) == [str(n) for n in FAST_FLOW_COUNTS]
    for by_steps in speed.values():
        assert all(len(scores) == 2 and scores[0] != scores[1] for scores in by_steps.values())
    for way in ("muse", "flow"):
        assert speed[way]["1"][0][2] < list(speed[way].values())[-1][0][2]  # milliseconds
    assert list(speed["causal"]) == ["49"]
    for name in ("x-muse-2-flow", "x-muse-2-causal"):
        assert records[name]["results"]["scores"] == speed  # measured once
    masks = records["x-muse-1"]["results"]["scores"]
    assert list(masks) == list(SHARES_HIDDEN)
    ways = records["x-muse-3"]["results"]["scores"]
    assert list(ways) == list(CASCADE_VARIANTS)
    for base, cascade, direct in zip(*ways.values(), strict=True):  # of a seed
        assert 0 < base[2] < cascade[2] and direct[2] > 0  # seconds
        assert len({base[1], cascade[1], direct[1]}) == 3
    decoders = records["x-muse-7"]["results"]
    assert decoders["same"] and list(decoders["scores"]) == list(DECODERS)
    assert decoders["scores"]["as wide"] != decoders["scores"]["twice as wide"]
    edits = records["x-muse-4"]["results"]
    assert records["x-muse-5"]["results"] == edits
    assert all(len(shares) == 1 for shares in edits["read"].values())
    kept = [edits["free"][str(n)][0][1] for n in ROUNDS_MADE]
    assert kept == sorted(kept, reverse=True) and 1 > kept[0] > kept[-1]
    results = records["x-muse-6"]["results"]
    assert records["x-muse-6-words"]["results"] == results
    assert list(results["scores"]) == list(TEXT_ENCODERS)
    for scores in results["scores"].values():
        assert list(scores) == list(ENCODER_SCORES)
        assert scores["loss"][0] < math.log(64) and all(
            0 <= scores[k][0] <= 1 for k in scores if k != "loss"
        )
    assert len({scores["loss"][0] for scores in results["scores"].values()}) == 3


def test_shares():
    u = torch.tensor([0.0, 0.5, 1.0])
    found = [share_of(u).tolist() for share_of in SHARES_HIDDEN.values()]
    assert found[0] == pytest.approx([1, 0.5**0.5, 0], abs=1e-6) and found[1] == [0, 0.5, 1]
    assert found[2] == pytest.approx([0.15] * 3)


# --- rules ----------------------------------------------------------------------------------------


def speeds(muse, flow=((2.0, 1.0), (2.0, 1.0)), causal=()):
    """Ratios of 8 and 49 steps of each seed; ratio and milliseconds of 8 steps of the flow, and of
    tokens one by one."""
    return {
        "scores": {
            "muse": {"8": [[0.9, a, 3.0] for a, _ in muse], "49": [[0.9, b, 9.0] for _, b in muse]},
            "flow": {"8": [[0.9, ratio, took] for ratio, took in flow]},
            "causal": {"49": [[0.9, ratio, took] for ratio, took in causal]},
        }
    }


@pytest.mark.parametrize(
    ("muse", "expected"),
    [
        ([(1.1, 1.0), (1.19, 1.0)], "supported"),
        ([(1.1, 1.0), (1.3, 1.0)], "undecided"),
        ([(1.3, 1.0), (1.3, 1.0)], "refuted"),
    ],
)
def test_few_steps(muse, expected):
    assert EXPERIMENTS["x-muse-2"].decide(speeds(muse)) == expected


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        ([(2.0, 1.0), (2.0, 1.0)], "refuted"),  # nearer and cheaper than Muse's 4 and 3 ms
        ([(5.0, 4.0), (6.0, 5.0)], "supported"),
        ([(5.0, 1.0), (6.0, 1.0)], "undecided"),
        ([(2.0, 1.0), (6.0, 1.0)], "undecided"),
    ],
)
def test_faster(flow, expected):
    assert EXPERIMENTS["x-muse-2-flow"].decide(speeds([(4.0, 4.0)] * 2, flow)) == expected


@pytest.mark.parametrize(
    ("causal", "expected"),
    [
        ([(4.0, 5.0), (3.4, 3.1)], "supported"),  # Muse: 4 and 3 ms
        ([(4.0, 5.0), (3.3, 3.1)], "undecided"),
        ([(4.0, 5.0), (4.0, 2.9)], "undecided"),
        ([(3.3, 5.0), (4.0, 2.9)], "refuted"),
    ],
)
def test_faster_than_one_by_one(causal, expected):
    results = speeds([(4.0, 4.0)] * 2, causal=causal)
    assert EXPERIMENTS["x-muse-2-causal"].decide(results) == expected


@pytest.mark.parametrize(
    ("cosine", "uniform", "few", "expected"),
    [
        ([4.0, 4.1], [5.0, 5.2], [9.0, 9.0], "supported"),
        ([4.0, 4.1], [5.0, 5.2], [9.0, 7.0], "undecided"),
        ([4.0, 5.0], [4.5, 4.6], [12.0, 12.0], "undecided"),
        ([5.0, 5.2], [4.0, 4.1], [12.0, 12.0], "refuted"),
        ([4.0, 4.2], [5.0, 5.2], [4.1, 9.0], "refuted"),
    ],
)
def test_masks(cosine, uniform, few, expected):
    values = zip(SHARES_HIDDEN, (cosine, uniform, few), strict=True)
    results = {"scores": {name: [[0.9, r] for r in ratios] for name, ratios in values}}
    assert EXPERIMENTS["x-muse-1"].decide(results) == expected


@pytest.mark.parametrize(
    ("cascade", "direct", "expected"),
    [
        ([(0.9, 4.0), (0.8, 3.0)], [(0.9, 5.0), (0.7, 4.0)], "supported"),
        ([(0.9, 4.0), (0.6, 3.0)], [(0.9, 5.0), (0.7, 4.0)], "undecided"),
        ([(0.9, 4.0), (0.8, 5.0)], [(0.9, 5.0), (0.7, 4.0)], "undecided"),
        ([(0.9, 6.0), (0.8, 5.0)], [(0.9, 5.0), (0.7, 4.0)], "refuted"),
    ],
)
def test_cascade(cascade, direct, expected):
    results = {"scores": dict(zip(CASCADE_VARIANTS, ([], cascade, direct), strict=True))}
    assert EXPERIMENTS["x-muse-3"].decide(results) == expected


@pytest.mark.parametrize(
    ("smaller", "larger", "same", "expected"),
    [
        ([(0.2, 1.5), (0.3, 1.6)], [(0.1, 1.4), (0.2, 1.5)], True, "supported"),
        ([(0.2, 1.5), (0.3, 1.6)], [(0.1, 1.4), (0.2, 1.5)], False, "undecided"),
        ([(0.2, 1.5), (0.3, 1.6)], [(0.1, 1.4), (0.2, 1.7)], True, "undecided"),
        ([(0.2, 1.5), (0.3, 1.6)], [(0.3, 1.6), (0.4, 1.7)], True, "refuted"),
    ],
)
def test_larger_decoder(smaller, larger, same, expected):
    scores = dict(zip(DECODERS, (smaller, larger), strict=True))
    results = {"scores": scores, "same": same}
    assert EXPERIMENTS["x-muse-7"].decide(results) == expected


@pytest.mark.parametrize(
    ("true", "by_guidance", "expected"),
    [
        ([0.95, 0.9], ([0.5, 0.5], [0.6, 0.6], [0.7, 0.7]), "supported"),
        ([0.95, 0.8], ([0.5, 0.5], [0.6, 0.6], [0.7, 0.7]), "undecided"),
        ([0.95, 0.9], ([0.5, 0.5], [0.6, 0.4], [0.7, 0.7]), "undecided"),
        ([0.8, 0.8], ([0.5, 0.5], [0.6, 0.6], [0.7, 0.7]), "refuted"),
        ([0.95, 0.9], ([0.5, 0.5], [0.4, 0.4], [0.7, 0.7]), "refuted"),
    ],
)
def test_repainting(true, by_guidance, expected):
    read = {"generated": [1.0, 1.0], TRUE_LABEL: true}
    read |= {
        f"another label, guidance {g:g}": shares
        for g, shares in zip(REPAINT_GUIDANCES, by_guidance, strict=True)
    }
    assert EXPERIMENTS["x-muse-4"].decide({"read": read}) == expected


@pytest.mark.parametrize(
    ("edits", "chance", "expected"),
    [
        ([(0.7, 0.5), (0.7, 0.5)], [0.1, 0.1], "supported"),
        ([(0.7, 0.5), (0.5, 0.5)], [0.1, 0.1], "undecided"),
        ([(0.7, 0.3), (0.5, 0.5)], [0.1, 0.1], "refuted"),
        ([(0.7, 0.5), (0.7, 0.5)], [0.5, 0.5], "refuted"),  # as many are kept by chance
    ],
)
def test_free_editing(edits, chance, expected):
    free = {str(n): [[0.1, 0.9]] * len(edits) for n in ROUNDS_MADE[:-1]}
    free[str(ROUNDS_MADE[-1])] = [list(pair) for pair in edits]
    results = {"free": free, "chance": chance}
    assert EXPERIMENTS["x-muse-5"].decide(results) == expected


def encoder_results(
    loss=1.1, digit=0.1, attributes=0.0, unheard=(0.6, 0.1), seeds=3, wobble=0.001, shaky=1
):
    """With trained encoders a loss of 1, and 0.8 of digits and attributes right; with untrained
    ones `loss`, and less right by so much. Seeds differ, in digits `shaky` times."""
    moves = [wobble * k for k in range(seeds)]
    trained = {"loss": [1.0] * seeds, "digit": [0.8] * seeds, "attributes": [0.8] * seeds}
    other = {
        "loss": [loss + m for m in moves],
        "digit": [0.8 - digit - shaky * m for m in moves],
        "attributes": [0.8 - attributes - m for m in moves],
    }
    both = zip(TEXT_ENCODERS, (trained, other), unheard, strict=False)
    return {"scores": {n: s | {"unheard": [u + m for m in moves]} for n, s, u in both}}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (encoder_results(), "supported"),
        (encoder_results(digit=0.0, attributes=0.1), "supported"),
        (encoder_results(digit=0.01), "undecided"),  # fewer than two points
        (encoder_results(loss=1.008), "undecided"),  # less than 1%
        (encoder_results(wobble=-0.08), "undecided"),  # within the spread
        (encoder_results(digit=-0.05, shaky=100), "undecided"),  # of digits
        (encoder_results(loss=1.0, digit=0.0), "refuted"),
        (encoder_results(loss=0.9, digit=-0.2, attributes=-0.1), "refuted"),
        (encoder_results(loss=1.009, digit=0.0), "undecided"),  # not in every seed
        (encoder_results(loss=1.0, digit=0.0, attributes=0.019), "undecided"),
        (encoder_results(seeds=1), "undecided"),
        (encoder_results(loss=1.0, digit=0.0, seeds=1), "undecided"),
    ],
)
def test_trained_encoder(results, expected):
    assert EXPERIMENTS["x-muse-6"].decide(results) == expected


@pytest.mark.parametrize(
    ("unheard", "expected"),
    [
        ((0.6, 0.1), "supported"),
        ((0.41, 0.2), "supported"),
        ((0.398, 0.1), "undecided"),  # not in every seed half of the 0.8
        ((0.6, 0.31), "undecided"),
        ((0.19, 0.1), "refuted"),
        ((0.199, 0.1), "undecided"),
        ((0.6, 0.6), "refuted"),
        ((0.9, 0.901), "refuted"),
    ],
)
def test_unheard_words(unheard, expected):
    assert EXPERIMENTS["x-muse-6-words"].decide(encoder_results(unheard=unheard)) == expected
    assert (
        EXPERIMENTS["x-muse-6-words"].decide(encoder_results(unheard=unheard, seeds=1))
        == "undecided"
    )
