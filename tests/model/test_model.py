"""Wiring: every part reaches the output, nothing is shared or dead, shapes are checked."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanosd3.config import CONFIGS
from nanosd3.embeddings import batch_times, timestep_embedding
from nanosd3.flow import flow_loss, interpolate
from nanosd3.layers import RMSNorm, attention, modulate, split_heads
from nanosd3.mmdit import MMDiT
from nanosd3.patchify import centre_crop, patchify, sincos_positions, unpatchify
from nanosd3.vae import AutoencoderKL, kl_divergence, sample_posterior

TINY = CONFIGS["tiny"]
MMDIT = replace(TINY.mmdit, depth=3, dual_attention=(1,))


def perturbed(config=MMDIT) -> MMDiT:
    """A model whose zero-initialised parts are not zero, so that everything counts."""
    torch.manual_seed(0)
    model = MMDiT(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def inputs(B=2, H=8, W=8, M=7, config=MMDIT):
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    z, context = draw(B, config.latent_channels, H, W), draw(B, M, config.context_dim)
    return z, torch.rand(B, generator=g), context, draw(B, config.pooled_dim)


# --- patches ------------------------------------------------------------------------------------


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)
)
def test_patchify_round_trip(B, C, rows, columns, p):
    x = torch.randn(B, C, rows * p, columns * p)
    tokens = patchify(x, p)
    assert tokens.shape == (B, rows * columns, p * p * C)
    assert torch.equal(unpatchify(tokens, p, rows * p, columns * p), x)


def test_patchify_order():
    """Against loops: tokens row by row; in a token (row, column, channel)."""
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = patchify(x, 2)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                expected = [
                    x[b, c, 2 * i + q, 2 * j + r]
                    for q in range(2)
                    for r in range(2)
                    for c in range(3)
                ]
                assert tokens[b, i * 3 + j].tolist() == [int(e) for e in expected]


def test_patchify_refuses():
    with pytest.raises(ValueError, match="5x4 is not divisible by the patch size 2"):
        patchify(torch.zeros(1, 1, 5, 4), 2)
    with pytest.raises(ValueError, match="5 tokens"):
        unpatchify(torch.zeros(1, 5, 4), 2, 4, 4)
    with pytest.raises(ValueError, match="do not fit"):
        centre_crop(sincos_positions(8, 4, 4, 4), 5, 3)


def test_positions_differ_and_crop_from_the_middle():
    positions = sincos_positions(32, 6, 4, 4)
    assert len({tuple(p) for p in positions[0].tolist()}) == 36
    square = positions.view(6, 6, 32)
    crop = centre_crop(positions, 2, 4)
    assert torch.equal(crop.view(2, 4, 32), square[2:4, 1:5])
    # rows share the second half, columns the first
    assert torch.equal(square[0, 3, :16], square[5, 3, :16])
    assert torch.equal(square[3, 0, 16:], square[3, 5, 16:])


# --- layers -------------------------------------------------------------------------------------


def test_rms_norm():
    norm, x = RMSNorm(8), torch.randn(3, 8)
    norm.weight.data = torch.randn(8)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_modulate():
    x, shift, scale = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8)
    normed = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    expected = normed * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulate(x, shift, scale), expected)


def test_attention_against_loops():
    q, k, v = split_heads(torch.randn(2, 5, 3 * 128), 3)
    out = attention(q, k, v)
    for b in range(2):
        for h in range(2):
            weights = torch.softmax(q[b, h] @ k[b, h].T / 8, dim=1)
            torch.testing.assert_close(out[b, :, 64 * h : 64 * h + 64], weights @ v[b, h])


# --- MMDiT --------------------------------------------------------------------------------------


def test_fresh_model_answers_zero():
    z, t, context, pooled = inputs()
    v = MMDiT(MMDIT)(z, t, context, pooled)
    assert v.shape == z.shape and torch.equal(v, torch.zeros_like(z))


def test_first_loss():
    """1 + E[x0^2], up to sampling, at every time."""
    x0, noise = 1.5 * torch.randn(64, 4, 8, 8), torch.randn(64, 4, 8, 8)
    _, t, context, pooled = inputs(B=64)
    loss = flow_loss(MMDiT(MMDIT)(interpolate(x0, noise, t), t, context, pooled), x0, noise)
    assert loss.mean().item() == pytest.approx(1 + 1.5**2, abs=0.1)


def test_every_parameter_gets_a_gradient():
    model = perturbed()
    model(*inputs()).square().mean().backward()
    # The last block's text has no queries: its query norm, stored in official files, is frozen.
    unused = {"joint_blocks.2.context_block.attn.ln_q.weight"}
    for name, parameter in model.named_parameters():
        if name in unused:
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    # ... and the rows of queries in its fused projection are never read.
    grad = model.joint_blocks[2].context_block.attn.qkv.weight.grad
    assert (
        grad[: model.config.width].abs().sum() == 0 and grad[model.config.width :].abs().sum() > 0
    )


def test_learning_starts_from_zero():
    """Training starts in spite of the zero initialisation: gates open one after another, from
    the output back, and after a few steps every parameter has a gradient."""
    torch.manual_seed(0)
    model = MMDiT(MMDIT)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    target = torch.randn(2, 4, 8, 8)
    for _ in range(6):
        optimizer.zero_grad()
        (model(*inputs()) - target).square().mean().backward()
        optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("part", range(4), ids=["z", "t", "context", "pooled"])
def test_every_input_reaches_the_output(part):
    model, args = perturbed(), list(inputs())
    before = model(*args)
    args[part] = args[part] * 0.5 + 0.1
    assert (model(*args) - before).abs().max() > 1e-4


@pytest.mark.parametrize("change", [{"qk_norm": False}, {"dual_attention": ()}, {"grid_span": 8}])
def test_every_option_reaches_the_output(change):
    model = perturbed()
    other = MMDiT(replace(MMDIT, **change))
    shared = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    own = other.state_dict()
    for key in own:
        if key in shared:
            own[key] = shared[key][: own[key].shape[0]]  # modulation of a dual block is longer
    other.load_state_dict(own)
    assert (other(*inputs()) - model(*inputs())).abs().max() > 1e-4


@pytest.mark.parametrize("stream", ["x_block", "context_block"])
@pytest.mark.parametrize("branch", ["attn.proj", "mlp.fc2"])
def test_every_branch_reaches_the_output(stream, branch):
    """With one branch's output projection zeroed in the first block, the output changes."""
    model = perturbed()
    before = model(*inputs())
    linear = model.joint_blocks[0].get_submodule(f"{stream}.{branch}")
    linear.weight.data.zero_()
    assert (model(*inputs()) - before).abs().max() > 1e-4


