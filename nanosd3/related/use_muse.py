"""Draw and edit with a finished Muse.

    python -m nanosd3.related muse --sample "a bold 3" --steps 8
    python -m nanosd3.related muse --edit digit.png --prompt "the digit 8" --mask lower-half.png
    python -m nanosd3.related muse --edit digit.png --prompt "the digit 8"

With a mask, the tokens that it marks are drawn anew and no other changes; without one, the image
drifts to the prompt, a few tokens at a time.
"""

import argparse
import io
import sys
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from nanosd3.cli import Parser, unicode_text
from nanosd3.data.pictures import read_image, read_mask, to_latent_mask, to_pixels
from nanosd3.errors import InputError
from nanosd3.machine.accelerate import accelerate
from nanosd3.machine.device import set_up
from nanosd3.official.limits import limited_config
from nanosd3.pipeline import Pipeline
from nanosd3.random_streams import rng
from nanosd3.related.command import parse, run_system
from nanosd3.related.muse import Muse
from nanosd3.related.muse_editing import (
    FREE_GUIDANCE,
    FREE_ROUNDS,
    MUSE_STEPS,
    TokenPainter,
    edit_freely,
    repaint,
)
from nanosd3.related.train_muse import (
    MuseSystem,
    muse_config,
    muse_sampling,
    text_fingerprint,
    vq_config,
)
from nanosd3.related.vq import VQAutoencoder
from nanosd3.storage.files import check_writable, load_weights, write_file
from nanosd3.storage.run import Run
from nanosd3.text import check_prompts
from nanosd3.training import figures

IMAGES_DRAWN = 8  # drawn for a prompt
OF_TRAINING = ("data", "config", "fresh", "batch", "lr")  # options
OF_USE = ("prompt", "mask", "negative", "model")


class MuseCommand(MuseSystem):
    """The command `muse`: trains one, or draws and edits with one."""

    def add_options(self, parser: Parser) -> None:
        super().add_options(parser)
        add = parser.add_argument_group(
            "instead of training",
            "--steps is then the number of steps, --seed that of the samples, and --out a file: "
            ".png or .npy (default: muse.png)",
        ).add_argument
        text = f"draw {IMAGES_DRAWN} images for a prompt with a finished run"
        add("--sample", type=unicode_text, metavar="PROMPT", help=text)
        add("--edit", type=Path, metavar="IMAGE", help="edit an image so that it fits --prompt")
        add("--prompt", type=unicode_text, help="what an edited image shows")
        text = "redraw where this image is light, and nothing else (default: a little everywhere)"
        add("--mask", type=Path, metavar="FILE", help=text)
        text = "what guidance moves away from (default: no text)"
        add("--negative", type=unicode_text, help=text)
        add("--model", type=Path, metavar="FOLDER", help="the finished run (default: runs/muse)")


def muse_command(arguments: list[str]) -> int:
    """Train, draw or edit, as the options say."""
    system = MuseCommand()
    args = parse(system, arguments)
    use = "sample" if args.sample is not None else "edit" if args.edit is not None else None
    if not use:
        for name in OF_USE:
            if getattr(args, name) is not None:
                raise InputError(f"--{name} has no effect without --sample or --edit")
        return run_system(system, arguments)
    check_use(args, use)
    painter, guidance, temperature = open_muse(args)
    begin, seed = time.perf_counter(), args.seed
    if use == "sample":
        steps, prompts = args.steps or MUSE_STEPS, [args.sample] * IMAGES_DRAWN
        tokens = painter.draw(prompts, seed, steps, guidance, temperature, args.negative or "")
        rows, note = [(args.sample, painter.images(tokens))], f"{steps} steps"
    else:
        tokens, rows, note = edited(args, painter, guidance, temperature)
    seconds = time.perf_counter() - begin
    write_file(args.out, picture_of(rows, args.out.suffix.lower()))
    print(f"{len(tokens)} images in {seconds:.1f} s, {note}: {args.out}")
    return 0


def check_use(args: argparse.Namespace, use: str) -> None:
    """Set `out`. Raises InputError for options that do not go together."""
    if args.sample is not None and args.edit is not None:
        raise InputError("--sample and --edit are two things to do: choose one")
    if use == "edit" and args.prompt is None:
        raise InputError('--edit needs --prompt "what it shall show"')
    free = use == "edit" and args.mask is None
    without = dict.fromkeys(OF_TRAINING, f"--{use}")
    without |= {"prompt": "--sample", "mask": "--sample"} if use == "sample" else {}
    without |= {"temperature": "--edit without --mask"} if free else {}
    for name, other in without.items():
        if getattr(args, name) not in (None, False):
            raise InputError(f"--{name} has no effect with {other}")
    muse_sampling(args)
    check_prompts([args.sample if use == "sample" else args.prompt], args.negative or "")
    args.out = out = args.out or Path("muse.png")
    if out.suffix.lower() not in (".png", ".npy"):
        raise InputError(f"--out {out}: must end in .png or .npy")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: folder {out.parent} does not exist")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder")
    check_writable(out)


