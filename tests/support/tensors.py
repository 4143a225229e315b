"""Tensors of every kind that a training state may hold."""

import torch


def draw(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every layout and type a training state may hold, with random numbers."""
    g = torch.Generator().manual_seed(seed)
    plain = torch.randn(5, 7, generator=g)
    plain[0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-42])
    kernel = torch.randn(2, 3, 4, 5, generator=g)
    return {
        "step": torch.tensor(float(seed)),  # a scalar, like AdamW's
        "weight.plain": plain,
        "weight.kernel": kernel.to(memory_format=torch.channels_last),
        "weight.columns": torch.randn(4, 6, generator=g)[:, 1:3],
        "weight.turned": torch.randn(4, 6, generator=g).T,
        "weight.none": torch.zeros(0, 3),
        "ema.plain": plain + 1,
        "double": torch.randn(3, generator=g, dtype=torch.float64),
        "half": torch.randn(3, generator=g).to(torch.bfloat16),
        "count": torch.tensor([2**60 + seed]),
    }


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes of each tensor, which also tell NaNs and zeros of either sign apart."""
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }
