"""One training run on many processes, with PyTorch's own means: torchrun starts them, DDP or FSDP2
binds them.

    torchrun --nproc-per-node 4 train_mnist.py --parallel fsdp

Every process draws the same numbers and takes its share of the batch's rows, so that the loss does
not depend on how many they are (but for the rounding of sums). DDP gives each a whole copy of the
network and averages gradients; FSDP2 gives each a share of every weight, gradient, moment and
average, and gathers the weights of one block when it is computed. What is small (autoencoder, text
encoders) is trained by the first process alone; the others wait and read its files, so all must
see the same folders.

How a network is computed is settled here too, beside it and not in it: the type of the numbers
(weights and their averages stay float32), recomputed activations, the compiler.

Left out: tensor and pipeline parallelism, which networks of 8B do not need.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanosd3.runtime import InputError

MODES = ("ddp", "fsdp")
PATIENCE = timedelta(hours=12)  # a stage of the first process alone may take so long
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    mode: str | None = None  # "ddp", "fsdp", or None for a process alone
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self.largest(0)

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes bring."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order of rank, on the CPU; all bring equally many."""
        if self.size == 1:
            return rows.cpu()
        parts = [torch.empty_like(rows, device="cpu") for _ in range(self.size)]
        dist.all_gather(parts, rows.cpu())
        return torch.cat(parts)

    def shares(self, batch: int, accumulate: int = 1) -> list[range]:
        """This process's rows of a batch, in as many parts as gradients are accumulated over.

        Raises InputError if that does not divide the batch.
        """
        parts = self.size * accumulate
        if batch % parts:
            raise InputError(f"a batch of {batch} cannot be divided among {self.size} processes "
                             f"x {accumulate} parts; take a multiple of {parts}")  # fmt: skip
        rows = batch // parts
        first = self.rank * accumulate
        return [range(i * rows, (i + 1) * rows) for i in range(first, first + accumulate)]


ALONE = Team()


def launched() -> int:
    """How many processes torchrun has started for this run; 0 without it."""
    return int(os.environ.get("WORLD_SIZE", 0)) if "LOCAL_RANK" in os.environ else 0


@contextmanager
def team(mode: str | None, device: torch.device) -> Iterator[Team]:
    """While open, this process is one of a team that torchrun has started, or alone without it.

    Raises InputError if `mode` is given without torchrun, or torchrun without it.
    """
    if not launched():
        if mode:
            raise InputError(f"--parallel {mode} needs processes: start with `torchrun "
                             "--nproc-per-node N` instead of `python`")  # fmt: skip
        yield Team(device=device)
        return
    if mode is None:
        raise InputError(f"torchrun has started {launched()} processes; say --parallel ddp or fsdp")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield Team(dist.get_rank(), dist.get_world_size(), mode, device)
    dist.barrier()  # who leaves early takes the others' connections along


# --- how a network is computed --------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """How steps are computed; none of it changes what they compute, but for rounding."""

    precision: str = "float32"  # or "bfloat16": of products and activations; weights are float32
    checkpointing: bool = False  # keep the inputs of blocks only, and compute each twice
    compiled: bool = False
    accumulate: int = 1  # parts of a process's share of the batch, one after the other


class Placed(nn.Module):
    """A network spread over a team and computed as told: call it instead of the network.

    `blocks` are the parts that are gathered, recomputed and compiled one by one. Gradients come
    out averaged over the team, whose processes each see a share of the rows.
    """

    def __init__(
        self,
        module: nn.Module,
        team: Team = ALONE,
        compute: Compute = Compute(),
        blocks: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.module, self.team, self.compute = module, team, compute
        for block in blocks:
            if compute.checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if compute.compiled:
                block.compile()
        self.network = module
        if team.mode == "fsdp":
            self.shard(blocks)
        elif team.mode == "ddp" and any(p.requires_grad for p in module.parameters()):
            self.network = DistributedDataParallel(module, forward_sync_buffers=False)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute.precision)

    def shard(self, blocks: Sequence[nn.Module]) -> None:
        """FSDP2: every weight becomes a DTensor, of which this process holds its rows. The first
        process brings the numbers; the others need to know shapes only (the meta device)."""
        full = self.module.state_dict() if self.team.leads else {}
        self.module.to("meta")
        mesh = init_device_mesh(self.team.device.type, (self.team.size,))
        types = MixedPrecisionPolicy(
            param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for part in (*blocks, self.module):
            fully_shard(part, mesh=mesh, mp_policy=types)
        self.module.to_empty(device=self.team.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.module, full, options=options)

    def forward(
        self, z: Tensor, t: Tensor, context: Tensor, pooled: Tensor, skip: Collection[int] = ()
    ) -> Tensor:
        """The network's answer in float32. Time is never rounded to bfloat16: its 8 bits would
        turn the fast cosines of the timestep embedding into noise."""
        if self.team.mode == "fsdp":
            z, context, pooled = (x.to(self.dtype) for x in (z, context, pooled))
            velocity = self.network(z, t, context, pooled, skip).float()
            if not torch.is_grad_enabled():  # no backward pass will give back what was gathered
                self.module.reshard()
            return velocity
        lower = self.compute.precision != "float32"
        with torch.autocast(z.device.type, self.dtype) if lower else nullcontext():
            return self.network(z, t, context, pooled, skip).float()

    def exchanging(self, wanted: bool) -> AbstractContextManager:
        """For a forward and backward pass: whether gradients are averaged over the team at its
        end. They are at the last part of a step, and before it only added up."""
        if self.team.mode == "fsdp":
            self.module.set_requires_gradient_sync(wanted)
        elif self.team.mode == "ddp" and not wanted:
            return self.network.no_sync()
        return nullcontext()


def local(x: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, in the same memory; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor, asked for by all processes together; any other tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x
