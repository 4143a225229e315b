"""Backbones: identities with the core's MMDiT, parameters in closed form, and what reads what."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from nanosd3.config import CONFIGS
from nanosd3.layers import attention
from nanosd3.mmdit import MMDiT, feed_forward
from nanosd3.related.backbones import (
    BACKBONES,
    Backbone,
    BackboneConfig,
    ConvBlock,
    CrossBlock,
    Reading,
    SharedBlock,
    ThreeSetBlock,
    UViT,
)
from nanosd3.vae import ResBlock

M, CLIP = 7, 4  # text tokens
MNIST = asdict(CONFIGS["mnist"].mmdit)
CONFIG = BackboneConfig(**MNIST, heads=1, clip_tokens=CLIP)
D = CONFIG.width


def shaken(model: nn.Module) -> nn.Module:
    """With random numbers in place of all zeros."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def make(kind: str, config: BackboneConfig = CONFIG) -> MMDiT:
    torch.manual_seed(0)
    return shaken(BACKBONES[kind](config))


def inputs(batch: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    sizes = (batch, 4, 8, 8), (batch,), (batch, M, CONFIG.context_dim), (batch, CONFIG.pooled_dim)
    z, t, context, pooled = (torch.randn(s, generator=g, dtype=torch.float64) for s in sizes)
    return z, t.sigmoid(), context, pooled


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens, text tokens and conditioning of a block."""
    g = torch.Generator().manual_seed(2)
    sizes = (2, 5, D), (2, M, D), (2, D)
    x, y, c = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    return x, y, c


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_fresh_network_answers_zero_and_learns(kind):
    torch.manual_seed(0)
    model = BACKBONES[kind](CONFIG).double()
    z, *told = inputs()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    out = model(z, *told)
    assert out.shape == z.shape and not out.any()
    losses = []
    for _ in range(6):
        loss = (model(z, *told) - torch.roll(z, 1, 3)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_parameter_gets_a_gradient(kind):
    model = make(kind)
    model(*inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # not the norm of queries that the last text has not
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_everything_told_reaches_the_answer(kind):
    """Time, the pooled text, tokens of CLIP and of T5, and places."""
    model, (z, t, context, pooled) = make(kind), inputs()
    out = model(z, t, context, pooled)
    clip, t5 = context.clone(), context.clone()
    clip[:, CLIP - 1] += 1
    t5[:, CLIP] += 1
    for other in ((z, t / 2, context, pooled), (z, t, context, pooled + 1),
                  (z, t, clip, pooled), (z, t, t5, pooled)):  # fmt: skip
        assert (model(*other) - out).abs().amax((1, 2, 3)).min() > 1e-3
    flat = model(torch.ones_like(z), t, context, pooled)
    assert (flat[:, :, 2:4, 2:4] - flat[:, :, 4:6, 4:6]).abs().max() > 1e-3
    alone = model(z, t[0], context, pooled)  # one time for all
    torch.testing.assert_close(alone, model(z, t[:1].expand(2), context, pooled))
    for i in (0, 1):  # images of a batch do not mix
        one = model(*(x[i : i + 1] for x in (z, t, context, pooled)))
        torch.testing.assert_close(one, out[i : i + 1])


@pytest.mark.parametrize("kind", BACKBONES)
def test_batches_that_differ(kind):
    z, t, context, pooled = inputs()
    with pytest.raises(ValueError, match="batch sizes differ: z 2, t 2, context 1, pooled 2"):
        make(kind)(z, t, context[:1], pooled)


def test_parameters_in_closed_form():
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    heads = 2 * 64  # the norms of queries and keys
    stream = 18 * D * D + (6 + 3 + 1 + 4 + 1) * D + heads
    keys_only = 5 * D * D + 5 * D + heads
    cross = stream + 4 * D * D + (1 + 2 + 1) * D + heads + 2 * D
    blocks = {
        "dit": 2 * stream,
        "cross": 2 * cross,
        "mmdit": 3 * stream + keys_only,
        "mmdit3": 4 * stream + 2 * keys_only,
    }
    ends = count(BACKBONES["mmdit"](replace(CONFIG, depth=0)))
    for kind, expected in blocks.items():
        assert count(BACKBONES[kind](CONFIG)) - ends == expected, kind
    uvit = UViT(CONFIG)
    C = uvit.channels
    conv = 2 * (9 * C * C + C) + 4 * C + 2 * C * (D + 1)
    edges = 2 * (9 * 4 * C) + C + 4 + 2 * C  # in and out, and the last norm
    patches = 2 * (16 * (C // 4 - 1) * D) + 4 * (C - 4)  # of more channels
    assert count(uvit) == ends + blocks["cross"] + 2 * conv + edges + patches


def test_width_and_depth_are_apart():
    assert CONFIG.width == 64 and replace(CONFIG, depth=5).width == 64
    assert replace(CONFIG, heads=3).width == 192
    for kind, make_it in BACKBONES.items():
        with torch.device("meta"):
            model = make_it(replace(CONFIG, heads=2, depth=3))
        assert len(model.joint_blocks) == 3 and model.t_embedder.mlp[2].out_features == 128, kind


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_dit_is_an_mmdit_whose_streams_share_their_weights(qk_norm):
    config = replace(CONFIG, depth=3, qk_norm=qk_norm)
    dit, state = make("dit", config), {}
    for key, value in dit.state_dict().items():
        if ".stream." not in key:
            state[key] = value
            continue
        state[key.replace(".stream.", ".x_block.")] = value
        last = key.startswith("joint_blocks.2.")
        if not (last and ("mlp" in key or "attn.proj" in key)):  # keys and values are left of text
            parts = 2 * D if last and "adaLN" in key else None
            state[key.replace(".stream.", ".context_block.")] = value[:parts]
    mmdit = MMDiT(config).double()
    mmdit.load_state_dict(state)
    torch.testing.assert_close(dit(*inputs()), mmdit(*inputs()))


@torch.no_grad()
def test_three_sets_of_which_two_are_equal_are_mmdit():
    mmdit = make("mmdit", replace(CONFIG, depth=3))
    three = Backbone(replace(CONFIG, depth=3), ThreeSetBlock).double()
    state = {}
    for key, value in mmdit.state_dict().items():
        for name in ("clip_block", "t5_block"):
            state[key.replace("context_block", name)] = value
    three.load_state_dict(state)
    torch.testing.assert_close(three(*inputs()), mmdit(*inputs()))
    for name in ("clip_block", "t5_block"):  # and each of them counts
        changed = Backbone(replace(CONFIG, depth=3), ThreeSetBlock).double()
        changed.load_state_dict(
            {k: v + 0.1 if f"0.{name}.mlp" in k else v for k, v in state.items()}
        )
        assert (changed(*inputs()) - mmdit(*inputs())).abs().max() > 1e-3


@torch.no_grad()
def test_without_reading_cross_is_a_stream_alone():
    """Then a block is DiT's adaLN-Zero block on image tokens."""
    block = shaken(CrossBlock(CONFIG, last=False))
    nn.init.zeros_(block.cross_attn.proj.weight)
    nn.init.zeros_(block.cross_attn.proj.bias)
    x, y, c = tokens()
    alone = shaken(SharedBlock(CONFIG, last=False))
    alone.stream.load_state_dict(block.stream.state_dict())
    expected, _ = alone(x, y[:, :0], c)
    torch.testing.assert_close(block(x, y, c)[0], expected)


@torch.no_grad()
def test_reading_by_hand():
    reading, (x, y, _) = shaken(Reading(D, qk_norm=True)), tokens()
    q, (k, v) = reading.ln_q(reading.q(x)), reading.kv(y).chunk(2, dim=2)
    weights = (q @ reading.ln_k(k).transpose(1, 2) / 8).softmax(2)  # one head of 64
    torch.testing.assert_close(reading(x, y), reading.proj(weights @ v))


@torch.no_grad()
def test_a_conv_block_is_the_autoencoders_until_it_is_told_something():
    torch.manual_seed(0)
    block, plain = ConvBlock(16, D, 8).double(), ResBlock(16, 16, 8).double()
    shaken(block)
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        getattr(plain, layer).load_state_dict(getattr(block, layer).state_dict())
    x, c = torch.randn(2, 16, 8, 8, dtype=torch.float64), tokens()[2]
    told = block(x, c)
    nn.init.zeros_(block.adaLN_modulation.weight)
    nn.init.zeros_(block.adaLN_modulation.bias)
    torch.testing.assert_close(block(x, c), plain(x))
    assert (told - plain(x)).abs().max() > 1e-2


@torch.no_grad()
def test_uvit_is_a_transformer_beside_a_skip():
    """With a head that is zero, what is left is a convolutional network that saw no text."""
    model, (z, t, context, pooled) = make("uvit"), inputs()
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)
    c = model.t_embedder(timesteps(t)) + model.y_embedder(pooled)
    h = model.conv_in(z)
    for block in (*model.down_blocks, *model.up_blocks):
        h = block(h, c)
    expected = model.conv_out(nn.functional.silu(model.norm_out(h)))
    torch.testing.assert_close(model(z, t, context, pooled), expected)
    torch.testing.assert_close(model(z, t, context + 1, pooled), expected)


