"""The networks of a checkpoint, read when they are first needed."""

from collections.abc import Callable

import torch
from torch import nn

from nanosd3.components import on_meta
from nanosd3.lazy_modules import LazyModules
from nanosd3.machine.accelerate import accelerate
from nanosd3.official.checkpoint import Checkpoint
from nanosd3.official.missing_keys import check
from nanosd3.official.tensors import fill


def open_networks(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, staged: bool
) -> LazyModules:
    """Networks by name, each read when it is first used; with `staged` they are freed after use,
    otherwise they stay.

    `dtype` None: a run keeps float32; official weights are in float32 on CPU and bfloat16 on a GPU.
    Text encoders are never in float16, in which T5 overflows. Raises InputError for tensors that
    are missing or misshapen.
    """
    check(checkpoint)
    if dtype is None:
        half = device.type == "cuda" and not (checkpoint.path / "run.json").exists()
        dtype = torch.bfloat16 if half else torch.float32
    text_dtype = torch.float32 if dtype == torch.float16 else dtype

    def reader(name: str) -> Callable[[], nn.Module]:
        kind = dtype if name in ("mmdit", "vae") else text_dtype
        return lambda: accelerate(
            fill(on_meta(checkpoint.config, name), checkpoint.parts[name], device, kind)
        )

    return LazyModules({name: reader(name) for name in checkpoint.parts}, device, staged)
