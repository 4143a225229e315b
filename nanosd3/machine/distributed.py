"""Distributed training: a process group started by torchrun, with DDP or FSDP2.

    torchrun --nproc-per-node 4 train_mnist.py --parallel fsdp

Every process draws the same random numbers and computes its share of the batch's rows, so the loss
does not depend on the number of processes (except for rounding). With DDP each process holds a full
copy of the network and gradients are averaged; with FSDP2 each holds a shard of every weight,
gradient, optimizer moment and EMA weight, and the weights of one block are gathered while it is
computed. The small networks (autoencoder, text encoders) are trained by the main process alone; the
others wait and read its files, so all processes must see the same file system.

This module also decides how a network is computed, from outside the network: precision (weights
and their averages stay float32), activation checkpointing, torch.compile.

Tensor and pipeline parallelism are left out: an 8B model does not need them.

Imports that only FSDP2 needs are deferred, since they take a second.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanosd3.errors import InputError
from nanosd3.machine.accelerate import checkpoint_blocks, compile_blocks
from nanosd3.machine.device import torchrun_number

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

MODES = ("ddp", "fsdp")
TIMEOUT = timedelta(hours=12)  # the others wait this long while the main process trains alone
CPU = torch.device("cpu")

# DDP need not synchronise buffers: the only ones are the position embeddings, which are constant.
# (PyTorch before 2.13 has the second name.)
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a training run, as seen by one of them."""

    rank: int = 0
    size: int = 1
    mode: str | None = None  # "ddp", "fsdp", or None for a single process
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes arrive here."""
        self.all_reduce_max(0)

    def all_reduce_max(self, number: int) -> int:
        """The largest `number` of all processes."""
        if self.size == 1:
            return number
        result = torch.tensor(number)
        dist.all_reduce(result, dist.ReduceOp.MAX)
        return int(result)

    def all_gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all processes, in order of rank, on the CPU.

        Every process must pass a tensor of the same shape.
        """
        if self.size == 1:
            return rows.cpu()
        parts = [torch.empty_like(rows, device="cpu") for _ in range(self.size)]
        dist.all_gather(parts, rows.cpu())
        return torch.cat(parts)

    def microbatches(self, batch: int, accumulate: int = 1) -> list[range]:
        """This process's rows of a batch, split into `accumulate` microbatches.

        Raises InputError if the batch is not divisible by processes x microbatches.
        """
        parts = self.size * accumulate
        if batch % parts:
            raise InputError(
                f"a batch of {batch} cannot be divided among {self.size} processes "
                f"x {accumulate} microbatches; use a multiple of {parts}"
            )
        rows = batch // parts
        first = self.rank * accumulate
        return [range(i * rows, (i + 1) * rows) for i in range(first, first + accumulate)]


SINGLE_PROCESS = ProcessGroup()


def launched_processes() -> int:
    """Number of processes torchrun started for this run; 0 without torchrun."""
    return torchrun_number("WORLD_SIZE") or 0


