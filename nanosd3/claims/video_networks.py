"""Short clips of moving digits, and transformers on spacetime patches trained on them, for
experiments.

A clip has 4 frames, so that three seeds of several networks fit into minutes. The text encoders are
trained once, on the captions of clips, and the clips are encoded once: networks of all seeds see
the same ones, each in its own order. All start from the finished main job's transformer for images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import measured_once, network_job, open_main_run
from nanosd3.config_types import Config, Recipe
from nanosd3.related.moving_digits import Clips, ClipSize, MovingDigits
from nanosd3.related.train_video import (
    encode_captions,
    encoded_clips,
    size_name,
    train_encoders,
    train_video,
)
from nanosd3.related.video_system import VIDEO_EMA, VIDEO_SAMPLING, TrainedVideo
from nanosd3.storage.run import Run
from nanosd3.training.stages import Job, training_of

CLIP_BATCH, CLIP_RATE = 32, 1e-2
CLIPS_TO_TRAIN_ON = 3000
SQUARE: ClipSize = (4, 32, 32)
WIDE: ClipSize = (4, 32, 48)
DRAWING_STEPS = 10


class CroppedDigits(MovingDigits):
    """Clips that are cut out of the middle of wider ones, as video was made square for training."""

    def videos(self, clips: Clips, size: ClipSize) -> Tensor:
        edge = (WIDE[2] - size[2]) // 2
        return super().videos(clips, (*size[:2], WIDE[2]))[..., edge : edge + size[2]]


@dataclass(frozen=True)
class TrainedClips:
    """A network, what it needs to draw, and where it was trained."""

    video: TrainedVideo
    run: Run

    @property
    def seconds(self) -> float:
        """Of a core."""
        return self.run.stages["video"]["thread_seconds"]

    def once(self, what: str, measure: Callable[[], Any]) -> Any:
        """What has been measured of it, now or before."""
        return measured_once(self.run, what, measure)


class ClipTrainer:
    """Trains transformers on clips, from a finished main job's transformer, with its autoencoder
    and images, and with text encoders that know the words for motion."""

    def __init__(self, conditions: Conditions):
        self.conditions = conditions
        self.finished = finished = open_main_run(conditions)
        training = replace(training_of(finished.config), ema_decay=VIDEO_EMA)
        if conditions.fast:
            short = {name: replace(getattr(training, name), steps=2) for name in ("clip", "t5")}
            training = replace(training, **short)
        sampling = replace(VIDEO_SAMPLING, steps=2 if conditions.fast else DRAWING_STEPS)
        self.config = replace(finished.config, training=training, sampling=sampling)
        self.moving = MovingDigits(finished.source, SQUARE)
        self.cropped = CroppedDigits(finished.source, SQUARE)
        self.job = job = self.job_of("clip-texts", self.config, 0)
        with job.run.alone():
            pipeline = train_encoders(job, finished.pipeline.vae, self.moving)
        self.captions = encode_captions(pipeline.text, self.moving)

    @property
    def seconds(self) -> float:
        """Of training the text encoders."""
        return sum(self.job.run.stages[name]["seconds"] for name in ("clip", "t5"))

    def job_of(self, name: str, config: Config, seed: int) -> Job:
        sizes = [SQUARE, WIDE, CLIPS_TO_TRAIN_ON]
        return network_job(self.conditions, self.finished, name, config, seed, clips=sizes)

    def trained(
        self, name: str, moving: MovingDigits, size: ClipSize, steps: int, seed: int
    ) -> TrainedClips:
        """The network of a seed for clips of one size, trained now or before."""
        recipe = Recipe(steps, CLIP_BATCH, CLIP_RATE, min(50, steps // 4), 0.0, optimizer="muon")
        count = CLIPS_TO_TRAIN_ON
        if self.conditions.fast:
            recipe, count = replace(recipe, batch=4, steps=max(1, steps // 40), warmup=1), 16
        config = replace(self.config, training=replace(training_of(self.config), flow=recipe))
        vae = self.finished.pipeline.vae
        cropped = moving is self.cropped  # from the same clips as wide ones
        data = self.job_of("cropped-clips" if cropped else "clips", self.config, 0)
        drawn_for = WIDE if cropped else size
        with data.run.alone():
            encoded = {size: encoded_clips(data, moving, vae, size, count, drawn_for)}
        job = self.job_of(name, config, seed)
        with job.run.alone():
            if "video" not in job.run.stages:
                print(f"{name}, clips of {size_name(size)}, seed {seed}", flush=True)
            images, captions = self.finished.pipeline.mmdit, self.captions
            network = train_video(job, images, moving, encoded, captions, (size,))
        return TrainedClips(TrainedVideo(network, vae, captions, moving, config), job.run)
