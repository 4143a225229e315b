"""Original captions, rich ones, and half of each: what is with_kind, rules, and that it runs."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import sd3_captions
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.sd3_captions import CAPTION_ARMS, CAPTION_SCORES, share_followed, with_kind
from nanosd3.cli import run_main
from nanosd3.config import CONFIGS
from nanosd3.data.mnist import load_images, plain_captions
from nanosd3.data.sources import Digits
from nanosd3.training.report import SLANT_WORDS, WEIGHT_WORDS

NAMES = ("x-sd3-captions", "x-sd3-captions-rich")


# --- captions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> Digits:
    return Digits(load_images().first(300, 60), CONFIGS["tiny"])


def drawn_texts(source: Digits) -> list[set[str]]:
    """All captions that each image can get."""
    n = torch.arange(source.count)
    drawn = [source.captions(n, torch.full((len(n),), (k + 0.5) / 360)) for k in range(360)]
    return [{source.texts[i] for i in row} for row in torch.stack(drawn, 1).tolist()]


def test_kinds_of_captions(source):
    """Each kind alone has exactly the captions of its kind, and every image keeps all of them."""
    words = {text for c in range(10) for text in plain_captions(source.images.names, c)}
    whole = drawn_texts(source)
    original, rich = (drawn_texts(with_kind(source, kind)) for kind in sd3_captions.CAPTION_KINDS)
    for i, (everything, plain, described) in enumerate(zip(whole, original, rich, strict=True)):
        assert (
            plain
            == everything & words
            == set(plain_captions(source.images.names, int(source.labels[i])))
        )
        assert described == everything - words
        for text in described:
            assert any(word in text for word in (*WEIGHT_WORDS, *SLANT_WORDS)), text
    weights = source.weight[:300].unique().tolist()
    assert weights == [0, 1, 2]  # medium strokes, too, have a choice of their own length


def test_half_of_each(source):
    """The mix is the main job's own captions, half of which are rich."""
    assert with_kind(source, "half of each") is source
    words = {text for c in range(10) for text in plain_captions(source.images.names, c)}
    n, steps = torch.arange(200), 36
    u = torch.arange(steps).repeat_interleave(200).add(0.5) / steps
    texts = [source.texts[i] for i in source.captions(n.repeat(steps), u).tolist()]
    assert sum(text in words for text in texts) / len(texts) == pytest.approx(0.5, abs=0.03)


def test_told_leaves_the_source_alone(source):
    before = source.described.captions.choices.clone()
    other = with_kind(source, "rich")
    assert source.described.captions.choices.equal(before)
    assert other.texts is source.texts and other.key(3) == source.key(3)  # one cache for all


# --- rules ----------------------------------------------------------------------------------------


def made_up(
    original: float, mixed: float, rich: float, seeds: int = 3, wobble: float = 0.0
) -> dict:
    """Scores whose digits and attributes are equal; those of the mix vary over seeds by `wobble`
    up and down, and those of the others do not."""
    moves = [wobble * k for k in (-1, 0, 1)][:seeds]
    shares = zip(CAPTION_ARMS, (original, mixed, rich), (0, 1, 0), strict=True)
    return {"scores": {arm: {key: [share + varies * m for m in moves] for key in CAPTION_SCORES}
                       for arm, share, varies in shares}}  # fmt: skip


@pytest.mark.parametrize(
    ("results", "against_original", "against_rich"),
    [
        (made_up(0.6, 0.9, 0.8), "supported", "supported"),
        (made_up(0.6, 0.9, 0.95), "supported", "refuted"),
        (made_up(0.95, 0.9, 0.6), "refuted", "supported"),
        (made_up(0.6, 0.9, 0.895), "supported", "undecided"),  # less than a point
        (made_up(0.6, 0.9, 0.905), "supported", "undecided"),
        (made_up(0.88, 0.9, 0.92, wobble=0.03), "undecided", "undecided"),  # within the spread
        (made_up(0.88, 0.9, 0.92, wobble=0.015), "supported", "refuted"),
        (made_up(0.6, 0.9, 0.8, seeds=1), "undecided", "undecided"),
    ],
)
def test_rules(results, against_original, against_rich):
    found = [EXPERIMENTS[name].decide(results) for name in NAMES]
    assert found == [against_original, against_rich]


def test_followed_counts_both_alike():
    scores = {key: [9.0] for key in CAPTION_SCORES}
    scores |= {"word: digit": [1.0, 0.5], "rich: attributes": [0.4, 0.5]}
    assert share_followed(scores) == pytest.approx([0.7, 0.5])


# --- it runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where texts and images are encoded once for all tests here."""
    return tmp_path_factory.mktemp("out")


def test_runs(tiny_run, out):
    for name in NAMES:
        words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "1", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / "fast" / f"{name}.png").stat().st_size > 5000
    first, second = (
        json.loads((out / "fast" / f"{name}.json").read_text())["results"] for name in NAMES
    )
    assert first == second  # the same networks and scores
    assert list(first["scores"]) == list(CAPTION_ARMS)
    networks = sorted(path.name for path in (out / "fast" / "networks").iterdir())
    assert len(networks) == 3
    for one in first["scores"].values():
        assert list(one) == list(CAPTION_SCORES)
        assert all(0 <= share <= 1 for key in CAPTION_SCORES[:3] for share in one[key])
    losses = [last_loss(out / "fast" / "networks" / name) for name in networks]
    assert len(set(losses)) == 3  # other captions, other losses
    assert all(len(row) == len(first["table"]["columns"]) for row in first["table"]["rows"])


def last_loss(folder) -> float:
    """Of training; at the first step the velocity is zero, whatever the text."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry][-1]


def test_scores_are_of_what_was_asked(tiny_run, out, monkeypatch):
    """Real digits in place of samples: all right, for prompts of both kinds."""
    from nanosd3.claims.experiment import Conditions
    from nanosd3.claims.runs import open_encoded
    from nanosd3.claims.sd3_variants import Variant, trained_variant
    from nanosd3.pipeline import Pipeline
    from nanosd3.training.evaluation import draw_prompts

    conditions = Conditions((0,), True, Path(tiny_run), out)
    finished, features = open_encoded(conditions)
    variant = Variant(1, data="captions-half-of-each", steps=sd3_captions.CAPTION_STEPS)
    network = trained_variant(conditions, finished, features, variant, 0)
    monkeypatch.setattr(finished.scorer, "score", lambda digits, draw: (0.75, 2 * floor(draw)))
    floor, asked = finished.scorer.floor, []

    def real(self, prompts, seed, steps):
        kind = sd3_captions.CAPTION_KINDS[len(asked)]
        asked.append((seed, steps))
        draw = draw_prompts(with_kind(finished.source, kind), 40, seed)
        assert draw.prompts == prompts
        return finished.source.images.train_images[draw.chosen].numpy()

    monkeypatch.setattr(Pipeline, "__call__", real)
    scores = sd3_captions.prompt_scores(finished, network, 3, 40)
    assert asked == [(103, 8), (103, 8)]
    expected = {"word: digit": 0.75, "rich: digit": 0.75, "rich: attributes": 1.0, "ratio": 2.0}
    assert scores == pytest.approx(expected)
