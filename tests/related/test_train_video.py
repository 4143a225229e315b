"""The command `python -m nanosd3.related video`, on a tiny run, and its --sample."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.commands import refused, status
from support.interruptions import interrupted_after

from nanosd3.config_types import Sampling
from nanosd3.flow import flow_loss, shift
from nanosd3.random_streams import rng
from nanosd3.related import __main__ as related
from nanosd3.related import command as related_command
from nanosd3.related import video_system
from nanosd3.related.finished_run import open_finished_run
from nanosd3.related.moving_digits import MovingDigits, velocities
from nanosd3.related.train_video import (
    CLIP_SIZES,
    FRAMES_IN_PATCH,
    EncodedCaptions,
    decode_frames,
    encode_captions,
    encode_frames,
    encoded_clips,
    encoders_of,
    first_network,
    sample_video,
    video_step,
)
from nanosd3.related.video import VideoMMDiT, inflated
from nanosd3.related.video_system import VideoSystem
from nanosd3.storage.run import Run
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job

command = partial(status, related.main, "video")


@pytest.fixture(scope="module")
def finished(tiny_run):
    return open_finished_run(tiny_run, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def video_run(tiny_run, tmp_path_factory):
    """A tiny video model, interrupted after its third step and resumed."""
    out = tmp_path_factory.mktemp("related") / "video"
    with interrupted_after(2):
        assert command("--run", tiny_run, "--out", out) == 130
    assert not (out / "video.safetensors").exists() and list(out.glob("state-*"))
    assert len(list((out / "cache").glob("clips-*"))) == len(set(CLIP_SIZES))
    assert command("--run", tiny_run, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def moving(finished) -> MovingDigits:
    return MovingDigits(finished.source, CLIP_SIZES[0])


@pytest.fixture
def job(video_run, finished, tmp_path) -> Job:
    system = VideoSystem()
    args = related_command.parse(system, ["--run", str(finished.run.folder)])
    run = Run.read(shutil.copytree(video_run, tmp_path / "run"))
    return Job(run, system.config(args, finished), finished.source, torch.device("cpu"), 0)


def lively(job) -> VideoMMDiT:
    torch.manual_seed(0)
    network = VideoMMDiT(job.config.mmdit, FRAMES_IN_PATCH)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter)
    return network.eval()


# --- frames and captions --------------------------------------------------------------------------


@torch.no_grad()
def test_frames_go_through_the_autoencoder_one_by_one(finished, moving):
    vae = finished.pipeline.vae
    videos = moving.videos(moving.draw_clips(3, torch.Generator().manual_seed(0)), (4, 24, 32))
    latents = encode_frames(vae, videos)
    assert latents.shape == (3, 4, 4, 6, 8)
    for k in range(4):
        mean, _ = vae.encode(videos[:, :, k])
        torch.testing.assert_close(latents[:, :, k], vae.normalise(mean), atol=1e-4, rtol=1e-4)
    decoded = decode_frames(vae, latents)
    expected = vae.decode(vae.denormalise(latents[:, :, 2])).clamp(-1, 1)
    torch.testing.assert_close(decoded[:, :, 2], expected, atol=1e-4, rtol=1e-4)


def test_captions_are_encoded_by_the_run_s_own_encoders(job, moving, video_run, finished):
    """No word is cut off, and every caption differs; without text there are zeros."""
    pipeline = encoders_of(job.run, job.config, job.device)
    assert not pipeline.text.truncated(moving.texts)
    assert finished.pipeline.text.truncated(moving.texts)
    captions = encode_captions(pipeline.text, moving)
    assert len(captions.pooled) == len(moving.texts) + 1
    assert torch.pdist(captions.pooled).min() > 1e-4
    assert not captions.none(2)[0].any() and captions.none(2)[0].shape[0] == 2
    context, pooled = pipeline.encode_text([moving.texts[7]])
    torch.testing.assert_close(captions.of(torch.tensor([7])), (context, pooled))


# --- a training step ------------------------------------------------------------------------------


@pytest.fixture
def encoded(job, moving, finished):
    return {s: encoded_clips(job, moving, finished.pipeline.vae, s, 16) for s in set(CLIP_SIZES)}


class Recorder:
    """A network that answers 1 everywhere, and notes what it is asked."""

    frames = FRAMES_IN_PATCH

    def __init__(self):
        self.asked = []

    def __call__(self, z, t, context, pooled):
        self.asked.append((z, t, pooled))
        return torch.ones_like(z)


def numbered(moving) -> EncodedCaptions:
    """Texts that say their number."""
    number = torch.cat([torch.arange(len(moving.texts)) + 1.0, torch.zeros(1)])
    return EncodedCaptions(number[:, None, None].expand(-1, 2, 3), number[:, None].expand(-1, 3))


def test_a_step(job, moving, encoded):
    """The loss is that of clips, captions, noise and times that belong together."""
    size, model, rows = CLIP_SIZES[3], Recorder(), StepRNG((0, "video", 3), range(4))
    clips, latents = encoded[size]
    found = video_step(job, moving, encoded, numbered(moving), model, rows)
    z, t, text = model.asked[0]
    noise, s = rows.noise(z.shape[1:]), t.view(-1, 1, 1, 1, 1)
    x0 = (z - s * noise) / (1 - s)
    torch.testing.assert_close(found, flow_loss(torch.ones_like(z), x0, noise), rtol=1e-3, atol=0)
    labels = moving.digits.labels
    for mine, number in zip(x0, text[:, 0].int().tolist(), strict=True):
        nearest = (latents.float() - mine).flatten(1).norm(dim=1)
        assert nearest.min() < 0.05
        i = nearest.argmin()
        if number:  # not dropped
            words = moving.texts[number - 1].split()
            assert words[1] in moving.names[int(labels[clips.digits[i]])]
            motion = torch.tensor(int(clips.motion[i]))
            assert moving.texts[number - 1].endswith(
                moving.texts[moving.numbers[0, moving.names[0][0], int(motion)]].split("zero")[1]
            )


def test_sizes_take_turns_and_text_is_dropped(job, moving, encoded):
    model = Recorder()
    for step in range(120):
        rows = StepRNG((0, "video", step), range(4))
        video_step(job, moving, encoded, numbered(moving), model, rows)
    for step, (z, _, _) in enumerate(model.asked):
        frames, height, width = CLIP_SIZES[step % len(CLIP_SIZES)]
        expected = (max(frames, FRAMES_IN_PATCH), height // 4, width // 4)
        assert z.shape[2:] == expected
        if frames == 1:  # a picture stands still, under its noise
            t = model.asked[step][1].view(-1, 1, 1, 1, 1)
            clean = (z - t * StepRNG((0, "video", step), range(4)).noise(z.shape[1:])) / (1 - t)
            torch.testing.assert_close(clean[:, :, 0], clean[:, :, 1], atol=1e-2, rtol=1e-2)
    dropped = torch.cat([text[:, 0] == 0 for _, _, text in model.asked])
    assert 0.05 < dropped.float().mean() < 0.16


def test_longer_clips_get_more_noise(job, moving, encoded):
    """The median of t is the recipe's, moved by the root of the number of pixels."""
    model = Recorder()
    for step in range(300):
        rows = StepRNG((0, "video", step), range(4))
        video_step(job, moving, encoded, numbered(moving), model, rows)
    for k, (frames, height, width) in enumerate(CLIP_SIZES):
        t = torch.cat([asked[1] for asked in model.asked[k :: len(CLIP_SIZES)]])
        expected = job.training.time_mean + math.log(frames * height * width / 1024) / 2
        assert (t / (1 - t)).log().median().item() == pytest.approx(expected, abs=0.15)


