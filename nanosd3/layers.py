"""The parts an MMDiT block is made of.

Everything here is small on purpose: a norm, a modulation, an MLP, one attention call. The text
encoders share RMSNorm and nothing else: they have conventions of their own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64  # SD3's heads are all 64 wide: depth d means width 64 d and d heads


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), times a learned weight: LayerNorm without mean and bias.

    On queries and keys (each head's 64 features) it bounds the attention logits; without it
    they grow in long bfloat16 runs until the softmax saturates (paper, section 5.3.2).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then x (1 + scale) + shift; x (B, L, D), others (B, D).

    This is adaLN: the scale and shift that a LayerNorm learns once are computed for each image
    from the timestep and the pooled text (DiT, arXiv 2212.09748, section 3.2).
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear, with a hidden layer four times as wide."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x), approximate="tanh")  # (B, L, 4 D)
        return self.fc2(h)


def split_heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(B, L, parts*D), all of q, then of k, then of v, to `parts` tensors (B, heads, L, 64)."""
    B, L, _ = x.shape
    return x.view(B, L, parts, -1, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / 8) v over (B, heads, L, 64), heads joined again: (B, L, D).

    No mask: padded text takes part, as it did when the official models were trained.
    """
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
