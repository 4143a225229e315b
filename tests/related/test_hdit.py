"""HDiT: against plain loops, the start, the wiring, the loss's weight, and what a pass costs."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from nanosd3.embeddings import timestep_embedding
from nanosd3.flow import interpolate
from nanosd3.related.axial_rope import axial_frequencies, cell_centres, rotate, rotation
from nanosd3.related.hdit import (
    AdaRMSNorm,
    HDiT,
    HDiTConfig,
    HDiTLevel,
    HourglassBlock,
    hdit_loss,
    hdit_multiply_adds,
    merge,
    soft_min_snr,
    split,
)
from nanosd3.related.neighbourhood import grid_tiles

CPU = torch.device("cpu")
LEVELS = (HDiTLevel(16, 1, 3), HDiTLevel(32, 2, 3), HDiTLevel(48, 2, None))
SMALL = HDiTConfig(2, 2, LEVELS, head_dim=8, mapping_width=24, mapping_depth=2, pooled_dim=10)


def shaken_network(config: HDiTConfig = SMALL, seed: int = 0) -> HDiT:
    """With random numbers in place of all zeros."""
    torch.manual_seed(seed)
    model = HDiT(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def inputs(size: tuple[int, int] = (24, 16), batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, 2, *size, generator=generator, dtype=torch.float64)
    pooled = torch.randn(batch, 10, generator=generator, dtype=torch.float64)
    return z, torch.tensor([0.2, 0.5, 0.9][:batch]), pooled


@pytest.mark.parametrize("setting", [torch.inference_mode, lambda: torch.device("meta")])
def test_training_after_looking(setting):
    """Angles and tiles are kept, and those made in inference mode could not be trained with; the
    first caller may have another default device, too."""
    rotation.cache_clear()
    grid_tiles.cache_clear()
    model, (z, t, pooled) = shaken_network(), inputs()
    with setting():
        seen = model(z, t, pooled)
    trained = model(z, t, pooled)
    trained.sum().backward()
    assert torch.equal(trained, seen) and rotation.cache_info().hits


# --- positions ----------------------------------------------------------------------------------


def test_centres():
    """The short side of the image is as much shorter here."""
    centres = cell_centres((2, 4)).view(2, 4, 2)
    assert centres[:, 0, 0].tolist() == [-0.25, 0.25]
    assert centres[0, :, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]
    tall = cell_centres((4, 2)).view(4, 2, 2)
    assert torch.equal(tall, centres.transpose(0, 1).flip(2))


def test_merged_cells_have_the_mean_position():
    fine = cell_centres((6, 4)).view(3, 2, 2, 2, 2)
    assert torch.allclose(fine.mean((1, 3)).reshape(6, 2), cell_centres((3, 2)))


def test_frequencies():
    """pi to 10 pi in equal ratios, without the end, assigned to heads in turn."""
    found = axial_frequencies(2, 32)
    assert found.shape == (2, 4)
    in_order = found.T.flatten()
    expected = [math.pi * 10 ** (i / 8) for i in range(8)]
    torch.testing.assert_close(in_order, torch.tensor(expected, dtype=torch.float64))


def test_rotation_against_loops():
    """Feature i of the first quarter and i of the second are a point that is turned; half of the
    pairs by the row, half by the column; the rest stays."""
    grid, heads, d = (3, 5), 2, 16
    x = torch.randn(1, heads, 15, d, dtype=torch.float64)
    found = rotate(x, *rotation(grid, heads, d, torch.float64, CPU))
    frequencies = [math.pi * 10 ** (i / 4) for i in range(4)]
    for h in range(heads):
        for token in range(15):
            row, column = divmod(token, 5)
            places = ((2 * row + 1 - 3) / 5, (2 * column + 1 - 5) / 5)
            for axis in (0, 1):
                for j in range(2):
                    angle = places[axis] * frequencies[2 * j + h]
                    i = 2 * axis + j
                    point = complex(x[0, h, token, i], x[0, h, token, i + 4])
                    turned = point * complex(math.cos(angle), math.sin(angle))
                    got = complex(found[0, h, token, i], found[0, h, token, i + 4])
                    assert got == pytest.approx(turned, abs=1e-12)
    assert torch.equal(found[..., 8:], x[..., 8:])


def test_products_depend_on_distance_alone():
    """Of a query and a key that are the same for all tokens."""
    q, k = (torch.randn(1, 2, 1, 16, dtype=torch.float64).expand(-1, -1, 36, -1) for _ in "qk")
    turns = rotation((6, 6), 2, 16, torch.float64, CPU)
    products = (rotate(q, *turns) @ rotate(k, *turns).mT).view(2, 6, 6, 6, 6)
    torch.testing.assert_close(products[:, :5, :5, :5, :5], products[:, 1:, 1:, 1:, 1:])
    assert products[0, 0, 0].std() > 0.01


# --- blocks -------------------------------------------------------------------------------------


def test_norm_has_a_scale_and_nothing_else():
    norm = AdaRMSNorm(6, 3).double()
    x, c = torch.randn(2, 5, 6).double() + 1, torch.randn(2, 3).double()
    rms = x.square().mean(2, keepdim=True).sqrt()
    nn.init.zeros_(norm.linear.weight)
    torch.testing.assert_close(norm(x, c), x / rms, rtol=1e-5, atol=0)
    nn.init.normal_(norm.linear.weight)
    expected = x / rms * (1 + (norm.linear.weight @ c.T).T[:, None])
    torch.testing.assert_close(norm(x, c), expected, rtol=1e-5, atol=1e-6)
    assert norm.linear.bias is None


def block_by_loops(block: HourglassBlock, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
    """A block for one image x (N, D), c (Dm), one head and one query after the other."""
    (N, D), heads, window = x.shape, block.attn.heads, block.attn.window
    d, (rows, columns) = D // heads, grid
    tall, wide = (n if window is None else min(window, n) for n in grid)

    def norm(layer: AdaRMSNorm, x: Tensor) -> Tensor:
        scale = 1 + layer.linear.weight @ c
        return torch.stack([row * scale / (row.square().mean() + 1e-6).sqrt() for row in x])

    def turned(vector: Tensor, h: int, token: int) -> Tensor:
        vector = vector / vector.norm() * block.attn.sharpness[h].sqrt()
        out, count = vector.clone(), heads * d // 8
        places = [(2 * p + 1 - n) / max(grid) for p, n in
                  zip(divmod(token, columns), grid, strict=True)]  # fmt: skip
        for i in range(d // 4):
            axis, j = divmod(i, d // 8)
            angle = places[axis] * math.pi * 10 ** ((j * heads + h) / count)
            a, b = vector[i], vector[i + d // 4]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 4] = b * math.cos(angle) + a * math.sin(angle)
        return out

    normed, attended = norm(block.norm1, x), torch.zeros_like(x)
    q, k, v = (normed @ w.T for w in block.attn.qkv.weight.chunk(3))
    for h in range(heads):
        mine = slice(h * d, (h + 1) * d)
        keys = [turned(k[i, mine], h, i) for i in range(N)]
        for i in range(N):
            row, column = divmod(i, columns)
            top = min(max(row - tall // 2, 0), rows - tall)
            left = min(max(column - wide // 2, 0), columns - wide)
            read = [j for j in range(N) if top <= j // columns < top + tall
                    and left <= j % columns < left + wide]  # fmt: skip
            query = turned(q[i, mine], h, i)
            weights = torch.stack([query @ keys[j] for j in read]).softmax(0)
            attended[i, mine] = sum(w * v[j, mine] for w, j in zip(weights, read, strict=True))
    x = x + attended @ block.attn.proj.weight.T
    normed, mlp = norm(block.norm2, x), block.mlp
    gate = nn.functional.gelu(normed @ mlp.wi_0.weight.T, approximate="tanh")
    return x + (gate * (normed @ mlp.wi_1.weight.T)) @ mlp.wo.weight.T


@torch.no_grad()
@pytest.mark.parametrize(("grid", "window"), [((5, 6), 3), ((6, 5), None), ((2, 7), 3)])
def test_block_against_loops(grid, window):
    torch.manual_seed(0)
    block = HourglassBlock(16, 8, window, 12).double()
    for parameter in block.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x, c = torch.randn(2, grid[0] * grid[1], 16).double(), torch.randn(2, 12).double()
    found = block(x, c, grid)
    for i in range(2):
        expected = block_by_loops(block, x[i], c[i], grid)
        torch.testing.assert_close(found[i], expected, atol=1e-9, rtol=0)
    assert (found - x).abs().mean() > 0.1


def test_sharpness_and_hidden_width():
    block = HourglassBlock(32, 8, 3, 12)
    assert torch.equal(block.attn.sharpness, torch.full((4,), 10.0))
    assert block.mlp.wi_0.weight.shape == block.mlp.wi_1.weight.shape == (96, 32)


def test_merge_and_split():
    """Four neighbours, row by row, side by side; and back."""
    x = torch.arange(4 * 6 * 2).view(1, 24, 2)
    merged = merge(x, (4, 6))
    assert merged.shape == (1, 6, 8)
    assert torch.equal(merged[0, 1], x[0, [2, 3, 8, 9]].flatten())
    assert torch.equal(split(merged, (4, 6)), x)


# --- the whole network ----------------------------------------------------------------------------


@torch.no_grad()
def spelled_out(model: HDiT, z: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
    """The hourglass of three levels, step by step, from the blocks."""

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    mapping = model.mapping
    c = timestep_embedding(t).double() @ mapping.time.weight.T + pooled @ mapping.text.weight.T
    c = rms(c, mapping.norm_in.weight)
    for i in range(2):
        c = c + mapping.mlps[i](rms(c, mapping.norms[i].weight))
    c = rms(c, mapping.norm_out.weight)
    B, C, H, W = z.shape
    grid, x = (H // 2, W // 2), z.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1)
    x = x.reshape(B, -1, 4 * C) @ model.patch_in.weight.T
    first = model.inward[0][0](x, c, grid)
    half = (grid[0] // 2, grid[1] // 2)
    x = merge(first, grid) @ model.merges[0].weight.T
    second = model.inward[1][1](model.inward[1][0](x, c, half), c, half)
    quarter = (half[0] // 2, half[1] // 2)
    x = merge(second, half) @ model.merges[1].weight.T
    x = model.inward[2][1](model.inward[2][0](x, c, quarter), c, quarter)
    back = split(x @ model.splits[1].weight.T, half)
    x = (1 - model.mix[1]) * second + model.mix[1] * back
    x = model.outward[1][1](model.outward[1][0](x, c, half), c, half)
    back = split(x @ model.splits[0].weight.T, grid)
    x = (1 - model.mix[0]) * first + model.mix[0] * back
    x = rms(model.outward[0][0](x, c, grid), model.norm_out.weight) @ model.patch_out.weight.T
    x = x.view(B, H // 2, W // 2, 2, 2, C)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(B, C, H, W)


def test_the_network_spelled_out():
    model = shaken_network()
    torch.testing.assert_close(model(*inputs()), spelled_out(model, *inputs()))


def test_no_convolution_anywhere():
    """Linear layers, norms and attention: nothing else has weights, and nothing mixes neighbours
    but merging, splitting and attention."""
    kinds = {type(module).__name__ for module in HDiT(SMALL).modules()}
    assert not any("conv" in kind.lower() or "pool" in kind.lower() for kind in kinds)
    leaves = {type(m).__name__ for m in HDiT(SMALL).modules() if not list(m.children())}
    assert leaves == {"Linear", "RMSNorm"}
    assert not any(m.bias is not None for m in HDiT(SMALL).modules() if isinstance(m, nn.Linear))


def test_fresh_hdit_answers_zero():
    z, t, pooled = inputs()
    model = HDiT(SMALL).double()
    assert torch.equal(model(z, t, pooled), torch.zeros_like(z))
    assert torch.equal(model.mix, torch.full((2,), 0.5))


@torch.no_grad()
def test_fresh_blocks_are_the_identity():
    model = HDiT(SMALL)
    x, c = torch.randn(2, 30, 16), torch.randn(2, 24)
    assert torch.equal(model.inward[0][0](x, c, (5, 6)), x)
    before = model.mapping.text.weight.abs().max()
    assert 0 < before <= 10**-0.5  # as PyTorch has it


def test_levels_count_blocks():
    model = HDiT(SMALL)
    assert [len(blocks) for blocks in model.inward] == [1, 2, 2]
    assert [len(blocks) for blocks in model.outward] == [1, 2]
    windows = [blocks[0].attn.window for blocks in (*model.inward, *model.outward)]
    assert windows == [3, 3, None, 3, 3]


@torch.no_grad()
def test_time_and_text_reach_every_pixel():
    model = shaken_network()
    z, t, pooled = inputs()
    answer = model(z, t, pooled)
    for other in ((z, t + 0.05, pooled), (z, t, pooled.roll(1, 1)), (z.roll(1, 3), t, pooled)):
        assert (model(*other) - answer).abs().amax(1).min() > 1e-9
    torch.testing.assert_close(model(z[1:2], t[1:2], pooled[1:2]), answer[1:2])
    torch.testing.assert_close(model(z, t[1], pooled)[1:2], answer[1:2])


@torch.no_grad()
def test_pixels_far_apart_meet_in_the_middle():
    """By the global level alone: with a window there too, one corner knows nothing of the other."""
    z, t, pooled = inputs((32, 32), 1)
    changed = z.clone()
    changed[:, :, 0, 0] += 1
    for window, told in ((None, True), (1, False)):
        config = replace(SMALL, levels=(*LEVELS[:2], HDiTLevel(48, 2, window)))
        model = shaken_network(config)
        corners = [model(x, t, pooled)[0, 0, -1, -1] for x in (z, changed)]
        assert (abs(corners[0] - corners[1]) > 1e-12) == told


def test_every_parameter_of_hdit_gets_a_gradient():
    model = shaken_network()
    model(*inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in model.parameters())


def test_a_flat_one():
    """A single global level: no merging, and every patch reads every other."""
    model = shaken_network(replace(SMALL, levels=(HDiTLevel(16, 2, None),)))
    assert not len(model.merges) and not len(model.outward) and model.config.multiple == 2
    z, t, pooled = inputs((10, 6))
    assert model(z, t, pooled).shape == z.shape


def test_what_does_not_fit_hdit():
    model = HDiT(SMALL)
    z, t, pooled = (x.float() for x in inputs())
    assert SMALL.multiple == 8
    for size in ((24, 12), (20, 16)):
        with pytest.raises(ValueError, match=rf"size {size[0]}x{size[1]} is no multiple of 8"):
            model(z[..., : size[0], : size[1]], t, pooled)
    for batch in ((z, t[:2], pooled), (z, t, pooled[:2]), (z[:2], t, pooled)):
        with pytest.raises(ValueError, match="batch sizes differ"):
            model(*batch)


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_weight_is_soft_min_snr(data_std):
    """On the error of x0: 1 / (sigma^2 + data_std^2), which is gamma SNR / (SNR + gamma)."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    sigma, gamma = t / (1 - t), 1 / data_std**2
    snr = 1 / sigma**2
    on_x0 = soft_min_snr(t, data_std) / t**2  # x0 is wrong by t times what the velocity is
    torch.testing.assert_close(on_x0, 1 / (sigma**2 + data_std**2))
    torch.testing.assert_close(on_x0, gamma * snr / (snr + gamma))
    assert (on_x0 < gamma).all() and (on_x0 < snr).all()


