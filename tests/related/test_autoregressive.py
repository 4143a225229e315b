"""Tokens one after another: causal, and the same with and without cached keys and values."""

import math

import pytest
import torch

from nanosd3.related.autoregressive import CausalMuse, write_tokens
from nanosd3.related.muse import MASK, Muse, MuseConfig, masked_loss

CONFIG = MuseConfig(depth=2, width=64, codes=7, grid=3, context_dim=5, pooled_dim=6)


def lively(kind=CausalMuse):
    torch.manual_seed(0)
    model = kind(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False)


def inputs(B=2):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (B, 3, 3), generator=generator)
    context = torch.randn(B, 4, 5, generator=generator)
    return tokens, context, torch.randn(B, 6, generator=generator)


def test_a_token_sees_those_before_it_and_no_other():
    model, (tokens, *text) = lively(), inputs()
    logits = model(tokens, *text).flatten(1, 2)
    for n in range(9):
        other = tokens.flatten(1).clone()
        other[:, n] = (other[:, n] + 1) % 7
        changed = (model(other.view_as(tokens), *text).flatten(1, 2) != logits).any(2)
        assert not changed[:, : n + 1].any() and changed[:, n + 1 :].all()


def test_text_reaches_every_token():
    model, (tokens, context, pooled) = lively(), inputs()
    logits = model(tokens, context, pooled)
    for other in (model(tokens, -context, pooled), model(tokens, context, -pooled)):
        assert (other != logits).any(-1).all()


def test_the_past_is_kept_exactly():
    model, (tokens, *text) = lively(), inputs()
    whole, last = model(tokens, *text).flatten(1, 2), torch.full((2,), MASK)
    for _ in range(2):  # a second image starts anew
        with model.keeping_past():
            for n in range(9):
                logits = model.next_logits(
                    last if n == 0 else tokens.flatten(1)[:, n - 1], n, *text
                )
                torch.testing.assert_close(logits, whole[:, n])
    torch.testing.assert_close(model(tokens, *text).flatten(1, 2), whole)  # nothing is left of it


def test_it_has_the_weights_of_a_muse():
    states = []
    for kind in (Muse, CausalMuse):
        torch.manual_seed(0)
        model = kind(CONFIG)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    tokens, *text = inputs()
    loss = masked_loss(model(tokens, *text), tokens, torch.full_like(tokens, MASK))
    torch.testing.assert_close(loss, torch.full((2,), math.log(7)))


def test_draws_what_the_logits_say():
    """Against a loop over whole passes, from the same random numbers; guidance moves logits."""
    model, (_, *text) = lively(), inputs()
    without = [torch.zeros_like(x) for x in text]
    for guidance in (1.0, 3.0):
        drawn = write_tokens(model, text, without, guidance, torch.Generator().manual_seed(3))
        generator, tokens = torch.Generator().manual_seed(3), torch.zeros(2, 9).long()
        for n in range(9):
            seen = tokens.view(2, 3, 3)
            logits = model(seen, *without) + guidance * (model(seen, *text) - model(seen, *without))
            p = logits.flatten(1, 2)[:, n].softmax(-1)
            tokens[:, n] = torch.multinomial(p, 1, generator=generator)[:, 0]
        assert torch.equal(drawn.flatten(1), tokens)


def test_refuses_what_a_muse_refuses():
    model, (tokens, context, pooled) = lively(), inputs()
    with pytest.raises(ValueError, match="tokens must be from 0 to 6, or MASK"):
        model(tokens + 7, context, pooled)
    with pytest.raises(ValueError, match="batch sizes differ: tokens 2, context 1, pooled 2"):
        model(tokens, context[:1], pooled)
