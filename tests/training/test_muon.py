"""Muon: closed forms, PyTorch's own on single matrices, fused layers, what it trains, resuming."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nanosd3.config import CONFIGS
from nanosd3.config_types import Recipe
from nanosd3.errors import InputError
from nanosd3.layers import MLP
from nanosd3.mmdit import MMDiT
from nanosd3.training.muon import COEFFICIENTS, MOMENTUM, STEP, Muon, orthogonalised
from nanosd3.training.optimizer import make_optimizers, matrices_of

RECIPE = Recipe(10, 4, 1e-2, 2, 0.0, optimizer="muon")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (1, 8)])
def test_singular_values_follow_the_polynomial_and_directions_stay(shape):
    """Against a decomposition: U p(p(...p(S))) V^T."""
    x = draw(3, *shape)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(orthogonalised(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert s.min() > 0.65 and s.max() < 1.25


def step_both(weight: torch.Tensor, grads: list[torch.Tensor], weight_decay: float = 0.0):
    """A weight after some steps of ours and of PyTorch's Muon."""
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    group = {"params": [ours], "weight_decay": weight_decay}
    muon = Muon([group], lr=0.01)
    options = {"momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=weight_decay, **options)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        muon.step()
        reference.step()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("shape", [(24, 24), (32, 8), (8, 32)])
def test_as_pytorch_on_single_matrices(shape, monkeypatch):
    """The same weights as torch.optim.Muon's, but for its rounding: it computes the iterations in
    bfloat16 whatever the machine (1% of a step)."""
    weight, grads = draw(*shape), [draw(*shape, seed=i) for i in range(1, 5)]
    ours, rounded = step_both(weight, grads, weight_decay=0.1)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    again, exact = step_both(weight, grads, weight_decay=0.1)
    assert torch.equal(ours, again)
    moved = (exact - weight).norm()
    assert (ours - exact).norm() / moved < 1e-5
    assert 1e-5 < (rounded - exact).norm() / moved < 0.05


def test_fused_matrices_are_stepped_one_by_one():
    weight, grad = draw(3 * 16, 16), draw(3 * 16, 16, seed=1)
    grad[16:32] *= 1e3  # of no concern to the others
    fused = nn.Parameter(weight.clone())
    fused.grad = grad.clone()
    Muon([{"params": [fused], "parts": 3}], lr=0.01).step()
    alone = []
    for part, part_grad in zip(weight.chunk(3), grad.chunk(3), strict=True):
        p = nn.Parameter(part.clone())
        p.grad = part_grad.clone()
        Muon([{"params": [p]}], lr=0.01).step()
        alone.append(p.detach())
    torch.testing.assert_close(fused.detach(), torch.cat(alone), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("rows", "columns", "parts"), [(32, 32, 1), (96, 32, 3), (16, 64, 1)])
def test_a_step_is_as_long_as_adamws(rows, columns, parts):
    """0.2 lr a number, up to the spread that the iteration leaves."""
    p = nn.Parameter(torch.zeros(rows, columns))
    p.grad = draw(rows, columns) * 1e-3
    Muon([{"params": [p], "parts": parts}], lr=0.01).step()
    assert p.detach().square().mean().sqrt() == pytest.approx(STEP * 0.01, rel=0.2)


def test_no_gradient_no_step():
    """Neither without a gradient nor with one of zeros, as the last block's unused queries have."""
    p, q = nn.Parameter(draw(8, 8)), nn.Parameter(draw(8, 8))
    before, p.grad = (p.detach().clone(), q.detach().clone()), torch.zeros(8, 8)
    Muon([{"params": [p, q]}, {"params": [nn.Parameter(draw(4, 4))]}], lr=0.1).step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])


# --- what it trains -------------------------------------------------------------------------------


def test_the_matrices_of_the_joint_blocks_but_for_their_modulations():
    """tiny has everything: dual attention, and a last block that is shorter."""
    model = MMDiT(CONFIGS["tiny"].mmdit)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    muon, adamw = make_optimizers(model, RECIPE)
    parts = {names[p]: g["parts"] for g in muon.param_groups for p in g["params"]}
    layers = ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2")
    weights = {n for n in names.values() if n.endswith(tuple(f"{end}.weight" for end in layers))}
    assert set(parts) == weights and len(weights) == 4 + 4 + 4 + 2 + 1
    assert all(number == (3 if "qkv" in name else 1) for name, number in parts.items())
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted([*parts, *rest]) == sorted(names.values())
    rates = [group["lr_scale"] for group in (*muon.param_groups, *adamw.param_groups)]
    assert rates == [1.0, 1.0, 0.5, 0.5]


def test_adamw_alone_has_the_full_rate():
    (adamw,) = make_optimizers(MMDiT(CONFIGS["tiny"].mmdit), replace(RECIPE, optimizer="adamw"))
    assert [group["lr_scale"] for group in adamw.param_groups] == [1.0, 1.0]


def test_other_networks_are_refused():
    with pytest.raises(InputError, match="optimizer muon is for the transformer; use adamw"):
        matrices_of(MLP(8))