def timesteps(t: Tensor) -> Tensor:
    from nanosd3.embeddings import timestep_embedding

    return timestep_embedding(t).double()


# --- what reads what ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rewritten"), [("dit", True), ("cross", False), ("mmdit", True), ("mmdit3", True)]
)
def test_whether_the_text_reads_the_image(kind, rewritten):
    block = make(kind).joint_blocks[0]
    x, y, c = tokens()
    x.requires_grad_()
    _, after = block(x, y, c)
    assert (after is y) == (not rewritten)
    if rewritten:
        (grad,) = torch.autograd.grad(after[:, CLIP:].square().sum(), x)
        assert grad.abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("kind", ["dit", "cross", "mmdit", "mmdit3"])
@torch.no_grad()
def test_fresh_blocks_are_the_identity(kind):
    torch.manual_seed(0)
    x, y, c = tokens()
    model = BACKBONES[kind](CONFIG).double()
    after = model.joint_blocks[0](x, y, c)
    assert after[0].equal(x) and after[1].equal(y)
    last = model.joint_blocks[1](x, y, c)
    assert last[0].equal(x) and (last[1] is None or kind == "cross")


def test_a_shared_block_is_a_plain_one_on_one_sequence():
    block, (x, y, c) = shaken(SharedBlock(CONFIG, last=False)), tokens()
    s, stream = torch.cat([y, x], 1), block.stream
    attn_mod, mlp_mod = stream.modulation(c)
    gathered = attention(*stream.attn.project(stream.modulated(s, attn_mod)))
    s = s + attn_mod.gate[:, None] * stream.attn.proj(gathered)
    s = feed_forward(stream, s, mlp_mod)
    image, text = block(x, y, c)
    torch.testing.assert_close(torch.cat([text, image], 1), s)
    final = SharedBlock(CONFIG, last=True).double()
    final.load_state_dict(block.state_dict())
    torch.testing.assert_close(final(x, y, c)[0], image)


def test_queries_differ_from_the_start():
    """Biases of queries, keys and values are random, as the core's are."""
    for kind in BACKBONES:
        model = BACKBONES[kind](CONFIG)
        for name, parameter in model.named_parameters():
            if name.endswith(("qkv.bias", "cross_attn.q.bias", "cross_attn.kv.bias")):
                assert 0.3 < parameter.std() < 0.7, (kind, name)


@torch.no_grad()
def test_which_tokens_are_t5s():
    """Those after CLIP's, and no others."""
    block, (x, y, c) = shaken(ThreeSetBlock(CONFIG, last=False)), tokens()
    image, text = block(x, y, c)
    block.t5_block.mlp.fc2.bias += 1
    same, changed = block(x, y, c)
    assert same.equal(image) and changed[:, :CLIP].equal(text[:, :CLIP])
    assert (changed - text)[:, CLIP:].abs().amax((0, 2)).min() > 1e-3
