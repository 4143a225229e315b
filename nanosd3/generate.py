"""Images for prompts, from a run or from official weights.

python -m nanosd3.generate "a handwritten seven" --model runs/mnist --out digits.png
python -m nanosd3.generate "a photo of a cat" --model sd3.5_medium.safetensors --out cat.png
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from nanosd3.cli import Parser, image_count, positive, run_main, unicode_text
from nanosd3.data.pictures import read_image, read_mask
from nanosd3.errors import InputError, options_of, shown
from nanosd3.few_steps import ALL_SAMPLERS
from nanosd3.machine.device import set_up
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.missing_keys import report
from nanosd3.official.own_runs import uses_other_encoders
from nanosd3.pipeline import Pipeline, open_pipeline
from nanosd3.related.train_consistency_decoder import open_decoder
from nanosd3.request import SKIP_RANGE, SKIP_SCALE, STRENGTH
from nanosd3.storage.files import check_writable, write_file
from nanosd3.text import ENCODERS
from nanosd3.training.grids_and_gifs import drawn_picture, npy
from nanosd3.weights import PRECISIONS, add_files, files_of


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, for the command line."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers as in 7,8,9, got {shown(text)}"
        ) from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m nanosd3.generate", "Images for prompts.")
    add = parser.add_argument
    text = 'such as "a bold seven leaning right"'
    add("prompts", nargs="*", type=unicode_text, metavar="PROMPT", help=text)
    add(
        "--model",
        type=Path,
        metavar="PATH",
        help="run folder, single file of weights or diffusers folder (default: runs/mnist)",
    )
    add("--run", type=Path, metavar="PATH", help="the same as --model")
    add(
        "--weights",
        type=Path,
        metavar="PATH",
        help="the same as --model; or, for a run trained with --weights, the current path of those "
        "weights",
    )
    add_files(parser)
    text = "decode with the consistency decoder in this folder, trained for the run"
    add("--decoder", type=Path, metavar="FOLDER", help=text)
    add("--report", action="store_true", help="only say what the model holds")
    add(
        "--out",
        type=Path,
        help=".png: one image, or a captioned grid; .npy: the uint8 array (default: digits.png for "
        "a model trained here, else image.png)",
    )
    add("--count", type=image_count, help="images per prompt (default: 8 for a run, else 1)")
    add_sampling(parser)
    text = "negative prompt (default: empty)"
    add("--negative", type=unicode_text, default="", help=text)
    add(
        "--skip-layers",
        type=whole_numbers,
        default=(),
        metavar="I,J,...",
        help="skip-layer guidance without these blocks, in the first part of the steps "
        f"(up to {SKIP_RANGE[1]:.0%}%); 7,8,9 for SD3.5-medium",
    )
    add("--skip-scale", type=float, help=f"its scale (default: {SKIP_SCALE})")
    add("--init-image", type=Path, metavar="FILE", help="start from this image")
    add(
        "--strength",
        type=float,
        help=f"strength of the change, up to 1 (default: {STRENGTH}; with a mask 1)",
    )
    add("--mask", type=Path, metavar="FILE", help="repaint only where this image is light")
    add("--drop", action="append", default=[], choices=ENCODERS, help="leave out a text encoder")
    add("--t5-length", type=positive, help="tokens for T5, padded or cut (default: the model's)")
    add(
        "--dtype",
        choices=tuple(PRECISIONS),
        help="of the networks (default: a run's own; else float32 on CPU, bfloat16 on a GPU)",
    )
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: the usable cores, at most 8)")
    return parser.parse_args(arguments)


def add_sampling(parser: Parser) -> None:
    """Add the options whose default is the model's."""
    add = parser.add_argument
    add("--height", type=positive, help="pixels (default: the model's)")
    add("--width", type=positive, help="pixels (default: the model's)")
    add("--steps", type=positive, help="solver steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale; 1 or less: off (default: the model's)")
    add("--sampler", choices=tuple(ALL_SAMPLERS), help="solver (default: the model's)")
    add("--shift", type=float, help="timestep shift towards noise (default: the model's)")


def check_arguments(args: argparse.Namespace) -> None:
    """Resolve `model`, `weights`, `count` and `out`. Raises InputError for options that do not go
    together."""
    model = args.model or args.run
    if (args.model and args.run) or (args.weights and model and not uses_other_encoders(model)):
        raise InputError("--model, --run and --weights are one option: name one of them")
    if not model:  # beside a run, --weights says where the weights it was trained on are now
        model, args.weights = args.weights or Path("runs/mnist"), None
    args.model = model
    if args.report:
        check_report(args)
        return
    if not args.prompts:
        raise InputError("no PROMPT given (see --help)")
    if args.skip_scale is not None and not args.skip_layers:
        raise InputError("--skip-scale has no effect without --skip-layers")
    for name in ("mask", "strength"):
        if getattr(args, name) is not None and not args.init_image:
            raise InputError(f"--{name} has no effect without --init-image")
    own = is_run(args.model)
    out = args.out or Path("digits.png" if own else "image.png")
    if out.suffix.lower() not in (".png", ".npy"):
        raise InputError(f"{out}: the output must end in .png or .npy")
    if not out.parent.is_dir():
        raise InputError(f"{out}: folder {out.parent} does not exist")
    if out.is_dir():
        raise InputError(f"{out}: is a folder")
    check_writable(out)
    args.out, args.count = out, args.count or (8 if own else 1)


def check_report(args: argparse.Namespace) -> None:
    """Raise InputError for options that have no effect on a report."""
    read = {"model", "run", "weights", "report", *files_of(args)}
    for name, usual in vars(parse([])).items():
        if name not in read and getattr(args, name) != usual:
            option = "PROMPT" if name == "prompts" else options_of([name])
            raise InputError(f"{option} has no effect with --report, which draws nothing")


def is_run(path: Path) -> bool:
    return not path.exists() or (path / "run.json").exists()


def open_model(args: argparse.Namespace) -> Pipeline:
    """The pipeline of the model; unless it is a run, its report is printed first."""
    checkpoint = open_checkpoint(args.model, files_of(args), args.weights)
    if not is_run(args.model):
        print(report(checkpoint))
    dtype = PRECISIONS[args.dtype] if args.dtype else None
    device = set_up(args.threads)
    pipeline = open_pipeline(checkpoint, device, dtype, staged=True)
    if args.decoder:
        pipeline.decoder = open_decoder(args.decoder, args.model, device)
    return pipeline


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    check_arguments(args)
    if args.report:
        print(report(open_checkpoint(args.model, files_of(args), args.weights)))
        return 0
    pipeline = open_model(args)
    channels = pipeline.config.vae.image_channels
    image, notes = read_image(args.init_image, channels) if args.init_image else (None, [])
    mask, mask_notes = read_mask(args.mask) if args.mask else (None, [])
    for note in notes + mask_notes:
        print(f"note: {note}", file=sys.stderr)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        images = pipeline(
            [prompt for prompt in args.prompts for _ in range(args.count)],
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
    assert isinstance(images, np.ndarray)  # not latents
    seconds = time.perf_counter() - begin
    is_array = args.out.suffix.lower() == ".npy"
    picture = npy(images) if is_array else drawn_picture(images, args.prompts)
    write_file(args.out, picture)
    rate = len(images) / seconds
    print(f"{len(images)} images in {seconds:.1f} s ({rate:.3g} per second): {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
