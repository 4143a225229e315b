"""DiT: sizes, costs, the four blocks, the start, and that everything told reaches the answer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nanosd3.embeddings import timestep_embedding
from nanosd3.layers import attention, modulate
from nanosd3.mmdit import Stream, feed_forward
from nanosd3.related.dit import (
    BLOCKS,
    DIT_CONFIGS,
    CrossAttention,
    DiT,
    DiTConfig,
    SelfAttention,
    multiply_adds,
)

TINY = DIT_CONFIGS["tiny"]
XL = DIT_CONFIGS["DiT-XL/2"]

# Giga multiply-adds of the paper's table 4 and the sizes of its table 1
PAPER = {
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06,
    "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71,
    "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64,
}  # fmt: skip
MILLIONS = {"S": 33, "B": 130, "L": 458, "XL": 675}
BLOCK_COSTS = {"in_context": 119.35, "cross_attention": 137.60, "adaln": 118.55,
               "adaln_zero": 118.62, "adaln_gates": 118.62}  # fmt: skip


def shaken(config: DiTConfig, seed: int = 0) -> DiT:
    """With random numbers in place of all zeros."""
    torch.manual_seed(seed)
    model = DiT(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def inputs(config: DiTConfig = TINY, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (batch, config.latent_channels, config.latent_size, config.latent_size)
    z = torch.randn(size, generator=generator, dtype=torch.float64)
    return z, torch.tensor([0.2, 0.5, 0.9][:batch]), torch.tensor([0, 7, 10][:batch])


# --- sizes and costs ----------------------------------------------------------------------------


def formula(c: DiTConfig) -> int:
    """Parameters in closed form, with adaLN-Zero."""
    D, features = c.width, c.patch_size**2 * c.latent_channels
    block = (3 * D + D + 4 * D + D + 6 * D) + (3 + 1 + 4 + 4 + 6) * D * D
    embedders = (features + 1) * D + (256 + 1) * D + (D + 1) * D + (c.classes + 1) * D
    final = (D + 1) * 2 * D + (D + 1) * features * (2 if c.learned_variance else 1)
    return embedders + c.depth * block + final


@pytest.mark.parametrize("name", DIT_CONFIGS)
def test_parameters(name):
    config = DIT_CONFIGS[name]
    with torch.device("meta"):
        model = DiT(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == formula(config)
    if name.endswith("/2"):
        assert round(count / 1e6) == MILLIONS[name.removeprefix("DiT-").removesuffix("/2")]


def test_sizes_of_the_paper():
    """Table 1, at all three patch sizes."""
    rows = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    for size, row in rows.items():
        for patch in (2, 4, 8):
            c = DIT_CONFIGS[f"DiT-{size}/{patch}"]
            assert (c.depth, c.width, c.heads) == row and c.patch_size == patch
            assert (c.latent_size, c.latent_channels, c.classes) == (32, 4, 1000)
            assert c.learned_variance and c.block == "adaln_zero" and c.null == 1000


def test_parameters_of_the_published_network():
    """As its own code counts them, the position table among them."""
    with torch.device("meta"):
        model = DiT(XL)
    assert sum(value.numel() for value in model.state_dict().values()) == 675_129_632


@pytest.mark.parametrize("name", PAPER)
def test_costs(name):
    assert multiply_adds(DIT_CONFIGS[name]) / 1e9 == pytest.approx(PAPER[name], rel=0.01)


def test_costs_in_closed_form():
    c = replace(XL, depth=3, latent_size=16)
    D, N = c.width, 64
    block = 12 * D * D * N + 2 * N * N * D + 6 * D * D
    ends = N * (16 * D + 32 * D) + 256 * D + D * D + 2 * D * D
    assert multiply_adds(c) == 3 * block + ends


@pytest.mark.parametrize("block", BLOCKS)
def test_costs_of_blocks(block):
    cost = multiply_adds(replace(XL, block=block)) / 1e9
    assert cost == pytest.approx(BLOCK_COSTS[block], abs=0.006)


def test_costs_at_512_pixels():
    assert multiply_adds(replace(XL, latent_size=64)) / 1e9 == pytest.approx(524.6, rel=0.001)


def test_names_are_those_of_the_checkpoints():
    with torch.device("meta"):
        names = set(DiT(replace(XL, depth=2)).state_dict())
    linear = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in
              ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]  # fmt: skip
    linear += ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    linear += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    expected = {f"{name}.{part}" for name in linear for part in ("weight", "bias")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}


# --- attention and blocks -----------------------------------------------------------------------


def heads_by_loops(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention (L, D) of queries (L, D), keys and values (M, D)."""
    width = q.shape[1] // heads
    parts = []
    for h in range(heads):
        mine = slice(h * width, (h + 1) * width)
        weights = torch.softmax(q[:, mine] @ k[:, mine].T / width**0.5, dim=1)
        parts.append(weights @ v[:, mine])
    return torch.cat(parts, dim=1)


