"""Time and memory, measured in pairs: the same weights and inputs in this code and in another.

    python -m nanosd3.bench forward --against diffusers      one pass through each part
    python -m nanosd3.bench train --against diffusers        one step of training the transformer
    python -m nanosd3.bench memory --config sd3-medium       a whole run, by its largest stage
    python -m nanosd3.bench growth --out growth.png          steps of training of many sizes
    python -m nanosd3.bench table --config sd3.5-large       the memory of one, computed
    python -m nanosd3.bench cuda                             everything, on a GPU

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
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanosd3 import footprint, growth
from nanosd3.config import CONFIGS, Config
from nanosd3.costs import parameters, training_flops
from nanosd3.layouts import COMPONENTS, PREFIXES
from nanosd3.measure.cuda import command
from nanosd3.pairs import (
    Forward,
    count_flops,
    forward_of,
    inputs,
    peak_memory,
    randomly_filled,
    side_of,
    text_tokens,
    theirs,
    training_step,
    with_depth,
    with_layers,
)
from nanosd3.products import multiplication_speed, seconds
from nanosd3.runtime import InputError, Parser, memory_found, positive, run_main, set_up
from nanosd3.text import ENCODERS
from nanosd3.weights import DTYPES

NAMES = {"mmdit": "transformer", "vae": "VAE decode", "clip_l": "CLIP-L", "clip_g": "CLIP-G",
         "t5": "T5"}  # fmt: skip


def prepare(
    args: argparse.Namespace, part: str, device: torch.device
) -> tuple[Forward, Forward, int]:
    """Our forward and theirs, on the same weights and inputs, and the bytes of the weights."""
    config, dtype = with_layers(CONFIGS[args.config], args.layers), DTYPES[args.dtype]
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
    side_of(CONFIGS[args.config], args.size)  # before anything large is made
    device = set_up(args.threads)
    peak = multiplication_speed(device, DTYPES[args.dtype])
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


def bench_train(args: argparse.Namespace) -> None:
    """Time, arithmetic and memory of a training step of the transformer; float32 weights."""
    config = with_depth(CONFIGS[args.config], args.depth or CONFIGS[args.config].mmdit.depth)
    tokens = args.batch * side_of(config, args.size) ** 2
    device = set_up(args.threads)
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
    best, peak = min(row[0] for row in rows), multiplication_speed(device, torch.float32)
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
    side_of(CONFIGS[args.config], args.size)
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


# --- steps of many sizes -------------------------------------------------------------------------


def bench_growth(args: argparse.Namespace) -> None:
    """Time and memory of a training step against depth, image tokens and batch, with formulas."""
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: expected a .png in a folder that exists")
    config = CONFIGS[args.config]
    most = growth.Setting(args.depth, side_of(config, args.size), args.batch)
    costs = growth.grow(config, most, args.repeats, set_up(args.threads))
    speed = growth.draw(config, most, costs, args.out)
    print(f"{args.out}: times beside those of the FLOPs at {speed / 1e9:.0f} GFLOP/s, and memory")


def bench_table(args: argparse.Namespace) -> None:
    """Memory of a training step, computed, beside what this machine has."""
    config, side = CONFIGS[args.config], side_of(CONFIGS[args.config], args.size)
    shape = config.mmdit, args.batch, side, side, text_tokens(config)
    flops = training_flops(*shape, args.checkpointing)
    print(f"{args.config}, {parameters(config.mmdit) / 1e9:.3f} billion parameters, {args.size}x"
          f"{args.size} ({side**2} image tokens, {shape[-1]} of text), {args.precision}, batch "
          f"{args.batch} in each process: {flops / 1e12:.2f} TFLOP a step")  # fmt: skip
    how = {"precision": args.precision, "checkpointing": args.checkpointing}
    print(footprint.table(*shape, **how, processes=args.processes))
    found, whose = memory_found()
    print(f"{'here':18}{found:10.2f} {whose}")


# --- the command line ----------------------------------------------------------------------------

COMMANDS = {
    "forward": bench_forward,
    "train": bench_train,
    "memory": bench_memory,
    "growth": bench_growth,
    "table": bench_table,
}


def parsers() -> dict[str, Parser]:
    """A parser for each command, which takes the options that act there and refuses all others."""
    made = {name: Parser(f"python -m nanosd3.bench {name}", run.__doc__)
            for name, run in COMMANDS.items()}  # fmt: skip

    def add(commands: str, option: str, **how: object) -> None:
        for name in commands.split():
            made[name].add_argument(option, **how)

    everywhere, said = "forward train memory growth table", "(default: %(default)s)"
    add("forward train", "--against", choices=("diffusers",), help="the other side of each pair")
    add(everywhere, "--config", default="sd3-d15", choices=tuple(CONFIGS), help=said)
    add(everywhere, "--size", type=positive, default=256, help=f"pixels a side {said}")
    add("forward train growth table", "--batch", type=positive, default=2, help=said)
    add("forward", "--layers", type=positive, default=4, help=f"of the text encoders {said}")
    add("train", "--depth", type=positive, help="of the transformer (default: the config's)")
    add("growth", "--depth", type=positive, default=8, help=f"of the transformer {said}")
    add("forward train growth", "--repeats", type=positive, default=5, help=f"measurements {said}")
    add("forward", "--parts", nargs="+", choices=COMPONENTS, help="which (default: all)")
    add("forward", "--dtype", default="float32", choices=tuple(DTYPES), help=said)
    add("forward", "--compile", action="store_true", help="through torch.compile")
    add("memory", "--without", nargs="*", default=[], choices=ENCODERS, help="leave out")
    add("memory", "--folder", type=Path, help="where weights go (default: the temporary folder)")
    add("growth", "--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    add("table", "--processes", type=positive, nargs="+", default=(1, 8, 64),
        help="how many, a column for each (default: 1 8 64)")  # fmt: skip
    add("table", "--precision", default="float32", choices=tuple(footprint.BYTES), help=said)
    add("table", "--checkpointing", action="store_true", help="compute blocks twice, keep less")
    add("forward train growth", "--threads", type=positive, help="(default: all usable cores)")
    made["growth"].set_defaults(batch=8)
    made["table"].set_defaults(batch=1)
    return made


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = Parser("python -m nanosd3.bench", "Time and memory, measured and computed.")
    parser.add_argument("what", choices=(*COMMANDS, "cuda"), help="first; each has its own --help")
    what = parser.parse_args(words[:1]).what
    if what == "cuda":
        return command.bench_cuda(command.parser().parse_args(words[1:]))
    COMMANDS[what](parsers()[what].parse_args(words[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
