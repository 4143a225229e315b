"""Open any model, and write it for other programs.

    python -m nanosd3.weights report PATH           what a file or folder holds
    python -m nanosd3.weights export PATH --layout single|diffusers --out OUT

PATH is a single file of weights, a diffusers folder or a run folder. Which model it is, and every
size, is read from the tensors (official/detect.py), and names are mapped by one table
(official/key_names.py). `load` gives a `Pipeline` whose networks are loaded when they are needed.
"""

import argparse
import sys
from pathlib import Path

import torch

from nanosd3.arguments import path_of, truth_value
from nanosd3.cli import Parser, run_main
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import open_checkpoint
from nanosd3.official.export import LAYOUTS, export
from nanosd3.official.missing_keys import check, report
from nanosd3.pipeline import Pipeline, open_pipeline
from nanosd3.text import ENCODERS

PRECISIONS = {kind: getattr(torch, kind) for kind in ("float32", "bfloat16", "float16")}
PART_FILES = (*ENCODERS, "vae")  # parts that may be files of their own


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    staged: bool = True,
    clip_l: Path | None = None,
    clip_g: Path | None = None,
    t5: Path | None = None,
    vae: Path | None = None,
    weights: Path | None = None,
) -> Pipeline:
    """The model in a single file, a diffusers folder or a run folder, as a Pipeline.

    `dtype` None: float32 for a run and on CPU, else bfloat16; the text encoders are never in
    float16, where T5 overflows. With `staged`, networks are loaded when needed and freed after use;
    otherwise they stay in memory, for repeated calls. `clip_l`, `clip_g`, `t5` and `vae` are files
    or folders of their own; `weights` is the current path of the weights that a run was trained
    with. Raises InputError for anything missing or of the wrong shape.
    """
    files = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5, "vae": vae}
    place = None if weights is None else path_of("weights", weights)
    checkpoint = open_checkpoint(path_of("path", path), files, place)
    pipeline = open_pipeline(checkpoint, device, dtype, truth_value("staged", staged))
    if not staged:
        pipeline.parts.load()
    return pipeline


# --- command line -------------------------------------------------------------------------------


def add_files(parser: Parser) -> None:
    """Add the options that name networks in files or folders of their own."""
    for name in (part.replace("_", "-") for part in PART_FILES):
        text = f"the {name.upper()}, if it is a file or folder of its own"
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=text)


def files_of(args: argparse.Namespace) -> dict[str, Path | None]:
    return {name: getattr(args, name) for name in PART_FILES}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m nanosd3.weights", "Look into official weights, or write them.")
    parser.add_argument("what", choices=("report", "export"), help="what to do")
    text = "single file, diffusers folder or run folder"
    parser.add_argument("path", type=Path, metavar="PATH", help=text)
    parser.add_argument("--layout", choices=LAYOUTS, help="export: which layout to write")
    parser.add_argument("--out", type=Path, help="export: the file or folder to write")
    add_files(parser)
    text = "current path of the weights that the run was trained with"
    parser.add_argument("--weights", type=Path, metavar="PATH", help=text)
    args = parser.parse_args(arguments)
    if args.what == "export" and not (args.layout and args.out):
        raise InputError("export needs --layout single|diffusers and --out PATH")
    if args.what == "report" and (args.layout or args.out):
        raise InputError("--layout and --out belong to export")
    checkpoint = open_checkpoint(args.path, files_of(args), args.weights)
    print(report(checkpoint))
    check(checkpoint)
    if args.what == "export":
        export(checkpoint, args.layout, args.out)
        print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