def test_rows_of_a_microbatch(job, moving, encoded):
    network, captions = Recorder(), numbered(moving)
    whole, half = (
        video_step(job, moving, encoded, captions, network, StepRNG((0, "video", 1), rows))
        for rows in (range(4), range(2, 4))
    )
    torch.testing.assert_close(half, whole[2:])


def test_pictures_stand_still(encoded):
    """Also in their captions; all other clips move."""
    for size, (clips, _) in encoded.items():
        moves = velocities(clips.motion).any(1)
        assert moves.all() if size[0] > 1 else not moves.any()


def test_clips_are_encoded_once(job, moving, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(job.run, "folder", tmp_path)
    vae, size = finished.pipeline.vae, (4, 32, 32)
    clips, latents = encoded_clips(job, moving, vae, size, 6)
    expected = encode_frames(vae, moving.videos(clips, size))
    torch.testing.assert_close(latents.float(), expected, atol=2e-2, rtol=1e-2)
    again, same = encoded_clips(job, moving, None, size, 6)
    assert torch.equal(same, latents) and torch.equal(again.digits, clips.digits)


def test_training_starts_from_the_transformer_for_images(job, finished):
    """But what reads the text is new, and depends on the seed."""
    images = finished.pipeline.mmdit
    network, other = first_network(job, images), first_network(replace(job, seed=1), images)
    known = inflated(images.state_dict(), FRAMES_IN_PATCH)
    for key, found in network.state_dict().items():
        if key.startswith(("context_embedder", "y_embedder")):
            same = torch.equal(found, other.state_dict()[key])
            assert same == key.endswith("bias") and (same or not torch.equal(found, known[key]))
        else:
            assert torch.equal(found, known[key]), key


# --- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_follow_the_guided_velocity(job, finished, monkeypatch):
    """Euler's steps towards the text and away from none; in batches, each clip its noise."""
    network, vae = lively(job), finished.pipeline.vae
    way = replace(job.config, sampling=Sampling(3, 1.7, 1.0, "euler"))
    config = job.config.mmdit
    text = torch.randn(3, 5, config.context_dim), torch.randn(3, config.pooled_dim)
    none = tuple(torch.zeros_like(x) for x in text)
    size = (4, 24, 32)
    noise = [torch.randn(4, 4, 6, 8, generator=rng(9, "video", i)) for i in range(3)]
    z = torch.stack(noise)
    times = shift(torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]), 3**0.5)  # 3 times as many pixels
    for t, after in pairwise(times):
        told, untold = (network(z, t, *x) for x in (text, none))
        z = z + (after - t) * (untold + 1.7 * (told - untold))
    found = sample_video(network, vae, text, none, size, way, 9)
    assert found.shape == (3, 1, *size)
    torch.testing.assert_close(found, decode_frames(vae, z), atol=1e-3, rtol=1e-3)
    monkeypatch.setattr("nanosd3.related.train_video.CLIPS_AT_ONCE", 2)
    torch.testing.assert_close(
        sample_video(network, vae, text, none, size, way, 9), found, atol=1e-3, rtol=1e-3
    )
    picture = sample_video(network, vae, text, none, (1, 24, 32), way, 9)
    assert picture.shape == (3, 1, 1, 24, 32)


