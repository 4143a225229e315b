"""Small image sets in the IDX format."""

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor


def idx(array: Tensor) -> bytes:
    """The content of an IDX file of unsigned bytes."""
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + bytes(array.flatten().int().tolist())
    )


def write_set(
    folder: Path,
    train: int = 30,
    test: int = 20,
    compress: bool = False,
    labels: list[int] | None = None,
    side: int = 28,
) -> Path:
    """Write the four files of an image set of noise; `labels` (default: 0 to 9) are repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    cycle = torch.tensor(range(10) if labels is None else labels)
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(0, 256, (count, side, side), generator=generator)
        classes = cycle[torch.arange(count) % len(cycle)]
        for kind, array in (("images-idx3", images), ("labels-idx1", classes)):
            name = f"{part}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder
