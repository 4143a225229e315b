"""Benchmarks: time and memory, measured and predicted.

    python -m nanosd3.bench forward --against diffusers      one forward pass of each part
    python -m nanosd3.bench train --against diffusers        one training step of the transformer
    python -m nanosd3.bench memory --config sd3-medium       peak memory of a whole run
    python -m nanosd3.bench growth --out growth.png          training steps of many sizes
    python -m nanosd3.bench table --config sd3.5-large       predicted memory of a training step
    python -m nanosd3.bench frontier runs/mnist              how good a trained model is
    python -m nanosd3.bench cuda                             everything, on a GPU

Weights are random, which changes neither time nor memory; only `frontier` needs a trained model.
Text encoders have their full width but few layers (`forward --layers`), since all their layers cost
the same. Memory is that of all tensors alive at the peak. The measurements are in measure/; the
options and the printing are here.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from nanosd3.cli import Parser, image_count, positive, run_main
from nanosd3.components import COMPONENTS
from nanosd3.config import CONFIGS
from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.machine.device import memory_found, set_up
from nanosd3.machine.matmul import multiplication_speed
from nanosd3.measure import growth, training_memory
from nanosd3.measure.compare_diffusers import (
    Workload,
    compare_pass,
    compare_training,
    require_diffusers,
)
from nanosd3.measure.costs import parameters, training_flops
from nanosd3.measure.cuda import command
from nanosd3.measure.generate_memory import measure_run
from nanosd3.measure.random_models import patches_per_side, text_tokens, with_depth, with_layers
from nanosd3.pipeline import Pipeline
from nanosd3.storage.run import Run
from nanosd3.text import ENCODERS
from nanosd3.training import evaluation, plots
from nanosd3.weights import PRECISIONS

REAL_ACCURACY = 0.993  # roughly the classifier's accuracy on real images
NAMES = {
    "mmdit": "transformer",
    "vae": "VAE decode",
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5": "T5",
}


def workload(args: argparse.Namespace, config: Config, dtype: str, compiled: bool) -> Workload:
    """The measurement that the options describe. Raises InputError for an unsupported size."""
    patches_per_side(config, args.size)  # before anything large is allocated
    if args.against:
        require_diffusers()
    return Workload(
        config=config,
        size=args.size,
        batch=args.batch,
        repeats=args.repeats,
        device=set_up(args.threads),
        dtype=PRECISIONS[dtype],
        compiled=compiled,
        against=bool(args.against),
    )


def bench_forward(args: argparse.Namespace) -> None:
    """Time and memory of a forward pass of each part."""
    config = with_layers(CONFIGS[args.config], args.layers)
    work = workload(args, config, args.dtype, args.compile)
    speed = multiplication_speed(work.device, work.dtype)
    print(
        f"{args.config}, {args.size}x{args.size}, batch {args.batch}, {args.dtype}, text "
        f"encoders of {args.layers} layers; matrix product {speed / 1e9:.0f} GFLOP/s"
    )
    print(
        "| part | ours | share of peak | time ratio | memory ratio | beyond weights | "
        "difference |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for part in args.parts or COMPONENTS:
        cost = compare_pass(work, part)
        share = cost.flops / cost.seconds / speed
        row = f"| {NAMES[part]} | {cost.seconds:.3f} s | {share:.0%} | "
        if ratios := cost.ratios:
            row += f"{ratios.time:.2f} | {ratios.memory:.2f} | {ratios.activations:.2f} | "
            row += f"{ratios.difference:.0e} |"
        else:
            row += "- | - | - | - |"
        print(row, flush=True)


def bench_train(args: argparse.Namespace) -> None:
    """Time, FLOPs and memory of a training step of the transformer, with float32 weights."""
    config = with_depth(CONFIGS[args.config], args.depth or CONFIGS[args.config].mmdit.depth)
    work = workload(args, config, "float32", compiled=False)
    cost = compare_training(work)
    speed = multiplication_speed(work.device, work.dtype)
    tokens = args.batch * patches_per_side(config, args.size) ** 2
    print(
        f"{args.config}, depth {config.mmdit.depth}, {args.size}x{args.size}, batch "
        f"{args.batch}, float32: {cost.seconds:.3f} s, {tokens / cost.seconds:.0f} image tokens a "
        f"second, {cost.flops / cost.seconds / speed:.0%} of the matrix product's "
        f"{speed / 1e9:.0f} GFLOP/s, {cost.fixed / 1e9:.3f} GB of weights and moments + "
        f"{cost.peak / 1e9:.3f} GB"
    )
    if ratios := cost.ratios:
        print(
            f"against {args.against}: time {ratios.time:.2f}, memory {ratios.memory:.2f}, beyond "
            f"weights and moments {ratios.activations:.2f}, loss of the second step differs by "
            f"{ratios.difference:.0e}"
        )


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory of a run of `generate`, next to the weights of each part (Linux)."""
    config = CONFIGS[args.config]
    if config.training:
        raise InputError(
            f"memory: --config {args.config} is small; choose an official model, such as sd3-medium"
        )
    patches_per_side(config, args.size)
    run = measure_run(config, args.size, args.without, args.folder)
    for part, size in run.weights.items():
        print(f"{NAMES[part]:12}{size / 1e9:7.2f} GB in float32")
    print(f"program     {run.before / 1e9:7.2f} GB before any weights")
    ratio = run.peak / (run.before + run.weights[run.largest])
    total = run.before + sum(run.weights.values())
    print(
        f"peak        {run.peak / 1e9:7.2f} GB: {ratio:.2f} of the program and its largest part "
        f"({NAMES[run.largest]}); with all parts at once {total / 1e9:.2f} GB"
    )


