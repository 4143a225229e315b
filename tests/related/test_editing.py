"""Zero-shot edits: known coordinates are exact, the rest is the model's, bases are orthogonal."""

import pytest
import torch
import torch.nn.functional as F

from nanosd3.few_steps import consistency, even_schedule
from nanosd3.related.editing import (
    LUMA,
    block_basis,
    block_means_known,
    brightness_basis,
    denoise,
    edit,
    reflection,
)

F64 = torch.float64
GEN = torch.Generator().manual_seed(0)
POINT = torch.randn(1, 3, 8, 8, dtype=F64, generator=GEN)  # the only image that the model knows
Y = torch.randn(2, 3, 8, 8, dtype=F64, generator=GEN)
TIMES = even_schedule(3).double()


def to_point(z, t):
    return (z - POINT) / t


def test_inpainting_keeps_what_is_known():
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    x = edit(to_point, Y, known, TIMES, GEN)
    assert x[:, :, :4].equal(Y[:, :, :4])
    torch.testing.assert_close(x[:, :, 4:], POINT[:, :, 4:].expand(2, -1, -1, -1))


def test_the_model_sees_the_known_part_noised():
    """Also in the first call, and noise is fresh in each; nothing of y's unknown part is used."""
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    seen = []
    velocity = lambda z, t: seen.append((z, t)) or to_point(z, t)  # noqa: E731
    edit(velocity, Y, known, torch.tensor([0.8, 0.4, 0.0], dtype=F64), torch.Generator())
    noises = [((z - (1 - t) * Y) / t)[:, :, :4] for z, t in seen]
    assert all(0.8 < float(noise.std()) < 1.2 for noise in noises)
    assert (noises[0] - noises[1]).abs().max() > 0.5
    other, short = torch.where(known, Y, torch.full_like(Y, 99.0)), torch.tensor([0.5, 0.0])
    bent = lambda z, t: torch.cos(z)  # noqa: E731
    ends = [edit(bent, y, known, short, torch.Generator().manual_seed(1)) for y in (Y, other)]
    assert ends[0].equal(ends[1])


def test_nothing_known_is_sampling():
    velocity = lambda z, t: torch.cos(z)  # noqa: E731
    known = torch.zeros(1, dtype=torch.bool)
    x = edit(velocity, Y, known, torch.tensor([1.0, 0.0], dtype=F64), GEN.manual_seed(3))
    noise = torch.randn(Y.shape, dtype=F64, generator=GEN.manual_seed(3))
    torch.testing.assert_close(x, consistency(velocity, noise, even_schedule(1).double()))


@pytest.mark.parametrize("first", [LUMA, (1.0, 1, 1, 1), (1.0, 0, 0), (-2.0, 0.5)])
def test_reflection(first):
    first = torch.tensor(first, dtype=F64)
    matrix = reflection(first)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(first), dtype=F64))
    torch.testing.assert_close(matrix[0], first / first.norm())
    torch.testing.assert_close(matrix, matrix.T)


def test_colouring_keeps_brightness():
    known = torch.tensor([True, False, False])[:, None, None]
    x = edit(to_point, Y, known, TIMES, GEN, brightness_basis, brightness_basis)
    luma = torch.tensor([0.2989, 0.5870, 0.1140], dtype=F64)[:, None, None]
    torch.testing.assert_close((x * luma).sum(1), (Y * luma).sum(1))
    rest = brightness_basis(x - POINT)[:, 1:]
    torch.testing.assert_close(rest, torch.zeros_like(rest))


def test_super_resolution_keeps_block_means():
    to, back = block_basis(4)
    torch.testing.assert_close(back(to(Y)), Y)
    means = F.avg_pool2d(Y, 4)
    torch.testing.assert_close(to(Y)[:, :, 0].transpose(1, 2).view(2, 3, 2, 2), 4 * means)
    x = edit(to_point, Y, block_means_known(4), TIMES, GEN, to, back)
    torch.testing.assert_close(F.avg_pool2d(x, 4), means)
    inside = x - means.repeat_interleave(4, 2).repeat_interleave(4, 3)
    of_point = POINT - F.avg_pool2d(POINT, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(inside, of_point.expand(2, -1, -1, -1))


def test_denoise():
    """The exact answer for data N(0, 1): the mean of the image given the noisy one."""
    sigma = 0.5
    t = torch.tensor(sigma / (1 + sigma), dtype=F64)
    noisy = Y + sigma * torch.randn(Y.shape, dtype=F64, generator=GEN)
    z = (1 - t) * noisy

    def gaussian(z, t):
        scale = 1 / ((1 - t) ** 2 + t**2)
        return t * scale * z - (1 - t) * scale * z  # noise - x0

    torch.testing.assert_close(denoise(gaussian, z, t), noisy / (1 + sigma**2))
