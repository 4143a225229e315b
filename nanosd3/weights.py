"""Official weights in, official weights out.

    python -m nanosd3.weights report PATH           what is in a file or folder
    python -m nanosd3.weights export PATH --layout single|diffusers --out OUT

PATH is a single-file checkpoint, a diffusers folder or a run folder of this program; which model
it is, and every size, is read from the tensors (found.py, sizes.py), and names are mapped by one
table (layouts.py). `load` gives a `Pipeline` whose parts are read when they are needed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nanosd3.accelerate import accelerate
from nanosd3.audit import check, on_meta, report
from nanosd3.export import LAYOUTS, export
from nanosd3.found import Found, find
from nanosd3.parts import Parts, fill
from nanosd3.pipeline import Pipeline
from nanosd3.runtime import InputError, Parser, run_main
from nanosd3.text import ENCODERS

DTYPES = {kind: getattr(torch, kind) for kind in ("float32", "bfloat16", "float16")}
FILES = (*ENCODERS, "vae")  # parts that may be files of their own


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
) -> Pipeline:
    """The model in a single file, a diffusers folder or a run folder, as a Pipeline.

    `dtype` None: float32 on CPU, bfloat16 on CUDA; the text encoders are never in float16, which
    T5 overflows. `staged` parts are read when they are needed and forgotten when they are done;
    without it they stay, for many calls. Raises InputError for anything missing or misshapen.
    """
    files = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5, "vae": vae}
    return open_pipeline(find(Path(path), files), torch.device(device), dtype, staged)


def open_pipeline(
    found: Found, device: torch.device, dtype: torch.dtype | None, staged: bool
) -> Pipeline:
    """A Pipeline of what was found. Raises InputError for anything missing or misshapen."""
    check(found)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for_text = torch.float32 if dtype == torch.float16 else dtype

    def reader(name: str) -> Callable[[], nn.Module]:
        kind = dtype if name in ("mmdit", "vae") else for_text
        return lambda: accelerate(
            fill(on_meta(found.config, name), found.parts[name], device, kind)
        )

    sources = {name: reader(name) for name in found.parts}
    return Pipeline(found.config, found.tokenizers, Parts(sources, device, staged))


# --- command line -------------------------------------------------------------------------------


def add_files(parser: Parser) -> None:
    """The options that name parts in files of their own."""
    for name in (part.replace("_", "-") for part in FILES):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE",
                            help=f"the {name.upper()}, if it is a file of its own")  # fmt: skip


def files_of(args: argparse.Namespace) -> dict[str, Path | None]:
    return {name: getattr(args, name) for name in FILES}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m nanosd3.weights", "Look into official weights, or write them.")
    parser.add_argument("what", choices=("report", "export"), help="what to do")
    parser.add_argument("path", type=Path, metavar="PATH",
        help="single file, diffusers folder or run folder")  # fmt: skip
    parser.add_argument("--layout", choices=LAYOUTS, help="export: which layout to write")
    parser.add_argument("--out", type=Path, help="export: the file or folder to write")
    add_files(parser)
    args = parser.parse_args(arguments)
    if args.what == "export" and not (args.layout and args.out):
        raise InputError("export needs --layout single|diffusers and --out PATH")
    if args.what == "report" and (args.layout or args.out):
        raise InputError("--layout and --out belong to export")
    found = find(args.path, files_of(args))
    print(report(found))
    check(found)
    if args.what == "export":
        export(found, args.layout, args.out)
        print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
