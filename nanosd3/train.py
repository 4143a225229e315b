"""Train on one's own images: `python -m nanosd3.train --config small --data FOLDER`.

FOLDER holds pictures with captions: `x.png` and beside it `x.txt`, a caption a line, or one
`metadata.jsonl` with an object a line, `{"file_name": "x.png", "text": "a red heart"}`; `text` may
be a list, of which one is drawn each time. Pictures of any size and shape: each is scaled and cut
to the nearest of some sizes of about the config's area (buckets.py).

The stages are those of train_mnist.py: autoencoder, text encoders, flow, samples; there are no
classes, so nobody judges. With --weights and --init it is how an official model is fine-tuned.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nanosd3.folders import ImageFolder, read_folder
from nanosd3.jobs import (
    Plan,
    add_options,
    get_encoders,
    get_features,
    job_of,
    make_plan,
    previews,
)
from nanosd3.report import report_pictures
from nanosd3.runtime import Parser, run_main
from nanosd3.sources import Pictures
from nanosd3.stages import Job, train_flow

SHOWN = 8  # captions that samples are drawn of, unless told otherwise
NAMED = 20  # skipped files named, at most


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m nanosd3.train", "Train Stable Diffusion 3 on a folder of images.")
    add_options(parser, "small")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of pictures with captions")
    add("--prompt", action="append", dest="prompts", metavar="TEXT", help="what samples are drawn "
        "of; may be given often (default: some of the captions)")  # fmt: skip
    return parser.parse_args(arguments)


def describe(folder: ImageFolder, source: Pictures) -> None:
    """Say what was found and what was not taken."""
    for line in folder.skipped[:NAMED]:
        print(f"skipped: {line}", file=sys.stderr)
    if len(folder.skipped) > NAMED:
        print(f"skipped: and {len(folder.skipped) - NAMED} more", file=sys.stderr)
    print(f"data: {source.trained} images from {source.name}, {source.count - source.trained} more "
          f"held out, {len(folder.skipped)} skipped; {len(source.texts)} captions, such as "
          f"{source.texts[0]!r}")  # fmt: skip
    counts = ", ".join(f"{h}x{w}: {n}" for (h, w), n in source.buckets.counts().items())
    print(f"buckets (height x width): {counts}")


def some(texts: Sequence[str], count: int) -> list[str]:
    """So many of them, from all over."""
    return list(texts[:: max(1, len(texts) // count)][:count])


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    plan = make_plan(args)
    folder = read_folder(args.data)
    source = Pictures(folder, plan.config)
    with job_of(args, plan, source) as job:
        if job:
            if job.team.leads:
                describe(folder, source)
                if not any(entry["stage"] == "data" for entry in job.run.read_log()):
                    job.run.log(stage="data", step=0, skipped_files=list(folder.skipped))
            train(job, plan, args.prompts or some(source.texts, SHOWN))
    return 0


def train(job: Job, plan: Plan, prompts: list[str]) -> None:
    """All stages, one after the other; those that are finished are loaded."""
    encoders = get_encoders(job, plan.frozen)
    features = get_features(job, encoders, prompts)
    mmdit = train_flow(job, features, previews(job, features, prompts), plan.init)
    if mmdit is None:
        return
    report_pictures(job, prompts, features.pipeline(mmdit, job.device))
    job.run.finish("samples", {})
    print(f"done: {job.run.folder / 'samples.png'} and loss.png, metrics.json. More: python -m "
          f'nanosd3.generate "{prompts[0]}" --run {job.run.folder} --out image.png')  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