@contextmanager
def process_group(mode: str | None, device: torch.device) -> Iterator[ProcessGroup]:
    """Join the process group of torchrun while open; without torchrun, yield a single process.
    `device` is this process's own.

    Raises InputError if `mode` is given without torchrun, or torchrun is used without `mode`.
    """
    if not launched_processes():
        if mode:
            raise InputError(
                f"--parallel {mode} needs torchrun: start with `torchrun "
                "--nproc-per-node N` instead of `python`"
            )
        yield ProcessGroup(device=device)
        return
    if mode is None:
        raise InputError(
            f"torchrun started {launched_processes()} processes; add --parallel ddp or fsdp"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    yield ProcessGroup(dist.get_rank(), dist.get_world_size(), mode, device)
    dist.barrier()  # an early exit would tear down other ranks' connections


# --- parallel model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """How a training step is computed. Except for rounding, no setting changes its result."""

    precision: str = "float32"  # or "bfloat16", for products and activations, never for weights
    checkpointing: bool = False  # save only the inputs of blocks, recompute their activations
    compiled: bool = False  # compile the blocks with torch.compile
    accumulate: int = 1  # microbatches per process over which gradients are accumulated


class ParallelModel(nn.Module):
    """A network distributed over a process group, with the given precision, checkpointing and
    compilation. Call it in place of the network.

    `blocks` are the submodules that are gathered, checkpointed and compiled one at a time.
    Gradients are averaged over the processes, each of which computes its rows of the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        group: ProcessGroup = SINGLE_PROCESS,
        compute: Compute = Compute(),
        blocks: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.module, self.group, self.compute = module, group, compute
        if compute.checkpointing:
            checkpoint_blocks(blocks)
        if compute.compiled:
            compile_blocks(blocks)
        self.network = module  # what forward calls: the module itself, or DDP around it
        if group.mode == "fsdp":
            self.shard(blocks)
        elif group.mode == "ddp" and any(p.requires_grad for p in module.parameters()):
            options: dict[str, Any] = {SYNC_BUFFERS: False}
            self.network = DistributedDataParallel(module, **options)

    @property
    def dtype(self) -> torch.dtype:
        """The type of products and activations."""
        return getattr(torch, self.compute.precision)

    def shard(self, blocks: Sequence[nn.Module]) -> None:
        """Turn every weight into a DTensor of which this process holds its rows (FSDP2).

        The main process broadcasts its weights; on the others the network may be on the meta
        device, where only shapes exist.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        full = self.module.state_dict() if self.group.is_main else {}
        self.module.to("meta")
        mesh = init_device_mesh(self.group.device.type, (self.group.size,))
        types = MixedPrecisionPolicy(
            param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for part in (*blocks, self.module):
            fully_shard(part, mesh=mesh, mp_policy=types)
        self.module.to_empty(device=self.group.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.module, full, options=options)

    def forward(
        self, z: Tensor, t: Tensor, context: Tensor, pooled: Tensor, skip: Collection[int] = ()
    ) -> Tensor:
        """The network's velocity in float32.

        t is never rounded to bfloat16, whose 8 significant bits would turn the fast cosines of the
        timestep embedding into noise.
        """
        if is_fsdp(self.module):
            z, context, pooled = (x.to(self.dtype) for x in (z, context, pooled))
            velocity = self.network(z, t, context, pooled, skip).float()
            if not torch.is_grad_enabled():  # no backward pass will free the weights
                self.module.reshard()
            return velocity
        mixed = self.compute.precision != "float32"
        with torch.autocast(z.device.type, self.dtype) if mixed else nullcontext():
            return self.network(z, t, context, pooled, skip).float()

    def syncing_gradients(self, enabled: bool) -> AbstractContextManager:
        """Context for a forward and backward pass: whether it averages gradients over the group.

        Enable it for the last microbatch of a step only; the others just accumulate gradients.
        """
        if is_fsdp(self.module):
            self.module.set_requires_gradient_sync(enabled)
        elif isinstance(self.network, DistributedDataParallel) and not enabled:
            return self.network.no_sync()
        return nullcontext()


def is_fsdp(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether FSDP2 has sharded the module's weights."""
    return hasattr(module, "reshard")


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether x is a DTensor, of which this process holds some rows."""
    return hasattr(x, "full_tensor")


def local_shard(x: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return x.to_local() if is_sharded(x) else x


def gather_full(x: Tensor) -> Tensor:
    """The full tensor of a sharded one (all processes must call this together); any other tensor
    unchanged."""
    return x.full_tensor() if is_sharded(x) else x


def shard_like(full: Tensor, x: Tensor) -> Tensor:
    """A full tensor that all processes have, sharded as `x` is; unchanged if `x` is not."""
    if not is_sharded(x):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, x.device_mesh, x.placements, src_data_rank=None)
