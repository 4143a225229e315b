"""Moving digits: where they are in every frame, what their captions say, and what is seen."""

import pytest
import torch

from nanosd3.related.finished_run import open_finished_run
from nanosd3.related.motion import (
    centres,
    fitted_motion,
    located_digits,
    measure_clips,
    motion_scores,
)
from nanosd3.related.moving_digits import (
    DIGIT_SIDE,
    MOTIONS,
    SPRITE,
    Clips,
    MovingDigits,
    bounced,
    caption,
    drawn_clips,
    long_exposure,
    paths,
    sprites,
    velocities,
)

SIZES = [(8, 32, 32), (8, 24, 40), (20, 64, 64), (4, 20, 24), (1, 32, 32)]


@pytest.fixture(scope="module")
def finished(tiny_run):
    return open_finished_run(tiny_run, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def moving(finished) -> MovingDigits:
    return MovingDigits(finished.source, SIZES[0])


def test_a_bounce_is_a_reflection():
    positions = torch.tensor([-3, -1, 0, 4, 5, 6, 9, 10, 11, 15])
    found = bounced(positions, torch.tensor(5))
    assert found.tolist() == [3, 1, 0, 4, 5, 4, 1, 0, 1, 5]
    assert not bounced(positions, torch.tensor(0)).any()  # no room at all


def test_directions_and_speeds():
    """Rows go down and columns to the right, in pixels a frame."""
    expected = {
        ("left", ", slowly"): [0, -1],
        ("right", ", fast"): [0, 3],
        ("up", ""): [-2, 0],
        ("down", ", slowly"): [1, 0],
    }
    for motion, velocity in expected.items():
        assert velocities(torch.tensor(MOTIONS.index(motion))).tolist() == velocity


def test_starts_are_all_from_which_the_way_fits():
    """7 steps of one pixel in a room of 12: from 0 to 5 forwards, from 7 to 12 back."""
    u = torch.linspace(0, 0.999, 200)[:, None].expand(-1, 2)
    for velocity, starts in ((1, range(6)), (-1, range(7, 13))):
        corners = paths(torch.tensor([0, velocity]).expand(200, 2), u, (8, 32, 32))
        assert corners[:, 0, 1].unique().tolist() == list(starts)
        assert corners[:, 0, 0].unique().tolist() == list(range(13))


@pytest.mark.parametrize("size", SIZES)
def test_a_path(size):
    """Inside the frame; at its speed, but where it bounces; and without a bounce if that can be."""
    generator = torch.Generator().manual_seed(0)
    motion = torch.randint(len(MOTIONS), (500,), generator=generator)
    velocity = velocities(motion)
    corners = paths(velocity, torch.rand(500, 2, generator=generator), size)
    assert corners.shape == (500, size[0], 2)
    room = torch.tensor(size[1:]) - SPRITE
    assert corners.min() >= 0 and (corners <= room).all()
    steps = corners.diff(dim=1)
    assert (steps.abs() <= velocity.abs()[:, None]).all()
    fits = (velocity.abs() * (size[0] - 1) <= room).all(1)
    assert (steps[fits] == velocity[fits, None]).all()
    if size[0] > 1 and (~fits).any():  # it sets off as the caption says
        first = steps[~fits, 0]
        moves = (room >= velocity.abs())[~fits].all(1)
        assert (first[moves] == velocity[~fits][moves]).all()
    if (room > 4).all() and size[0] == 8:  # starts are spread over all there are
        across = corners[velocity[:, 0] == 0][:, 0, 0]
        assert across.unique().numel() == room[0] + 1


def test_a_frame_shows_the_sprite_where_it_is():
    ink = torch.rand(3, SPRITE, SPRITE)
    corners = torch.randint(9, (3, 4, 2))
    videos = drawn_clips(ink, corners, (4, 28, 29))
    assert videos.shape == (3, 1, 4, 28, 29)
    for b in range(3):
        for t in range(4):
            y, x = corners[b, t].tolist()
            frame = videos[b, 0, t] / 2 + 0.5
            torch.testing.assert_close(frame[y : y + SPRITE, x : x + SPRITE], ink[b])
            assert frame.sum() == pytest.approx(ink[b].sum().item(), rel=1e-4)


def test_sprites_keep_the_ink(finished):
    images = finished.source.images.test_images
    ink = sprites(images)
    kept = ink.sum((1, 2)) / (images.float().sum((1, 2)) / 255 * (DIGIT_SIDE / 28) ** 2)
    assert kept.mean() > 0.98 and 0.85 < kept.min() and kept.max() < 1.05  # wide ones lose a tip


def test_captions(moving, finished):
    assert caption("seven", MOTIONS.index(("left", ", fast"))) == "a seven moving left, fast"
    assert caption("8", MOTIONS.index(("up", ""))) == "an 8 moving up"
    assert caption("eight", len(MOTIONS)) == "an eight"
    assert len(set(moving.texts)) == len(moving.texts) == 20 * 13
    clips = moving.draw_clips(200, torch.Generator().manual_seed(1))
    index = moving.captions_of(clips, torch.linspace(0, 0.999, 200))
    for i, image, motion in zip(index.tolist(), clips.digits, clips.motion, strict=True):
        names = finished.source.images.names[int(finished.source.labels[image])]
        direction, speed = MOTIONS[motion]
        words = moving.texts[i]
        assert words.split()[1] in names and f"moving {direction}{speed}" in words
        assert words.endswith(speed)
    assert {moving.texts[i].split()[1] for i in index.tolist()} >= {"seven", "7", "zero", "0"}
    still = moving.draw_clips(9, torch.Generator(), moving=False)
    assert not velocities(still.motion).any()


def test_the_pictures_that_clip_sees(moving):
    """As a Source: the same clip for the same image, and later frames brighter."""
    index = torch.tensor([5, 6, 5])
    pictures, u = moving.pixels(index), torch.zeros(3)
    assert pictures.shape == (3, 1, 32, 32) and pictures.min() == -1 and pictures.max() <= 1
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])
    assert moving.captions(index, u).tolist()[0] == moving.captions(index[:1], u[:1]).item()
    clips = moving.clips(index)
    assert torch.equal(moving.captions(index, u), moving.captions_of(clips, u))
    some = moving.clips(torch.arange(40))
    assert some.motion.unique().numel() > 8 and some.start.unique().numel() == 80
    video = -torch.ones(1, 1, 4, 2, 2)
    video[0, 0, 1, 0, 0] = video[0, 0, 3, 1, 1] = 1
    assert long_exposure(video)[0, 0].tolist() == [[0, -1], [-1, 1]]