def open_muse(args: argparse.Namespace) -> tuple[TokenPainter, float, float]:
    """The finished Muse in a run folder, with the text encoders of --run, and the guidance and
    temperature to draw with: those given, or the run's own. Raises InputError if there is none, or
    it was trained with other encoders."""
    folder = args.model or Path("runs/muse")
    index = folder / "run.json"
    run = Run.read(folder) if index.exists() else None
    if run is None or run.identity.get("system") != MuseSystem.name or "muse" not in run.stages:
        raise InputError(
            f"--model {folder}: holds no finished Muse; `python -m nanosd3.related muse` trains one"
        )
    Run.read(args.run)  # a folder that is none is refused first
    identity = run.identity
    if identity.get("text") != text_fingerprint(args.run):
        raise InputError(
            f"--model {folder}: was trained with other text encoders than those of {args.run}; "
            "name its run with --run"
        )
    config, size = limited_config(identity["config"], index), identity.get("size")
    if size not in ("mnist", "tiny"):
        raise InputError(f"{index}: damaged: no size")
    device = set_up(args.threads)
    vq, muse = VQAutoencoder(vq_config(config, size)), Muse(muse_config(config, size))
    for name, module in (("tokens", vq), ("muse", muse)):
        load_weights(module, folder / f"{name}.safetensors")
        accelerate(module.requires_grad_(False).eval().to(device))
    pipeline = Pipeline.load(args.run, device)
    texts = [text for text in (args.sample, args.prompt, args.negative) if text]
    for message in pipeline.text.remarks(texts, None, ()):
        print(f"warning: {message}", file=sys.stderr)
    given = {name: getattr(args, name) for name in ("guidance", "temperature")}
    values = [identity[name] if given[name] is None else given[name] for name in given]
    return TokenPainter(vq, muse, pipeline), *values


Rows = list[tuple[str, np.ndarray]]


def edited(
    args: argparse.Namespace, painter: TokenPainter, guidance: float, temperature: float
) -> tuple[Tensor, Rows, str]:
    """Tokens of edited images, rows of images to show, and what to say of them."""
    x = image_of(args.edit, painter)
    tokens = painter.tokens(x).expand(IMAGES_DRAWN, -1, -1)
    logits = painter.logits([args.prompt] * IMAGES_DRAWN, args.negative or "")
    generator = rng(args.seed, "muse edit")
    if args.mask:
        pixels, notes = read_mask(args.mask)
        print_notes(notes)
        marked = to_latent_mask(pixels, x.shape[2], x.shape[3], painter.vq.config.factor, 0)
        where = marked[0, 0].to(tokens.device) > 0
        steps = args.steps or MUSE_STEPS
        new = repaint(logits, tokens, where, steps, guidance, temperature, generator)
    else:
        steps = args.steps or FREE_ROUNDS
        guidance = FREE_GUIDANCE if args.guidance is None else guidance
        new = edit_freely(logits, tokens, steps, guidance, generator)
    kept = float((new == tokens).float().mean())
    rows = [("as tokens", painter.images(tokens)), (args.prompt, painter.images(new))]
    return new, rows, f"{steps} steps, {kept:.0%} of the tokens kept"


def image_of(path: Path, painter: TokenPainter) -> Tensor:
    """The image (1, C, H, W) in a file. Raises InputError if it is not of the size trained at."""
    config = painter.vq.config
    array, notes = read_image(path, config.image_channels)
    print_notes(notes)
    x, side = to_pixels(array, config.image_channels), painter.muse.config.grid * config.factor
    if tuple(x.shape[2:]) != (side, side):
        size = f"{x.shape[2]}x{x.shape[3]}"
        raise InputError(f"{path}: is {size} (height x width), this Muse is for {side}x{side}")
    return x


def print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def picture_of(rows: Rows, suffix: str) -> bytes:
    """The file: an array of the last row, or a grid with a caption for each row."""
    if suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, rows[-1][1])
        return buffer.getvalue()
    return figures.png(figures.grid(rows))
