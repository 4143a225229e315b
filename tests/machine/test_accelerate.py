"""Accelerated models: same outputs and gradients, less memory for the backward pass."""

import contextlib
import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from nanosd3 import layers
from nanosd3.components import COMPONENTS, on_meta
from nanosd3.config import CONFIGS
from nanosd3.machine import matmul
from nanosd3.machine.accelerate import (
    FastLinear,
    RecomputingMLP,
    RecomputingStream,
    accelerate,
    checkpoint_blocks,
    compile_blocks,
    recomputed,
)
from nanosd3.mmdit import Attention, MMDiT, Modulation, Stream
from nanosd3.t5 import GatedMLP


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def test_every_linear_is_replaced_and_nothing_else_changes():
    for part in COMPONENTS:
        plain, fast = on_meta(CONFIGS["tiny"], part), accelerate(on_meta(CONFIGS["tiny"], part))
        kinds = {type(module) for module in fast.modules()}
        assert not kinds & {torch.nn.Linear, layers.MLP, Stream, GatedMLP, Attention}
        pairs = zip(fast.modules(), plain.modules(), strict=True)
        assert all(isinstance(a, type(b)) for a, b in pairs)
        assert fast.state_dict().keys() == plain.state_dict().keys()
        assert accelerate(fast) is fast  # idempotent
        assert {type(module) for module in copy.deepcopy(fast).modules()} == kinds


def test_layers_of_checkpointed_models_recompute_nothing():
    kinds = {type(m) for m in accelerate(on_meta(CONFIGS["tiny"], "mmdit"), True).modules()}
    assert FastLinear in kinds and layers.MLP in kinds and Stream in kinds
    assert not kinds & {RecomputingMLP, RecomputingStream}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "gated"])
def test_mlps_agree_and_do_not_modify_their_input(kind, grad):
    torch.manual_seed(0)
    plain = layers.MLP(8) if kind == "mlp" else GatedMLP(8, 32)
    plain.double()
    fast, x = accelerate(copy.deepcopy(plain)), 3 * draw(2, 5, 8, dtype=torch.float64)
    original = x.clone()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fast(x), plain(original))
    assert torch.equal(x, original)


@pytest.mark.parametrize("kind", ["mlp", "gated"])
def test_accelerated_mlps_have_the_same_gradients(kind):
    torch.manual_seed(0)
    plain = layers.MLP(8) if kind == "mlp" else GatedMLP(8, 32)
    plain.double()
    fast, x = accelerate(copy.deepcopy(plain)), draw(2, 5, 8, dtype=torch.float64)
    expected = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    gradients = torch.autograd.grad(fast(x).square().sum(), list(fast.parameters()))
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_mlp_uses_the_tanh_gelu():
    mlp = layers.MLP(1).double()
    for parameter in mlp.parameters():
        torch.nn.init.zeros_(parameter)
    mlp.fc1.weight.data[0] = mlp.fc2.weight.data[0, 0] = 1  # one hidden feature is x
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)[:, None]
    expected = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    for module in (mlp, accelerate(copy.deepcopy(mlp))):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(module(x), expected)


def test_only_the_output_is_recomputed():
    """Neither another tensor of the same size nor one that starts at the same address."""
    x, other, large = (torch.randn(rows, 3, requires_grad=True) for rows in (4, 2, 4))

    def function(x):
        return 2 * torch.tanh(x[:2])

    whole = 2 * torch.tanh(x)
    output = whole[:2]
    with recomputed(output, function, x):
        loss = (output * other).sum() + (whole * large).sum()
    got = torch.autograd.grad(loss, (x, other, large))
    slope = 2 * (1 - torch.tanh(x) ** 2)
    both = large + torch.cat([other, torch.zeros(2, 3)])
    for gradient, expected in zip(got, (slope * both, output, whole), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_recomputed_output_is_not_saved():
    x, weight = draw(50, 12).requires_grad_(), draw(5, 12).requires_grad_()

    def loss_of(recompute: bool) -> tuple[torch.Tensor, weakref.ref]:
        hidden = torch.tanh(x) * 2  # the product, since tanh itself saves its output
        hooks = recomputed(hidden, lambda x: torch.tanh(x) * 2, x)
        with hooks if recompute else contextlib.nullcontext():
            return F.linear(hidden, weight).square().sum(), weakref.ref(hidden)

    plain, saved = loss_of(False)
    loss, recomputed_later = loss_of(True)
    assert saved() is not None and recomputed_later() is None
    expected = torch.autograd.grad(plain, (x, weight))
    assert all(map(torch.equal, torch.autograd.grad(loss, (x, weight)), expected))


def saved_numbers(model, arguments) -> int:
    """Numbers saved by a forward pass for the backward pass: allocations that outlive it."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        out = model(*arguments)
    events = profiler.profiler.kineto_results.events()
    return (
        sum(e.nbytes() for e in events if e.name() == "[memory]") // out.element_size()
        - out.numel()
    )


@pytest.mark.parametrize("name", ["tiny", "mnist"])
def test_a_model_saves_less_and_has_the_same_gradients(name):
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
    gradients, kept = [], []
    for version in (accelerate(copy.deepcopy(model)), model):
        trained = [p for p in version.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(version(*arguments).square().mean(), trained))
        kept.append(saved_numbers(version, arguments))
    assert all(map(torch.equal, *gradients))
    assert kept[0] < 0.85 * kept[1]


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a PyTorch without oneDNN"
)
def test_transforms_and_compilers_work(monkeypatch):
    """torch.func gradients, forward-mode differentiation, vmap, torch.compile's graph capture."""
    monkeypatch.setattr(matmul, "onednn_multiplies_faster", lambda: True)
    mlp, stream, x = accelerate(layers.MLP(8)), accelerate(Stream(8, False)), draw(3, 8)
    weights = dict(mlp.named_parameters())

    def loss(weights):
        modulated = stream.modulated(x[None], Modulation(x[:1], x[1:2]))
        return torch.func.functional_call(mlp, weights, modulated)

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


def test_checkpointed_blocks_are_computed_again_in_the_backward_pass():
    blocks = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    x, calls = draw(4, 8), []
    blocks(x).square().sum().backward()
    expected = [p.grad.clone() for p in blocks.parameters()]
    blocks.zero_grad()
    for block in blocks:
        block.forward = lambda x, forward=block.forward: (calls.append(forward), forward(x))[1]
    checkpoint_blocks(blocks)
    output = blocks(x)
    before = len(calls)
    output.square().sum().backward()
    assert len(calls) == before + 3  # each block once more
    for p, grad in zip(blocks.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_compiled_blocks_go_through_the_backend_one_by_one():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    blocks = torch.nn.Sequential(layers.RMSNorm(8), layers.MLP(8))
    x = draw(4, 8)
    expected = blocks(x)
    compile_blocks(blocks, backend)
    assert torch.equal(blocks(x), expected)
    assert len(graphs) == 2
