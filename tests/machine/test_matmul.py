"""Products through oneDNN agree with F.linear, gradients included."""

import itertools
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanosd3.machine import matmul
from nanosd3.machine.matmul import linear

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a PyTorch without oneDNN"
)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (9, 12), (4, 7, 12), (2, 3, 4, 12), (0, 12)])
def test_gradients_match_f_linear(monkeypatch, shape, bias):
    monkeypatch.setattr(matmul, "onednn_multiplies_faster", lambda: True)
    inputs = [draw(*shape), draw(5, 12), draw(5)][: 3 if bias else 2]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    y, expected = matmul.linear(*ours), F.linear(*theirs)
    assert ("OneDNNLinear" in type(y.grad_fn).__name__) == bool(y.numel())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    g = draw(*expected.shape)
    gradients = torch.autograd.grad(y, ours, g)
    expected_gradients = torch.autograd.grad(expected, theirs, g.double())
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("shape", [(12,), (4, 7, 12)])
def test_second_derivatives_match_f_linear(monkeypatch, shape):
    monkeypatch.setattr(matmul, "onednn_multiplies_faster", lambda: True)

    def second(multiply, dtype):
        inputs = [draw(*s).to(dtype).requires_grad_() for s in (shape, (5, 12), (5,))]
        loss = multiply(*inputs).square().sum()
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    ours, theirs = second(matmul.linear, torch.float32), second(F.linear, torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@needs_onednn
def test_unneeded_gradients_are_not_computed(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_multiplies_faster", lambda: True)
    calls, original = [], matmul.onednn_linear
    monkeypatch.setattr(matmul, "onednn_linear", lambda *a: calls.append(1) or original(*a))
    frozen, x = draw(5, 12), draw(3, 12).requires_grad_()
    matmul.linear(x, frozen).sum().backward()
    assert len(calls) == 2 and x.grad is not None  # forward, and the gradient of x
    calls.clear()
    with torch.no_grad():
        assert matmul.linear(x, frozen).grad_fn is None
    assert len(calls) == 1


def test_float64_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_multiplies_faster", lambda: True)
    x, weight = (draw(*s, dtype=torch.float64).requires_grad_() for s in ((3, 12), (5, 12)))
    assert "OneDNNLinear" not in type(matmul.linear(x, weight).grad_fn).__name__


@needs_onednn
def test_autocast_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_multiplies_faster", lambda: True)
    x, weight = draw(3, 12), draw(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(x, weight).dtype == torch.bfloat16 and not matmul.eager()
    assert matmul.linear(x, weight).dtype == torch.float32 and matmul.eager()
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not matmul.eager()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert matmul.eager()


def test_timing(monkeypatch):
    cpu, calls = torch.device("cpu"), []
    assert 0.05 <= matmul.seconds(lambda: time.sleep(0.05), cpu) < 5
    times = itertools.cycle([3.0, 2.0, 4.0])
    monkeypatch.setattr(matmul, "seconds", lambda f, device: calls.append(f()) or next(times))
    assert matmul.multiplication_speed(cpu, torch.bfloat16) == 2 * 1024**3 / 2.0
    assert all(x.shape == (1024, 1024) and x.dtype == torch.bfloat16 for x in calls)


@pytest.fixture
def fast(monkeypatch):
    """Pretend that `linear` should use oneDNN on this processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(matmul, "onednn_multiplies_faster", lambda: True)


@pytest.mark.usefixtures("fast")
def test_onednn_matches_f_linear():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
        x, weight = x.double(), weight.double()  # oneDNN has no float64
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    linear(x, weight.requires_grad_()).sum().backward()  # nor autograd
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(4, 8))


@pytest.mark.usefixtures("fast")
def test_other_devices_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_linear", lambda *_: pytest.fail("not for this device"))
    with torch.no_grad():
        y = linear(torch.empty(2, 8, device="meta"), torch.empty(4, 8, device="meta"))
    assert y.shape == (2, 4) and y.device.type == "meta"


def test_without_proc_cpuinfo(monkeypatch):
    def no_such_file(*_):
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", no_such_file)
    assert matmul.onednn_multiplies_faster.__wrapped__() is False
