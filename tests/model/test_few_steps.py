"""Few steps: their times, fresh noise between them, and known parts that stay."""

from itertools import pairwise

import pytest
import torch

from nanosd3.few_steps import consistency, even_schedule, inpainting_afresh
from nanosd3.flow import shift
from nanosd3.samplers import euler

F64 = torch.float64
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
POINT = torch.linspace(-1, 1, 4)


def to_point(z, t):
    """The velocity to one data point: every step's clean image is it."""
    return (z - POINT) / t


def test_even_schedule():
    torch.testing.assert_close(even_schedule(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert even_schedule(1).tolist() == [1.0, 0.0]
    torch.testing.assert_close(
        even_schedule(4, 3.0)[1:4], shift(torch.tensor([0.75, 0.5, 0.25]), 3)
    )


def test_one_step_is_eulers():
    velocity = lambda z, t: torch.sin(3 * z)  # noqa: E731
    ts = even_schedule(1)
    torch.testing.assert_close(consistency(velocity, NOISE, ts), euler(velocity, NOISE, ts))
    one_point = consistency(to_point, NOISE, even_schedule(5))
    torch.testing.assert_close(one_point, POINT.expand_as(NOISE))


def test_what_each_step_sees():
    """z at the step's time is the last image, noised afresh; the callback sees both."""
    seen, asked = [], []
    velocity = lambda z, t: asked.append((z, t)) or torch.cos(z)  # noqa: E731
    ts = even_schedule(3)
    out = consistency(velocity, NOISE, ts, lambda *step: seen.append(step), fresh=1.0)
    assert [i for i, *_ in seen] == [0, 1, 2] and len(asked) == 3
    assert all(float(t) == float(ts[i]) == float(asked[i][1]) for i, t, _, _ in seen)
    for (_, t, z, x0), (asked_z, _) in zip(seen, asked, strict=True):
        assert z.equal(asked_z)
        torch.testing.assert_close(x0, z - t * torch.cos(z))
    torch.testing.assert_close(out, seen[2][3])
    used = [NOISE]
    for (_, _, _, x0), (_, t, z, _) in pairwise(seen):
        used.append((z - (1 - t) * x0) / t)  # the noise that was added
    for fresh in used[1:]:
        assert abs(float(fresh.mean())) < 0.35 and 0.7 < float(fresh.std()) < 1.3
    for i, a in enumerate(used):
        for b in used[i + 1 :]:
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(float(correlation)) < 0.35


def test_part_of_the_noise_is_kept():
    """Unit noise of which half (of the amplitude) is drawn; without any, the step is Euler's."""
    velocity = lambda z, t: torch.cos(z)  # noqa: E731
    ts = even_schedule(3)
    torch.testing.assert_close(
        consistency(velocity, NOISE, ts, fresh=0.0), euler(velocity, NOISE, ts)
    )
    start, seen = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0)), []
    to_zero = lambda z, t: z / t  # noqa: E731
    consistency(to_zero, start, even_schedule(2), lambda i, t, z, x0: seen.append(z))
    added = seen[1] / 0.5
    assert float(added.std()) == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(torch.stack([added.flatten(), start.flatten()]))[0, 1]
    assert float(correlation) == pytest.approx(0.75**0.5, abs=0.02)


def test_images_do_not_depend_on_their_neighbours():
    velocity = lambda z, t: torch.cos(z)  # noqa: E731
    ts = even_schedule(4)
    together = consistency(velocity, NOISE, ts)
    for i in (2, 0):
        assert consistency(velocity, NOISE[i : i + 1], ts).equal(together[i : i + 1])
    assert consistency(velocity, NOISE, ts).equal(together)
    assert not consistency(velocity, NOISE + 1e-3, ts).isclose(together, atol=0.05).all()


def test_the_noise_to_name_streams_after():
    """On the way already, z may differ by rounding; the fresh noise is that of the start."""
    velocity = lambda z, t: torch.cos(z)  # noqa: E731
    ts, near = even_schedule(4)[1:], NOISE * 0.7
    out = consistency(velocity, near, ts, noise=NOISE)
    again = consistency(velocity, near + 1e-7, ts, noise=NOISE)
    torch.testing.assert_close(again, out, atol=1e-4, rtol=0)
    assert not consistency(velocity, near, ts).isclose(out, atol=0.05).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_type_and_device_are_kept(dtype):
    assert consistency(to_point, NOISE.to(dtype), even_schedule(2).to(dtype)).dtype == dtype


def test_known_parts_stay_with_fresh_noise():
    x0, mask = torch.zeros_like(NOISE) + 0.3, torch.zeros(1, 1, 4, 4)
    mask[..., 2:, :] = 1
    seen = []
    velocity = inpainting_afresh(lambda z, t: seen.append((z, t)) or to_point(z, t), mask, x0)
    out = consistency(velocity, NOISE, even_schedule(4))
    torch.testing.assert_close(out[..., :2, :], x0[..., :2, :])
    torch.testing.assert_close(out[..., 2:, :], POINT.expand_as(NOISE)[..., 2:, :])
    for z, t in seen[1:]:  # what the network sees around the mask is the known image, noised
        noise = (z - (1 - t) * x0)[..., :2, :] / t
        assert 0.5 < float(noise.std()) < 1.5
    half = inpainting_afresh(lambda z, t: z * t, torch.full((1, 1, 4, 4), 0.25), x0)
    z, t = torch.randn(3, 2, 4, 4), torch.tensor(0.4)
    torch.testing.assert_close(half(z, t), 0.75 * (z - x0) / t + 0.25 * z * t)
