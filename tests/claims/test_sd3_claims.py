"""Experiments on SD3's claims: each runs, and its rule can come out in all three ways."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanosd3 import mmdit
from nanosd3.claims import __main__ as command
from nanosd3.claims import data_sets, sd3_attention, sd3_middle, sd3_networks, sd3_straightness
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.sd3_formulations import COMPARED_FAST, SETTINGS, typical
from nanosd3.claims.sd3_ranks import average_ranks, fronts
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.mmdit import MMDiT
from nanosd3.related.formulations import FORMULATIONS
from nanosd3.training import train_flow
from nanosd3.training.stages import Job


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sd3-claims")


def quickly(name: str, out: Path, tiny_run: Path) -> dict:
    """The results of an experiment in its fast form."""
    words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "2", "--fast"]
    assert run_main(lambda: command.main(words)) == 0
    assert (out / "fast" / f"{name}.png").stat().st_size > 5000
    record = json.loads((out / "fast" / f"{name}.json").read_text())
    table = record["results"]["table"]
    assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    return record["results"]


# --- rules on made-up numbers -------------------------------------------------------------------


def left(*quarters: tuple[float, float, float]) -> dict:
    """What is left to learn in each seed: near data, in the middle, near noise."""
    return {"left_to_learn": [[d, d, m, m, m, m, n, n] for d, m, n in quarters]}


FIVE = [5.0, 5.0, 5.0]
TWO, THREE, SIX = [2.0, 2.1, 1.9], [3.0, 3.1, 2.9], [6.0, 6.1, 6.2]
WIDE = [2.0, 7.0, 4.0]


def ranks(**by_name: list[float]) -> dict:
    """Average ranks in all settings; `rf` and `weighted`, the others 5."""
    names = {"rf": by_name.get("rf", FIVE), "rf/lognorm(0, 1)": by_name["weighted"]}
    return dict.fromkeys(FORMULATIONS, FIVE) | names


def at_steps(few: dict, many: dict) -> dict:
    return {"ranks": {"few": few, "many": many}}


def attention(f32: list[float], f32_without: list[float], bf16: list[float],
              bf16_without: list[float]) -> dict:  # fmt: skip
    """Largest logits during training, of which the last counts; the same numbers as losses."""
    arms = {"float32, with": f32, "float32, without": f32_without,
            "bfloat16, with": bf16, "bfloat16, without": bf16_without}  # fmt: skip
    return {"arms": {arm: {"largest": [[99.0 if "with," in arm else 0.0, x] for x in each],
                           "loss": each} for arm, each in arms.items()}}  # fmt: skip


def following(rf: list[float], others: list[float], one: list[float] | None = None) -> dict:
    """Lengths, or errors at each number of steps, alike on both fields; but `one` is v/cos's on
    that of trained networks, after 10 steps. EDM's lengths do not count."""
    names = dict.fromkeys(sd3_straightness.FORMULATIONS_COMPARED, others)
    names |= dict.fromkeys(sd3_straightness.RECTIFIED, rf)
    errors = {name: [each] * 4 for name, each in names.items()}
    last = {"v/cos": one or others, "edm(0, 0.6)": [0.0] * len(rf)}
    late = {"v/cos": [others, one or others, others, others]}
    return {"lengths": {"exact": names, "trained": names | last},
            "errors": {"exact": errors, "trained": errors | late}}  # fmt: skip


FOLLOWING = [
    (following(TWO, SIX), "supported"),
    (following(TWO, SIX, THREE), "supported"),
    (following(THREE, SIX, TWO), "refuted"),
    (following(SIX, TWO), "refuted"),
    (following(TWO, SIX, TWO), "undecided"),
    (following(TWO, SIX, WIDE), "undecided"),
    (following([2.0], [3.0]), "undecided"),
    (following([2.1, 3.0, 4.0], SIX, [1.0, 1.0, 1.0]), "refuted"),
    (following([2.0, 3.0, 4.0], SIX, [1.5, 1.0, 2.5]), "undecided"),  # not twice the spread
]

