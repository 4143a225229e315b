"""Neighbourhood attention: the rule, its two forms against plain loops, and what each costs."""

import pytest
import torch
from torch import Tensor

from nanosd3.measure.meters import count_flops
from nanosd3.related import neighbourhood
from nanosd3.related.neighbourhood import (
    axis_tiles,
    axis_windows,
    grid_tiles,
    masked_attention,
    neighbourhood_mask,
    neighbours,
    tiled_attention,
    window_starts,
)

# Grids that the tiles of 4 x 4 divide, and do not; with windows that are even, and larger than them
GRIDS = [((8, 8), 5), ((16, 16), 5), ((16, 16), 7), ((12, 20), 3), ((7, 10), 3), ((9, 13), 4),
         ((5, 3), 5), ((3, 9), 7), ((2, 2), 3), ((1, 6), 3), ((11, 11), 1)]  # fmt: skip


def inputs(grid: tuple[int, int], dtype: torch.dtype, batch: int = 2, heads: int = 3):
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, heads, grid[0] * grid[1], 8)
    return torch.randn(shape, generator=generator, dtype=dtype).unbind(0)


# --- the rule -----------------------------------------------------------------------------------


def test_starts():
    """The docstring's example; at the borders windows are moved inside and stay whole."""
    assert window_starts(8, 5).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert window_starts(6, 3).tolist() == [0, 0, 1, 2, 3, 3]
    assert window_starts(6, 4).tolist() == [0, 0, 0, 1, 2, 2]
    assert window_starts(5, 5).tolist() == [0] * 5
    assert window_starts(4, 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("n", "window"), [(8, 5), (9, 4), (7, 7), (6, 1)])
def test_every_token_reads_as_many(n, window):
    seen = neighbours(n, window)
    assert (seen.sum(1) == window).all() and seen.diagonal().all()
    for row in seen:  # without gaps
        (places,) = row.nonzero(as_tuple=True)
        assert places[-1] - places[0] == window - 1


def test_mask_is_of_rows_and_columns():
    """Token 0 of 3 x 5 with a window of 3 reads the first three columns of all three rows; a window
    larger than an axis is all of it."""
    assert neighbourhood_mask((3, 5), 3)[0].view(3, 5).int().tolist() == [[1, 1, 1, 0, 0]] * 3
    middle = neighbourhood_mask((5, 4), 3)[2 * 4 + 3].view(5, 4).int().tolist()
    assert middle == [[0] * 4, [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0] * 4]
    assert axis_windows((3, 9), 5) == (3, 5)
    assert neighbourhood_mask((2, 3), 9).all()


# --- both forms ---------------------------------------------------------------------------------


def by_loops(q: Tensor, k: Tensor, v: Tensor, grid, window: int, scale: float) -> Tensor:
    """One query after the other."""
    rows, columns = grid
    out = torch.zeros_like(q)
    for row in range(rows):
        for column in range(columns):
            tall, wide = min(window, rows), min(window, columns)
            top = max(0, min(row - tall // 2, rows - tall))
            left = max(0, min(column - wide // 2, columns - wide))
            read = [r * columns + c for r in range(top, top + tall)
                    for c in range(left, left + wide)]  # fmt: skip
            i = row * columns + column
            scores = (q[:, :, i, None] * k[:, :, read]).sum(3) * scale  # (B, heads, keys)
            out[:, :, i] = (scores.softmax(2)[..., None] * v[:, :, read]).sum(2)
    return out


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("attend", [masked_attention, tiled_attention])
def test_against_loops(attend, grid, window):
    q, k, v = inputs(grid, torch.float64, batch=1, heads=2)
    expected = by_loops(q, k, v, grid, window, 0.7)
    torch.testing.assert_close(attend(q, k, v, grid, window, 0.7), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_tiles_equal_the_definition(grid, window, dtype, tolerance):
    """Answers, and gradients of queries, keys and values."""
    leaves = [x.requires_grad_() for x in inputs(grid, dtype)]
    weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for attend in (masked_attention, tiled_attention):
        out = attend(*leaves, grid, window, 8**-0.5)
        found.append((out, *torch.autograd.grad((out * weight).mean(), leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)
    assert found[0][3].abs().max() > 1e-4


def test_whole_windows_are_ordinary_attention():
    q, k, v = inputs((4, 6), torch.float64)
    full = torch.softmax(q @ k.mT * 0.3, dim=3) @ v
    torch.testing.assert_close(tiled_attention(q, k, v, (4, 6), 6, 0.3), full)


def test_columns_of_memory_do_not_matter():
    """Queries, keys and values as a projection leaves them, not contiguous."""
    q, k, v = inputs((8, 8), torch.float64)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = tiled_attention(q, k, v, (8, 8), 5, 1.0)
    assert torch.equal(tiled_attention(*strided, (8, 8), 5, 1.0), expected)


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "window"), [(16, 5), (16, 7), (13, 4), (8, 8), (3, 3), (1, 1)])
def test_halos_hold_all_that_is_read(n, window):
    queries, halo, read = axis_tiles(n, window)
    assert set(queries.flatten().tolist()) == set(range(n))
    assert halo.min() >= 0 and halo.max() < n and halo.shape[1] == min(n, 4 + window - 1)
    assert (read.sum(2) == window).all()


def test_tiles_of_a_grid():
    """16 x 16 tokens in 16 tiles of 16 queries, each with a halo of 8 x 8."""
    queries, halos, mask, places = grid_tiles((16, 16), 5, torch.device("cpu"))
    assert queries.shape == (16, 16) and halos.shape == (16, 64) and mask.shape == (16, 1, 16, 64)
    assert queries[5].tolist() == [r * 16 + c for r in range(4, 8) for c in range(4, 8)]
    assert halos[5].tolist() == [r * 16 + c for r in range(2, 10) for c in range(2, 10)]
    assert halos[0].tolist() == [r * 16 + c for r in range(8) for c in range(8)]
    assert torch.equal(queries.flatten()[places], torch.arange(256))
    assert neighbourhood.TILE == 4


def test_cost_is_linear():
    """Multiply-adds a token: 2 d for each of the 64 keys of a halo, whatever the grid; all N by the
    definition."""
    per_token = {}
    for n in (8, 16, 32):
        q = torch.empty(1, 1, n * n, 8, device="meta")
        for attend in (masked_attention, tiled_attention):
            flops = count_flops(lambda f=attend, q=q, n=n: f(q, q, q, (n, n), 5, 1.0))
            per_token[attend, n] = flops / 2 / n**2 / 8
    assert [per_token[tiled_attention, n] for n in (8, 16, 32)] == [128] * 3
    assert [per_token[masked_attention, n] for n in (8, 16, 32)] == [2 * n * n for n in (8, 16, 32)]