# --- what is seen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 32, 32), (8, 24, 40), (12, 32, 48)])
def test_real_clips_are_seen_as_they_are(moving, finished, size):
    clips = moving.draw_clips(60, torch.Generator().manual_seed(2))
    videos = moving.videos(clips, size)
    corners = paths(velocities(clips.motion), clips.start, size)
    found = centres(videos[:, 0] / 2 + 0.5)
    middle = moving.ink[clips.digits]
    own = centres(middle[:, None])[:, 0]
    torch.testing.assert_close(found, corners + own[:, None], atol=1e-3, rtol=0)
    velocity, explained = fitted_motion(found, size[1:])
    close = (velocity - velocities(clips.motion)).abs().amax(1) <= 0.5
    assert close.float().mean() > 0.9 and explained.median() > 0.98


def test_digits_are_found_and_enlarged(moving, finished):
    """What is cut out is the image that the sprite was made of, a little blurred."""
    clips = moving.draw_clips(20, torch.Generator().manual_seed(3))
    ink = moving.videos(clips, (2, 32, 40))[:, 0] / 2 + 0.5
    digits = located_digits(ink, centres(ink)).view(20, 2, 28, 28)
    images = moving.digits.all_images[clips.digits].float()
    for k in range(2):
        found = digits[:, k].float()
        alike = torch.nn.functional.cosine_similarity(found.flatten(1), images.flatten(1))
        assert alike.median() > 0.85


def test_velocities_are_told_apart():
    """Every motion, from a start in the middle; none; and noise, which a line explains badly."""
    frames = torch.arange(8)
    velocity = velocities(torch.arange(len(MOTIONS) + 1))
    start = torch.tensor([40.0, 40.0]) + (SPRITE - 1) / 2
    centre = start + velocity[:, None] * frames[:, None]
    found, explained = fitted_motion(centre, (96, 96))
    assert torch.equal(found, velocity.float()) and (explained[:-1] == 1).all()
    _, explained = fitted_motion(start + 9 * torch.randn(200, 8, 2), (96, 96))
    assert explained.median() < 0.7


def test_scores(moving, finished):
    """Real clips have full marks, as far as the classifier reads; each fault costs its own."""
    scorer, size = finished.scorer, (8, 32, 32)
    clips = moving.draw_clips(100, torch.Generator().manual_seed(4))
    labels, velocity = finished.source.labels[clips.digits], velocities(clips.motion)
    videos = moving.videos(clips, size)
    real = measure_clips(scorer, moving.videos(clips.at(slice(50, 100)), size)).features

    def scores(shown, asked_labels=labels, asked=velocity):
        return motion_scores(measure_clips(scorer, shown), asked_labels, asked, real)

    whole = scores(videos)
    assert whole["direction"] > 0.95 and whole["speed"] > 0.95 and whole["line_r2"] > 0.98
    still = scores(videos[:, :, :1].expand(-1, -1, 8, -1, -1))
    assert still["direction"] == still["speed"] == 0
    slow = velocity.abs().amax(1) == 1  # these do not come back from a wall
    assert scores(videos.flip(2)[slow], labels[slow], velocity[slow])["direction"] == 0
    backwards = scores(videos.flip(2))
    assert backwards["prompt_accuracy"] == pytest.approx(whole["prompt_accuracy"], abs=1e-3)
    other = scores(videos, (labels + 1) % 10)
    assert other["direction"] == whole["direction"]
    assert other["prompt_accuracy"] != whole["prompt_accuracy"]
    faster = scores(videos, asked=velocity * 2)
    assert faster["direction"] == whole["direction"] and faster["speed"] < 0.1
    shuffled = videos.clone()
    shuffled[:, :, 1::2] = videos.roll(1, 0)[:, :, 1::2]
    assert scores(shuffled)["same_digit_in_all_frames"] <= whole["same_digit_in_all_frames"]
    assert scores(torch.rand_like(videos))["frechet_distance"] > whole["frechet_distance"]
    one = moving.draw_clips(20, torch.Generator(), moving=False)
    pictures = moving.videos(one, (1, 32, 32))
    zero = velocities(one.motion)
    found = motion_scores(
        measure_clips(scorer, pictures), finished.source.labels[one.digits], zero, real
    )
    assert found["direction"] is None and found["line_r2"] is None


def test_some_of_the_clips():
    clips = Clips(torch.arange(4), torch.arange(4), torch.rand(4, 2))
    some = clips.at(torch.tensor([2, 0]))
    assert some.digits.tolist() == some.motion.tolist() == [2, 0]
    assert torch.equal(some.start, clips.start[[2, 0]])
