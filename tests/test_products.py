"""Products by the faster library, with the gradients of F.linear."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F

from nanosd3 import products

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a PyTorch without oneDNN"
)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (9, 12), (4, 7, 12), (2, 3, 4, 12), (0, 12)])
def test_product_has_the_gradients_of_linear(monkeypatch, shape, bias):
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: True)
    given = [draw(*shape), draw(5, 12), draw(5)][: 3 if bias else 2]
    ours = [x.clone().requires_grad_() for x in given]
    theirs = [x.double().requires_grad_() for x in given]
    y, expected = products.linear(*ours), F.linear(*theirs)
    assert ("Product" in type(y.grad_fn).__name__) == bool(y.numel())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    g = draw(*expected.shape)
    for a, b in zip(
        torch.autograd.grad(y, ours, g), torch.autograd.grad(expected, theirs, g.double()),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_product_computes_no_gradient_that_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: True)
    calls, original = [], products.product
    monkeypatch.setattr(products, "product", lambda *a: calls.append(1) or original(*a))
    frozen, x = draw(5, 12), draw(3, 12).requires_grad_()
    products.linear(x, frozen).sum().backward()
    assert len(calls) == 2 and x.grad is not None  # forward, and for x
    calls.clear()
    with torch.no_grad():
        assert products.linear(x, frozen).grad_fn is None
    assert len(calls) == 1


def test_other_types_are_multiplied_by_pytorch(monkeypatch):
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: True)
    x, weight = (draw(*s, dtype=torch.float64).requires_grad_() for s in ((3, 12), (5, 12)))
    assert "Product" not in type(products.linear(x, weight).grad_fn).__name__


@needs_onednn
def test_autocast_is_pytorchs(monkeypatch):
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: True)
    x, weight = draw(3, 12), draw(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16 and not products.eager()
    assert products.linear(x, weight).dtype == torch.float32 and products.eager()
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not products.eager()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert products.eager()


def test_times(monkeypatch):
    cpu, calls = torch.device("cpu"), []
    assert 0.05 <= products.seconds(lambda: time.sleep(0.05), cpu) < 5
    times = itertools.cycle([3.0, 2.0, 4.0])
    monkeypatch.setattr(products, "seconds", lambda f, device: calls.append(f()) or next(times))
    assert products.multiplication_speed(cpu, torch.bfloat16) == 2 * 2048**3 / 2.0
    assert all(x.shape == (2048, 2048) and x.dtype == torch.bfloat16 for x in calls)
