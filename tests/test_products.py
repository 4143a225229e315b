"""Products by the faster library, and activations that are computed again: the same gradients."""

import contextlib
import itertools
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from nanosd3 import layers, products
from nanosd3.config import CONFIGS
from nanosd3.mmdit import MMDiT

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


def test_recomputed_output_is_not_kept():
    x, weight = draw(50, 12).requires_grad_(), draw(5, 12).requires_grad_()

    def through(remember: bool) -> tuple[torch.Tensor, weakref.ref]:
        middle = torch.tanh(x) * 2  # the product, not what tanh itself keeps
        with (
            contextlib.nullcontext() if remember
            else products.recomputed(middle, lambda x: torch.tanh(x) * 2, x)
        ):  # fmt: skip
            return F.linear(middle, weight).square().sum(), weakref.ref(middle.untyped_storage())

    kept, _ = through(True)
    loss, _ = through(False)
    expected = torch.autograd.grad(kept, (x, weight))
    assert all(map(torch.equal, torch.autograd.grad(loss, (x, weight)), expected))


def kept_while(*contexts) -> bool:
    """Whether an output lives on for the gradient that is declared to be recomputed."""
    x, weight = draw(50, 12).requires_grad_(), draw(5, 12).requires_grad_()
    middle = torch.tanh(x) * 2
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        with products.recomputed(middle, lambda x: torch.tanh(x) * 2, x):
            out = F.linear(middle, weight)  # noqa: F841
    there = weakref.ref(middle.untyped_storage())
    del middle
    return there() is not None


def test_everything_can_be_kept():
    """For what is computed twice as a whole; afterwards, and after an error, all is as before."""
    assert not kept_while() and kept_while(products.everything_kept())
    assert kept_while(products.everything_kept(), products.everything_kept())
    with products.everything_kept():
        with products.everything_kept():
            pass
        assert kept_while()
    with contextlib.suppress(KeyError), products.everything_kept():
        raise KeyError
    assert not kept_while()


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


def saved_numbers(model, arguments) -> int:
    """How many numbers a forward pass keeps for the gradient: tensors that live after it."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        out = model(*arguments)
    events = profiler.profiler.kineto_results.events()
    return (
        sum(e.nbytes() for e in events if e.name() == "[memory]") // out.element_size()
        - out.numel()
    )


@pytest.mark.parametrize("name", ["tiny", "mnist"])
def test_a_model_keeps_less_and_has_the_same_gradients(monkeypatch, name):
    config = CONFIGS[name].mmdit
    torch.manual_seed(0)
    model = MMDiT(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    arguments = (
        draw(3, config.latent_channels, 8, 8, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9]),
        draw(3, 7, config.context_dim, dtype=torch.float64),
        draw(3, config.pooled_dim, dtype=torch.float64),
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients, kept = [], []
    for patch in (False, True):
        if patch:
            monkeypatch.setattr(layers, "recomputed", lambda *_: contextlib.nullcontext())
        loss = model(*arguments).square().mean()
        gradients.append(torch.autograd.grad(loss, trained))
        kept.append(saved_numbers(model, arguments))
    assert all(map(torch.equal, *gradients))
    assert kept[0] < 0.85 * kept[1]


@needs_onednn
def test_transforms_and_compilers_see_through(monkeypatch):
    """Derivatives by torch.func and forward mode, vmap, and torch.compile's graph capture."""
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: True)
    mlp, x = layers.MLP(8), draw(3, 8)
    weights = dict(mlp.named_parameters())

    def loss(weights):
        return torch.func.functional_call(mlp, weights, layers.modulate(x[None], x[:1], x[1:2]))

    by_func = torch.func.grad(lambda w: loss(w).square().sum())(weights)
    by_tape = torch.autograd.grad(loss(weights).square().sum(), weights.values())
    for a, b in zip(by_func.values(), by_tape, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    _, slope = torch.func.jvp(mlp, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = mlp(forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)
    torch.testing.assert_close(torch.func.vmap(mlp)(x), mlp(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.compile(mlp, backend="eager", fullgraph=True)(x), mlp(x), atol=1e-5, rtol=1e-5
    )
