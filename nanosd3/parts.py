"""Networks that are in memory only while they are needed.

A large model is five networks that never work at the same time: the text encoders read the
prompt, then the transformer samples, then the autoencoder paints. `Parts` makes each one when it
is first asked for and, if `staged`, forgets it when it is done, so the peak is the largest part
and not the sum.

What a part is made from is a dictionary of `Stored` tensors: name, shape and type are known, the
numbers are still in the file. `fill` reads them one by one into a module that was built without
memory (on the meta device), each cast as it is read, so no part is ever held twice.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanosd3.runtime import InputError

State = dict[str, "Stored"]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or one made of some; `read()` gives it, memory-mapped if possible."""

    name: str  # as the file calls it
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def rows(self, index: int, parts: int) -> "Stored":
        """One of `parts` equal shares of the first dimension."""
        shape = (self.shape[0] // parts, *self.shape[1:])
        return replace(self, shape=shape, read=lambda: self.read().chunk(parts)[index])

    def halves_swapped(self) -> "Stored":
        return replace(self, read=lambda: torch.cat(self.read().chunk(2)[::-1]))

    def reshaped(self, shape: tuple[int, ...]) -> "Stored":
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))


def stack_rows(parts: list[Stored]) -> Stored:
    """Tensors joined along the first dimension."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return replace(
        parts[0],
        name=", ".join(part.name for part in parts),
        shape=shape,
        read=lambda: torch.cat([part.read() for part in parts]),
    )


def stored(name: str, tensor: Tensor, file: Path) -> Stored:
    """A tensor that is in memory already."""
    return Stored(name, file, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def fill(
    module: nn.Module, state: State, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """Give a module on the meta device its tensors, cast to `dtype` (None: as stored), frozen.

    Buffers (the position grid) keep the type they are stored in. Raises InputError naming the
    first tensor that holds NaN or infinity.
    """
    buffers = {name for name, _ in module.named_buffers()}
    filled = {
        key: cast(state[key], target, device, None if key in buffers else dtype)
        for key, target in module.state_dict().items()
    }
    module.load_state_dict(filled, assign=True)
    return module.requires_grad_(False).eval()


def cast(source: Stored, target: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """The numbers of `source`, memory-mapped if nothing about them changes; otherwise in the
    target's layout, which is channels-last for convolutions."""
    tensor = source.read()
    dtype = dtype or tensor.dtype
    if tensor.dtype != dtype or tensor.device != device or not target.is_contiguous():
        tensor = torch.empty_like(target, dtype=dtype, device=device).copy_(tensor)
    if not is_finite(tensor):
        wrong = "holds NaN or infinity"
        if is_finite(source.read()):
            wrong = f"has numbers too large for {dtype}; take bfloat16 or float32"
        raise InputError(f"{source.file}: tensor {source.name} {wrong}")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; mostly the sum shows it, without another copy."""
    if tensor.dtype.itemsize == 1:  # 8-bit floats, which cannot be summed
        tensor = tensor.half()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


class Parts(Mapping[str, nn.Module]):
    """Networks by name. Each is given as it is or as a function that makes it, which is called
    when the part is first asked for; `release` forgets it again if `staged`."""

    def __init__(
        self,
        sources: Mapping[str, nn.Module | Callable[[], nn.Module]],
        device: torch.device,
        staged: bool = False,
    ):
        self.device, self.staged = device, staged
        self.makers = {n: s for n, s in sources.items() if not isinstance(s, nn.Module)}
        self.ready = {n: s for n, s in sources.items() if isinstance(s, nn.Module)}

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self.ready:
            self.ready[name] = self.makers[name]()
        return self.ready[name]

    def sources(self) -> dict[str, nn.Module | Callable[[], nn.Module]]:
        """What other Parts could be made from."""
        return {**self.makers, **self.ready}

    def release(self, name: str) -> None:
        """Say that `name` is not needed for now."""
        if self.staged and name in self.makers:
            self.ready.pop(name, None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def __contains__(self, name: object) -> bool:
        return name in self.ready or name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources())

    def __len__(self) -> int:
        return len(self.sources())
