"""What the other tests of the spine pass over: defaults, ends, boundaries, rounding, initial
weights. Every test here was written because a planted fault survived without it (mutation.py).
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanosd3 import products
from nanosd3.config import CONFIGS
from nanosd3.flow import logit_normal, mode, schedule, stratified, uniform
from nanosd3.layers import RMSNorm, modulate, timestep_embedding
from nanosd3.mmdit import MMDiT
from nanosd3.patchify import centre_crop, patchify, sincos_positions, unpatchify
from nanosd3.products import linear
from nanosd3.samplers import Skip, guided, inpainting

MMDIT = replace(CONFIGS["tiny"].mmdit, depth=3, dual_attention=(1,))

# --- time ---------------------------------------------------------------------------------------


def test_defaults():
    u = torch.linspace(0.01, 0.99, 9)
    assert torch.equal(uniform(u), u)
    assert torch.equal(logit_normal(u), logit_normal(u, 0.0, 1.0))
    assert torch.equal(mode(u), mode(u, 1.29))
    assert torch.equal(schedule(5), schedule(5, 1.0))


def test_stratified_is_uniform_in_its_intervals():
    u = stratified(10_000, torch.Generator().manual_seed(0))
    within = (u.double() * 10_000) % 1
    assert torch.histc(within, 10, 0, 1).min() > 800


def test_stratified_draws_from_its_generator_alone():
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws.append(stratified(64, torch.Generator().manual_seed(0)))
    assert torch.equal(*draws)


def test_stratified_comes_near_the_ends_and_never_there(monkeypatch):
    u = stratified(10_000, torch.Generator().manual_seed(0))
    assert u.min() < 1e-3 and u.max() > 1 - 1e-3
    for extreme in (0.0, 1 - 2**-24):  # the least and the most that torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda n, generator, x=extreme: torch.full((n,), x))
        u = stratified(64, torch.Generator())
        assert u.min() > 0 and u.max() < 1
        assert torch.isfinite(logit_normal(u)).all()


# --- guidance -----------------------------------------------------------------------------------


def test_skip_layers_acts_at_both_ends_of_its_part():
    model = lambda z, t, context, pooled, skip=(): z + len(skip)  # noqa: E731
    text = (torch.zeros(1, 1, 1), torch.zeros(1, 1))
    velocity = guided(model, text, text, 1.0, Skip((7,), 2.0, first=0.75, last=0.5))
    acts = [bool(velocity(torch.zeros(1), torch.tensor(t))) for t in (0.76, 0.75, 0.5, 0.49)]
    assert acts == [False, True, True, False]


def test_half_repainted_is_half_of_each():
    x0, noise = torch.randn(2, 1, 4, 2, 2)
    velocity = inpainting(lambda z, t: z * t, torch.full((1, 1, 2, 2), 0.25), x0, noise)
    z, t = torch.randn(1, 4, 2, 2), torch.tensor(0.4)
    torch.testing.assert_close(velocity(z, t), 0.75 * (noise - x0) + 0.25 * z * t)


# --- patches ------------------------------------------------------------------------------------


def test_each_side_is_checked():
    for height, width in ((4, 5), (5, 4)):
        with pytest.raises(ValueError, match=f"{height}x{width} is not divisible"):
            patchify(torch.zeros(1, 1, height, width), 2)
        with pytest.raises(ValueError, match=f"do not make a {height}x{width} image"):
            unpatchify(torch.zeros(1, 4, 4), 2, height, width)
    for rows, columns in ((5, 1), (1, 5)):
        with pytest.raises(ValueError, match="do not fit"):
            centre_crop(sincos_positions(8, 4, 4, 4), rows, columns)


def test_crops_of_another_parity():
    square = torch.arange(36).view(1, 36, 1)
    assert centre_crop(square, 3, 5).flatten().tolist() == [
        6 * row + column for row in (1, 2, 3) for column in range(5)
    ]
    assert torch.equal(centre_crop(square, 6, 6), square)


def test_positions_between_patches_and_in_full_precision():
    """A grid whose margin is half a patch; and the far corner, against float64."""
    positions = sincos_positions(32, 5, 4, 4)
    assert positions.dtype == torch.float32
    assert positions[0, 0, 0].item() == pytest.approx(math.sin(-0.5))
    corner = sincos_positions(1536, 192, 64, 16)[0, -1, :384].double()
    exact = [math.sin((191 - 64) / 4 * 10000 ** (-k / 384)) for k in range(384)]
    torch.testing.assert_close(corner, torch.tensor(exact).double(), atol=1e-7, rtol=0)


# --- layers -------------------------------------------------------------------------------------


def test_norms_of_small_numbers():
    """Where the epsilon decides."""
    x = 1e-3 * torch.randn(2, 5, 8, dtype=torch.float64)
    norm = RMSNorm(8).double()  # fresh: weight 1
    torch.testing.assert_close(norm(x), x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt())
    centred = x - x.mean(2, keepdim=True)
    zero = torch.zeros(2, 8, dtype=torch.float64)
    expected = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modulate(x, zero, zero), expected)


def test_time_in_low_precision_and_on_other_devices():
    t = torch.tensor([0.2505, 0.9]).bfloat16()
    assert torch.equal(timestep_embedding(t), timestep_embedding(t.float()))
    assert timestep_embedding(torch.empty(3, device="meta")).device.type == "meta"


@pytest.fixture
def fast(monkeypatch):
    """A processor on which `linear` takes the other library."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: True)


