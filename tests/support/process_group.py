r"""The program that test_distributed.py runs under torchrun: train a tiny network's flow stage on
synthetic latents of two sizes, once for each scenario.

    torchrun --nproc-per-node N tests/support/process_group.py FOLDER \
        '[{"name": ..., "mode": ...}, ...]'
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanosd3.cli import run_main
from nanosd3.config import CONFIGS, Recipe
from nanosd3.data.buckets import Buckets
from nanosd3.machine.distributed import Compute, ProcessGroup, process_group
from nanosd3.random_streams import rng
from nanosd3.storage.run import Run
from nanosd3.training import loop, stages, train_flow
from nanosd3.training.cached_features import Features

STEPS = 6
SIZES = [(8, 8)] * 10 + [(4, 10)] * 6 + [(8, 8)] + [(4, 10)] * 3  # the last four are held out
TINY = CONFIGS["tiny"]
FLOW = Recipe(STEPS, batch=8, lr=1e-2, warmup=2, weight_decay=0.1)
CONFIG = replace(TINY, training=replace(TINY.training, flow=FLOW))


class SyntheticData:
    """A data source and its encoded features in one: random latents and random text."""

    trained, count = 16, 20
    texts = ("a", "b", "c")

    def __init__(self):
        self.buckets = Buckets(SIZES[: self.trained])

    def draw(self, batch, generator):
        return self.buckets.draw(batch, generator)

    def captions(self, index, u):
        return (u * 3).long()

    def groups(self, numbers):
        sizes = sorted({SIZES[i] for i in numbers})
        return [torch.tensor([i for i in numbers if SIZES[i] == size]) for size in sizes]

    def latents(self, index):
        drawn = [torch.randn(2, 4, *SIZES[i], generator=rng("latents", int(i))) for i in index]
        mean, logvar = torch.stack(drawn).unbind(1)
        return mean, 0.1 * logvar.exp()

    def normalise(self, z):
        return z

    latents_and_noise = Features.latents_and_noise

    def text(self, captions):
        context = torch.stack([torch.randn(24, 48, generator=rng("t", int(i))) for i in captions])
        return context, context[:, 0, :32]


def train(
    folder: Path,
    group: ProcessGroup,
    name: str,
    stop_at: int = -1,
    stop_by: str = "",
    optimizer: str = "adamw",
    **compute: Any,
) -> None:
    """Run the flow stage in FOLDER/name, with this optimizer and these fields of Compute.

    After step `stop_at` the last process sends itself the signal `stop_by`.
    """
    if group.is_main:
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / "run.json").exists():
            Run(folder / name, {"config": {}}, {}).write()
    group.barrier()
    data = SyntheticData()
    run = Run.read(folder / name)
    training = replace(CONFIG.training, flow=replace(FLOW, optimizer=optimizer))
    config = replace(CONFIG, training=training)
    task = stages.Job(run, config, data, group.device, 0, group, Compute(**compute))

    def watch(step, average):
        if step == stop_at and group.rank == group.size - 1:
            os.kill(os.getpid(), signal.Signals[stop_by])

    if "flow" not in run.stages:
        train_flow.train_flow(task, data, watch)


def main(folder: Path, scenarios: list[dict]) -> None:
    torch.set_num_threads(1)
    loop.SAVE_EVERY = 2
    train_flow.VALIDATION_TIMES = 2  # as in the tests' own process
    with process_group("ddp", torch.device("cpu")) as group:
        for scenario in scenarios:
            mode = scenario.pop("mode")
            train(folder, replace(group, mode=mode), **scenario)


if __name__ == "__main__":
    run_main(lambda: main(Path(sys.argv[1]), json.loads(sys.argv[2])))