def check_picture(out: Path) -> None:
    """Raises InputError if a plot cannot be written there."""
    if out.suffix != ".png" or not out.parent.is_dir():
        raise InputError(f"--out {out}: expected a .png file in an existing folder")


def bench_growth(args: argparse.Namespace) -> None:
    """Time and memory of a training step against depth, image tokens and batch, measured and
    predicted."""
    check_picture(args.out)
    config = CONFIGS[args.config]
    largest = growth.StepShape(args.depth, patches_per_side(config, args.size), args.batch)
    costs = growth.grow(config, largest, args.repeats, set_up(args.threads))
    columns, title, speed = growth.plot_data(config, largest, costs)
    plots.plot_growth(columns, title, args.out)
    print(
        f"{args.out}: measured and predicted time (FLOPs at {speed / 1e9:.0f} GFLOP/s) and memory"
    )


def bench_table(args: argparse.Namespace) -> None:
    """Predicted memory of a training step, next to the memory of this machine."""
    config, side = CONFIGS[args.config], patches_per_side(CONFIGS[args.config], args.size)
    shape = config.mmdit, args.batch, side, side, text_tokens(config)
    flops = training_flops(*shape, args.checkpointing)
    print(
        f"{args.config}, {parameters(config.mmdit) / 1e9:.3f} billion parameters, {args.size}x"
        f"{args.size} ({side**2} image tokens, {shape[-1]} of text), {args.precision}, batch "
        f"{args.batch} in each process: {flops / 1e12:.2f} TFLOP a step"
    )
    table = training_memory.memory_table(
        *shape,
        precision=args.precision,
        checkpointing=args.checkpointing,
        processes=args.processes,
    )
    gigabytes, source = memory_found()
    print(f"{table}\n{'here':18}{gigabytes:10.2f} {source}")


def bench_frontier(args: argparse.Namespace) -> None:
    """Accuracy and Frechet distance of a finished run of train_mnist.py at several guidance scales,
    on fresh draws of prompts and noise: a table, and a plot of one against the other."""
    run, out = Run.read(args.run), args.out or args.run / "frontier.png"
    check_picture(out)
    if any(not 0 <= guidance < float("inf") for guidance in args.guidance):
        raise InputError("--guidance: expected numbers of at least 0")
    device = set_up(args.threads)
    scorer = evaluation.open_scorer(run, args.data, device)
    pipeline = Pipeline.load(args.run, device)
    seeds = range(1, args.draws + 1)
    print("| guidance | accuracy | distance / floor | of each draw |\n| --- | --- | --- | --- |")
    points = []
    guidances = sorted(set(args.guidance))
    for point in evaluation.frontier(scorer, pipeline, guidances, args.count, seeds):
        draws = zip(point.accuracies, point.ratios, strict=True)
        each = "; ".join(f"{accuracy:.1%}, {ratio:.2f}" for accuracy, ratio in draws)
        row = f"| {point.guidance:g} | {point.accuracy:.2%} | {point.ratio:.2f} | {each} |"
        print(row, flush=True)
        points.append(point)
    rows = [(p.guidance, p.accuracy, p.ratio) for p in points]
    plots.plot_frontier(rows, run.stages["judge"]["accuracy"], out)
    if found := evaluation.at_accuracy(points, REAL_ACCURACY):
        print(
            f"prompt accuracy is {REAL_ACCURACY:.1%} at guidance {found[0]:.2f}, where the "
            f"distance is {found[1]:.2f} times that of real images"
        )
    print(out)


