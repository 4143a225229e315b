"""Train the transformer on clips of moving digits, of several sizes and lengths at once.

    python -m nanosd3.related video
    python -m nanosd3.related video --sample "a seven moving left" --frames 12 --width 48

The finished run's autoencoder is used as it is, and training starts from its transformer. Its text
encoders do not know the words for motion, so the CLIPs and T5 are trained again on these captions;
CLIP sees each clip as one image, a maximum over brightened frames.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanosd3.cli import Parser, positive
from nanosd3.config_types import Config, Recipe, Sampling
from nanosd3.data.mnist import to_uint8
from nanosd3.errors import InputError
from nanosd3.machine.accelerate import accelerate
from nanosd3.official.limits import limited_config
from nanosd3.random_streams import rng
from nanosd3.related.command import RECIPE_SIZES, Study, check_guidance, size_of, with_flow_recipe
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.motion import scored_clips, scores_of_pairs, scores_of_size
from nanosd3.related.moving_digits import Clips, ClipSize, MovingDigits
from nanosd3.related.sample_command import (
    SAMPLES,
    SamplingSystem,
    add_guidance,
    repeated_prompts,
    warn_of,
    with_sampling,
)
from nanosd3.related.scoring import evaluations, evaluations_in_words
from nanosd3.related.train_video import (
    CLIP_SIZES,
    FRAMES_IN_PATCH,
    EncodedCaptions,
    encode_captions,
    encoded_clips,
    encoders_of,
    sample_video,
    size_name,
    train_encoders,
    train_video,
)
from nanosd3.related.two_digits import (
    PAIR_BATCH,
    PAIR_SIZES,
    PAIRS_ENCODED,
    MovingPairs,
    check_pairs,
)
from nanosd3.related.video import VideoMMDiT, fold_time
from nanosd3.storage.files import read_module, write_file
from nanosd3.storage.run import Run
from nanosd3.training.grids_and_gifs import gif, grid_of, png, side_by_side, to_image
from nanosd3.training.stages import training_of
from nanosd3.vae import AutoencoderKL

UNSEEN: tuple[ClipSize, ...] = ((8, 32, 48), (12, 32, 32))
MOST_FRAMES = 64
PATCH_LENGTHS = range(1, 9)  # frames
FRAME_MILLISECONDS = 100
STRIPS = 8  # clips in the picture
VIDEO_RECIPES = {
    "mnist": Recipe(2000, batch=64, lr=1e-2, warmup=50, weight_decay=0.0, optimizer="muon"),
    "tiny": Recipe(6, batch=4, lr=1e-3, warmup=1, weight_decay=0.0),
}
VIDEO_SAMPLING = Sampling(steps=25, guidance=2.5, shift=1.0, sampler="euler")
CLIPS_ENCODED = {"mnist": 4000, "tiny": 16}  # of each size
VIDEO_EMA = 0.995


def check_size(size: ClipSize, config: Config) -> None:
    """Raises InputError for a size that does not fit the network."""
    frames, height, width = size
    if not 1 <= frames <= MOST_FRAMES:
        raise InputError(f"--frames must be from 1 to {MOST_FRAMES}, got {frames}")
    step = config.vae.factor * config.mmdit.patch_size
    for name, pixels in (("height", height), ("width", width)):
        if pixels % step or not 0 < pixels <= config.mmdit.grid * step:
            most = config.mmdit.grid * step
            raise InputError(f"--{name} must be a multiple of {step} up to {most}, got {pixels}")


def sizes_of(recipe: str, pairs: bool) -> tuple[ClipSize, ...]:
    return PAIR_SIZES[recipe] if pairs else CLIP_SIZES


@dataclass(frozen=True)
class TrainedVideo:
    """A video model, and the encoders of its captions and frames."""

    network: VideoMMDiT
    vae: AutoencoderKL
    captions: EncodedCaptions
    moving: MovingDigits
    config: Config

    def draw(self, clips: Clips, size: ClipSize, seed: int = 0) -> Tensor:
        """Videos (B, 1, T, H, W) in [-1, 1] for the captions of clips."""
        index = self.moving.captions_of(clips, torch.zeros(len(clips.digits)))
        text = self.captions.of(index), self.captions.none(len(index))
        return sample_video(self.network, self.vae, *text, size, self.config, seed)


def trained_video(study: Study) -> TrainedVideo:
    """Train all stages on the finished run's digits, or load them."""
    job, finished = study.job, study.finished
    recipe, pairs = size_of(study.args, finished), study.args.two_digits
    sizes = sizes_of(recipe, pairs)
    moving = (MovingPairs if pairs else MovingDigits)(finished.source, sizes[0])
    pipeline = train_encoders(job, finished.pipeline.vae, moving)
    captions = encode_captions(pipeline.text, moving)
    count = (PAIRS_ENCODED if pairs else CLIPS_ENCODED)[recipe]
    missing = dict.fromkeys(sizes) if "video" not in job.run.stages else ()
    encoded = {size: encoded_clips(job, moving, pipeline.vae, size, count) for size in missing}
    network = train_video(job, finished.pipeline.mmdit, moving, encoded, captions, sizes)
    return TrainedVideo(network, pipeline.vae, captions, moving, job.config)


