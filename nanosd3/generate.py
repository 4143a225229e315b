"""Prompts to images, from a run or from official weights.

python -m nanosd3.generate "a handwritten seven" --run runs/mnist --out digits.png
python -m nanosd3.generate "a photo of a cat" --weights sd3.5_medium.safetensors --out cat.png
"""

import argparse
import io
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from nanosd3 import figures
from nanosd3.audit import report
from nanosd3.checkpoint import Run, write_file
from nanosd3.found import find, find_run
from nanosd3.images import read_image, read_mask
from nanosd3.options import SKIP_RANGE, SKIP_SCALE, STRENGTH
from nanosd3.pipeline import Pipeline
from nanosd3.runtime import InputError, Parser, positive, run_main, set_up
from nanosd3.samplers import SAMPLERS
from nanosd3.text import ENCODERS
from nanosd3.weights import DTYPES, add_files, files_of, open_pipeline


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between, for the command line."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as in 7,8,9, got {text!r}") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m nanosd3.generate", "Images for prompts.")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help='such as "a bold seven leaning right"')
    add("--run", type=Path, help="run folder of this program (default: runs/mnist)")
    add("--weights", type=Path, metavar="PATH",
        help="official weights: a single file or a diffusers folder")  # fmt: skip
    add_files(parser)
    add("--report", action="store_true", help="only say what is in --weights")
    add("--out", type=Path,
        help=".png: one picture, or a captioned grid; .npy: the uint8 array (default: digits.png "
             "of a run, image.png of weights)")  # fmt: skip
    add("--count", type=positive, help="images a prompt (default: 8 of a run, 1 of weights)")
    add("--height", type=positive, help="pixels (default: the model's)")
    add("--width", type=positive, help="pixels (default: the model's)")
    add("--steps", type=positive, help="solver steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale; up to 1: none (default: the model's)")
    add("--sampler", choices=tuple(SAMPLERS), help="ODE solver (default: the model's)")
    add("--shift", type=float, help="timestep shift towards noise (default: the model's)")
    add("--negative", default="", help="what guidance moves away from (default: no text)")
    add("--skip-layers", type=numbers, default=(), metavar="I,J,...",
        help="skip-layer guidance without these blocks, in the first part of the steps "
             f"(up to {SKIP_RANGE[1]:.0%}%); 7,8,9 for SD3.5-medium")  # fmt: skip
    add("--skip-scale", type=float, help=f"its strength (default: {SKIP_SCALE})")
    add("--init-image", type=Path, metavar="FILE", help="start from this picture")
    add("--strength", type=float, help="how much of it is made new, up to 1 (default: "
        f"{STRENGTH}; with a mask 1)")  # fmt: skip
    add("--mask", type=Path, metavar="FILE", help="repaint only where this picture is light")
    add("--drop", action="append", default=[], choices=ENCODERS, help="leave out a text encoder")
    add("--t5-length", type=positive, help="tokens for T5, padded or cut (default: the model's)")
    add("--dtype", choices=tuple(DTYPES), help="of --weights (default: float32 on CPU, bfloat16 "
        "on a GPU)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: all usable cores)")
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> Path:
    """Where to write. Raises InputError for options that do not go together."""
    if args.run and args.weights:
        raise InputError("--run and --weights: name one of them")
    if args.report:
        if not args.weights:
            raise InputError("--report is of --weights PATH")
        return Path()
    if not args.prompts:
        raise InputError("no PROMPT given (see --help)")
    for name, value in {**files_of(args), "dtype": args.dtype}.items():
        if value is not None and not args.weights:
            raise InputError(f"--{name.replace('_', '-')} belongs to --weights PATH")
    if args.skip_scale is not None and not args.skip_layers:
        raise InputError("--skip-scale has no effect without --skip-layers")
    for name in ("mask", "strength"):
        if getattr(args, name) is not None and not args.init_image:
            raise InputError(f"--{name} has no effect without --init-image")
    out = args.out or Path("image.png" if args.weights else "digits.png")
    if out.suffix not in (".png", ".npy"):
        raise InputError(f"{out}: the output must end in .png or .npy")
    if not out.parent.is_dir():
        raise InputError(f"{out}: folder {out.parent} does not exist")
    if out.is_dir():
        raise InputError(f"{out}: is a folder")
    return out


def open_model(args: argparse.Namespace) -> Pipeline:
    """The pipeline of a run or of official weights, whose report is printed first."""
    if not args.weights:
        folder = args.run or Path("runs/mnist")
        if "weights" not in Run.read(folder).identity:
            return Pipeline.load(folder, set_up(args.threads))
        return open_pipeline(find_run(folder), set_up(args.threads), None, staged=True)
    found = find(args.weights, files_of(args))
    print(report(found))
    dtype = DTYPES[args.dtype] if args.dtype else None
    return open_pipeline(found, set_up(args.threads), dtype, staged=True)


def content(images: np.ndarray, prompts: list[str], suffix: str) -> bytes:
    """The file: an array, one picture as it is, or a grid with a row for each prompt."""
    if suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, images)
        return buffer.getvalue()
    if len(images) == 1:
        return figures.png(figures.to_image(images[0]))
    rows = np.split(images, len(prompts))
    captions = [prompt or "(no text)" for prompt in prompts]
    return figures.png(figures.grid(list(zip(captions, rows, strict=True))))


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    out = check_arguments(args)
    if args.report:
        print(report(find(args.weights, files_of(args))))
        return 0
    pipeline = open_model(args)
    channels = pipeline.config.vae.image_channels
    image = read_image(args.init_image, channels) if args.init_image else None
    mask = read_mask(args.mask) if args.mask else None
    count = args.count or (1 if args.weights else 8)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        images = pipeline(
            [prompt for prompt in args.prompts for _ in range(count)],
            args.negative,
            steps=args.steps,
            guidance=args.guidance,
            shift=args.shift,
            sampler=args.sampler,
            seed=args.seed,
            height=args.height,
            width=args.width,
            t5_length=args.t5_length,
            drop=args.drop,
            skip_layers=args.skip_layers,
            skip_scale=SKIP_SCALE if args.skip_scale is None else args.skip_scale,
            image=image,
            strength=args.strength,
            mask=mask,
            progress=True,
        )
    seconds = time.perf_counter() - begin
    write_file(out, content(images, args.prompts, out.suffix))
    print(f"{len(images)} images in {seconds:.1f} s ({len(images) / seconds:.3g} a second): {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
