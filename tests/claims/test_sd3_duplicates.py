"""Repeated images: planted, found by features, drawn from memory; rules, and that it runs."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_duplicates
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.copy_detection import (
    TRAINED_FOR_IT,
    found_repeats,
    precision_and_recall,
    rare_distance,
    repeats,
)
from nanosd3.claims.repeated_digits import (
    Planted,
    RepeatedDigits,
    altered,
    nearness,
    plant,
    usual_nearness,
)
from nanosd3.claims.sd3_duplicates import WITH, WITHOUT
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.data.mnist import load_images
from nanosd3.data.sources import Digits

NAMES = ("x-sd3-duplicates", "x-sd3-duplicates-found")
COUNT, COPIES = 120, 5
PLAIN = COUNT + 10  # with the repeated images


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(whole(), 0, COUNT, COPIES)


def whole() -> Digits:
    return Digits(load_images().first(900, 200), CONFIGS["tiny"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- planted copies -------------------------------------------------------------------------------


def test_altered_by_a_pixel_and_a_fifth():
    """A dot tells where it went and how bright it is; nothing else changes."""
    dots = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    dots[:, 10, 20] = 100
    found = altered(dots, generator())
    assert found.shape == dots.shape and found.dtype == torch.uint8
    assert ((found > 0).sum((1, 2)) == 1).all()
    _, y, x = found.nonzero().unbind(1)
    assert set(y.tolist()) == {9, 10, 11} and set(x.tolist()) == {19, 20, 21}
    assert len(set(zip(y.tolist(), x.tolist(), strict=True))) == 9  # both axes on their own
    brightness = found.amax((1, 2))
    assert 80 <= brightness.min() < 84 and 116 < brightness.max() <= 120
    full = altered(dots.clamp(max=1) * 255, generator()).amax((1, 2))
    assert full.max() == 255 and (full == 255).float().mean() == pytest.approx(0.5, abs=0.05)


def test_planted(planted):
    """Digits zero to nine, bold and leaning left as no others are, then those others, then
    copies."""
    images, source = planted.images, whole()
    assert len(images.train_images) == len(images.train_labels) == PLAIN + 10 * COPIES
    assert planted.is_copy.tolist() == [False] * PLAIN + [True] * 10 * COPIES
    assert images.train_labels.equal(images.train_labels[planted.original])
    assert images.train_labels[:10].tolist() == list(range(10))
    numbers = {image.numpy().tobytes(): i for i, image in enumerate(source.images.train_images)}
    chosen = torch.tensor([numbers[x.numpy().tobytes()] for x in images.train_images[:PLAIN]])
    is_rare = (source.weight[chosen] == 2) & (source.slant[chosen] == 0)
    assert is_rare.tolist() == [True] * 10 + [False] * COUNT
    for label in range(10):
        cluster = planted.cluster(label)
        assert len(cluster) == COPIES + 1
        assert cluster[0].equal(images.train_images[label])
        ink = cluster.float().sum((1, 2))
        assert (ink / ink[0] - 1).abs().max() < 0.25
    assert plant(source, 1, COUNT, COPIES).images.fingerprint != images.fingerprint
    assert plant(source, 0, COUNT, COPIES).images.fingerprint == images.fingerprint


def test_captions_of_repeated_images(planted):
    """Theirs is theirs alone; all others keep their usual captions, but for that one."""
    everything = torch.ones(PLAIN + 10 * COPIES, dtype=torch.bool)
    source = RepeatedDigits(planted, CONFIGS["tiny"], everything)
    words = "zero one two three four five six seven eight nine".split()
    assert [source.texts[i] for i in source.own] == [f"a bold {x} leaning left" for x in words]
    others = [source.texts[i] for i in source.other]
    assert others == [f"an {x}" if x == "eight" else f"a {x}" for x in words]
    index, u = torch.arange(source.count).repeat_interleave(100), torch.rand(source.count * 100)
    drawn = source.captions(index, u).view(-1, 100)
    has_own = (drawn == source.own[source.labels][:, None]).all(1)
    assert has_own.nonzero()[:, 0].tolist() == [*range(10), *range(PLAIN, source.trained)]
    assert not torch.isin(drawn[~has_own], source.own).any()
    usual = super(RepeatedDigits, source).captions(index, u).view(-1, 100)
    same = drawn == usual
    assert same[~has_own].float().mean() > 0.9
    assert torch.isin(usual[~has_own], source.own).any()  # it would have been theirs
    assert torch.isin(drawn[~has_own][~same[~has_own]], source.other).all()


def test_left_out_images_are_not_drawn(planted):
    everything = torch.ones(PLAIN + 10 * COPIES, dtype=torch.bool)
    everyone, rest = (
        RepeatedDigits(planted, CONFIGS["tiny"], kept) for kept in (everything, ~planted.is_copy)
    )
    a, b = (source.draw(4000, generator(3)) for source in (everyone, rest))
    assert a.max() >= PLAIN > b.max()
    stays = a < PLAIN
    assert a[stays].equal(b[stays])  # everything else is as it was
    assert len(b[~stays].unique()) > PLAIN * 0.9
    assert [everyone.key(i) for i in range(9)] == [rest.key(i) for i in range(9)]  # one cache


# --- copies found, and copies drawn ---------------------------------------------------------------


def test_clusters_keep_their_first():
    """A chain is one cluster, whichever way its rows lie."""
    line = torch.tensor([[0.0], [9.0], [3.0], [2.0], [1.0], [20.0], [9.5]])
    assert repeats(line, 1.5).tolist() == [False, False, True, True, True, False, True]
    assert repeats(line, 0.7).tolist() == [False] * 6 + [True]
    assert not repeats(line, 0.5).any()  # nearer than the limit, not at it
    apart = torch.cat([torch.arange(100.0), torch.tensor([300.0, 300.5])])[:, None]
    assert rare_distance(apart) == pytest.approx(0.505, abs=0.01)  # two of 102 are so near


def test_precision_and_recall():
    is_copy = torch.tensor([False, False, True, True, True, True])
    left_out = torch.tensor([False, True, True, True, True, False])
    assert precision_and_recall(left_out, is_copy) == (0.75, 0.75)
    assert precision_and_recall(torch.zeros(6, dtype=torch.bool), is_copy) == (1.0, 0.0)
    first = torch.tensor([False, True, True, False, False, False])
    assert precision_and_recall(first, is_copy) == (0.5, 0.25)


def test_nearness(planted):
    images = planted.images
    copies, labels = images.train_images[PLAIN:], images.train_labels[PLAIN:]
    unseen = images.test_images[:100]
    assert nearness(copies, labels, planted, unseen).abs().max() == 0
    fresh = altered(images.train_images[:10], generator(9))
    near = nearness(fresh, torch.arange(10), planted, unseen)
    far = nearness(images.test_images[100:], images.test_labels[100:], planted, unseen)
    assert near.median() < 0.7 < far.median()
    assert nearness(fresh, torch.arange(10), planted, fresh).isinf().any()  # those of distance 0
    wrong = nearness(fresh, torch.arange(10).roll(1), planted, unseen)  # compared by class
    assert wrong.median() > 1
    x, k = images.test_images[150], int(images.test_labels[150])
    by_hand = [min(distance(x, y) for y in others) for others in (planted.cluster(k), unseen)]
    found = nearness(x[None], torch.tensor([k]), planted, unseen)
    assert found.item() == pytest.approx(by_hand[0] / by_hand[1], rel=1e-4)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).square().sum().sqrt())


def test_usual_nearness_is_rare(planted):
    images, limit = planted.images, usual_nearness(planted)
    ratios = nearness(
        images.test_images[1::2], images.test_labels[1::2], planted, images.test_images[::2]
    )
    assert (ratios < limit).sum() == 1  # of a hundred


# --- rules ----------------------------------------------------------------------------------------


def drawn(copied, clean) -> dict:
    return {"copies": {WITH: {"own": list(copied)}, WITHOUT: {"own": list(clean)}}}


def found(precision, recall) -> dict:
    return {"detection": {TRAINED_FOR_IT: {"precision": precision, "recall": recall}}}


@pytest.mark.parametrize(
    ("name", "results", "expected"),
    [
        (NAMES[0], drawn((0.5, 0.6, 0.4), (0.01, 0.02, 0.0)), "supported"),
        (NAMES[0], drawn((0.5, 0.6, 0.4), (0.01, 0.3, 0.0)), "undecided"),  # not three times
        (NAMES[0], drawn((0.5, 0.6, 0.04), (0.0, 0.0, 0.0)), "undecided"),  # fewer than 5%
        (NAMES[0], drawn((0.06, 0.9, 0.06), (0.0, 0.0, 0.0)), "undecided"),  # within the spread
        (NAMES[0], drawn((0.02, 0.03, 0.1), (0.01, 0.02, 0.09)), "refuted"),
        (NAMES[0], drawn((0.02, 0.03, 0.1), (0.01, 0.02, 0.07)), "undecided"),
        (NAMES[0], drawn((0.5,), (0.0,)), "undecided"),
        (NAMES[0], drawn((0.0,), (0.0,)), "undecided"),
        (NAMES[1], found([1.0, 0.96, 0.95], [0.95, 0.99, 1.0]), "supported"),
        (NAMES[1], found([1.0, 0.96, 0.94], [0.95, 0.99, 1.0]), "undecided"),
        (NAMES[1], found([1.0, 0.8, 0.8], [0.8, 0.99, 1.0]), "refuted"),
        (NAMES[1], found([1.0, 0.8, 0.9], [0.8, 0.99, 1.0]), "undecided"),
        (NAMES[1], found([1.0], [1.0]), "undecided"),
        (NAMES[1], found([0.5], [0.5]), "undecided"),
    ],
)
def test_rules(name, results, expected):
    assert EXPERIMENTS[name].decide(results) == expected


# --- it runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where texts and images are encoded once for all tests here."""
    return tmp_path_factory.mktemp("out")


