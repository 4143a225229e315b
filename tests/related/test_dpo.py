"""DPO: closed forms of the loss, and weights of low rank that change nothing until trained."""

import math

import pytest
import torch
from torch import nn

from nanosd3.config import CONFIGS
from nanosd3.flow import flow_loss, interpolate
from nanosd3.machine.accelerate import accelerate
from nanosd3.mmdit import MMDiT
from nanosd3.random_streams import rng
from nanosd3.related.dpo import (
    LowRank,
    add_low_rank,
    dpo_loss,
    linear_layers,
    merge_low_rank,
    pair_errors,
    reward_margin,
)

CONFIG = CONFIGS["tiny"].mmdit  # QK-norm, dual attention, and a last block with keys alone


def random_model(seed: int = 0) -> MMDiT:
    torch.manual_seed(seed)
    model = MMDiT(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return accelerate(model)


def inputs(seed: int = 0, batch: int = 3) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    latents = (batch, CONFIG.latent_channels, 8, 8)
    z, other, noise = (torch.randn(latents, generator=g) for _ in range(3))
    t = torch.rand(batch, generator=g)
    text = torch.randn(batch, 5, CONFIG.context_dim, generator=g)
    return z, other, noise, t, (text, torch.randn(batch, CONFIG.pooled_dim, generator=g))


# --- the loss -----------------------------------------------------------------------------------


def errors(*rows: float) -> tuple[torch.Tensor, torch.Tensor]:
    winner, loser = torch.tensor(rows, dtype=torch.float64).view(-1, 2).unbind(1)
    return winner, loser


def test_closed_forms():
    before = errors(0.7, 0.4, 0.2, 0.9)
    assert dpo_loss(before, before, 50.0).tolist() == pytest.approx([math.log(2)] * 2)
    now = errors(0.6, 0.6, 0.3, 0.9)  # better at the winner and worse at the loser; worse at one
    assert reward_margin(now, before).tolist() == pytest.approx([0.3, -0.1])
    expected = [math.log(1 + math.exp(-0.6)), math.log(1 + math.exp(0.2))]
    assert dpo_loss(now, before, 2.0).tolist() == pytest.approx(expected)


def test_swapping_the_pair_negates_the_margin():
    now, before = errors(0.6, 0.6), errors(0.7, 0.4)
    swapped = reward_margin(now[::-1], before[::-1])
    torch.testing.assert_close(swapped, -reward_margin(now, before))
    p, q = (torch.exp(-dpo_loss(x, y, 3.0)) for x, y in ((now, before), (now[::-1], before[::-1])))
    torch.testing.assert_close(p + q, torch.ones_like(p))  # one of the two is preferred


def test_the_gradient_points_to_the_winner():
    """For a model that is free to answer anything: it comes nearer to the winner's velocity, and
    leaves the loser's, as far as the other way."""
    winner, loser, noise, t, _ = inputs()
    answers = torch.zeros(6, *noise.shape[1:], requires_grad=True)
    now = pair_errors(lambda *_: answers, winner, loser, noise, t, (t, t))
    before = tuple(x.detach() for x in now)
    dpo_loss(now, before, 4.0).sum().backward()
    target = torch.cat([noise - winner, noise - loser])
    # 4 sigmoid(0) times the gradient of a mean square, down at the winner and up at the loser
    expected = 2 * 2 * (0 - target) / noise[0].numel()
    expected[3:] *= -1
    torch.testing.assert_close(answers.grad, expected)


def test_pair_errors():
    """Both images of a pair with the same time, noise and text."""
    model = random_model().eval()
    winner, loser, noise, t, text = inputs()
    found = pair_errors(model, winner, loser, noise, t, text)
    for x0, error in zip((winner, loser), found, strict=True):
        expected = flow_loss(model(interpolate(x0, noise, t), t, *text), x0, noise)
        torch.testing.assert_close(error, expected)
    assert not torch.allclose(*found)


# --- low rank -----------------------------------------------------------------------------------


def test_a_fresh_one_changes_nothing():
    plain, adapted = random_model(), add_low_rank(random_model(), 2)
    z, _, _, t, text = inputs()
    assert adapted(z, t, *text).equal(plain(z, t, *text))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(linear_layers(adapted)) * 2 == len(trained) > 20
    assert all(name.endswith((".up", ".down")) for name in trained)
    assert all(name.startswith("joint_blocks.") for name in trained)
    kinds = {name.split(".parametrizations")[0].split(".", 3)[3] for name in trained}
    assert kinds == {"adaLN_modulation.1", "attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj",
                     "mlp.fc1", "mlp.fc2"}  # fmt: skip


def test_low_rank():
    weight = torch.randn(6, 5)
    addition = LowRank(weight, 2, rng("test"))
    assert addition.down.shape == (2, 5) and addition.up.shape == (6, 2)
    assert addition(weight).equal(weight) and addition.down.abs().sum() > 0
    nn.init.normal_(addition.up)
    difference = addition(weight) - weight
    torch.testing.assert_close(difference, addition.up @ addition.down)
    assert torch.linalg.matrix_rank(difference, tol=1e-4) == 2
    wide = LowRank(torch.zeros(1, 4000), 50, rng("test")).down
    assert wide.std().item() == pytest.approx(
        4000**-0.5, rel=0.02
    )  # products keep the size of inputs


def test_merged_equals_adapted():
    model = add_low_rank(random_model(), 2, rng("test"))
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(parameter, std=0.3)
    z, _, _, t, text = inputs()
    before = model(z, t, *text)
    assert (before - random_model()(z, t, *text)).abs().max() > 0.01
    merged = merge_low_rank(model)
    assert merged is model and {*merged.state_dict()} == {*MMDiT(CONFIG).state_dict()}
    torch.testing.assert_close(merged(z, t, *text), before)
    assert not any(p.requires_grad for p in merged.parameters())


def test_the_seed_decides():
    a, b, c = (add_low_rank(random_model(), 2, rng("test", i)).state_dict() for i in (0, 0, 1))
    key = next(key for key in a if key.endswith(".down"))
    assert a[key].equal(b[key]) and not a[key].equal(c[key])


def test_it_learns_what_is_preferred():
    """A few steps on one pair: the margin rises, and nothing but the additions has changed."""
    reference, model = random_model(), add_low_rank(random_model(), 4, rng("test"))
    given = inputs(3, batch=4)
    with torch.no_grad():
        before = pair_errors(reference, *given)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        dpo_loss(pair_errors(model, *given), before, 10.0).mean().backward()
        optimizer.step()
    assert reward_margin(pair_errors(model, *given), before).mean() > 0.01
    kept = reference.state_dict()
    for name, parameter in model.named_parameters():
        if not name.endswith((".up", ".down")):
            plain = name.replace("parametrizations.weight.original", "weight")
            assert parameter.equal(kept[plain])
