"""Neighbourhood attention: every token attends to a small square of tokens around it.

In an image a pixel depends most on those nearby. If each of N tokens attends to k x k others
instead of all N, the cost of attention is linear in N, not quadratic. A square that would cross the
border is moved inside as a whole, so that every token reads exactly k x k (arXiv 2204.07143): along
an axis of n tokens, token i reads k of them from

    start(i) = clamp(i - k // 2, 0, n - k)

(k = 5, n = 8)   token 0  # # # # # . . .      token 4  . . # # # # # .
                 token 1  # # # # # . . .      token 7  . . . # # # # #

There are two implementations. `masked_attention` is the definition: attention between all tokens,
with a mask, at a cost of N x N. `tiled_attention` gives the same result at little more than the
minimal cost: the squares of neighbouring tokens overlap, so a tile of 4 x 4 queries needs the keys
of (4 + k - 1)^2 tokens, its halo, and attends to those under a mask of its own. All tiles together
are one ordinary attention with the tiles as its batch, which is fast on any processor.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.related.axial_rope import Grid
from nanosd3.torch_settings import usual_settings

TILE = 4  # queries on a side of a tile


def window_starts(n: int, window: int) -> Tensor:
    """The first neighbour of each of n tokens of an axis, (n,)."""
    return (torch.arange(n) - window // 2).clamp(0, n - window)


def neighbours(n: int, window: int) -> Tensor:
    """Which tokens of an axis each token reads, bool (n, n)."""
    start, key = window_starts(n, window)[:, None], torch.arange(n)
    return (start <= key) & (key < start + window)


def axis_windows(grid: Grid, window: int) -> tuple[int, int]:
    """The window along each axis: the whole axis if it is shorter."""
    return min(window, grid[0]), min(window, grid[1])


# --- the definition -------------------------------------------------------------------------------


def neighbourhood_mask(grid: Grid, window: int) -> Tensor:
    """Which tokens of a grid (rows, columns) each token reads, bool (N, N), rows first."""
    rows, columns = map(neighbours, grid, axis_windows(grid, window))
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(2 * (grid[0] * grid[1],))


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: int, scale: float
) -> Tensor:
    """Attention (B, heads, N, d) of each token of a grid to its window x window neighbours."""
    mask = neighbourhood_mask(grid, window).to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


# --- in tiles -------------------------------------------------------------------------------------


def axis_tiles(n: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles along an axis: the positions of their queries (T, t) and of their halos (T, h), and
    which of its halo each query reads, bool (T, t, h).

    Where n is no multiple of t the last tile is moved back, and some queries are in two tiles.
    """
    t, h = min(TILE, n), min(TILE + window - 1, n)
    first = torch.arange(0, n, t).clamp(max=n - t)  # (T,)
    queries = first[:, None] + torch.arange(t)
    # A halo begins with its first query's window; near the end it is moved inside, like a window.
    halo = (first - window // 2).clamp(0, n - h)[:, None] + torch.arange(h)
    return queries, halo, neighbours(n, window)[queries[:, :, None], halo[:, None, :]]


@lru_cache(maxsize=32)
@usual_settings()  # cached: later calls may train
def grid_tiles(
    grid: Grid, window: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tiles of a grid: the tokens of their queries (T, t*t) and halos (T, h*h), which of them
    each query reads, bool (T, 1, t*t, h*h), and where to find the output of each token, (N,), in
    the concatenated outputs of all tiles."""
    rows, columns = map(axis_tiles, grid, axis_windows(grid, window))
    width = grid[1]
    queries, halos = (
        (r[:, None, :, None] * width + c[None, :, None, :]).flatten(0, 1).flatten(1)
        for r, c in zip(rows[:2], columns[:2], strict=True)
    )
    mask = rows[2][:, None, :, None, :, None] & columns[2][None, :, None, :, None, :]
    mask = mask.flatten(0, 1).flatten(1, 2).flatten(2)  # (T, t*t, h*h)
    places = torch.empty(grid[0] * width, dtype=torch.long)
    places[queries.flatten()] = torch.arange(queries.numel())
    return queries.to(device), halos.to(device), mask[:, None].to(device), places.to(device)


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: int, scale: float
) -> Tensor:
    """The same as `masked_attention`, at a cost that grows with the number of tokens."""
    queries, halos, mask, places = grid_tiles(grid, window, q.device)

    def cut(x: Tensor, tokens: Tensor) -> Tensor:
        """The tokens (T, n) of x (B, heads, N, d), as (T, B * heads, n, d)."""
        x = x.flatten(0, 1).index_select(1, tokens.flatten())
        return x.unflatten(1, tokens.shape).transpose(0, 1)

    q_tiles, k_halos, v_halos = cut(q, queries), cut(k, halos), cut(v, halos)
    out = F.scaled_dot_product_attention(q_tiles, k_halos, v_halos, attn_mask=mask, scale=scale)
    out = out.transpose(0, 1).flatten(1, 2).index_select(1, places)  # (B * heads, N, d)
    return out.unflatten(0, q.shape[:2])
