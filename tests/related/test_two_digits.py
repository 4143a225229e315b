"""Clips of two digits: what is in them, their captions, and `video --two-digits` on a tiny run."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3.config import CONFIGS
from nanosd3.related import __main__ as related
from nanosd3.related.finished_run import open_finished_run
from nanosd3.related.moving_digits import MOTIONS, Clips, MovingDigits, velocities
from nanosd3.related.two_digits import PAIR_SIZES, MovingPairs, check_pairs, in_pairs, one_of
from nanosd3.text import Tokenizers

SIZE = (4, 48, 48)


@pytest.fixture(scope="module")
def finished(tiny_run):
    return open_finished_run(tiny_run, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def pairs(finished) -> MovingPairs:
    return MovingPairs(finished.source, SIZE)


# --- clips --------------------------------------------------------------------------------------


def test_both_digits_are_seen(pairs, finished):
    """Each where it would be alone; the brighter one where they overlap."""
    clips = pairs.draw_clips(30, torch.Generator().manual_seed(0))
    assert clips.digits.shape == clips.motion.shape == (30, 2) and clips.start.shape == (30, 2, 2)
    alone = MovingDigits(finished.source, SIZE)
    a, b = (alone.videos(Clips(clips.digits[:, k], clips.motion[:, k], clips.start[:, k]), SIZE)
            for k in (0, 1))  # fmt: skip
    assert torch.equal(pairs.videos(clips, SIZE), torch.maximum(a, b)) and not torch.equal(a, b)
    assert (clips.motion[:, 0] != clips.motion[:, 1]).any()
    some = pairs.videos(clips.at(slice(3, 5)), SIZE)
    assert torch.equal(some, torch.maximum(a, b)[3:5])
    still = pairs.draw_clips(9, torch.Generator(), moving=False)
    assert not velocities(still.motion.flatten()).any()


def test_pairs_are_neighbours_in_a_draw():
    clips = Clips(torch.arange(6), torch.arange(6) + 10, torch.arange(12.0).view(6, 2))
    both = in_pairs(clips)
    assert both.digits.tolist() == [[0, 1], [2, 3], [4, 5]]
    second = one_of(both, 1)
    assert second.digits.tolist() == [1, 3, 5] and second.motion.tolist() == [11, 13, 15]
    assert second.start.tolist() == [[2, 3], [6, 7], [10, 11]]


def test_captions_name_both(pairs, finished):
    assert len(set(pairs.texts)) == len(pairs.texts) == 400
    assert "a seven and an 8" in pairs.texts and "an 8 and a seven" in pairs.texts
    clips = pairs.draw_clips(300, torch.Generator().manual_seed(1))
    u, seen = torch.rand(300, generator=torch.Generator().manual_seed(2)), set()
    for i, digits in zip(pairs.captions_of(clips, u).tolist(), clips.digits, strict=True):
        first, second = pairs.texts[i].split(" and ")
        for words, image in zip((first, second), digits, strict=True):
            names = finished.source.images.names[int(finished.source.labels[image])]
            assert words.split()[1] in names
        seen.add((first.split()[1].isdigit(), second.split()[1].isdigit()))
    assert len(seen) == 4  # all ways to name two digits


def test_no_caption_is_cut_off(pairs):
    for name in ("tiny", "mnist"):
        config = CONFIGS[name].text
        words = Tokenizers.train(pairs.texts, config)
        assert max(len(words.bpe.encode(text)) for text in pairs.texts) <= config.clip_l.length
        assert max(len(words.unigram.encode(text)) for text in pairs.texts) <= config.t5.length


def test_as_a_source(pairs):
    """The same clip for the same image, with others for others; and a picture of it."""
    index = torch.tensor([5, 6, 5])
    clips = pairs.clips(index)
    assert clips.digits[:, 0].tolist() == [5, 6, 5]
    pictures = pairs.pixels(index)
    assert pictures.shape == (3, 1, 48, 48) and torch.equal(pictures[0], pictures[2])
    some = pairs.clips(torch.arange(60))
    assert some.digits[:, 1].unique().numel() > 20 and some.start.unique().numel() == 240
    assert some.motion.unique().numel() == len(MOTIONS)
    assert (some.motion[:, 0] != some.motion[:, 1]).float().mean() > 0.8
    u = torch.zeros(3)
    assert torch.equal(pairs.captions(index, u), pairs.captions_of(clips, u))
    assert pairs.fingerprint != MovingDigits(pairs.digits, SIZE).fingerprint


def test_frames_that_fit():
    """64 x 64 is the most that a finished mnist run has positions for."""
    main = CONFIGS["mnist"]
    check_pairs(PAIR_SIZES["mnist"][0], main)
    smaller = replace(main, mmdit=replace(main.mmdit, grid=7))
    with pytest.raises(Exception, match="has positions for 56x56"):
        check_pairs(PAIR_SIZES["mnist"][0], smaller)


# --- the command --------------------------------------------------------------------------------


command = partial(status, related.main, "video")


@pytest.fixture(scope="module")
def pair_run(tiny_run, tmp_path_factory):
    """A tiny model of pairs, interrupted after its third step and resumed."""
    out = tmp_path_factory.mktemp("related") / "pairs"
    words = ("--run", tiny_run, "--out", out, "--two-digits")
    with interrupted_after(2):
        assert command(*words) == 130
    cached = sorted(path.name for path in (out / "cache").glob("clips-*"))
    assert cached == ["clips-1x48x48.safetensors", "clips-4x48x48.safetensors"]
    assert command(*words) == 0
    return out


def test_a_run_of_pairs(pair_run, capsys):
    metrics = json.loads((pair_run / "metrics.json").read_text())
    assert list(metrics["by_size"]) == ["4x48x48"] and metrics["frechet_ratio_to_real"] > 0
    assert "direction" not in metrics and (pair_run / "video.safetensors").exists()
    picture = Image.open(pair_run / "samples.png")
    assert picture.width > 190 + 4 * 48


def test_samples_of_pairs(pair_run, tiny_run, tmp_path, capsys):
    """Of the size trained on, or another; words of motion are unknown to it."""

    def drawn(prompt: str, *words: object) -> np.ndarray:
        out = tmp_path / "x.npy"
        where = ("--model", pair_run, "--run", tiny_run, "--out", out)
        assert command("--sample", prompt, *where, *words) == 0
        return np.load(out)

    assert drawn("a seven and an 8").shape == (1, 4, 48, 48)
    assert "warning" not in capsys.readouterr().err
    assert drawn("a seven and an 8", "--frames", 6, "--width", 40).shape == (1, 6, 48, 40)
    assert drawn("a seven moving left").shape == (1, 4, 48, 48)
    assert "warning: words that occur in no training caption" in capsys.readouterr().err


def test_what_does_not_go_together(pair_run, tiny_run, tmp_path, capsys):
    def line(*words: object) -> str:
        return refused(capsys, related.main, "video", "--run", tiny_run, *words)

    out = tmp_path / "out"
    said = line("--two-digits", "--config", "mnist", "--out", out)
    assert "--two-digits: draws frames of 64x64 pixels, but the transformer of --run has" in said
    assert "48x48" in said and not out.exists()
    assert "two_digits" in line("--out", pair_run)
    said = line("--sample", "a 7 and a 1", "--two-digits", "--model", pair_run, "--out", out)
    assert "--two-digits" in said