def test_attention_reaches_the_residual_stream():
    """With every MLP silenced, image tokens still attend to each other and the text."""
    model = perturbed()
    for name, parameter in model.named_parameters():
        if ".mlp.fc2." in name and "joint_blocks" in name:
            parameter.data.zero_()
    z, t, context, pooled = inputs()
    before = model(z, t, context, pooled)
    assert (model(z, t, context + 0.5, pooled) - before).abs().max() > 1e-4
    z = z.clone()
    z[:, :, 0, 0] += 1  # one token; another one, far away, must notice
    assert (model(z, t, context, pooled) - before)[:, :, 7, 7].abs().max() > 1e-5


def test_streams_share_no_parameters():
    pointers = [p.data_ptr() for p in perturbed().parameters()]
    assert len(pointers) == len(set(pointers))


def test_text_is_a_set():
    """No positions on text tokens: their order changes nothing."""
    model = perturbed().double()
    z, t, context, pooled = (x.double() for x in inputs())
    shuffled = context[:, torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(
        model(z, t, context, pooled), model(z, t, shuffled, pooled), atol=1e-9, rtol=0
    )


def test_image_tokens_are_not_a_set():
    model, (z, t, context, pooled) = perturbed(), inputs()
    flipped = model(z.flip(3), t, context, pooled).flip(3)
    assert (flipped - model(z, t, context, pooled)).abs().max() > 1e-3


def test_batch_of_one_is_a_row():
    model, args = perturbed().double(), [x.double() for x in inputs(B=3)]
    whole = model(*args)
    for i in range(3):
        torch.testing.assert_close(model(*(x[i : i + 1] for x in args)), whole[i : i + 1])


def test_one_time_for_all():
    model, (z, _, context, pooled) = perturbed(), inputs()
    same = model(z, torch.tensor(0.3), context, pooled)
    torch.testing.assert_close(same, model(z, torch.tensor([0.3, 0.3]), context, pooled))


def test_sizes():
    model = perturbed()
    for H, W in ((4, 8), (12, 2), (8, 10)):
        assert model(*inputs(H=H, W=W)).shape == (2, 4, H, W)
    with pytest.raises(ValueError, match="7x8 is not divisible"):
        model(*inputs(H=7))
    with pytest.raises(ValueError, match="do not fit"):
        model(*inputs(H=16))
    z, t, context, pooled = inputs()
    for broken in (
        (z, t[:1], context, pooled),
        (z, t, context[:1], pooled),
        (z, t, context, pooled[:1]),
    ):
        with pytest.raises(ValueError, match="batch sizes differ"):
            model(*broken)


# --- autoencoder --------------------------------------------------------------------------------


def test_vae_shapes_and_sizes():
    vae = AutoencoderKL(TINY.vae)
    mean, logvar = vae.encode(torch.randn(2, 1, 24, 32))
    assert mean.shape == logvar.shape == (2, 4, 6, 8)
    assert vae.decode(mean).shape == (2, 1, 24, 32)
    with pytest.raises(ValueError, match="30x32 is not divisible by 4"):
        vae.encode(torch.zeros(1, 1, 30, 32))


def test_vae_gradients_and_clamp():
    vae = AutoencoderKL(TINY.vae)
    mean, logvar = vae.encode(torch.randn(2, 1, 16, 16))
    z = sample_posterior(mean, logvar, torch.randn_like(mean))
    (vae.decode(z).square().mean() + kl_divergence(mean, logvar).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())
    vae.encoder.conv_out.bias.data += 1e4
    assert vae.encode(torch.zeros(1, 1, 8, 8))[1].max() == 20


def test_posterior_and_kl():
    mean, logvar = torch.randn(2, 3, 4, 4, 4)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(
        sample_posterior(mean, logvar, noise), mean + logvar.exp().sqrt() * noise
    )
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(posterior, prior).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    assert kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2)) == 0


def test_latents_are_shifted_then_scaled():
    vae = AutoencoderKL(replace(TINY.vae, shift=0.5, scale=2.0))
    z = torch.tensor([[0.5, 1.0, -1.5]])
    assert vae.normalise(z).tolist() == [[0.0, 1.0, -4.0]]
    torch.testing.assert_close(vae.denormalise(vae.normalise(z)), z)


MMDIT = replace(CONFIGS["tiny"].mmdit, depth=3, dual_attention=(1,))


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


def test_times_of_a_batch():
    half, x = torch.tensor(0.5), torch.zeros(3, 2)
    assert batch_times(half, x).tolist() == [0.5] * 3
    assert batch_times(half, x.to("meta")).is_meta  # as on a GPU; samplers' times lie on the CPU
    own = torch.tensor([0.1, 0.2])
    assert batch_times(own, x) is own  # the network checks how many there are


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