# --- the command ----------------------------------------------------------------------------------


def quick(monkeypatch):
    """Leave scores and pictures out."""
    scores = {"prompt_accuracy": 0.0, "direction": 0.0, "line_r2": 0.0}
    monkeypatch.setattr(video_system, "scores_of_size", lambda *_: scores)
    monkeypatch.setattr(video_system, "draw_strips", lambda *_: None)
    main = {"evaluations": 1, "prompt_accuracy": 0.0, "frechet_ratio_to_real": 0.0}
    monkeypatch.setattr(related_command, "pipeline_scores", lambda *_: main)


def test_resumed_byte_for_byte(video_run, tiny_run, tmp_path, monkeypatch):
    quick(monkeypatch)
    assert command("--run", tiny_run, "--out", tmp_path / "b") == 0
    for name in ("video", "text", "clip", "t5", "autoencoder"):
        whole = (tmp_path / "b" / f"{name}.safetensors").read_bytes()
        assert whole == (video_run / f"{name}.safetensors").read_bytes(), name


def test_what_a_run_leaves(video_run, tiny_run):
    metrics = json.loads((video_run / "metrics.json").read_text())
    assert metrics["system"] == "video" and metrics["evaluations"] == 50  # 25, guided
    assert list(metrics["by_size"]) == ["8x32x32", "8x32x48", "12x32x32"]
    for scores in (metrics, *metrics["by_size"].values()):
        for key in ("prompt_accuracy", "direction", "speed", "same_digit_in_all_frames"):
            assert 0 <= scores[key] <= 1
        assert scores["frechet_ratio_to_real"] > 0 and scores["line_r2"] <= 1
        assert scores["real"]["direction"] > 0.8
    seconds = [metrics["stages"][name]["seconds"] for name in ("clip", "t5", "video")]
    assert metrics["training_seconds"] == pytest.approx(sum(seconds)) and min(seconds) > 0
    picture = Image.open(video_run / "samples.png")
    assert picture.width > 1.5 * picture.height and not (video_run / "cache").exists()
    own, theirs = (load_file(folder / "text.safetensors") for folder in (video_run, tiny_run))
    assert any(not torch.equal(own[key], theirs[key]) for key in own)


def sample(video_run, tiny_run, out, *options) -> int:
    return command("--sample", "a seven moving left", "--model", video_run, "--run", tiny_run,
                   "--out", out, *options)  # fmt: skip


def test_samples(video_run, tiny_run, tmp_path):
    """Every option changes what is drawn, and the file shows it."""
    drawn = {}
    for name, options in {
        "plain": (),
        "frames": ("--frames", 4),
        "height": ("--height", 24),
        "width": ("--width", 40),
        "seed": ("--seed", 1),
        "steps": ("--steps", 2),
        "guidance": ("--guidance", 4),
        "count": ("--count", 2),
    }.items():
        out = tmp_path / f"{name}.npy"
        assert sample(video_run, tiny_run, out, *options) == 0
        drawn[name] = np.load(out)
    plain = drawn.pop("plain")
    assert plain.shape == (1, 8, 32, 32) and plain.dtype == np.uint8
    shapes = {name: x.shape for name, x in drawn.items() if x.shape != plain.shape}
    assert shapes == {
        "frames": (1, 4, 32, 32),
        "height": (1, 8, 24, 32),
        "width": (1, 8, 32, 40),
        "count": (2, 8, 32, 32),
    }
    first, second = drawn["count"].astype(int)
    assert np.abs(first - plain[0]).max() <= 1 and (second != plain[0]).any()
    for name in ("seed", "steps", "guidance"):
        assert (drawn[name] != plain).any(), name


