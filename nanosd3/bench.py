"""Time and memory, measured in pairs: the same weights and inputs in this code and in another.

    python -m nanosd3.bench forward --against diffusers      one pass through each part
    python -m nanosd3.bench train --against diffusers        one step of training the transformer
    python -m nanosd3.bench memory --config sd3-medium       a whole run, by its largest stage

Machines are noisy, so a time means little and a ratio of two taken side by side means more:
`forward` and `train` run both in turn, several times, and give the median of the ratios. Memory is
that of all tensors alive at the peak, with the weights and without. Outputs are compared too: a
fast wrong answer is not fast. Weights are random; text encoders have their full width but few
layers, as all layers cost the same.
"""

import argparse
import copy
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nanosd3.config import CONFIGS, Config
from nanosd3.layouts import COMPONENTS, PREFIXES
from nanosd3.loop import CLIP_NORM
from nanosd3.pairs import (
    Forward,
    count_flops,
    forward_of,
    inputs,
    matrix_peak,
    peak_memory,
    randomly_filled,
    seconds,
    theirs,
)
from nanosd3.runtime import InputError, Parser, positive, run_main, set_up
from nanosd3.text import ENCODERS
from nanosd3.weights import DTYPES

NAMES = {"mmdit": "transformer", "vae": "VAE decode", "clip_l": "CLIP-L", "clip_g": "CLIP-G",
         "t5": "T5"}  # fmt: skip


def measured_config(args: argparse.Namespace) -> Config:
    """The config asked for, its text encoders cut to a few layers."""
    config = CONFIGS[args.config]
    text = config.text
    few = {
        name: replace(getattr(text, name), layers=min(args.layers, getattr(text, name).layers))
        for name in ENCODERS
    }
    return replace(config, text=replace(text, **few))


def prepare(
    args: argparse.Namespace, part: str, device: torch.device
) -> tuple[Forward, Forward, int]:
    """Our forward and theirs, on the same weights and inputs, and the bytes of the weights."""
    config, dtype = measured_config(args), DTYPES[args.dtype]
    ours = randomly_filled(config, part, device, dtype)
    given = inputs(config, part, args.size, args.batch, next(ours.parameters()))
    other = theirs(config, part, ours) if args.against else ours
    made = [
        forward_of(ours, part, given, foreign=False),
        forward_of(other, part, given, foreign=other is not ours),
    ]
    if args.compile:
        made = [torch.compile(forward) for forward in made]
    weights = sum(t.numel() * t.element_size() for t in ours.state_dict().values())
    return made[0], made[1], weights