def test_self_attention_against_loops():
    torch.manual_seed(0)
    attn, x = SelfAttention(24, 2).double(), torch.randn(2, 5, 24).double()
    for b in range(2):
        q, k, v = attn.qkv(x[b]).chunk(3, dim=1)
        expected = attn.proj(heads_by_loops(q, k, v, 2))
        torch.testing.assert_close(attn(x)[b], expected)


def test_cross_attention_against_loops():
    torch.manual_seed(0)
    attn, x = CrossAttention(24, 3).double(), torch.randn(2, 5, 24).double()
    others = torch.randn(2, 2, 24).double()
    for b in range(2):
        k, v = attn.kv(others[b]).chunk(2, dim=1)
        expected = attn.proj(heads_by_loops(attn.q(x[b]), k, v, 3))
        torch.testing.assert_close(attn(x, others)[b], expected)


def test_a_block_is_a_stream_of_mmdit():
    """A block of adaLN-Zero has the weights and the answer of an image stream alone."""
    model = shaken(replace(TINY, width=128))
    block, stream = model.blocks[0], Stream(128, qk_norm=False).double()
    stream.load_state_dict(block.state_dict())
    x, c = torch.randn(3, 16, 128).double(), torch.randn(3, 128).double()
    mod, mlp_mod = stream.modulation(c)
    attended = stream.attn.proj(attention(*stream.attn.project(stream.modulated(x, mod))))
    expected = feed_forward(stream, x + mod.gate[:, None] * attended, mlp_mod)
    torch.testing.assert_close(block(x, c, torch.zeros(3, 2, 128)), expected)