CASES = {
    "x-sd3-straight": FOLLOWING,
    "x-sd3-straight-steps": FOLLOWING,
    "x-sd3-qk-norm": [
        (attention([5, 5], [10, 20], [5, 6], [10, 12]), "supported"),
        (attention([5, 5], [10, 9.9], [5, 6], [10, 12]), "undecided"),
        (attention([5, 5], [10, 20], [5, 6], [10, 11.9]), "undecided"),
        (attention([5, 5], [10, 20], [5, 6], [5, 5]), "refuted"),
        (attention([5, 5], [4, 5], [5, 6], [10, 12]), "refuted"),
        (attention([5], [10], [5], [10]), "undecided"),
        (attention([5], [4], [5], [4]), "undecided"),
    ],
    "x-sd3-qk-norm-bf16": [
        (attention([0.9, 0.9], [1.0, 1.0], [0.9, 0.9], [1.2, 1.2]), "supported"),
        (attention([0.9, 0.9], [1.0, 1.0], [0.9, 0.9], [1.0, 1.02]), "undecided"),
        (attention([0.9, 0.9], [1.0, 1.0], [0.9, 0.9], [1.0, 1.0]), "refuted"),  # no more
        (attention([0.9, 0.9], [1.0, 1.0], [1.3, 1.3], [1.2, 1.2]), "refuted"),
        (attention([0.9, 0.9], [0.8, 0.8], [1.3, 1.3], [1.25, 1.25]), "refuted"),
        (attention([0.9, 0.9], [1.0, 1.0], [1.1, 1.2], [1.1, 1.4]), "undecided"),
        (attention([0.9, 0.9], [0.7, 0.7], [1.1, 1.2], [1.1, 1.2]), "undecided"),  # no gain
        (attention([0.9], [1.0], [0.9], [1.2]), "undecided"),
        (attention([0.9], [1.0], [0.9], [1.0]), "undecided"),
    ],
    "x-sd3-formulations": [
        ({"ranks": {"all": ranks(weighted=TWO)}}, "supported"),
        ({"ranks": {"all": ranks(weighted=TWO, rf=THREE)}}, "supported"),
        ({"ranks": {"all": ranks(weighted=SIX)}}, "refuted"),
        ({"ranks": {"all": ranks(weighted=THREE, rf=TWO)}}, "refuted"),
        ({"ranks": {"all": ranks(weighted=TWO, rf=TWO)}}, "undecided"),
        ({"ranks": {"all": ranks(weighted=WIDE)}}, "undecided"),
    ],
    "x-sd3-formulations-steps": [
        (at_steps(ranks(rf=TWO, weighted=TWO), ranks(rf=SIX, weighted=TWO)), "supported"),
        (at_steps(ranks(rf=TWO, weighted=SIX), ranks(rf=SIX, weighted=TWO)), "supported"),
        (at_steps(ranks(rf=SIX, weighted=TWO), ranks(rf=TWO, weighted=TWO)), "refuted"),
        (at_steps(ranks(rf=TWO, weighted=TWO), ranks(rf=SIX, weighted=SIX)), "refuted"),
        (at_steps(ranks(rf=TWO, weighted=TWO), ranks(rf=TWO, weighted=TWO)), "undecided"),
        (at_steps(ranks(rf=TWO, weighted=TWO), ranks(rf=WIDE, weighted=WIDE)), "undecided"),
    ],
    "x-sd3-middle": [
        (left((0.1, 0.3, 0.2), (0.2, 0.3, 0.1)), "supported"),
        (left((0.1, 0.3, 0.4), (0.2, 0.3, 0.4)), "refuted"),
        (left((0.4, 0.3, 0.1), (0.4, 0.3, 0.1)), "refuted"),
        (left((0.1, 0.3, 0.4), (0.4, 0.3, 0.1)), "undecided"),  # now at this end, now at that
        (left((0.1, 0.3, 0.4), (0.2, 0.3, 0.1)), "undecided"),
        (left((0.1, 0.3, 0.2)), "undecided"),
        (left((0.1, 0.3, 0.4)), "undecided"),
    ],
}


