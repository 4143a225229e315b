"""Edit images with a finished Muse.

    python -m nanosd3.related muse --edit digit.png --prompt "the digit 8" --mask lower-half.png
    python -m nanosd3.related muse --edit digit.png --prompt "the digit 8"

With a mask, only the tokens that it marks are redrawn; without one, a few tokens at a time are
redrawn anywhere, so that the image moves towards the prompt.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor

from nanosd3.cli import Parser, unicode_text
from nanosd3.data.pictures import read_image, read_mask, to_latent_mask, to_pixels
from nanosd3.errors import InputError
from nanosd3.machine.device import set_up
from nanosd3.random_streams import rng
from nanosd3.related.command import check_guidance
from nanosd3.related.finished_run import open_finished_run
from nanosd3.related.muse_editing import (
    FREE_GUIDANCE,
    FREE_ROUNDS,
    MUSE_STEPS,
    MusePipeline,
    edit_freely,
    repaint,
)
from nanosd3.related.muse_system import muse_sampling, open_muse_pipeline
from nanosd3.related.sample_command import (
    SamplingSystem,
    add_drawing_options,
    check_image_file,
    open_trained,
    warn_of,
    write_images,
)
from nanosd3.text import check_prompts


def editing_options(system: SamplingSystem, arguments: list[str]) -> argparse.Namespace:
    name = f"python -m nanosd3.related {system.name}"
    parser = Parser(name, "Edit an image with a finished run so that it fits a prompt.")
    add = parser.add_argument
    add("--edit", type=Path, required=True, metavar="IMAGE", help="an image of the size trained on")
    text = "what the edited image shows"
    add("--prompt", type=unicode_text, required=True, help=text)
    text = "redraw where this image is light, and nothing else (default: a little everywhere)"
    add("--mask", type=Path, metavar="FILE", help=text)
    add_drawing_options(parser, system)
    system.add_sampling_options(parser)
    args = parser.parse_args(arguments)
    if args.mask is None and args.temperature is not None:
        raise InputError("--temperature has no effect without --mask")
    check_prompts([args.prompt], args.negative)
    check_image_file(args.out, system.written)
    return args


def run_editing(system: SamplingSystem, arguments: list[str]) -> int:
    """Edit the image and write the file."""
    args = editing_options(system, arguments)
    finished = open_finished_run(args.run, args.data, set_up(args.threads))
    run = open_trained(system, args.model, finished)
    warn_of(finished.pipeline, [args.prompt, args.negative])
    pipeline = open_muse_pipeline(run, finished)
    tokens = pipeline.tokens(image_of(args.edit, pipeline)).expand(args.count, -1, -1)
    new = edited(args, pipeline, tokens, run.identity)
    kept = float((new == tokens).float().mean())
    write_images(system, args.out, pipeline.images(new), [args.prompt])
    print(f"{len(new)} images, {kept:.0%} of the tokens kept: {args.out}")
    return 0


def edited(
    args: argparse.Namespace, pipeline: MusePipeline, tokens: Tensor, identity: dict
) -> Tensor:
    """Tokens (B, h, w) of B edits of the image."""
    logits = pipeline.logits([args.prompt] * len(tokens), args.negative)
    generator = rng(args.seed, "muse edit")
    if args.mask is None:
        guidance = FREE_GUIDANCE if args.guidance is None else args.guidance
        check_guidance(guidance)
        return edit_freely(logits, tokens, args.steps or FREE_ROUNDS, guidance, generator)
    sampling = muse_sampling(args.guidance, args.temperature, identity)
    pixels, notes = read_mask(args.mask)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    factor = pipeline.vq.config.factor
    height, width = (factor * n for n in tokens.shape[1:])
    marked = to_latent_mask(pixels, height, width, factor, 0)[0, 0].to(tokens.device) > 0
    return repaint(logits, tokens, marked, args.steps or MUSE_STEPS, *sampling, generator)


def image_of(path: Path, pipeline: MusePipeline) -> Tensor:
    """The image (1, C, H, W) in a file. Raises InputError if it is not of the trained size."""
    config = pipeline.vq.config
    array, notes = read_image(path, config.image_channels)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    x, side = to_pixels(array, config.image_channels), pipeline.muse.config.grid * config.factor
    if tuple(x.shape[2:]) != (side, side):
        size = f"{x.shape[2]}x{x.shape[3]}"
        raise InputError(f"{path}: is {size} (height x width), this Muse is for {side}x{side}")
    return x