class VideoSystem(SamplingSystem):
    name = "video"
    what = "Spacetime patches: the same transformer draws videos of any size and length."
    paper = "Sora, OpenAI, 2024"
    drawn, written, count = "clips", (".gif", ".npy"), 1

    def add_options(self, parser: Parser) -> None:
        parser.epilog = SAMPLES
        text = "guidance scale of the samples (default: %(default)s)"
        add = parser.add_argument
        add("--guidance", type=float, default=VIDEO_SAMPLING.guidance, help=text)
        text = "the classic Moving MNIST: two digits in frames of 64x64, captions that name both"
        add("--two-digits", action="store_true", help=text)

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        check_guidance(args.guidance)
        size = size_of(args, finished)
        recipe = VIDEO_RECIPES[size]
        if args.two_digits:
            check_pairs(PAIR_SIZES[size][0], finished.config)
            recipe = replace(recipe, batch=PAIR_BATCH[size])
        config = with_flow_recipe(finished.config, recipe, args)
        training = replace(training_of(config), ema_decay=VIDEO_EMA)
        sampling = replace(VIDEO_SAMPLING, guidance=args.guidance)
        return replace(config, training=training, sampling=sampling)

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        what = {"two_digits": True} if args.two_digits else {}
        return {"size": size_of(args, finished), "frames_in_patch": FRAMES_IN_PATCH} | what

    def train(self, study: Study) -> dict:
        job, model = study.job, trained_video(study)
        pairs = study.args.two_digits
        first = sizes_of(size_of(study.args, study.finished), pairs)[0]
        score = scores_of_pairs if pairs else scores_of_size
        by_size, seconds = {}, 0.0
        for size in (first,) if pairs else (first, *UNSEEN):
            clips = scored_clips(model.moving, size, job.training.evaluate // 5)
            begin = time.perf_counter()
            videos = model.draw(clips, size)
            seconds = seconds or time.perf_counter() - begin
            by_size[size_name(size)] = score(study.finished, model.moving, videos, clips, size)
        shown = {"trained on": first} | ({} if pairs else {"not trained on": UNSEEN[0]})
        draw_strips(model, shown, job.run.folder)
        stages = job.run.stages
        return by_size[size_name(first)] | {
            "evaluations": evaluations(job.config.sampling),
            "clips": len(clips.digits),
            "clips_per_second": len(clips.digits) / seconds,
            "by_size": by_size,
            "training_seconds": sum(stages[name]["seconds"] for name in ("clip", "t5", "video")),
            "thread_seconds": stages["video"]["thread_seconds"],
        }

    def in_words(self, metrics: dict) -> str:
        spent = f"{evaluations_in_words(metrics['evaluations'])} a clip"
        if "direction" not in metrics:  # overlapping digits cannot be classified
            times = metrics["frechet_ratio_to_real"]
            return f"{spent}, Frechet distance {times:.2f} times that of real clips"
        return (
            f"{spent}, its digit is the prompted one in "
            f"{metrics['prompt_accuracy']:.1%} of frames, its direction right in "
            f"{metrics['direction']:.1%} of clips, a bouncing line explains "
            f"{metrics['line_r2']:.2f} of its motion"
        )

    def add_sampling_options(self, parser: Parser) -> None:
        add = parser.add_argument
        for name, of in (("frames", "of a clip"), ("height", "pixels"), ("width", "pixels")):
            add(f"--{name}", type=positive, help=f"{of} (default: those trained on)")
        add_guidance(parser)

    def draw(self, args: argparse.Namespace, run: Run, finished: FinishedRun) -> np.ndarray:
        config = limited_config(run.identity["config"], run.folder / "run.json")
        recipe, patch = run.identity.get("size"), run.identity.get("frames_in_patch")
        if recipe not in RECIPE_SIZES or not isinstance(patch, int) or patch not in PATCH_LENGTHS:
            raise InputError(f"{run.folder / 'run.json'}: damaged: no size of a video model")
        frames, height, width = sizes_of(recipe, run.identity.get("two_digits") is True)[0]
        size = (args.frames or frames, args.height or height, args.width or width)
        check_size(size, config)
        config = with_sampling(config, args)
        pipeline = encoders_of(run, config, finished.device)
        network = read_module(
            lambda: VideoMMDiT(config.mmdit, patch), run.folder / "video.safetensors"
        )
        accelerate(network.to(finished.device))
        warn_of(pipeline, args.sample)
        prompts = repeated_prompts(args)
        text, no_text = (pipeline.text.encode(x) for x in (prompts, [""] * len(prompts)))
        videos = sample_video(network, pipeline.vae, text, no_text, size, config, args.seed)
        return pixels_of(videos)

    def picture(self, images: np.ndarray, captions: list[str]) -> bytes:
        frames = images.swapaxes(0, 1)  # (T, n, H, W)
        if len(images) == 1:
            pictures = [to_image(frame) for frame in frames[:, 0]]
        else:
            pictures = [grid_of(captions, frame) for frame in frames]
        return gif(pictures, [FRAME_MILLISECONDS] * len(pictures))


def pixels_of(videos: Tensor) -> np.ndarray:
    """Videos (B, 1, T, H, W) in [-1, 1] as uint8 (B, T, H, W)."""
    B, _, T = videos.shape[:3]
    return to_uint8(fold_time(videos, 1)).view(B, T, *videos.shape[3:]).numpy()


def draw_strips(model: TrainedVideo, sizes: dict[str, ClipSize], folder: Path) -> None:
    """Write samples.png: clips frame by frame, of some sizes with their titles."""
    moving = model.moving
    clips = moving.draw_clips(STRIPS, rng("strips"))
    index = moving.captions_of(clips, torch.zeros(STRIPS))
    captions, columns = [moving.texts[i] for i in index], []
    for known, size in sizes.items():
        frames = pixels_of(model.draw(clips, size)).reshape(-1, *size[1:])
        columns.append((f"{size_name(size)}, {known}", grid_of(captions, frames)))
    write_file(folder / "samples.png", png(side_by_side(columns)))