def test_weight_is_that_of_edm_preconditioning():
    """The paper's: F is trained towards (x0 - c_skip y) / c_out for y = x0 + sigma noise, and the
    square of its error is weighted by (sigma sd)^2 / (sigma^2 + sd^2)^2."""
    sd, t = 0.6, torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    sigma = t / (1 - t)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    weight = (sigma * sd) ** 2 / (sigma**2 + sd**2) ** 2
    torch.testing.assert_close(soft_min_snr(t, sd), weight / c_out**2 * t**2)


def test_weight_of_the_loss():
    x0, noise, wrong = torch.randn(3, 4, 1, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    z = interpolate(x0, noise, t)
    error_of_x0 = (z - t.view(-1, 1, 1, 1) * (noise - x0 + wrong) - x0).square().mean((1, 2, 3))
    for std in (1.0, 3.0):
        expected = error_of_x0 / ((t / (1 - t) / std) ** 2 + 1)
        torch.testing.assert_close(hdit_loss(noise - x0 + wrong, x0, noise, t, std), expected)
    assert not hdit_loss(noise - x0, x0, noise, t).any()
    torch.testing.assert_close(soft_min_snr(torch.tensor(0.5)), torch.tensor(0.125))


# --- costs --------------------------------------------------------------------------------------


def hourglass(size: int) -> HDiTConfig:
    """Patches of 2, an 8 x 8 middle, and one more outer level for each doubling."""
    outer = round(math.log2(size / 16))
    return replace(
        SMALL, channels=1, levels=(HDiTLevel(16, 1, 5),) * outer + (HDiTLevel(32, 2, None),)
    )


def slopes(costs: list[float]) -> list[float]:
    """In the logarithms of cost and of pixels, which quadruple."""
    return [math.log(b / a) / math.log(4) for a, b in pairwise(costs)]


def test_multiply_adds_grow_with_pixels():
    sizes = (64, 128, 256)
    assert max(slopes([hdit_multiply_adds(hourglass(s), s, s) for s in sizes])) <= 1.0
    flat = replace(SMALL, channels=1, levels=(HDiTLevel(16, 2, None),))
    assert min(slopes([hdit_multiply_adds(flat, s, s) for s in sizes])) > 1.6


def test_multiply_adds_in_closed_form():
    """Blocks, merging and splitting, ends and mapping of two levels at 16 x 24."""
    levels = (HDiTLevel(16, 1, 3), HDiTLevel(32, 2, None))
    found = hdit_multiply_adds(replace(SMALL, levels=levels), 16, 24)
    fine, coarse = 8 * 12, 4 * 6
    fine_block = fine * (4 * 16**2 + 9 * 16**2 + 2 * 36 * 16) + 2 * 24 * 16  # 6 x 6 keys of a halo
    coarse_block = coarse * (4 * 32**2 + 9 * 32**2 + 2 * coarse * 32) + 2 * 24 * 32
    between = 2 * coarse * 64 * 32
    ends = 2 * fine * 8 * 16
    mapping = (256 + 10) * 24 + 2 * 9 * 24**2
    assert found == 2 * fine_block + 2 * coarse_block + between + ends + mapping