CASES["x-sd3-pixels"] = CASES["x-sd3-formulations"]
CASES["x-sd3-pixels-steps"] = CASES["x-sd3-formulations-steps"]


@pytest.mark.parametrize("name", CASES)
def test_rules_of_sd3(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


# --- x-sd3-middle -------------------------------------------------------------------------------


def test_share_of_draws():
    """Against counting: logit-normal(0, 1) draws 72.8% from the middle half."""
    assert sd3_middle.share_of_draws(0.25, 0.75) == pytest.approx(0.7280, abs=1e-4)
    assert sd3_middle.share_of_draws(0.0, 1.0) == 1
    draws = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    counted = ((draws > 0.5) & (draws < 0.625)).float().mean().item()
    assert sd3_middle.share_of_draws(0.5, 0.625) == pytest.approx(counted, abs=0.005)


def test_regions():
    assert sd3_middle.regions([1, 3, 4, 4, 6, 6, 0, 8]) == (2, 5, 4)


def test_times_are_even():
    """A logit-normal density of deviation 1.7 is uniform to within a hundredth."""
    mean, std = sd3_middle.ALMOST_UNIFORM
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    t = torch.sigmoid(mean + std * torch.special.ndtri(u))
    assert (t - u).abs().max() < 0.01


def test_middle_runs(tiny_run, out, monkeypatch):
    monkeypatch.setattr(train_flow, "VALIDATION_TIMES", sd3_middle.VALIDATION_TIMES)
    results = quickly("x-sd3-middle", out, tiny_run)
    assert results["times"][0] == 1 / 16 and len(results["early"]) == len(results["late"]) == 2
    assert sum(results["shares"]) == pytest.approx(1)
    for early, late, found in zip(
        *(results[key] for key in ("early", "late", "left_to_learn")), strict=True
    ):
        assert found == pytest.approx([a - b for a, b in zip(early, late, strict=True)])
        assert early != late
    assert results["training_seconds"] > 0


# --- formulations -------------------------------------------------------------------------------


def test_fronts():
    """Of accuracy and distance; equal points share a front."""
    best, fair, sharp, dull = (0.9, 2.0), (0.8, 3.0), (0.7, 1.0), (0.6, 4.0)
    assert fronts([fair, best, dull, sharp]) == [2, 1, 3, 1]
    assert fronts([best, best, (0.9, 2.1), (0.8, 2.0)]) == [1, 1, 2, 2]
    assert fronts([fair]) == [1]


def test_average_ranks():
    a = [[(0.9, 1.0), (0.5, 9.0)], [(0.9, 1.0), (0.5, 9.0)]]  # two settings, two seeds
    b = [[(0.8, 2.0), (0.9, 1.0)], [(0.9, 1.0), (0.9, 1.0)]]
    assert average_ranks({"a": a, "b": b}, [0, 1]) == {"a": [1.0, 2.0], "b": [1.5, 1.0]}
    assert average_ranks({"a": a, "b": b}, [1]) == {"a": [1.0, 2.0], "b": [1.0, 1.0]}


def test_typical_are_those_without_guidance():
    settings = SETTINGS["latents"]
    found = typical([[(0.5, float(i))] for i in range(len(settings))], settings)
    assert found[1] == found[3] == [0.5]
    assert [settings[int(found[k][0])] for k in (0, 2)] == [
        ("few", 1.0, "average"), ("many", 1.0, "average")]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), [("x-sd3-formulations", 8), ("x-sd3-pixels", 4)])
