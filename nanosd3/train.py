"""Train on your own images: `python -m nanosd3.train --config small --data FOLDER`.

FOLDER holds images with captions. Either each `x.png` has an `x.txt` beside it with one caption per
line, or there is one `metadata.jsonl` with an object per line: `{"file_name": "x.png", "text": "a
red heart"}`. `text` may be a list of captions. Where an image has several captions, one is drawn at
random each time. Images may have any size and shape: each is scaled and cropped to the nearest of a
few sizes of about the config's area (data/buckets.py).

The stages are those of train_mnist.py: autoencoder, text encoders, transformer, samples. As there
are no classes, there is no classifier and no prompt accuracy. With --init this is also how to
fine-tune an official model.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanosd3.cli import Parser, run_main, unicode_text
from nanosd3.data.image_folder import ImageFolder, read_folder
from nanosd3.data.sources import Pictures
from nanosd3.errors import shown
from nanosd3.torch_settings import usual_settings
from nanosd3.training.cached_features import get_features
from nanosd3.training.encoders import get_encoders
from nanosd3.training.options import Plan, add_options, generate_command, job_of, make_plan
from nanosd3.training.report import previews, report_pictures
from nanosd3.training.stages import Job
from nanosd3.training.train_flow import train_flow

SAMPLED_CAPTIONS = 8  # to draw samples for, if there is no --prompt
LISTED_FILES = 20  # skipped files listed by name, at most
HEAVY_CROP = 0.25  # share of the image area


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m nanosd3.train", "Train Stable Diffusion 3 on a folder of images.")
    add_options(parser, "small")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of images with captions")
    add(
        "--prompt",
        action="append",
        dest="prompts",
        type=unicode_text,
        metavar="TEXT",
        help="prompt to draw samples for; repeat for more (default: some of the captions)",
    )
    return parser.parse_args(arguments)


def print_summary(folder: ImageFolder, source: Pictures) -> None:
    """Print a summary of the data set, and which files were skipped and why."""
    for line in folder.skipped[:LISTED_FILES]:
        print(f"skipped: {line}", file=sys.stderr)
    if len(folder.skipped) > LISTED_FILES:
        more = f"and {len(folder.skipped) - LISTED_FILES} more, see log.jsonl of the run"
        print(f"skipped: {more}", file=sys.stderr)
    for note in notes_of(folder, source):
        print(f"note: {note}", file=sys.stderr)
    others = ""
    if folder.others:
        others = f", {folder.others.total()} other files ({', '.join(sorted(folder.others))})"
    print(
        f"data: {source.trained} images from {source.name}, {source.count - source.trained} more "
        f"held out, {len(folder.skipped)} skipped{others}; {len(source.texts)} captions, such as "
        f"{shown(source.texts[0])}"
    )
    counts = ", ".join(f"{h}x{w}: {n}" for (h, w), n in source.buckets.counts().items())
    print(f"buckets (height x width): {counts}")


def notes_of(folder: ImageFolder, source: Pictures) -> Iterator[str]:
    """How many images are converted, and how many are cropped heavily."""
    notes = Counter(note for picture in folder.pictures for note in picture.notes)
    for note, count in notes.items():
        yield f"{note}: {count} of {source.count} images"
    cut = [(share, name) for name, share in source.cropped() if share > HEAVY_CROP]
    if cut:
        share, name = max(cut)
        yield (
            f"cropped by more than {HEAVY_CROP:.0%}: {len(cut)} of {source.count} images, at most "
            f"{share:.0%} ({name})"
        )


def spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts, evenly spaced."""
    return list(texts[:: max(1, len(texts) // count)][:count])


@usual_settings()
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    plan = make_plan(args)
    folder = read_folder(args.data)
    source = Pictures(folder, plan.config)
    with job_of(args, plan, source) as job:
        if job:
            if job.group.is_main:
                print_summary(folder, source)
                if not any(entry["stage"] == "data" for entry in job.run.read_log()):
                    job.run.log(stage="data", step=0, skipped_files=list(folder.skipped))
            train(job, plan, args.prompts or spread(source.texts, SAMPLED_CAPTIONS))
    return 0


def train(job: Job, plan: Plan, prompts: list[str]) -> None:
    """Run all stages in order; finished ones are loaded."""
    encoders = get_encoders(job, plan.frozen)
    features = get_features(job, encoders, prompts)
    mmdit = train_flow(job, features, previews(job, features, prompts), plan.init)
    if mmdit is None:  # not the main process
        return
    report_pictures(job, prompts, features.pipeline(mmdit, job.device))
    job.run.finish("samples", {})
    print(
        f"done: {job.run.folder / 'samples.png'} and loss.png, metrics.json. To generate more: "
        f"{generate_command(prompts[0], job.run.folder, 'image.png')}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
