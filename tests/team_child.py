"""What tests/test_parallel.py runs in several processes: the flow of a tiny network, on latents of
two sizes made up here, in all ways asked for, one after the other.

    torchrun --nproc-per-node N tests/team_child.py FOLDER '[{"name": ..., "mode": ...}, ...]'
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from nanosd3 import loop, stages
from nanosd3.buckets import Buckets
from nanosd3.checkpoint import Run
from nanosd3.config import CONFIGS, Recipe
from nanosd3.parallel import Compute, Team, team
from nanosd3.runtime import rng, run_main

STEPS = 6
SIZES = [(8, 8)] * 10 + [(4, 10)] * 6 + [(8, 8)] + [(4, 10)] * 3  # four are held out
TINY = CONFIGS["tiny"]
CONFIG = replace(TINY, training=replace(
    TINY.training, flow=Recipe(STEPS, batch=8, lr=1e-2, warmup=2, weight_decay=0.1)
))  # fmt: skip


class Made:
    """A source and its features in one: random latents and random words."""

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

    def text(self, captions):
        context = torch.stack([torch.randn(24, 48, generator=rng("t", int(i))) for i in captions])
        return context, context[:, 0, :32]


def train(
    folder: Path, members: Team, name: str, stop_at: int = -1, stop_by: str = "", **how: object
) -> None:
    """One run in FOLDER/name. At a step, the last process may get a signal."""
    if members.leads:
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / "run.json").exists():
            Run(folder / name, {"config": {}}, {}).write()
    members.wait()
    made = Made()
    run = Run.read(folder / name)
    job = stages.Job(run, CONFIG, made, members.device, 0, members, Compute(**how))

    def watch(step, average):
        if step == stop_at and members.rank == members.size - 1:
            os.kill(os.getpid(), signal.Signals[stop_by])

    if "flow" not in run.stages:
        stages.train_flow(job, made, watch)


def main(folder: Path, scenarios: list[dict]) -> None:
    torch.set_num_threads(1)
    loop.SAVE_EVERY = 2
    with team("ddp", torch.device("cpu")) as found:
        for scenario in scenarios:
            mode = scenario.pop("mode")
            train(folder, replace(found, mode=mode), **scenario)


if __name__ == "__main__":
    run_main(lambda: main(Path(sys.argv[1]), json.loads(sys.argv[2])))