def test_formulations_run_once_for_both(tiny_run, out, name, settings):
    """What one experiment has trained, the other finds; every formulation is its own."""
    results = quickly(name, out, tiny_run)
    networks = {p: p.stat().st_mtime_ns for p in (out / "fast/networks").glob("*/*.*s*")}
    assert quickly(f"{name}-steps", out, tiny_run) == results
    assert len(networks) >= 3 * 2 * len(COMPARED_FAST)
    assert all(path.stat().st_mtime_ns == time for path, time in networks.items())
    assert len(results["settings"]) == settings
    assert set(results["scores"]) == set(COMPARED_FAST)
    for by_setting in results["scores"].values():
        assert [len(each) for each in by_setting] == [2] * settings
    ratios = {json.dumps(by_setting) for by_setting in results["scores"].values()}
    assert len(ratios) == len(COMPARED_FAST)  # no two formulations are the same
    assert results["training_seconds"] > 0


def both_data_sets(tiny_run: Path, out: Path) -> list[data_sets.Latents]:
    return data_sets.open_data_sets(Conditions((0,), True, tiny_run, out))


def test_halved_digits():
    """A block of 2 x 2 is one pixel; the border goes; doubling keeps the place."""
    digits = torch.zeros(1, 28, 28, dtype=torch.uint8)
    digits[0, 10:14, 6:10] = 255
    digits[0, 0, 0] = 255
    small = data_sets.halved(digits)
    assert small.shape == (1, 1, 12, 12) and small.sum() == 4
    assert (small[0, 0, 4:6, 2:4] == 1).all()
    single = torch.zeros(1, 28, 28, dtype=torch.uint8)
    single[0, 5, 7] = 255
    assert data_sets.halved(single).sum() == 0.25  # the mean of four
    large = data_sets.doubled(small)
    assert large.shape == digits.shape and large.dtype == torch.uint8
    rows, columns = large[0].float().sum(1), large[0].float().sum(0)
    assert (rows @ torch.arange(28.0) / rows.sum()).item() == pytest.approx(11.5)
    assert (columns @ torch.arange(28.0) / columns.sum()).item() == pytest.approx(7.5)


def test_both_data_sets(tiny_run, out):
    """Pixels have mean 0 and deviation 1 and come back as the digits they were; either data set
    fits its network."""
    latents, pixels = both_data_sets(tiny_run, out)
    assert [latents.name, pixels.name] == ["latents", "pixels"]
    index = torch.arange(50)
    step_rng = sd3_networks.StepRNG((0, "test"), range(50))
    x0, noise = pixels.x0_and_noise(torch.arange(len(pixels.pixels))[:50], step_rng)
    everything = (pixels.pixels - pixels.mean_and_std[0]) / pixels.mean_and_std[1]
    assert everything.mean().abs() < 1e-4 and everything.std().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(x0, everything[:50])
    assert noise.shape == x0.shape and 0.9 < noise.std() < 1.1
    digits = latents.finished.source.all_images[index]
    back = data_sets.doubled(data_sets.halved(digits))
    torch.testing.assert_close(pixels.to_digits(x0), back, atol=1, rtol=0)
    for data in (latents, pixels):
        what = data_sets.sample_inputs(data, 0, 20)
        assert data.mmdit.grid_sample**2 == 16 and data.mmdit.depth == 1
        x0, _ = data.x0_and_noise(index, step_rng)
        assert what.noise.shape[1:] == x0.shape[1:] and len(what.pooled) == len(what.noise)
        assert what.floor > 0


def test_scorer_of_halved_digits(tiny_run, out):
    """Real images, halved, are as far as the floor says, and no nearer to whole ones."""
    _, pixels = both_data_sets(tiny_run, out)
    what = data_sets.sample_inputs(pixels, 0, 40)
    chosen = what.draw.chosen
    real = (pixels.pixels[chosen] - pixels.mean_and_std[0]) / pixels.mean_and_std[1]
    accuracy, ratio = data_sets.scores_of_samples(pixels, real, what)
    assert ratio == pytest.approx(1, abs=0.02) and 0 <= accuracy <= 1
    assert pixels.scorer.test.shape == pixels.finished.scorer.test.shape
    assert not torch.equal(pixels.scorer.test, pixels.finished.scorer.test)


