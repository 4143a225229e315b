"""Networks that are in memory only while they are needed.

A large model consists of five networks that never run at the same time: the text encoders encode
the prompt, then the transformer samples, then the autoencoder decodes. `LazyModules` loads each one
on first use and, if `staged`, frees it after use, so that peak memory is that of the largest
network rather than the sum.

What a caller has set for its own tensors does not affect the networks (torch_settings.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from nanosd3.torch_settings import usual_settings


class LazyModules(Mapping[str, nn.Module]):
    """Networks by name, each given as a module or as a function that makes it.

    Functions are called when their network is first accessed. If `staged`, `release` frees it
    again, until the next access.
    """

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
            with usual_settings():
                self.ready[name] = self.makers[name]()
        return self.ready[name]

    def sources(self) -> dict[str, nn.Module | Callable[[], nn.Module]]:
        """Modules, and functions for those not loaded, to build other LazyModules from."""
        return {**self.makers, **self.ready}

    def release(self, name: str) -> None:
        """Free `name`, which is not needed for now, if `staged` and it can be made again."""
        if self.staged:
            self.free(name)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Release `name` at the end, even after an error or Ctrl-C: otherwise the next call would
        find it in memory, beside another network."""
        try:
            yield
        finally:
            self.release(name)

    def free(self, name: str) -> None:
        """Free `name`, if it can be made again."""
        if name in self.makers and name in self.ready:
            del self.ready[name]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def load(self) -> None:
        """Make all networks now."""
        for name in self:
            self[name]

    def __contains__(self, name: object) -> bool:
        return name in self.ready or name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources())

    def __len__(self) -> int:
        return len(self.sources())
