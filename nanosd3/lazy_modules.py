"""Networks that are in memory only while they are needed.

A large model consists of five networks that never run at the same time: the text encoders encode
the prompt, then the transformer samples, then the autoencoder decodes. `LazyModules` loads each one
on first use and, if `staged`, frees it after use, so that peak memory is that of the largest
network rather than the sum.

Whoever uses a network first may have set another default dtype or device for tensors of its own, or
inference mode, for good or for a while. None of that gets into the network (`usual_settings`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


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
        """Release `name` at the end, after an error or Ctrl-C too: the next call would meet it in
        memory, beside another network."""
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


@contextmanager
def usual_settings() -> Iterator[None]:
    """While open, tensors are made in float32, on the CPU and outside of inference mode, unless a
    call says otherwise: what the caller has set is put aside. Gradients stay on or off.

    As a decorator it keeps that out of a function's results: noise drawn in float64 is other noise,
    and nothing that was made in inference mode can be trained with.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which turns gradients on
            stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