def test_both_weights_of_a_network(tiny_run, out):
    """The average is none of the last, and a second call trains nothing."""
    data = both_data_sets(tiny_run, out)[1]
    first, second = (sd3_networks.trained_formulation(data, "v/cos", 0) for _ in range(2))
    for name in ("last", "average"):
        a, b = (getattr(each, name).final_layer.linear.weight for each in (first, second))
        assert torch.equal(a, b) and a.abs().sum() > 0 and not a.requires_grad
    assert not torch.equal(
        first.last.final_layer.linear.weight, first.average.final_layer.linear.weight
    )


def test_guidance_and_text_reach_the_samples(tiny_run, out):
    data = both_data_sets(tiny_run, out)[1]
    model, what = (
        sd3_networks.trained_formulation(data, "v/cos", 0).last,
        data_sets.sample_inputs(data, 0, 20),
    )
    torch.nn.init.normal_(model.final_layer.adaLN_modulation[1].weight)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    formulation = FORMULATIONS["v/cos"]
    made = [sd3_networks.sample_formulation(formulation, model, what, 2, g) for g in (1.0, 2.0)]
    assert made[0].shape == what.noise.shape and not torch.allclose(*made)
    other = data_sets.SampleInputs(what.draw, what.pooled.flip(0), what.noise, what.floor)
    assert not torch.allclose(
        made[0], sd3_networks.sample_formulation(formulation, model, other, 2, 1.0)
    )


class Recorder:
    """A network that answers zero, and what it was given."""

    def __init__(self, config):
        self.config, self.given = config, []

    def __call__(self, z, t, context, pooled):
        self.given.append((z, t, pooled))
        return torch.zeros_like(z)


def test_a_training_step(tiny_run, out):
    """What the network is shown has unit variance, a tenth has no text, and guessing zero costs
    the answer's variance."""
    data, size = both_data_sets(tiny_run, out)[1], 1000
    recipe = replace(sd3_networks.FAST_SHORT, batch=size)
    config = data.finished.config
    config = replace(config, training=replace(config.training, flow=recipe))
    run, source = data.finished.run, data.finished.source
    job, model = Job(run, config, source, torch.device("cpu"), 0), Recorder(data.mmdit)
    step_rng = sd3_networks.StepRNG((0, "step"), range(size))
    formulation = FORMULATIONS["v/cos"]
    losses = sd3_networks.formulation_step(formulation, data, job, model, step_rng)
    ((z, t, pooled),) = model.given
    assert z.var().item() == pytest.approx(1, abs=0.03)
    assert losses.shape == (size,) and losses.mean().item() == pytest.approx(1, abs=0.03)
    assert (pooled == 0).all(1).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert 0 < t.min() and t.max() < 1 and t.median().item() == pytest.approx(0.5, abs=0.05)


def test_samples_start_where_the_steps_do(tiny_run, out):
    data = both_data_sets(tiny_run, out)[1]
    what, model = data_sets.sample_inputs(data, 0, 20), Recorder(data.mmdit)
    late = replace(FORMULATIONS["rf"], steps=lambda n: torch.linspace(0.5, 0, n + 1))
    made = sd3_networks.sample_formulation(late, model, what, 3, 1.0)
    assert len(model.given) == 3
    torch.testing.assert_close(made, what.noise / 2)


# --- QK-norm ------------------------------------------------------------------------------------


def test_logits_are_those_of_attention():
    """With norm and without; by them, attention gives what the block's own gives."""
    for qk_norm in (True, False):
        config = replace(CONFIGS["tiny"].mmdit, qk_norm=qk_norm, dual_attention=())
        torch.manual_seed(0)
        model = MMDiT(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 48)
        given, real = [], mmdit.attention

        def attention(q, k, v, given=given, real=real):
            given.append((q, k))
            return real(q, k, v)

        with (
            pytest.MonkeyPatch.context() as patch,
            sd3_attention.record_queries_and_keys(model) as seen,
        ):
            patch.setattr(mmdit, "attention", attention)
            model(z, torch.rand(2), context, torch.randn(2, 32))
        found = sd3_attention.attention_logits(model, seen)
        assert len(found) == len(given) == 2
        for logits, (q, k) in zip(found, given, strict=True):
            torch.testing.assert_close(logits, q[:, :, -16:] @ k.transpose(2, 3) / 8)
        assert not any(m._forward_hooks for m in model.modules())


