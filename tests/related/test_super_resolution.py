"""The cascade's second transformer, and the larger decoder: what reaches what, and what stays."""

import math

import pytest
import torch

from nanosd3.related.muse import MASK, MuseConfig, masked_loss
from nanosd3.related.super_resolution import SuperResolution, with_decoder
from nanosd3.related.vq import VQAutoencoder, VQConfig

BASE = MuseConfig(depth=1, width=64, codes=7, grid=3, context_dim=5, pooled_dim=6)
FINE = MuseConfig(depth=2, width=64, codes=11, grid=6, context_dim=5, pooled_dim=6)


def lively():
    torch.manual_seed(0)
    model = SuperResolution(FINE, BASE, base_depth=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def inputs(B=2):
    torch.manual_seed(1)
    tokens = torch.randint(11, (B, 6, 6)).masked_fill(torch.rand(B, 6, 6) < 0.5, MASK)
    return tokens, torch.randint(7, (B, 3, 3)), torch.randn(B, 4, 5), torch.randn(B, 6)


def test_a_fresh_network_knows_nothing():
    tokens, base, *text = inputs()
    logits = SuperResolution(FINE, BASE, base_depth=1)(tokens, base, *text)
    loss = masked_loss(logits, tokens.clamp(min=0), tokens)
    assert logits.shape == (2, 6, 6, 11)
    torch.testing.assert_close(loss, torch.full((2,), math.log(11)))


def test_everything_reaches_the_logits_and_learns():
    """Every base token, both kinds of text and the fine tokens that are known."""
    model, (tokens, base, context, pooled) = lively(), inputs()
    logits = model(tokens, base, context, pooled)
    for n in range(9):
        other = base.flatten(1).clone()
        other[:, n] = (other[:, n] + 1) % 7
        changed = model(tokens, other.view_as(base), context, pooled)
        assert (changed != logits).any(-1).all()
    turned = model(tokens, base.flip(2), context, pooled)  # where they are counts, too
    assert (turned != logits).any()
    for other in ((tokens, base, -context, pooled), (tokens, base, context, -pooled)):
        assert (model(*other) != logits).any(-1).all()
    masked_loss(logits, tokens.clamp(min=0), tokens).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_where_a_base_token_is():
    """Two base tokens that change places change the logits: there are positions."""
    model, (tokens, base, *text) = lively(), inputs(1)
    base = torch.zeros_like(base)
    one, two = base.clone(), base.clone()
    one[0, 0, 0] = two[0, 2, 2] = 3
    assert (model(tokens, one, *text) - model(tokens, two, *text)).abs().max() > 1e-3


def test_base_layers_count():
    model, (tokens, base, *text) = lively(), inputs()
    logits = model(tokens, base, *text)
    model.base_blocks = model.base_blocks[:1]
    assert (model(tokens, base, *text) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [MASK, 7])
def test_base_tokens_are_all_known(wrong):
    tokens, base, *text = inputs()
    base[1, 0, 0] = wrong
    with pytest.raises(ValueError, match="base tokens must be from 0 to 6, none hidden"):
        SuperResolution(FINE, BASE, base_depth=1)(tokens, base, *text)


def test_a_larger_decoder_has_the_same_tokens():
    torch.manual_seed(0)
    vq = VQAutoencoder(VQConfig(1, (8, 8), (8, 8), 4, codes=13, width=4))
    larger = with_decoder(vq, (16, 24))
    x = torch.randn(2, 1, 8, 12)
    tokens = vq.tokenise(x)
    assert larger.tokenise(x).equal(tokens)
    assert larger.decode(tokens).shape == x.shape
    assert larger.config.channels == (8, 8) and larger.config.decoder_channels == (16, 24)
    trained = {name.split(".")[0] for name, p in larger.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}
    assert all(p.requires_grad for p in vq.parameters())  # and the other is as it was
