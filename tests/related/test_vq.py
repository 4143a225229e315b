"""The VQ autoencoder: nearest codes, the gradient past them, codes that restart."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanosd3.machine.accelerate import accelerate
from nanosd3.related.vq import (
    COMMITMENT,
    Quantiser,
    VQAutoencoder,
    VQConfig,
    perplexity,
    quantising_loss,
    straight_through,
)
from nanosd3.vae import VAEAttention

CONFIG = VQConfig(1, (8, 8, 16), (8, 8, 16), norm_groups=4, codes=16, width=4)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def vq():
    torch.manual_seed(0)
    return VQAutoencoder(CONFIG)


def test_nearest_by_plain_loops():
    """By the distance of vectors of length 1, whatever the lengths of the codes."""
    torch.manual_seed(1)
    quantiser = Quantiser(6, 3)
    with torch.no_grad():
        quantiser.codes *= torch.tensor([0.1, 1, 2, 5, 10, 100])[:, None]
    z = unit(2, 3, 4, 5)
    found = quantiser.nearest(z)
    codes = quantiser.codes.detach()
    codes = codes / codes.norm(dim=1, keepdim=True)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                distances = [float((z[b, :, i, j] - code).norm()) for code in codes]
                assert int(found[b, i, j]) == distances.index(min(distances))
    assert len(found.unique()) > 3
    vectors = quantiser.vectors(found)
    torch.testing.assert_close(vectors[1, :, 2, 3], codes[found[1, 2, 3]])
    assert quantiser.nearest(vectors).equal(found)


def test_the_gradient_goes_straight_through():
    z, e = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    out = straight_through(z, e)
    torch.testing.assert_close(out, e)
    (out * torch.arange(6.0).view(2, 3)).sum().backward()
    assert z.grad.equal(torch.arange(6.0).view(2, 3)) and e.grad is None


def test_quantising_loss():
    """Codes are drawn with weight 1, encodings with 0.25, each by its own term."""
    assert COMMITMENT == 0.25
    z, e = (torch.randn(2, 3, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    losses = quantising_loss(z, e)
    squares = (z - e).detach().square().flatten(1).sum(1)
    torch.testing.assert_close(losses.detach(), 1.25 * squares)
    losses.sum().backward()
    torch.testing.assert_close(e.grad, 2 * (e - z).detach())
    torch.testing.assert_close(z.grad, 0.5 * (z - e).detach())


def test_unused_codes_restart():
    """Those alone, on encodings of the batch; a second time there is less to do."""
    z = unit(4, 3, 8, 8)
    quantiser = Quantiser(32, 3)
    with torch.no_grad():
        quantiser.codes[:] = torch.tensor([1.0, 0, 0])
        quantiser.codes[5] = torch.tensor([-1.0, 0, 0])
    assert set(quantiser.nearest(z).unique().tolist()) == {0, 5}
    count = quantiser.restart_unused(z, torch.Generator().manual_seed(0))
    assert count == 30
    kept = quantiser.codes.detach()[[0, 5]]
    assert kept.equal(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]))
    positions = z.movedim(1, -1).flatten(0, -2)
    moved = quantiser.codes.detach()[[1, 31]]
    for code in moved:
        assert (positions == code).all(1).any()
    assert not moved[0].equal(moved[1])
    assert len(quantiser.nearest(z).unique()) > 25
    assert quantiser.codes.grad is None and quantiser.codes.requires_grad


def test_restarts_are_drawn_from_the_generator():
    """And a code that a single position chose stays."""
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.6, 0.8]]).T[None, :, :, None]  # (1, 2, 4, 1)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        quantiser = Quantiser(8, 2)
        with torch.no_grad():
            quantiser.codes[:] = torch.tensor([-1.0, 0])
            quantiser.codes[0], quantiser.codes[1] = torch.tensor([1.0, 0]), torch.tensor([0, 3.0])
        assert quantiser.nearest(z).flatten().tolist() == [0, 0, 1, 1]
        z[0, :, 3, 0] = torch.tensor([1.0, 0])
        assert quantiser.restart_unused(z, torch.Generator().manual_seed(5)) == 6
        z[0, :, 3, 0] = torch.tensor([0.6, 0.8])
        assert quantiser.codes[1].tolist() == [0, 3]
        found.append(quantiser.codes.detach())
    assert found[0].equal(found[1])


def test_perplexity():
    assert perplexity(torch.arange(16).repeat(3), 16) == pytest.approx(16)
    assert perplexity(torch.zeros(2, 3, dtype=torch.long), 16) == pytest.approx(1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity(torch.tensor([2, 2, 7, 2]), 16) == pytest.approx(math.exp(entropy))


def test_images_to_tokens_and_back(vq):
    """One model for every size; a size that does not divide is refused."""
    for height, width in ((28, 28), (8, 16)):
        x = torch.rand(2, 1, height, width) * 2 - 1
        z, tokens = vq.encode(x), vq.tokenise(x)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(2, height // 4, width // 4))
        assert z.shape[1] == CONFIG.width and tokens.shape == (2, height // 4, width // 4)
        assert tokens.min() >= 0 and tokens.max() < 16
        assert tokens.equal(vq.quantiser.nearest(z))
        out = vq.decode(tokens)
        assert out.shape == x.shape
        torch.testing.assert_close(out, vq.decoder(vq.quantiser.vectors(tokens)))
    with pytest.raises(ValueError, match="30x28 is not divisible by 4"):
        vq.encode(torch.zeros(1, 1, 30, 28))


def test_no_attention_and_a_larger_decoder():
    torch.manual_seed(0)
    large = VQAutoencoder(VQConfig(3, (8, 16), (16, 24), norm_groups=4, codes=16, width=4))
    leaves = (nn.Conv2d, nn.GroupNorm, Quantiser)
    for module in large.modules():
        assert isinstance(module, leaves) or not list(module.parameters(False))
        assert not isinstance(module, VAEAttention)
    assert large.config.factor == 2
    assert large.decoder.conv_in.out_channels == 24 and large.encoder.conv_in.out_channels == 8
    out = large.decode(large.tokenise(torch.rand(1, 3, 8, 8)))
    assert out.shape == (1, 3, 8, 8)
    fast = accelerate(large)
    torch.testing.assert_close(fast.decode(torch.zeros(1, 4, 4, dtype=torch.long)),
                               large.decode(torch.zeros(1, 4, 4, dtype=torch.long)))  # fmt: skip


def test_every_part_learns(vq):
    x = torch.rand(4, 1, 16, 16) * 2 - 1
    z = vq.encode(x)
    e = vq.quantiser.vectors(vq.quantiser.nearest(z))
    loss = (vq.decoder(straight_through(z, e)) - x).square().mean() + quantising_loss(z, e).mean()
    loss.backward()
    for name, parameter in vq.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_it_learns_to_reconstruct(vq):
    """A few steps on one batch: the error falls well below that of one grey for all."""
    x = -torch.ones(8, 1, 8, 8)
    for i in range(8):
        x[i, :, i % 4 : i % 4 + 3, i // 4 : i // 4 + 4] = 1
    optimizer = torch.optim.Adam(vq.parameters(), 1e-2)
    for step in range(60):
        z = vq.encode(x)
        if step % 10 == 0:
            vq.quantiser.restart_unused(z, torch.Generator().manual_seed(step))
        e = vq.quantiser.vectors(vq.quantiser.nearest(z))
        loss = (vq.decoder(straight_through(z, e)) - x).square().flatten(1).sum(1)
        (loss + quantising_loss(z, e)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    error = float((vq.decode(vq.tokenise(x)).detach() - x).square().mean())
    assert error < 0.5 * float(x.var())
