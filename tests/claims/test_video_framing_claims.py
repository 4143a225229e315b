"""Experiments on short clips: native frames against crops, and compute."""

import json
from pathlib import Path

import pytest
import torch

from nanosd3.claims import __main__ as command
from nanosd3.claims import video_framing, video_networks
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions
from nanosd3.claims.video_compute import TIMES_COMPUTE, ClipScorer
from nanosd3.claims.video_framing import (
    CROPPED,
    NATIVE,
    framing_of,
    real_border,
    share_at_border,
    times_as_often,
)
from nanosd3.claims.video_networks import SQUARE, WIDE, ClipTrainer, TrainedClips
from nanosd3.cli import run_main
from nanosd3.related.motion import clip_features, ink_at_border, scored_clips
from nanosd3.related.video_system import TrainedVideo
from nanosd3.storage.run import Run

# --- rules on made-up numbers -------------------------------------------------------------------


def framing(native, cropped) -> dict:
    return {"ways": {NATIVE: {"border": list(native)}, CROPPED: {"border": list(cropped)}}}


def compute(least, middle, most) -> dict:
    found = zip(TIMES_COMPUTE, (least, middle, most), strict=True)
    return {"compute": {str(times): {"distance": list(x)} for times, x in found}}


CASES = {
    "x-sora-2": [
        (framing((0.1, 0.1, 0.2), (0.2, 0.4, 0.41)), "supported"),
        (framing((0.1, 0.1, 0.2), (0.2, 0.4, 0.39)), "undecided"),
        (framing((0.1, 0.1, 0.2), (0.12, 0.05, 0.2)), "refuted"),
        (framing((0.1, 0.1, 0.2), (0.12, 0.05, 0.3)), "undecided"),
        (framing((0.0, 0.1), (0.2, 0.3)), "supported"),
        (framing((0.01, 0.0), (0.05, 0.06)), "undecided"),  # five times as often, of next to none
        (framing((0.1,), (0.5,)), "undecided"),
        (framing((0.1,), (0.1,)), "undecided"),
    ],
    "x-sora-3": [
        (compute((10, 11, 12), (7, 8, 8), (4, 5, 6)), "supported"),
        (compute((10, 11, 12), (7, 8, 8), (4, 5, 6.1)), "undecided"),  # more than half is left
        (compute((10, 11, 12), (4, 5, 5), (4, 4, 4.5)), "undecided"),  # within the spread
        (compute((10, 11, 12), (3, 4, 4), (4, 5, 5.5)), "refuted"),
        (compute((10, 11, 12), (9, 10, 11), (8.5, 9, 10)), "refuted"),  # hardly anything
        (compute((10, 11, 12), (9, 10, 11), (7.5, 9, 10)), "undecided"),
        (compute((10,), (7,), (4,)), "undecided"),
        (compute((10,), (7,), (9,)), "undecided"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rules_of_short_clips(name):
    for results, expected in CASES[name]:
        assert EXPERIMENTS[name].decide(results) == expected, (results, expected)
    assert {word for _, word in CASES[name]} == {"supported", "refuted", "undecided"}


def test_times_as_often():
    assert times_as_often(framing((0.1, 0.2), (0.3, 0.1))) == pytest.approx([3.0, 0.5])


# --- what is measured ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tiny_run, tmp_path_factory) -> ClipTrainer:
    out = tmp_path_factory.mktemp("trainer")
    return ClipTrainer(Conditions((0,), True, Path(tiny_run), out))


def clips_with(*places: tuple[int, int, int]) -> torch.Tensor:
    """A black clip for each place (frame, row, column), white there and grey where it is not."""
    videos = torch.full((len(places), 1, 3, 8, 10), -0.8)  # fainter than what is looked at
    for video, (t, y, x) in zip(videos, places, strict=True):
        video[0, t, y, x] = 1
    return videos


def test_ink_at_the_border():
    inside = ((0, 2, 2), (2, 5, 7), (1, 3, 5))
    outside = (
        (0, 0, 4),
        (2, 7, 4),
        (1, 3, 0),
        (2, 3, 9),
        (0, 1, 4),
        (2, 6, 4),
        (1, 3, 1),
        (2, 3, 8),
    )
    found = ink_at_border(clips_with(*inside, *outside)).tolist()
    assert found == [False] * 3 + [True] * 8


def test_what_clips_look_like_and_how_they_change(trainer):
    """The mean sees no order and no motion; the change is zero in a still picture."""
    moving, scorer = trainer.moving, trainer.finished.scorer
    videos = moving.videos(scored_clips(moving, SQUARE, 6), SQUARE)
    found = clip_features(scorer, videos)
    frames = torch.stack([scorer.classifier.features(videos[:, :, t]) for t in range(4)], dim=1)
    mean, change = found.chunk(2, dim=1)
    torch.testing.assert_close(mean, frames.mean(1), rtol=1e-4, atol=1e-5)
    steps = (frames[:, 1:] - frames[:, :-1]).abs().mean(1)
    torch.testing.assert_close(change, steps, rtol=1e-4, atol=1e-5)
    backwards = clip_features(scorer, videos.flip(2))
    torch.testing.assert_close(backwards, found, rtol=1e-4, atol=1e-5)
    still = clip_features(scorer, videos[:, :, :1].expand_as(videos))
    assert not still.chunk(2, dim=1)[1].any()
    wide = clip_features(scorer, moving.videos(scored_clips(moving, WIDE, 2), WIDE))
    assert wide.shape == (2, found.shape[1])


def test_known_clips_have_their_places(trainer):
    """Real clips are nearer to real ones than those that stand still or jump."""
    references = ClipScorer(trainer, 60).reference_distances()
    real, still, shuffled = references.values()
    assert real < still and real < shuffled
    assert ClipScorer(trainer, 60).reference_distances() == references


def test_crops_are_the_middle(trainer):
    clips = scored_clips(trainer.moving, SQUARE, 20)
    wide = trainer.moving.videos(clips, WIDE)
    assert torch.equal(trainer.cropped.videos(clips, SQUARE), wide[..., 8:40])
    assert torch.equal(trainer.cropped.videos(clips, WIDE), wide)
    assert trainer.cropped.texts == trainer.moving.texts
    cut, whole = (
        ink_at_border(moving.videos(scored_clips(moving, size, 1000, 1), size)).float().mean()
        for moving, size in ((trainer.cropped, SQUARE), (trainer.moving, WIDE))
    )
    assert cut > 2 * whole > 0


def test_real_clips_are_seen_through_the_autoencoder(trainer, monkeypatch):
    """One that is exact shows as many at the border as there are, one that draws nothing none."""
    moving, vae = trainer.cropped, trainer.finished.pipeline.vae
    monkeypatch.setattr(video_framing, "encode_frames", lambda _, videos: videos)
    monkeypatch.setattr(video_framing, "decode_frames", lambda _, latents: latents)
    real = share_at_border(moving.videos(scored_clips(moving, SQUARE, 50, 1), SQUARE))
    assert real_border(vae, moving, SQUARE, 50) == real > 0.2
    monkeypatch.setattr(video_framing, "decode_frames", lambda _, x: -torch.ones_like(x))
    assert real_border(vae, moving, SQUARE, 50) == 0


def test_crops_are_trained_on_as_cut_from_the_same_clips(trainer, monkeypatch):
    drawn = []
    encoded_clips = video_networks.encoded_clips
    monkeypatch.setattr(video_networks, "train_video", lambda *args: drawn.append(args[3]))
    monkeypatch.setattr(
        video_networks, "encoded_clips", lambda *args: (encoded_clips(*args)[0], args[3])
    )
    trainer.trained("native", trainer.moving, WIDE, 40, 0)
    trainer.trained("crops", trainer.cropped, SQUARE, 40, 0)
    trainer.trained("small", trainer.moving, SQUARE, 40, 0)
    (native, _), (crops, _), (small, _) = (clips for one in drawn for clips in one.values())
    assert torch.equal(native.start, crops.start) and torch.equal(native.digits, crops.digits)
    assert not torch.equal(small.start, crops.start)


def test_real_clips_in_place_of_samples(trainer, tmp_path, monkeypatch):
    """They reach the border as often as real ones; and are scores once."""
    asked = []

    def draw(self, clips, size, seed):
        asked.append(seed)
        return self.moving.videos(clips, size)

    monkeypatch.setattr(TrainedVideo, "draw", draw)
    found = {}
    for moving, size in ((trainer.moving, WIDE), (trainer.cropped, SQUARE)):
        video = TrainedVideo(None, None, trainer.captions, moving, trainer.config)
        network = TrainedClips(video, Run.open(tmp_path / f"{size}", {"seed": 5}))
        found[size] = framing_of(trainer, network, size, 200)
        assert framing_of(trainer, network, size, 200) == found[size]
    assert asked == [5, 5] and found[WIDE]["direction"] > 0.9
    for moving, size in ((trainer.moving, WIDE), (trainer.cropped, SQUARE)):
        real = (
            ink_at_border(moving.videos(scored_clips(moving, size, 1000, 1), size)).float().mean()
        )
        assert found[size]["border"] == pytest.approx(real.item(), abs=0.1)
    clip_scorer = ClipScorer(trainer, 60)
    network = TrainedClips(
        TrainedVideo(None, None, trainer.captions, trainer.moving, trainer.config),
        Run.open(tmp_path / "judged", {"seed": 6}),
    )
    scores = clip_scorer.scores(network)
    assert scores["direction"] > 0.9 and scores["line_r2"] > 0.9 and asked[-1] == 6
    assert scores["distance"] < clip_scorer.reference_distances()["real ones, standing still"]


# --- the experiments run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("clips")
    found = {}
    for name in CASES:
        words = [name, "--run", str(tiny_run), "--out", str(out), "--seeds", "1", "--fast"]
        assert run_main(lambda words=words: command.main(words)) == 0
        assert (out / "fast" / f"{name}.png").stat().st_size > 5000
        found[name] = json.loads((out / "fast" / f"{name}.json").read_text())["results"]
        table = found[name]["table"]
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    networks = sorted(path.name for path in (out / "fast" / "networks").iterdir())
    assert networks == [
        *("clip-texts-0", "clips-0", "compute-160-0", "compute-40-0", "compute-640-0"),
        *("cropped-clips-0", "framing-4x32x32-0", "framing-4x32x48-0"),
    ]  # the text encoders are trained once
    cached = sorted(path.name for path in (out / "fast" / "networks").glob("*/cache/*"))
    assert cached == [f"clips-4x32x{width}.safetensors" for width in (32, 32, 48)]
    return found


def test_framing_runs(results):
    ways = results["x-sora-2"]["ways"]
    assert [one["size"] for one in ways.values()] == ["4x32x48", "4x32x32"]
    for one in ways.values():
        for key in ("border", "digits", "direction", "elsewhere"):
            assert len(one[key]) == 1 and 0 <= one[key][0] <= 1
    assert all(0 <= one["real"] <= 1 for one in ways.values())
    assert results["x-sora-2"]["training_seconds"] > 0


def test_compute_runs(results):
    found = results["x-sora-3"]["compute"]
    assert list(found) == ["1", "4", "16"]
    distances = [one["distance"][0] for one in found.values()]
    assert len(set(distances)) == 3 and min(distances) > 0
    assert len(results["x-sora-3"]["landmarks"]) == 3
