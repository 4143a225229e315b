"""Refuse training that needs more memory than there is."""

from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.machine.device import memory_found
from nanosd3.machine.distributed import Compute
from nanosd3.measure.costs import parameters
from nanosd3.measure.training_memory import memory


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
