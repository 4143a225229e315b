"""The autoencoder in channels-last memory: the same numbers, as exact, in that layout."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanosd3.components import on_meta
from nanosd3.config import CONFIGS
from nanosd3.machine import channels_last
from nanosd3.machine.accelerate import accelerate
from nanosd3.machine.channels_last import ChannelsLastGroupNorm, group_moments
from nanosd3.vae import AutoencoderKL, ResBlock, Up, norm

LAST = torch.channels_last


def draw(*shape: int, mean: float = 0) -> torch.Tensor:
    x = mean + torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.contiguous(memory_format=LAST)


def norm_pair() -> tuple[torch.nn.GroupNorm, torch.nn.GroupNorm]:
    torch.manual_seed(0)
    plain = norm(32, 8)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    fast = accelerate(copy.deepcopy(plain))
    assert isinstance(fast, ChannelsLastGroupNorm)
    return plain, fast


def exact(layer: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    layer = copy.deepcopy(layer).double()
    return layer(x.double().contiguous())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mean", [0, 10, 100])
@pytest.mark.parametrize("shape", [(2, 32, 96, 80), (3, 32, 5, 7), (300, 32, 1, 2)])
def test_group_norm_is_as_exact_as_in_the_usual_layout(shape, mean, grad):
    plain, fast = norm_pair()
    x = draw(*shape, mean=mean)
    original = x.clone()
    with torch.set_grad_enabled(grad):
        out, usual = fast(x), plain(x.contiguous())
    assert out.is_contiguous(memory_format=LAST) and torch.equal(x, original)
    truth = exact(plain, x)
    error, limit = ((y - truth).abs().max() for y in (out, usual))
    assert error <= 2 * limit + 1e-6
    if shape[2] == 96 and mean:  # what PyTorch makes of the layout
        assert (F.group_norm(x, 8, fast.weight, fast.bias, 1e-6) - truth).abs().max() > 20 * error


def test_moments_of_groups_that_differ():
    """Each image and each group has its own; the first rows are no sample of the rest."""
    x = draw(2, 12, 64, 32)
    x = x * torch.arange(1, 13)[:, None, None] + 50 * torch.arange(24).view(2, 12, 1, 1)
    x[:, :, 32:] += 1000
    x = x.contiguous(memory_format=LAST)
    mean, variance = group_moments(x, 3)
    groups = x.double().reshape(2, 3, -1)
    torch.testing.assert_close(mean, groups.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance, groups.var(2, correction=0), rtol=1e-6, atol=0)


def test_moments_of_a_large_image_keep_their_digits():
    """A million squares in one float32 sum are off by 3e-8, in several by 2e-9."""
    x = draw(1, 4, 1024, 1024, mean=3)
    mean, variance = group_moments(x, 2)
    groups = x.double().reshape(1, 2, -1)
    torch.testing.assert_close(mean, groups.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance, groups.var(2, correction=0), rtol=1e-8, atol=0)


def test_gradients_of_the_group_norm():
    plain, fast = norm_pair()
    x, g = draw(2, 32, 24, 16, mean=10).requires_grad_(), draw(2, 32, 24, 16)
    double = copy.deepcopy(plain).double()
    expected = torch.autograd.grad(double(x.double()), (x, *double.parameters()), g.double())
    gradients = torch.autograd.grad(fast(x), (x, *fast.parameters()), g)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_keep_theirs(dtype):
    plain, fast = norm_pair()
    x = draw(2, 32, 64, 32, mean=10).to(dtype)  # too large to be copied for its smallness
    with torch.no_grad():
        out = fast.to(dtype)(x)
        assert out.dtype == dtype and out.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(out, plain.to(dtype)(x.contiguous()), rtol=1e-12, atol=1e-12)


def test_other_layouts_take_pytorchs_group_norm(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(channels_last, "group_moments", refuse)
    plain, fast = norm_pair()
    with torch.no_grad():
        for x in (draw(2, 32, 6, 6).contiguous(), torch.randn(2, 32, 6), torch.randn(2, 32)):
            assert torch.equal(fast(x), plain(x))


@torch.no_grad()
def test_the_autoencoder_agrees_and_stays_in_that_layout():
    """All convolutions read and write it, the first ones too."""
    torch.manual_seed(0)
    config = replace(CONFIGS["tiny"].vae, image_channels=3)  # one channel has no layout
    plain = AutoencoderKL(config)
    fast = accelerate(copy.deepcopy(plain))
    layouts = []
    for module in fast.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=LAST)
            module.register_forward_hook(
                lambda _, x, y: layouts.extend(
                    a.is_contiguous(memory_format=LAST) for a in (x[0], y)
                )
            )
    x = torch.rand(2, 3, 8 * config.factor, 8 * config.factor) * 2 - 1
    for a, b in zip(fast.encode(x), plain.encode(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    z = plain.encode(x)[0]
    torch.testing.assert_close(fast.decode(z), plain.decode(z), rtol=1e-5, atol=1e-5)
    assert layouts and all(layouts)


@pytest.mark.parametrize("channels", [(32, 32), (32, 64)])
@pytest.mark.parametrize("size", [6, 48])
def test_a_block_in_place_leaves_its_input(channels, size):
    """The same function, with and without gradients; what others may still read is not touched."""
    torch.manual_seed(0)
    plain = ResBlock(*channels, groups=8)
    fast = accelerate(copy.deepcopy(plain))
    x = draw(2, 32, size, size, mean=5)
    original = x.clone()
    expected = plain(x.contiguous())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(x, original)


@pytest.mark.parametrize("missing", ["norm1", "norm2"])
@pytest.mark.parametrize("faster", [accelerate, lambda block: block])
def test_a_block_without_a_norm(faster, missing):
    """Who takes one out, to see what it is for, gets the same without gradients."""
    torch.manual_seed(0)
    block, x = faster(ResBlock(32, 32, groups=8)), draw(2, 32, 48, 48)
    setattr(block, missing, torch.nn.Identity())
    expected, original = block(x), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, original)


@torch.no_grad()
def test_the_second_norm_of_a_block_is_in_place():
    """Its input and its output are one tensor; those of the first are two."""
    block, places = accelerate(ResBlock(32, 32, groups=8)), []
    for layer in (block.norm1, block.norm2):
        layer.register_forward_hook(lambda _, x, y: places.append(x[0].data_ptr() == y.data_ptr()))
    block(draw(2, 32, 48, 48))
    assert places == [False, True]


def test_the_plain_autoencoder_is_in_the_usual_layout():
    weight = on_meta(CONFIGS["tiny"], "vae").decoder.conv_in.weight
    assert weight.is_contiguous() and not weight.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    ("channels", "size", "dtype", "device", "grad", "merged"),
    [
        (64, (10, 7), torch.float32, "cpu", False, True),
        (64, (10, 7), torch.float64, "cpu", False, True),
        (32, (18, 15), torch.float32, "cpu", False, True),
        (32, (15, 15), torch.float32, "cpu", False, False),
        (16, (40, 40), torch.float32, "cpu", False, False),
        (64, (10, 7), torch.bfloat16, "cpu", False, False),
        (64, (10, 7), torch.float32, "meta", False, False),
        (64, (10, 7), torch.float32, "cpu", True, False),
    ],
)
def test_taps_are_merged_where_it_is_faster(
    monkeypatch, channels, size, dtype, device, grad, merged
):
    """Without gradients, on a CPU, with enough channels and pixels, and not in bfloat16, whose sums
    of taps would be rounded."""
    calls = []

    def listening(x, *weights, convolve=channels_last.convolve_repeated):
        calls.append(x.shape)
        return convolve(x, *weights)

    monkeypatch.setattr(channels_last, "convolve_repeated", listening)
    plain = Up(channels).to(device, dtype)
    fast = accelerate(copy.deepcopy(plain))
    x = draw(2, channels, *size).to(device, dtype)
    with torch.set_grad_enabled(grad):
        out, expected = fast(x), plain(x)
    assert len(calls) == merged and out.shape == expected.shape
    if device == "cpu":
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert merged or torch.equal(out, expected)