def test_any_number_of_frames(video_run, tiny_run, tmp_path):
    """The frames of the last patch that are not asked for are cut off."""
    clips = {}
    for frames in (3, 4, 7, 8, 9):
        assert sample(video_run, tiny_run, tmp_path / "x.npy", "--frames", frames) == 0
        clips[frames] = np.load(tmp_path / "x.npy")
        assert clips[frames].shape == (1, frames, 32, 32)
    for frames in (3, 7):
        assert (clips[frames] == clips[frames + 1][:, :frames]).all()
    assert (clips[9][:, :8] != clips[8]).any()  # five patches


def test_a_run_keeps_its_patches(video_run, tiny_run, tmp_path, capsys):
    """Their length is in run.json, not in this version's recipe; a damaged one is refused."""
    run = shutil.copytree(video_run, tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    config = tmp_path / "run" / "run.json"
    assert content["frames_in_patch"] == FRAMES_IN_PATCH
    content["frames_in_patch"] = FRAMES_IN_PATCH * 2
    config.write_text(json.dumps(content))
    options = ("video", "--sample", "7", "--model", run, "--run", tiny_run, "--out")
    assert "x_embedder" in refused(capsys, related.main, *options, tmp_path / "x.gif")
    content["frames_in_patch"] = "2"
    config.write_text(json.dumps(content))
    assert "damaged: no size" in refused(capsys, related.main, *options, tmp_path / "x.gif")


def test_what_is_not_understood_is_said(capsys, video_run, tiny_run, tmp_path):
    out = tmp_path / "x.npy"
    for prompt, said in (("a seven moving sideways", "sideways"), ("a seven moving left", "")):
        capsys.readouterr()
        options = ("--model", video_run, "--run", tiny_run, "--out", out)
        assert command("--sample", prompt, *options) == 0
        warned = capsys.readouterr().err
        assert ("warning: words that occur in no" in warned) == bool(said) and said in warned


def test_a_gif(video_run, tiny_run, tmp_path):
    """The frames in their order; of several clips, a captioned grid."""
    assert sample(video_run, tiny_run, tmp_path / "a.npy", "--frames", 6) == 0
    assert sample(video_run, tiny_run, tmp_path / "a.gif", "--frames", 6) == 0
    frames = np.load(tmp_path / "a.npy")[0]
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.info["loop"] == 0
        for k in range(6):
            gif.seek(k)
            shown = np.asarray(gif.convert("L"))[::2, ::2].astype(int)
            assert np.abs(shown - frames[k]).mean() < 8
    assert sample(video_run, tiny_run, tmp_path / "b.gif", "--count", 3) == 0
    with Image.open(tmp_path / "b.gif") as gif:
        assert gif.n_frames == 8 and gif.width > 300


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", "65"), "--frames must be from 1 to 64, got 65"),
        (("--height", "30"), "--height must be a multiple of 8 up to 48, got 30"),
        (("--width", "56"), "--width must be a multiple of 8 up to 48, got 56"),
        (("--guidance", "0.5"), "--guidance must be a number from 1 up, got 0.5"),
        (("--guidance", "nan"), "--guidance must be a number from 1 up, got nan"),
        (("--lr", "1"), "--lr"),
        (("--fresh",), "--fresh"),
    ],
)
def test_bad_options_of_samples(capsys, video_run, tiny_run, tmp_path, options, words):
    out = tmp_path / "x.gif"
    arguments = ("video", "--sample", "7", "--model", video_run, "--run", tiny_run, "--out", out)
    assert words in refused(capsys, related.main, *arguments, *options)
    assert not out.exists()


def test_bad_files(capsys, video_run, tiny_run, tmp_path):
    base = ("video", "--sample", "7", "--run", tiny_run, "--out")
    line = refused(capsys, related.main, *base, tmp_path / "x.png", "--model", video_run)
    assert "must end in .gif or .npy" in line
    line = refused(capsys, related.main, *base, tmp_path / "x.gif", "--model", tiny_run)
    assert "is not a run of `python -m nanosd3.related video`" in line
    line = refused(capsys, related.main, "video", "--run", tiny_run, "--guidance", "0",
                   "--out", tmp_path / "new")  # fmt: skip
    assert "--guidance" in line and not (tmp_path / "new").exists()