@torch.no_grad()
def bench_forward(args: argparse.Namespace) -> None:
    device = set_up(args.threads)
    peak = matrix_peak(device, DTYPES[args.dtype])
    print(f"{args.config}, {args.size}x{args.size}, batch {args.batch}, {args.dtype}, text "
          f"encoders of {args.layers} layers; matrix product {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    print("| part | ours | share of peak | time ratio | memory ratio | beyond weights | "
          "difference |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for part in args.parts or COMPONENTS:
        ours, other, weights = prepare(args, part, device)
        flops = count_flops(ours)
        answer = ours()
        difference = (answer - other()).abs().max() / answer.abs().max()
        pairs = [(seconds(ours, device), seconds(other, device)) for _ in range(args.repeats)]
        best = min(mine for mine, _ in pairs)
        row = f"| {NAMES[part]} | {best:.3f} s | {flops / best / peak:.0%} | "
        if not args.against:
            print(row + "- | - | - | - |")
            continue
        time_ratio = statistics.median(mine / their for mine, their in pairs)
        mine, their = (peak_memory(forward, device) for forward in (ours, other))
        print(row + f"{time_ratio:.2f} | {(weights + mine) / (weights + their):.2f} | "
              f"{mine / their:.2f} | {difference:.0e} |", flush=True)  # fmt: skip


# --- a step of training -------------------------------------------------------------------------


def training_step(model: nn.Module, forward: Forward, target: Tensor) -> Callable[[], Tensor]:
    """One step as the loop makes it: forward, loss, backward, clipped gradient, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.99), fused=True)

    def step() -> Tensor:
        loss = (forward() - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def bench_train(args: argparse.Namespace) -> None:
    """Time, arithmetic and memory of a training step of the transformer; float32 weights."""
    device, config = set_up(args.threads), CONFIGS[args.config]
    if args.depth:
        dual = tuple(i for i in config.mmdit.dual_attention if i < args.depth)
        mmdit = replace(config.mmdit, depth=args.depth, dual_attention=dual)
        config = replace(config, mmdit=mmdit)
    ours = randomly_filled(config, "mmdit", device, torch.float32)
    models = [ours, *([copy.deepcopy(theirs(config, "mmdit", ours))] if args.against else [])]
    given = inputs(config, "mmdit", args.size, args.batch, next(ours.parameters()))
    target = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(2)).to(device)
    steps = []
    for model in models:
        forward = forward_of(model.requires_grad_().train(), "mmdit", given, model is not ours)
        steps.append(training_step(model, forward, target))
    losses = [(step(), step())[1] for step in steps]  # the second one has felt a gradient
    flops = count_flops(steps[0])
    rows = [[seconds(step, device) for step in steps] for _ in range(args.repeats)]
    best, peak = min(row[0] for row in rows), matrix_peak(device, torch.float32)
    tokens = args.batch * (given[0].shape[2] * given[0].shape[3] // config.mmdit.patch_size**2)
    held = 3 * sum(p.numel() * p.element_size() for p in ours.parameters())  # with two moments
    memory = [peak_memory(step, device) for step in steps]
    print(f"{args.config}, depth {config.mmdit.depth}, {args.size}x{args.size}, batch "
          f"{args.batch}, float32: {best:.3f} s, {tokens / best:.0f} image tokens a second, "
          f"{flops / best / peak:.0%} of the matrix product's {peak / 1e9:.0f} GFLOP/s, "
          f"{held / 1e9:.3f} GB of weights and moments + {memory[0] / 1e9:.3f} GB")  # fmt: skip
    if args.against:
        ratio = statistics.median(mine / their for mine, their in rows)
        print(f"against {args.against}: time {ratio:.2f}, memory "
              f"{(held + memory[0]) / (held + memory[1]):.2f}, beyond weights and moments "
              f"{memory[0] / memory[1]:.2f}, loss of the second step differs by "
              f"{abs(losses[0] - losses[1]) / losses[0]:.0e}")  # fmt: skip


# --- a whole run --------------------------------------------------------------------------------


def status_of(field: str) -> int:
    """A line of this process's status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def alone(function: Callable, *arguments: object) -> object:
    """What a function returns in a process of its own, whose memory goes with it."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def write_random(config: Config, path: Path, without: list[str]) -> dict[str, int]:
    """A single file in float16 of a full-size model, filled at random; parameters by part."""
    state, counts = {}, {}
    for part in COMPONENTS:
        if part in without:
            continue
        module = randomly_filled(config, part, torch.device("cpu"), torch.float16)
        counts[part] = sum(tensor.numel() for tensor in module.state_dict().values())
        state |= {PREFIXES[part] + key: tensor for key, tensor in module.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return counts


CHILD = """
import sys
from nanosd3 import bench, generate
before = bench.status_of("VmHWM")
generate.main(sys.argv[1:])
print(before, bench.status_of("VmHWM"))
"""


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory of `generate` in a process of its own, beside the weights of each part."""
    if CONFIGS[args.config].training:
        raise InputError(f"memory: {args.config} is small; name one of the official models")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / f"{args.config}.safetensors"
        counts = alone(write_random, CONFIGS[args.config], path, args.without)
        options = ["a photo of a cat", "--weights", path, "--out", Path(folder) / "cat.png"]
        options += ["--height", args.size, "--width", args.size, "--steps", 2]
        options += [word for part in args.without for word in ("--drop", part)]
        command = [sys.executable, "-c", CHILD, *map(str, options)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"generate ended with status {done.returncode}")
        before, peak = map(int, done.stdout.split()[-2:])
    weights = {part: 4 * n for part, n in counts.items()}
    largest = max(weights, key=weights.get)
    for part, size in weights.items():
        print(f"{NAMES[part]:12}{size / 1e9:7.2f} GB in float32")
    print(f"program     {before / 1e9:7.2f} GB before any weights")
    print(f"peak        {peak / 1e9:7.2f} GB: {peak / (before + weights[largest]):.2f} of the "
          f"program and its largest part ({NAMES[largest]}); with all parts at once "
          f"{(before + sum(weights.values())) / 1e9:.2f} GB")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m nanosd3.bench", "Time and memory, measured in pairs.")
    add = parser.add_argument
    add(
        "what",
        choices=("forward", "train", "memory"),
        help="one pass of each part, one step of training the transformer, or a whole run",
    )
    add("--against", choices=("diffusers",), help="the other side of each pair")
    add("--config", default="sd3-d15", choices=tuple(CONFIGS), help="(default: %(default)s)")
    add("--size", type=positive, default=256, help="pixels a side (default: %(default)s)")
    add("--batch", type=positive, default=2, help="(default: 2, as with guidance)")
    add("--layers", type=positive, default=4, help="forward: of the text encoders (default: 4)")
    add("--depth", type=positive, help="train: of the transformer (default: the config's)")
    add("--repeats", type=positive, default=5, help="pairs (default: %(default)s)")
    add("--parts", nargs="+", choices=COMPONENTS, help="forward: which (default: all)")
    add("--dtype", default="float32", choices=tuple(DTYPES))
    add("--compile", action="store_true", help="forward: through torch.compile")
    add("--without", nargs="*", default=[], choices=ENCODERS, help="memory: leave out")
    add("--folder", type=Path, help="memory: where the weights go (default: the temporary folder)")
    add("--threads", type=positive, help="CPU threads (default: all usable cores)")
    args = parser.parse_args(arguments)
    if args.what == "forward":
        bench_forward(args)
    elif args.what == "train":
        bench_train(args)
    else:
        bench_memory(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