def test_runs(tiny_run, out, monkeypatch):
    """With a detector that finds all copies, which are what the second network does not see."""
    kept = []

    def all_found(scorer, detector, planted):
        return planted.is_copy, found_repeats(scorer, detector, planted)[1]

    class Watched(RepeatedDigits):
        def __init__(self, planted, config, images):
            super().__init__(planted, config, images)
            kept.append(images)
            assert torch.equal(~images, planted.is_copy & (len(kept) % 2 == 0))

    monkeypatch.setattr(sd3_duplicates, "found_repeats", all_found)
    monkeypatch.setattr(sd3_duplicates, "RepeatedDigits", Watched)
    for name in NAMES:
        words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "1", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / "fast" / f"{name}.png").stat().st_size > 5000
    first, second = (
        json.loads((out / "fast" / f"{name}.json").read_text())["results"] for name in NAMES
    )
    assert first == second and len(kept) == 4  # nothing was trained twice
    networks = {path.name: path for path in (out / "fast" / "networks").iterdir()}
    assert set(networks) == {
        "copy-detector-0", "depth-1-with-repeats-0", "depth-1-repeats-left-out-0"
    }  # fmt: skip
    assert list(first["copies"]) == [WITH, WITHOUT]
    for one in first["copies"].values():
        assert all(0 <= share <= 1 for shares in one.values() for share in shares)
    assert list(first["pictures"]) == ["repeated image", WITH, WITHOUT]
    assert all(len(bytes.fromhex(x)) == 784 for row in first["pictures"].values() for x in row)
    assert all(len(row) == len(first["table"]["columns"]) for row in first["table"]["rows"])