def test_largest_and_entropy():
    """Even attention has entropy 1, to a single token 0; the largest is so by its size."""
    even, single = torch.zeros(1, 1, 2, 5), torch.zeros(1, 1, 2, 5)
    single[..., 3] = -1000.0
    single[..., 4] = 200.0
    assert sd3_attention.largest_and_entropy([even]) == (0, pytest.approx(1))
    assert sd3_attention.largest_and_entropy([even, single]) == (1000, pytest.approx(0.5))


def test_norm_runs_once_for_both(tiny_run, out):
    results = quickly("x-sd3-qk-norm", out, tiny_run)
    assert quickly("x-sd3-qk-norm-bf16", out, tiny_run) == results
    arms = results["arms"]
    assert list(arms) == [f"{p}, {n}" for p in ("float32", "bfloat16") for n in ("with", "without")]
    for one in arms.values():
        assert one["steps"] == [1, 2, 3, 4] and len(one["loss"]) == 2
        assert [len(series) for series in one["largest"]] == [4, 4]
        assert all(0 < x <= 1 for series in one["entropy"] for x in series)
    assert len({one["largest"][0][-1] for one in arms.values()}) == 4  # each arm is its own
    assert results["training_seconds"] > 0


# --- straight paths -----------------------------------------------------------------------------


def test_scales():
    """Of data and noise with deviation 1, diffusion's has 1 all along; EDM's keeps the image."""
    t = torch.tensor([0.2, 0.5, 0.8])
    rf, eps, v, edm = map(sd3_straightness.own_scale, ("rf", "eps/linear", "v/cos", "edm(0, 0.6)"))
    assert (rf(t) == 1).all() and torch.equal(eps(t), v(t))
    torch.testing.assert_close(v(t) ** 2, 1 / (t**2 + (1 - t) ** 2))
    torch.testing.assert_close(edm(t) * (1 - t), torch.ones(3))


def test_lines_are_followed_exactly():
    """To a single point trajectories are lines, and Euler's end points right, whatever the steps;
    drawn to unit variance the line is an arc."""

    def velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (z - point) / t

    point, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    for name in sd3_straightness.FORMULATIONS_COMPARED:
        ratio, errors = sd3_straightness.straightness_and_errors(name, velocity, noise, 100)
        assert max(errors) < 1e-3
        if name in ("rf", "edm(0, 0.6)"):
            assert ratio == pytest.approx(1, abs=1e-3)
        if name in ("eps/linear", "v/cos"):
            assert 1.02 < ratio < 1.6


def test_trajectories_start_where_the_steps_do():
    given = []

    def velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        given.append((z, t))
        return torch.ones_like(z)

    noise = torch.ones(2, 3)
    sd3_straightness.straightness_and_errors("eps/linear", velocity, noise, 4)
    first = FORMULATIONS["eps/linear"].steps(4)[0]
    torch.testing.assert_close(given[0][0], first * noise)
    assert given[0][1] == first < 0.95


def test_following_runs_once_for_both(tiny_run, out):
    results = quickly("x-sd3-straight", out, tiny_run)
    assert quickly("x-sd3-straight-steps", out, tiny_run) == results
    for field in ("exact", "trained"):
        lengths, errors = results["lengths"][field], results["errors"][field]
        assert list(lengths) == list(errors) == list(sd3_straightness.FORMULATIONS_COMPARED)
        assert all(len(each) == 2 and min(each) > 0.999 for each in lengths.values())
        assert all([len(row) for row in rows] == [2] * 4 for rows in errors.values())
    for one, other in (("rf", "v/cos"), ("eps/linear", "edm(0, 0.6)")):  # steps of their own
        exact = results["errors"]["exact"]
        assert exact[one] != exact[other]
