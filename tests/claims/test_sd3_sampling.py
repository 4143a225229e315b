"""SD3's claims on sampling, which need no training: the shift for larger images, and guidance."""

import json

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_guidance, sd3_shift
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.cli import run_main
from nanosd3.flow import schedule
from nanosd3.related.paths import PATHS, exact_velocity


def quickly(name: str, out, run) -> dict:
    words = [name, "--run", str(run), "--out", str(out), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    assert (out / "fast" / f"{name}.png").stat().st_size > 5000
    results = json.loads((out / "fast" / f"{name}.json").read_text())["results"]
    table = results["table"]
    assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    return results


def trade(accuracy: list[list[float]], spread: list[list[float]]) -> dict:
    return {"accuracy": accuracy, "spread": spread}


RISES, FLAT = [0.90, 0.95, 0.97, 0.97, 0.96], [0.95, 0.95, 0.95, 0.94, 0.93]
NARROWS, BUMPY, WIDENS = (
    [1.0, 0.9, 0.8, 0.6, 0.5],
    [1.0, 0.9, 0.95, 0.6, 0.5],
    [0.5, 0.4, 0.4, 0.4, 0.5],
)

CASES = {
    "x-sd3-guidance": [
        (trade([RISES, RISES], [NARROWS, NARROWS]), "supported"),
        (trade([RISES, FLAT], [NARROWS, NARROWS]), "undecided"),
        (trade([RISES, RISES], [NARROWS, BUMPY]), "undecided"),
        (trade([FLAT, FLAT], [NARROWS, NARROWS]), "refuted"),
        (trade([RISES, RISES], [WIDENS, WIDENS]), "refuted"),
        (trade([RISES, RISES], [WIDENS, NARROWS]), "undecided"),
        (trade([RISES], [NARROWS]), "undecided"),
        (trade([FLAT], [WIDENS]), "undecided"),
    ],
    "x-sd3-shift": [
        ({"growth": [[2.0, 2.0], [1.8, 2.2]]}, "supported"),
        ({"growth": [[1.0, 4.0], [1.5, 2.69]]}, "supported"),  # geometric means
        ({"growth": [[2.0, 2.0], [1.4, 1.4]]}, "undecided"),
        ({"growth": [[3.0, 3.0], [2.0, 2.0]]}, "undecided"),
        ({"growth": [[2.0, 2.0], [1.2, 1.2]]}, "refuted"),
        ({"growth": [[3.3, 3.3], [2.0, 2.0]]}, "refuted"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


# --- the shift ------------------------------------------------------------------------------------


def test_best_shift_of_a_parabola():
    """Exact for errors that are a parabola in the logarithm; at an end where they only fall."""
    places = torch.tensor(sd3_shift.SHIFTS).log2()
    for at in (1.3, 2.9, 4.0):
        errors = (0.2 + 0.1 * (places - at) ** 2).tolist()
        assert sd3_shift.best_shift(errors) == pytest.approx(2**at, rel=1e-4)
    assert sd3_shift.best_shift((1 / (1 + places.exp())).tolist()) == pytest.approx(
        sd3_shift.SHIFTS[-1], rel=0.01
    )
    assert sd3_shift.best_shift(places.tolist()) == sd3_shift.SHIFTS[0]


def test_repeated_pixels_shift_exactly():
    """Two copies of every pixel: with sqrt(2) times the shift Euler's steps end in the same places,
    which is the paper's argument without its approximation."""
    g = torch.Generator().manual_seed(0)
    points, noise = (
        torch.randn(20, 6, generator=g).double(),
        torch.randn(5, 6, generator=g).double(),
    )
    twice = torch.cat([points, points], 1)
    ts = torch.linspace(1, 0, 9, dtype=torch.float64)[1:-1]  # between the ends, where sigma > 0
    shifted = 2**0.5 * ts / (1 + (2**0.5 - 1) * ts)
    small, large = (exact_velocity(PATHS["ot"], x) for x in (points, twice))
    for t, s in zip(ts, shifted, strict=True):
        # z / (1 - t) has noise of t / (1 - t) a pixel; over two copies its mean has 1 / sqrt(2)
        z = (1 - t) * points[:5] + t * noise
        Z = (1 - s) * torch.cat([points[:5]] * 2, 1) + s * torch.cat([noise, noise], 1) / 2**0.5
        x0 = z - t * small(z, t)
        torch.testing.assert_close((Z - s * large(Z, s))[:, :6], x0)


def test_digits_of_size():
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    for side in (8, 28, 32):
        x = sd3_shift.digits_of_size(images, side)
        assert x.shape == (5, side * side) and x.dtype == torch.float32
        assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-4
    plain = images.flatten(1).double()
    expected = ((plain - plain.mean()) / plain.std()).float()
    torch.testing.assert_close(sd3_shift.digits_of_size(images, 28), expected)


def test_shift_runs(tiny_run, tmp_path):
    results = quickly("x-sd3-shift", tmp_path, tiny_run)
    shape = torch.tensor([results["errors"][str(side)] for side in sd3_shift.SHIFTED_SIDES]).shape
    assert shape == (3, 2, 2, len(sd3_shift.SHIFTS))  # side, steps, seed, shift
    assert len(results["growth"]) == 2 and all(len(each) == 4 for each in results["growth"])
    small, middle = (results["best"][str(side)] for side in sd3_shift.SHIFTED_SIDES[:2])
    assert results["growth"][0][0] == pytest.approx(middle[0][0] / small[0][0])
    assert schedule(6, 2.0)[1] > schedule(6, 1.0)[1]  # a larger shift is nearer to noise


# --- guidance -------------------------------------------------------------------------------------


def test_spread_within():
    """Against a closed form: labels far apart add nothing, and a factor multiplies it."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(300)
    features = torch.randn(3000, 4, generator=g) + 100 * labels[:, None]
    assert sd3_guidance.spread_within(features, labels) == pytest.approx(2.0, rel=0.02)  # sqrt(4)
    assert sd3_guidance.spread_within(3 * features, labels) == pytest.approx(6.0, rel=0.02)
    assert sd3_guidance.spread_within(features.round(decimals=-2), labels) == 0


def test_guidance_runs(tiny_run, tmp_path):
    results = quickly("x-sd3-guidance", tmp_path, tiny_run)
    for key in ("accuracy", "ratio", "spread"):
        assert len(results[key]) == 2 and all(len(each) == 5 for each in results[key])
        assert key == "accuracy" or len(set(results[key][0])) == 5  # each scale draws others
    assert [row[0] for row in results["table"]["rows"]] == ["1", "1.6", "2.5", "4", "7"]
