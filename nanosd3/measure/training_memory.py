"""Memory of each process in training, in closed form: weights, gradients, moments, averages,
activations."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nanosd3.config_types import MMDiTConfig
from nanosd3.errors import InputError
from nanosd3.measure.activation_memory import Autocast, Step
from nanosd3.measure.costs import parameters

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes in one process at the peak of a step."""

    parameters: int  # this process's float32 share, copies gathered or cast for use, positions
    gradients: int
    optimizer: int  # AdamW's two moments; Muon needs less
    average: int  # EMA
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory(
    config: MMDiTConfig,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
    *,
    precision: str = "float32",
    checkpointing: bool = False,
    processes: int = 1,
    sharded: bool = False,
) -> Memory:
    """Memory of a training step in one of `processes`, each with a batch of its own.

    Several processes use DDP, or FSDP2 if `sharded`; bfloat16 means FSDP2's mixed precision if
    `sharded`, else autocast. Raises InputError for other precisions.
    """
    if precision not in BYTES:
        raise InputError(f"memory: expected precision {' or '.join(BYTES)}, got {precision}")
    kind = Step if sharded or precision == "float32" else Autocast
    shards = processes if sharded else None
    size = BYTES[precision]
    step = kind(config, batch, rows * columns, text_tokens, size, checkpointing, shards)
    gathered, gradients, activations = max(step.candidates(), key=sum)
    whole, positions = 4 * parameters(config), 4 * config.grid**2 * config.width
    share = -(-whole // processes) if sharded else whole
    buckets = whole if processes > 1 and not sharded else 0  # in which DDP reduces gradients
    return Memory(
        parameters=share + positions + gathered,
        gradients=gradients + buckets,
        optimizer=2 * share,
        average=share + positions,
        activations=activations,
    )


def memory_table(
    config: MMDiTConfig,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
    *,
    precision: str = "float32",
    checkpointing: bool = False,
    processes: Sequence[int] = (1, 8, 64),
) -> str:
    """GB per process as a table, one column for each number of processes; several use FSDP2."""
    predicted = [
        memory(
            config,
            batch,
            rows,
            columns,
            text_tokens,
            precision=precision,
            checkpointing=checkpointing,
            processes=count,
            sharded=count > 1,
        )
        for count in processes
    ]
    lines = ["GB per process of".ljust(18) + "".join(f"{count:10}" for count in processes)]
    for name in (*asdict(predicted[0]), "total"):
        values = "".join(f"{getattr(m, name) / 1e9:10.2f}" for m in predicted)
        lines.append(f"{name:18}" + values)
    return "\n".join(lines)
