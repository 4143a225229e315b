"""Refuse training that needs more memory than there is."""

from functools import cache

import torch
from torch import Tensor

from nanosd3.config_types import Config, VAEConfig
from nanosd3.errors import InputError
from nanosd3.machine.device import memory_found
from nanosd3.machine.distributed import Compute
from nanosd3.measure.costs import parameters
from nanosd3.measure.training_memory import memory
from nanosd3.pipeline import images_at_once
from nanosd3.vae import AutoencoderKL, sample_posterior


def refuse_too_large(config: Config, processes: int, compute: Compute, sharded: bool) -> None:
    """Raise InputError if a training step needs more memory than there is. Allocates nothing."""
    mmdit, text = config.mmdit, config.text
    side = config.image_size // config.vae.factor // mmdit.patch_size
    assert config.training  # it was asked for by name, see config.trainable
    batch = max(1, config.training.flow.batch // (processes * compute.accumulate))
    tokens = text.clip_l.length + text.t5.length
    need = memory(
        mmdit,
        batch,
        side,
        side,
        tokens,
        precision=compute.precision,
        processes=processes,
        checkpointing=compute.checkpointing,
        sharded=sharded,
    )
    available, where = memory_found()
    if available < need.total / 1e9:
        raise InputError(
            f"{config.name}: training {parameters(mmdit) / 1e9:.1f}B parameters needs "
            f"{need.total / 1e9:.0f} GB of memory per process ({need.activations / 1e9:.0f} GB of "
            f"it activations), found {available:.0f} GB {where}: not enough; see --checkpointing, "
            "--accumulate and --parallel fsdp"
        )


# --- autoencoder ----------------------------------------------------------------------------------


def autoencoder_rows(config: Config) -> int:
    """How many images the autoencoder is trained on at once: the batch, or a part that fits."""
    assert config.training
    batch = config.training.autoencoder.batch
    most = min(batch, images_at_once(config.vae, config.image_size**2))
    return next(rows for rows in range(most, 0, -1) if batch % rows == 0)


@cache
def autoencoder_memory(vae: VAEConfig, side: int) -> tuple[int, int]:
    """For an autoencoder trained on side x side pixels in float32: bytes of weights, gradients and
    moments, and of what autograd saves for each image. It is built, but holds no numbers."""
    with torch.device("meta"):
        network, x = AutoencoderKL(vae), torch.empty(1, vae.image_channels, side, side)
    weights = {p.untyped_storage()._cdata: p for p in network.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            saved[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean, logvar = network.encode(x)
        network.decode(sample_posterior(mean, logvar, torch.empty_like(mean))).square().sum()
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return 4 * sum(p.nbytes for p in weights.values()), held


def refuse_large_autoencoder(config: Config) -> None:
    """Raise InputError if training the autoencoder needs more memory than there is. No option for
    training the transformer reduces that."""
    weights, held = autoencoder_memory(config.vae, config.image_size)
    need, (available, where) = weights + autoencoder_rows(config) * held, memory_found()
    if available < need / 1e9:
        raise InputError(
            f"{config.name}: training the autoencoder on {config.image_size}x{config.image_size} "
            f"pixels needs {need / 1e9:.0f} GB of memory, found {available:.0f} GB {where}: not "
            "enough; take one that is trained, with --weights PATH"
        )