# --- the command line ----------------------------------------------------------------------------

COMMANDS = {
    "forward": bench_forward,
    "train": bench_train,
    "memory": bench_memory,
    "growth": bench_growth,
    "table": bench_table,
    "frontier": bench_frontier,
}


def parsers() -> dict[str, Parser]:
    """A parser for each command; each accepts only the options that have an effect there."""
    made = {
        name: Parser(f"python -m nanosd3.bench {name}", function.__doc__ or "")
        for name, function in COMMANDS.items()
    }

    def add(commands: str, option: str, **settings: Any) -> None:
        for name in commands.split():
            made[name].add_argument(option, **settings)

    everywhere, default = "forward train memory growth table", "(default: %(default)s)"
    add("forward train", "--against", choices=("diffusers",), help="compare with this library")
    add(everywhere, "--config", default="sd3-d15", choices=tuple(CONFIGS), help=default)
    add(everywhere, "--size", type=positive, default=256, help=f"image side in pixels {default}")
    add("forward train growth table", "--batch", type=positive, default=2, help=default)
    add("forward", "--layers", type=positive, default=4, help=f"text encoder layers {default}")
    add("train", "--depth", type=positive, help="of the transformer (default: the config's)")
    add("growth", "--depth", type=positive, default=8, help=f"largest depth {default}")
    add("forward train growth", "--repeats", type=positive, default=5, help=f"timings {default}")
    add("forward", "--parts", nargs="+", choices=COMPONENTS, help="which parts (default: all)")
    add("forward", "--dtype", default="float32", choices=tuple(PRECISIONS), help=default)
    add("forward", "--compile", action="store_true", help="use torch.compile")
    add("memory", "--without", nargs="*", default=[], choices=ENCODERS, help="encoders to drop")
    add("memory", "--folder", type=Path, help="for the weights (default: the temporary folder)")
    add("growth", "--out", type=Path, required=True, metavar="FILE.png", help="the plot")
    add(
        "table",
        "--processes",
        type=positive,
        nargs="+",
        default=(1, 8, 64),
        help="numbers of processes, one column each (default: 1 8 64)",
    )
    add(
        "table",
        "--precision",
        default="float32",
        choices=tuple(training_memory.BYTES),
        help=default,
    )
    add("table", "--checkpointing", action="store_true", help="recompute blocks in backward")
    add("frontier", "run", type=Path, help="folder of a finished run of train_mnist.py")
    add("frontier", "--data", type=Path, help="the run's images (default: the packaged MNIST)")
    add("frontier", "--guidance", type=float, nargs="+", default=(1.2, 1.4, 1.6, 1.8), help=default)
    add("frontier", "--draws", type=positive, default=3, help=f"of prompts and noise {default}")
    add("frontier", "--count", type=image_count, default=1000, help=f"samples of a draw {default}")
    add("frontier", "--out", type=Path, metavar="FILE.png", help="(default: in the run folder)")
    add(
        "forward train growth frontier",
        "--threads",
        type=positive,
        help="(default: the usable cores, at most 8)",
    )
    made["growth"].set_defaults(batch=8)
    made["table"].set_defaults(batch=1)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = Parser("python -m nanosd3.bench", "Benchmarks of time and memory.")
    parser.add_argument("what", choices=(*COMMANDS, "cuda"), help="first; each has its own --help")
    what = parser.parse_args(words[:1]).what
    if what == "cuda":
        return command.bench_cuda(command.parser().parse_args(words[1:]))
    COMMANDS[what](parsers()[what].parse_args(words[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
