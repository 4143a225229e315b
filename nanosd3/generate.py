"""Prompts to images: `python -m nanosd3.generate "a handwritten seven" --run runs/mnist`."""

import argparse
import io
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from nanosd3 import figures
from nanosd3.checkpoint import write_file
from nanosd3.pipeline import Pipeline
from nanosd3.runtime import InputError, Parser, positive, run_main, set_up
from nanosd3.samplers import SAMPLERS
from nanosd3.text import ENCODERS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m nanosd3.generate", "Images for prompts, from a trained run.")
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help='such as "a bold seven leaning right"')
    add("--run", type=Path, default=Path("runs/mnist"), help="run folder (default: %(default)s)")
    add("--out", type=Path, default=Path("digits.png"),
        help=".png: a captioned grid; .npy: the uint8 array (default: %(default)s)")  # fmt: skip
    add("--count", type=positive, default=8, help="images for each prompt (default: %(default)s)")
    add("--steps", type=positive, help="solver steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale; 1: none (default: the model's)")
    add("--sampler", choices=tuple(SAMPLERS), help="ODE solver (default: the model's)")
    add("--shift", type=float, help="timestep shift towards noise (default: the model's)")
    add("--negative", default="", help="what guidance moves away from (default: no text)")
    add("--drop", action="append", default=[], choices=ENCODERS, help="leave out a text encoder")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: all usable cores)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.out.suffix not in (".png", ".npy"):
        raise InputError(f"{args.out}: the output must end in .png or .npy")
    if not args.out.parent.is_dir():
        raise InputError(f"{args.out}: folder {args.out.parent} does not exist")
    if args.out.is_dir():
        raise InputError(f"{args.out}: is a folder")
    pipeline = Pipeline.load(args.run, set_up(args.threads))
    prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        images = pipeline(
            prompts,
            negative=args.negative,
            steps=args.steps,
            guidance=args.guidance,
            shift=args.shift,
            sampler=args.sampler,
            seed=args.seed,
            drop=args.drop,
            progress=True,
        )
    for remark in remarks:
        print(f"warning: {remark.message}", file=sys.stderr)
    rate = len(images) / (time.perf_counter() - begin)
    if args.out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, images)
        content = buffer.getvalue()
    else:
        rows = np.split(images, len(args.prompts))
        captions = [prompt or "(no text)" for prompt in args.prompts]
        content = figures.png(figures.grid(list(zip(captions, rows, strict=True))))
    write_file(args.out, content)
    print(f"{len(images)} images, {rate:.0f} a second: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