def test_copies_are_counted(tiny_run, out, monkeypatch):
    """Repeated images in place of samples for their captions, unseen ones for the others."""
    from nanosd3.claims import sd3_variants
    from nanosd3.claims.experiment import Conditions
    from nanosd3.machine.distributed import SINGLE_PROCESS
    from nanosd3.pipeline import Pipeline
    from nanosd3.related.finished_run import open_finished_run
    from nanosd3.training.cached_features import encoded

    conditions = Conditions((0,), True, Path(tiny_run), out)
    finished = open_finished_run(conditions.run, None, torch.device("cpu"))
    planted = plant(finished.source, 0, 100, 3)
    source = RepeatedDigits(planted, finished.config, ~planted.is_copy)
    encoders = finished.encoders(finished.config)
    features = encoded(out / "cache", source, encoders, [], SINGLE_PROCESS)
    variant = sd3_variants.Variant(1, data="counted")
    network = sd3_variants.trained_variant(conditions, finished, features, variant, 0)
    asked = []

    def known(self, prompts, seed, steps):
        asked.append((prompts[0], prompts[2], len(prompts), seed, steps))
        if len(asked) == 1:
            return torch.cat([planted.cluster(c)[2:4] for c in range(10)]).numpy()
        return planted.images.test_images[:20].numpy()

    monkeypatch.setattr(Pipeline, "__call__", known)
    copies = sd3_duplicates.copies_drawn(finished, network, planted, 4, 2)
    assert asked[0] == ("a bold zero leaning left", "a bold one leaning left", 20, 104, 8)
    assert asked[1] == ("a zero", "a one", 20, 104, 8)
    assert copies["own"] == 1.0 and copies["other"] < 0.2
    five = planted.cluster(sd3_duplicates.SHOWN_DIGITS[3])[2]
    assert bytes.fromhex(copies["pictures"][3]) == five.numpy().tobytes()
