"""Tensors that stay on disk until they are needed.

A `StoredTensor` knows a tensor's name, shape and dtype; `read()` loads the numbers. `fill` loads
them one at a time into a module built on the meta device, casting each as it is read, so no
network is ever in memory twice.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanosd3.errors import InputError
from nanosd3.storage.mapped import Parts

State = dict[str, "StoredTensor"]

SAMPLED = "sampled-"  # prefix of a fingerprint
MATRIX_VALUES = 256  # values of each matrix in it, roughly


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or one derived from others; memory-mapped where possible."""

    name: str  # in the file
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    parts: Parts = field(default_factory=Parts, repr=False, compare=False)  # mapped to read it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, index: int, chunks: int) -> "StoredTensor":
        """One of `chunks` equal slices of the first dimension."""
        shape = (self.shape[0] // chunks, *self.shape[1:])
        return replace(self, shape=shape, read=lambda: self.read().chunk(chunks)[index])

    def halves_swapped(self) -> "StoredTensor":
        """The two halves of the first dimension in the opposite order."""
        return replace(self, read=lambda: torch.cat(self.read().chunk(2)[::-1]))

    def reshaped(self, shape: tuple[int, ...]) -> "StoredTensor":
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))


def stack_rows(tensors: list[StoredTensor]) -> StoredTensor:
    """Concatenate tensors along the first dimension."""
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return replace(
        tensors[0],
        name=", ".join(tensor.name for tensor in tensors),
        shape=shape,
        read=lambda: torch.cat([tensor.read() for tensor in tensors]),
    )


def in_memory(name: str, tensor: Tensor, file: Path) -> StoredTensor:
    """Wrap a tensor that is already in memory."""
    return StoredTensor(name, file, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def some_values(tensor: StoredTensor) -> Tensor:
    """All values of a vector, some of a larger tensor, in float32."""
    values = tensor.read().flatten()
    step = 1 if len(tensor.shape) == 1 else max(1, len(values) // MATRIX_VALUES)
    return values[::step].float()


def fingerprint(parts: dict[str, State], like: str | None = None) -> str:
    """A hash of networks that may be too large to read in full: the name, shape and type of every
    tensor, all values of vectors (biases and norms), which any training changes, and some of every
    matrix, which a merged LoRA changes.

    For comparison with a stored fingerprint `like`, it is made as that one was: earlier versions
    took no values of matrices.
    """
    earlier = like is not None and not like.startswith(SAMPLED)
    digest = hashlib.sha256()
    for part in sorted(parts):
        for name, tensor in sorted(parts[part].items()):
            digest.update(f"{part} {name} {tensor.shape} {tensor.dtype}".encode())
            if len(tensor.shape) == 1 or not earlier:
                digest.update(some_values(tensor).numpy().tobytes())
    return digest.hexdigest() if earlier else f"{SAMPLED}{digest.hexdigest()}"


def fill(
    module: nn.Module, state: State, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """Load weights into a module on the meta device, cast to `dtype` (None: as stored), frozen.

    Buffers (the position grid) keep their stored dtype. Modules share nothing.
    Raises InputError naming the first tensor that holds NaN or infinity.
    """
    for tensor in state.values():
        tensor.parts.clear()
    buffers = {name for name, _ in module.named_buffers()}
    loaded = {
        key: cast(state[key], target, device, None if key in buffers else dtype)
        for key, target in module.state_dict().items()
    }
    module.load_state_dict(loaded, assign=True)
    return module.requires_grad_(False).eval()


def cast(
    source: StoredTensor, target: Tensor, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """Read a tensor: memory-mapped if nothing changes, otherwise copied into the target's memory
    format, which is channels-last for convolutions."""
    tensor = source.read()
    dtype = dtype or tensor.dtype
    if tensor.dtype != dtype or tensor.device != device or not target.is_contiguous():
        tensor = torch.empty_like(target, dtype=dtype, device=device).copy_(tensor)
    if not is_finite(tensor):
        problem = "holds NaN or infinity"
        if is_finite(source.read()):
            problem = f"has values too large for {dtype}; use bfloat16 or float32"
        raise InputError(f"{source.file}: tensor {source.name} {problem}")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity. The sum usually settles it without another copy."""
    if tensor.dtype.itemsize == 1:  # 8-bit floats cannot be summed
        tensor = tensor.half()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
