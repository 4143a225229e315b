"""Spacetime patches: exact inverses, positions, and an image as a video of one frame."""

import itertools

import pytest
import torch

from nanosd3.config import CONFIGS
from nanosd3.mmdit import MMDiT
from nanosd3.patchify import centre_crop, patchify, sincos_positions
from nanosd3.related.video import (
    VideoMMDiT,
    fold_time,
    inflated,
    patchify_video,
    spacetime_positions,
    time_code,
    unfold_time,
    unpatchify_video,
)

TINY = CONFIGS["tiny"].mmdit


@pytest.mark.parametrize(
    ("frames", "patch", "size"),
    [(1, 2, (3, 4, 6)), (2, 2, (4, 6, 4)), (4, 1, (8, 2, 3)), (3, 4, (3, 8, 4))],
)
def test_patches_are_boxes_and_come_back(frames, patch, size):
    T, H, W = size
    z = torch.randn(2, 3, T, H, W)
    tokens = patchify_video(z, frames, patch)
    assert tokens.shape == (2, T // frames * H // patch * W // patch, patch**2 * frames * 3)
    assert torch.equal(unpatchify_video(tokens, frames, patch, size), z)
    boxes = itertools.product(
        range(0, T, frames), range(0, H, patch), range(0, W, patch)
    )  # time first, then rows, then columns
    for token, (t, y, x) in zip(tokens.unbind(1), boxes, strict=True):
        box = z[:, :, t : t + frames, y : y + patch, x : x + patch]
        assert torch.equal(token.sort().values, box.flatten(1).sort().values)


def test_patches_of_one_frame_are_the_image_s():
    z = torch.randn(2, 4, 1, 6, 8)
    assert torch.equal(patchify_video(z, 1, 2), patchify(z[:, :, 0], 2))


def test_time_folds_and_unfolds():
    z = torch.arange(2 * 3 * 4).float().view(2, 3, 4, 1, 1).expand(-1, -1, -1, 2, 2)
    images = fold_time(z, 2)
    assert images.shape == (4, 6, 2, 2)
    assert torch.equal(images[1, :3, 0, 0], z[0, :, 2, 0, 0])  # the second pair's first frame
    assert torch.equal(unfold_time(images, 2, 4), z)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: patchify_video(torch.zeros(1, 1, 3, 2, 2), 2, 2), "3 frames"),
        (lambda: patchify_video(torch.zeros(1, 1, 2, 3, 2), 2, 2), "3x2"),
        (lambda: unpatchify_video(torch.zeros(1, 4, 8), 2, 2, (3, 4, 4)), "3 frames"),
        (lambda: unpatchify_video(torch.zeros(1, 5, 8), 1, 2, (2, 2, 4)), "5 tokens"),
        (lambda: unpatchify_video(torch.zeros(1, 6, 8), 1, 2, (2, 2, 4)), "3 tokens"),
    ],
)
def test_what_does_not_divide(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- positions ------------------------------------------------------------------------------------


def test_time_runs_from_the_middle():
    """Closed form; a longer clip surrounds a shorter one, and a single step is at zero."""
    code = time_code(8, 4)
    angles = torch.tensor([-1.5, -0.5, 0.5, 1.5])[:, None] * 10000 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(code, torch.cat([angles.sin(), angles.cos() - 1], 1))
    torch.testing.assert_close(time_code(16, 6)[1:-1], time_code(16, 4))
    assert not time_code(16, 1).any()


def test_positions_of_all_three_axes_differ():
    buffer = sincos_positions(64, 8, 4, 4)
    positions = spacetime_positions(buffer, 5, 3, 4)
    assert positions.shape == (1, 60, 64)
    assert torch.pdist(positions[0]).min() > 0.1
    middle = positions.view(5, 12, 64)[2]
    torch.testing.assert_close(middle, centre_crop(buffer, 3, 4)[0])


# --- the network ----------------------------------------------------------------------------------


def lively(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter)
    return network


def inputs(*shape):
    text = torch.randn(shape[0], 5, TINY.context_dim), torch.randn(shape[0], TINY.pooled_dim)
    return torch.randn(shape), torch.rand(shape[0]), *text


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame():
    """Number for number, with the same weights; blocks can be skipped there too."""
    image, video = lively(MMDiT(TINY)), VideoMMDiT(TINY, 1)
    video.load_state_dict(image.state_dict())
    z, *given = inputs(2, TINY.latent_channels, 6, 8)
    for skip in ((), (0,)):
        expected = image(z, *given, skip=skip)
        assert torch.equal(video(z[:, :, None], *given, skip=skip)[:, :, 0], expected)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_an_inflated_network_draws_a_picture_that_stands_still(frames):
    """Every frame of a patch is the image network's answer, if all of them are the same."""
    image, video = lively(MMDiT(TINY)), VideoMMDiT(TINY, frames)
    video.load_state_dict(inflated(image.state_dict(), frames))
    z, *given = inputs(2, TINY.latent_channels, 6, 8)
    still = z[:, :, None].expand(-1, -1, frames, -1, -1)
    expected = image(z, *given)[:, :, None].expand_as(still)
    torch.testing.assert_close(video(still, *given), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_any_grid():
    video = lively(VideoMMDiT(TINY, 2))
    for size in ((2, 4, 4), (8, 4, 6), (6, 6, 4)):
        z, *given = inputs(2, TINY.latent_channels, *size)
        assert video(z, *given).shape == z.shape
        assert torch.allclose(
            video(z, *given)[:1], video(z[:1], *(x[:1] for x in given)), atol=1e-4
        )
    with pytest.raises(ValueError, match="5 frames"):
        video(z[:, :, :5], *given)


@torch.no_grad()
def test_frames_see_each_other_and_their_order():
    video = lively(VideoMMDiT(TINY, 1))
    z, *given = inputs(1, TINY.latent_channels, 4, 4, 4)
    changed = z.clone()
    changed[:, :, 3] += 1
    assert (video(z, *given) - video(changed, *given))[:, :, 0].abs().max() > 1e-4
    turned = video(z.flip(2), *given).flip(2)
    assert (video(z, *given) - turned).abs().max() > 1e-4


def test_every_parameter_gets_a_gradient():
    video = lively(VideoMMDiT(TINY, 2))
    z, *given = inputs(2, TINY.latent_channels, 4, 4, 4)
    video(z, *given).square().sum().backward()
    still = [n for n, p in video.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not still


def test_a_fresh_network_answers_zero():
    z, *given = inputs(1, TINY.latent_channels, 2, 4, 4)
    assert not VideoMMDiT(TINY, 2)(z, *given).any()