def spelled_out(model: DiT, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The plain kinds of block, written out again from the paper's figure 3."""
    D = model.config.width
    x = model.x_embedder.proj(z).flatten(2).mT + model.pos_embed
    time = model.t_embedder.mlp(timestep_embedding(t).double())
    label = model.y_embedder["embedding_table"].weight[y]
    if model.config.block == "in_context":
        x = torch.cat([time[:, None], label[:, None], x], dim=1)
    ln = nn.functional.layer_norm
    for block in model.blocks:
        if model.config.block == "adaln":
            c = block.adaLN_modulation[1](nn.functional.silu(time + label))
            x = x + block.attn(modulate(x, c[:, :D], c[:, D : 2 * D]))
            x = x + block.mlp(modulate(x, c[:, 2 * D : 3 * D], c[:, 3 * D :]))
            continue
        one, two = block.norm1, block.norm2
        x = x + block.attn(ln(x, (D,), one.weight, one.bias, eps=1e-6))
        if model.config.block == "cross_attention":
            norm = block.norm_cross
            context = torch.stack([time, label], dim=1)
            x = x + block.cross_attn(ln(x, (D,), norm.weight, norm.bias, eps=1e-6), context)
        x = x + block.mlp(ln(x, (D,), two.weight, two.bias, eps=1e-6))
    if model.config.block == "adaln":
        shift, scale = model.final_layer.adaLN_modulation(time + label).chunk(2, dim=1)
        x = model.final_layer.linear(modulate(x, shift, scale))
    else:
        norm = model.final_layer.norm
        x = x[:, 2:] if model.config.block == "in_context" else x
        x = model.final_layer.linear(ln(x, (D,), norm.weight, norm.bias, eps=1e-6))
    x = x.view(len(z), 4, 4, 2, 2, -1)  # rows, columns, p, p, channels
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(z), -1, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize("block", ["in_context", "cross_attention", "adaln"])
def test_blocks_as_in_the_paper(block):
    model = shaken(replace(TINY, block=block))
    torch.testing.assert_close(model(*inputs()), spelled_out(model, *inputs()))


# --- start and wiring ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("learned_variance", [False, True])
def test_fresh_network_answers_zero(block, learned_variance):
    z, t, y = inputs()
    config = replace(TINY, block=block, learned_variance=learned_variance)
    answer = DiT(config).double()(z, t, y)
    assert answer.shape == (3, 8 if learned_variance else 4, 8, 8)
    assert torch.equal(answer, torch.zeros_like(answer))


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_only_blocks_of_adaln_zero_start_as_the_identity(block):
    torch.manual_seed(0)
    model = DiT(replace(TINY, block=block))
    x, c, pair = torch.randn(2, 16, 16), torch.randn(2, 16), torch.randn(2, 2, 16)
    unchanged = [torch.equal(layer(x, c, pair), x) for layer in model.blocks]
    assert unchanged == [block == "adaln_zero"] * 2


def test_initial_weights():
    torch.manual_seed(0)
    model = DiT(replace(DIT_CONFIGS["DiT-S/8"], depth=1, width=384))
    table, mlp = model.y_embedder["embedding_table"].weight, model.t_embedder.mlp
    for weight in (table, mlp[0].weight, mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(weight.mean().item()) < 1e-3
    for weight in (model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc1.weight,
                   model.x_embedder.proj.weight.flatten(1)):  # fmt: skip
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier, uniform
        assert 0.99 * bound < weight.abs().max().item() <= bound
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    final = model.final_layer
    zeros = (model.blocks[0].adaLN_modulation[1], final.adaLN_modulation[1], final.linear)
    assert all(not layer.weight.any() for layer in zeros)


def test_initial_signals_keep_their_size():
    torch.manual_seed(0)
    model = DiT(replace(TINY, width=256, heads=4, classes=99))
    mlp = model.t_embedder.mlp
    for weight, std in (
        (model.y_embedder["embedding_table"].weight, 1),
        (mlp[0].weight, 256**-0.5),
        (mlp[2].weight, 256**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.02)


def test_gates_not_zero_differ_in_the_blocks_only():
    torch.manual_seed(0)
    zero = DiT(TINY)
    torch.manual_seed(0)
    gates = DiT(replace(TINY, block="adaln_gates"))
    differ = {n for n, p in zero.state_dict().items() if not torch.equal(p, gates.state_dict()[n])}
    assert differ == {f"blocks.{i}.adaLN_modulation.1.weight" for i in range(2)}


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_everything_reaches_the_answer(block):
    """Time, label and every latent change every part of it; both halves of the channels differ."""
    model = shaken(replace(TINY, block=block))
    z, t, y = inputs()
    answer = model(z, t, y)
    for other in ((z, t + 0.05, y), (z, t, (y + 1) % 11), (z.roll(1, 3), t, y)):
        difference = (model(*other) - answer).abs().amax((2, 3))  # (B, 2 C)
        assert difference.min() > 1e-6
    torch.testing.assert_close(model(z[1:2], t[1:2], y[1:2]), answer[1:2])
    torch.testing.assert_close(model(z, t[1], y)[1:2], answer[1:2])
    assert not torch.allclose(answer[:, :4], answer[:, 4:])


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_gets_a_gradient(block):
    model = shaken(replace(TINY, block=block))
    z, t, y = inputs()
    model(z, t, y).square().sum().backward()
    table = model.y_embedder["embedding_table"].weight.grad
    assert [i for i in range(11) if table[i].any()] == [0, 7, 10]
    assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in model.parameters())


def test_what_does_not_fit():
    model = DiT(TINY)
    z, t, y = (x.float() if x.is_floating_point() else x for x in inputs())
    with pytest.raises(ValueError, match="latents 8x8, got 8x6"):
        model(z[..., :6], t, y)
    for batch in ((z, t[:2], y), (z, t, y[:2]), (z[:2], t, y)):
        with pytest.raises(ValueError, match="batch sizes differ"):
            model(*batch)
    for label in (-1, 11):
        with pytest.raises(ValueError, match="labels must be from 0 to 10"):
            model(z, t, torch.tensor([0, label, 3]))
    with pytest.raises(ValueError, match="got 'adaln-zero'"):
        DiT(replace(TINY, block="adaln-zero"))