@pytest.mark.usefixtures("fast")
def test_the_other_library_multiplies_alike():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
        x, weight = x.double(), weight.double()  # it knows no float64
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    linear(x, weight.requires_grad_()).sum().backward()  # nor gradients
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(4, 8))


@pytest.mark.usefixtures("fast")
def test_other_devices_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(products, "product", lambda *_: pytest.fail("not for this device"))
    with torch.no_grad():
        y = linear(torch.empty(2, 8, device="meta"), torch.empty(4, 8, device="meta"))
    assert y.shape == (2, 4) and y.device.type == "meta"


def test_the_processor_is_unknown_off_linux(monkeypatch):
    def no_such_file(*_):
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", no_such_file)
    assert products.onednn_multiplies_faster.__wrapped__() is False


# --- MMDiT --------------------------------------------------------------------------------------


def test_initial_weights():
    """The spread of every weight and bias, as `initialise` says."""
    torch.manual_seed(0)
    model = MMDiT(replace(MMDIT, pooled_dim=500))
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            assert (module.weight == 1).all(), name
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight.detach().flatten(1)
        fan_out, fan_in = weight.shape
        if "adaLN_modulation" in name or name == "final_layer.linear":
            spread = 0.0
        elif name.startswith(("t_embedder", "y_embedder")):  # normal
            spread = fan_in**-0.5
            assert weight.abs().max() > 3 * spread, name
        else:  # uniform, so bounded
            spread = math.sqrt(2 / (fan_in + fan_out))
            assert weight.abs().max() <= math.sqrt(3) * spread, name
        assert weight.std().item() == pytest.approx(spread, rel=0.04), name
        of_bias = 0.5 if name.endswith("qkv") else 0.0
        assert module.bias.std().item() == pytest.approx(of_bias, rel=0.15), name


def test_the_last_block_has_no_text_to_give():
    model = MMDiT(MMDIT)
    D = MMDIT.width
    x, y, c = torch.randn(2, 4, D), torch.randn(2, 3, D), torch.randn(2, D)
    assert model.joint_blocks[0](x, y, c)[1].shape == y.shape
    assert model.joint_blocks[-1](x, y, c)[1] is None


def test_positions_take_the_precision_of_the_latents():
    model = MMDiT(MMDIT).bfloat16()
    model.pos_embed = model.pos_embed.float()
    z, t = torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor(0.5)
    context, pooled = torch.randn(1, 3, MMDIT.context_dim), torch.randn(1, MMDIT.pooled_dim)
    assert model(z, t, context.bfloat16(), pooled.bfloat16()).dtype == torch.bfloat16


def test_dual_blocks_are_those_that_are_named():
    blocks = MMDiT(MMDIT).joint_blocks
    assert [hasattr(block.x_block, "attn2") for block in blocks] == [False, True, False]
    assert not any(hasattr(block.context_block, "attn2") for block in blocks)
