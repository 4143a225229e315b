"""Learning rate schedule, EMA, weight decay."""

from dataclasses import replace
from itertools import pairwise

import pytest
from torch import nn

from nanosd3.config_types import Recipe
from nanosd3.training.ema import make_ema, update_ema
from nanosd3.training.optimizer import decay_groups, learning_rate


def test_learning_rate():
    recipe = Recipe(steps=100, batch=1, lr=1.0, warmup=10, weight_decay=0.0)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1 and rates[55] == pytest.approx(0.505, abs=0.01)
    assert rates[-1] < 0.02 and all(a > b for a, b in pairwise(rates[10:]))
    constant = replace(recipe, decay="constant")
    assert [learning_rate(step, constant) for step in range(100)] == rates[:10] + [1.0] * 90


def test_ema_warms_up():
    module, start = nn.Linear(1, 1), 5.0
    nn.init.constant_(module.weight, start)
    ema = make_ema(module)
    nn.init.constant_(module.weight, 0.0)
    expected = start
    for step in range(300):
        update_ema(ema, module, step, 0.9999)
        expected *= min(0.9999, (1 + step) / (10 + step))
    assert ema.weight.item() == pytest.approx(expected, rel=1e-3)
    assert ema.weight.item() < 1e-3 * start  # a constant decay would have kept 0.9999^300 = 97%
    assert not ema.weight.requires_grad


def test_weight_decay_is_for_matrices():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[0].bias.requires_grad_(False)
    matrices, vectors = decay_groups(module.parameters(), 0.1)
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1] and vectors["weight_decay"] == 0
