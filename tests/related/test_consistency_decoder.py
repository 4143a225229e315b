"""The Consistency Decoder: the published constants, its network, and decoding in steps."""

import pytest
import torch

from nanosd3.flow import interpolate
from nanosd3.related.consistency import edm_form
from nanosd3.related.consistency_decoder import (
    DECODING_TIMES,
    PUBLISHED_LEVELS,
    ConsistencyDecoder,
    decode_in_steps,
    published_alpha_bar,
    published_latents,
    published_scalings,
    rectified_time,
)

F64 = torch.float64


def test_published_schedule():
    """sigma 43.8 and 1.015 at the two levels, which are t = 0.978 and 0.504."""
    alpha_bar = published_alpha_bar()
    assert len(alpha_bar) == 1024 and (alpha_bar.diff() < 0).all() and (alpha_bar > 0).all()
    at = alpha_bar[list(PUBLISHED_LEVELS)]
    sigma = (1 / at - 1).sqrt()
    assert sigma.tolist() == [pytest.approx(43.8, abs=0.3), pytest.approx(1.015, abs=0.003)]
    times = rectified_time(at).tolist()
    assert times == [pytest.approx(t, abs=5e-4) for t in DECODING_TIMES[:2]]


def test_published_scalings_are_edms():
    """The same answer as EDM's form of rectified flow, for the same image and the same noise."""
    alpha_bar = published_alpha_bar()[[1008, 512, 10]]
    x0, noise = torch.randn(2, 3, 5, dtype=F64).unbind(0)
    network = torch.sin
    x = alpha_bar.sqrt()[:, None] * x0 + (1 - alpha_bar).sqrt()[:, None] * noise
    c_skip, c_out, c_in = (c[:, None] for c in published_scalings(alpha_bar))
    theirs = c_skip * x + c_out * network(c_in * x)
    t = rectified_time(alpha_bar)
    z = interpolate(x0, noise, t)
    skip, out, inside = (c[:, None] for c in edm_form(t))
    torch.testing.assert_close(theirs, skip * z + out * network(inside * z))


def test_published_latents():
    latents = torch.ones(1, 4, 2, 2)
    seen = published_latents(latents)[0, :, 0, 0]
    mean, std = (0.3886, 0.0225, 0.0738, -0.0171), (0.9654, 1.0440, 0.7615, 0.7702)
    expected = [(0.18215 - m) / s for m, s in zip(mean, std, strict=True)]
    torch.testing.assert_close(seen, torch.tensor(expected))


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    net = ConsistencyDecoder(1, 4, (8, 16, 16))
    assert not net(torch.randn(2, 1, 16, 16), torch.rand(2), torch.randn(2, 4, 4, 4)).any()
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    return net


def test_everything_reaches_the_answer(decoder):
    z, t, latents = torch.randn(2, 1, 16, 16), torch.rand(2), torch.randn(2, 4, 4, 4)
    out = decoder(z, t, latents)
    assert out.shape == z.shape
    for other in ((z + 1, t, latents), (z, t / 2, latents), (z, t, latents + 1)):
        assert (decoder(*other) - out).abs().max() > 1e-4
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())
    torch.testing.assert_close(decoder(z, t[0], latents)[0], out[0])


def test_steps(decoder):
    """From nothing: the first step sees noise of 0.978, the second its answer and new noise."""
    latents, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 1, 16, 16)
    seen = []

    def watched(z, t, latents):
        seen.append((z, float(t)))
        return decoder(z, t, latents)

    x = decode_in_steps(watched, latents, noise)
    (first, t1), (second, t2) = seen
    assert (t1, t2) == (pytest.approx(0.978), pytest.approx(0.504))
    torch.testing.assert_close(first, 0.978 * noise[0])
    x0 = (first - 0.978 * decoder(first, torch.tensor(0.978), latents)).clamp(-1, 1)
    torch.testing.assert_close(second, (1 - 0.504) * x0 + 0.504 * noise[1])
    end = (second - 0.504 * decoder(second, torch.tensor(0.504), latents)).clamp(-1, 1)
    torch.testing.assert_close(x, end)
    assert float(x.abs().max()) <= 1
    with pytest.raises(ValueError, match="zip"):
        decode_in_steps(decoder, latents, noise, ts=(1.0, 0.0))
