"""Do clips get better with compute? (Sora, OpenAI, 2024)

The report shows the same clip after one, 4 and 32 units of training. Here a network trains 1, 4 and
16 times as long. How near its clips are to real ones is measured by features of whole frames and of
how they change: for a still picture of the right digit, the first are right and the second are not.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import (
    Conditions,
    Experiment,
    Verdict,
    lead,
    table_of,
    verdict,
)
from nanosd3.claims.video_networks import SQUARE, ClipTrainer, TrainedClips
from nanosd3.random_streams import rng
from nanosd3.related.motion import clip_features, measure_clips, motion_scores, scored_clips
from nanosd3.related.moving_digits import velocities
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.plot_style import MEANINGS, SERIES, label_counts, new_figure, save_plot

UNIT = 40  # training steps of the least compute
TIMES_COMPUTE = (1, 4, 16)
MARKED, HARDLY = 0.5, 0.8  # of the distance at the least compute
MOTION_KEYS = ("prompt_accuracy", "direction", "line_r2")


class ClipScorer:
    """Distances of clips to real ones."""

    def __init__(self, trainer: ClipTrainer, count: int):
        self.trainer, self.count = trainer, count
        self.reference = self.features(self.real(1))

    def real(self, draw: int) -> Tensor:
        """Real clips, different ones for every draw."""
        moving = self.trainer.moving
        return moving.videos(scored_clips(moving, SQUARE, self.count, draw), SQUARE)

    def features(self, videos: Tensor) -> Tensor:
        return clip_features(self.trainer.finished.scorer, videos)

    def distance(self, videos: Tensor) -> float:
        return frechet_distance(self.features(videos), self.reference)

    def reference_distances(self) -> dict[str, float]:
        """Distances of clips that are known to be right, or wrong in one way."""
        real = self.real(2)
        u = torch.rand(self.count, SQUARE[0], generator=rng("any order"))
        order = u.argsort(dim=1)
        shuffled = torch.stack([x[:, i] for x, i in zip(real, order, strict=True)])
        return {
            "real clips": self.distance(real),
            "real ones, standing still": self.distance(real[:, :, :1].expand_as(real)),
            "real ones, frames in any order": self.distance(shuffled),
        }

    def scores(self, network: TrainedClips) -> dict:
        """The distance of the network's clips, and beside it what moves in them."""

        def measure() -> dict:
            moving, scorer = self.trainer.moving, self.trainer.finished.scorer
            clips = scored_clips(moving, SQUARE, self.count)
            videos = network.video.draw(clips, SQUARE, network.run.identity["seed"])
            measured, labels = measure_clips(scorer, videos), moving.digits.labels[clips.digits]
            found = motion_scores(measured, labels, velocities(clips.motion), measured.features)
            return {"distance": self.distance(videos)} | {key: found[key] for key in MOTION_KEYS}

        return network.once("clips judged", measure)


def compute_study(conditions: Conditions) -> dict:
    """By compute: distances and motion, lists over seeds; and distances of known clips."""
    trainer = ClipTrainer(conditions)
    clip_scorer = ClipScorer(trainer, 20 if conditions.fast else 500)
    found: dict[str, dict[str, list[float]]] = {}
    for times in TIMES_COMPUTE:
        one: dict[str, list[float]] = {key: [] for key in ("distance", *MOTION_KEYS, "seconds")}
        for seed in conditions.seeds:
            steps = UNIT * times
            network = trainer.trained(f"compute-{steps}", trainer.moving, SQUARE, steps, seed)
            for key, value in clip_scorer.scores(network).items():
                one[key].append(value)
            one["seconds"].append(network.seconds)
        found[str(times)] = one
    references = clip_scorer.reference_distances()
    rows: list[list[object]] = [
        [f"{times}x", *(one[key] for key in one)] for times, one in found.items()
    ]
    rows += [[name, distance, *[""] * 4] for name, distance in references.items()]
    columns = ["compute", "distance of clips", "digit read in", "direction right in",
               "motion explained", "seconds"]  # fmt: skip
    return {
        "compute": found,
        "landmarks": references,
        "training_seconds": trainer.seconds + sum(sum(one["seconds"]) for one in found.values()),
        "table": table_of(columns, rows),
    }


def decide_clip_compute(results: dict) -> Verdict:
    distances = [one["distance"] for one in results["compute"].values()]
    falls = [lead(more, less) for less, more in pairwise(distances)]
    left = [last / first for first, last in zip(distances[0], distances[-1], strict=True)]
    enough = len(left) > 1
    return verdict(
        enough and all(mean > spread for mean, spread in falls) and max(left) <= MARKED,
        enough and (any(mean < -spread for mean, spread in falls) or min(left) > HARDLY),
    )


def plot_clip_compute(results: dict, path: Path) -> None:
    figure, (left, right) = new_figure(10, 2)
    found, references = results["compute"], results["landmarks"]
    times = [int(x) for x in found]
    seeds = zip(*(one["distance"] for one in found.values()), strict=True)
    for i, distances in enumerate(seeds):
        left.semilogx(times, distances, "-o", color=MEANINGS["prediction"], markersize=5,
                    label="drawn, each seed's" if i == 0 else None)  # fmt: skip
    known = zip(references.items(), ("-", "--", ":"), (MEANINGS["data"], *SERIES[:2]), strict=True)
    for (name, distance), line, colour in known:
        left.axhline(distance, color=colour, linestyle=line, label=name)
    left.set_ylim(0, 1.5 * left.dataLim.y1)  # room for the legend
    left.set(ylabel="Frechet distance of clips", title="How near to real clips")
    left.legend()
    names = ("digit read in", "direction right in", "motion explained, R^2")
    for key, name, line, colour in zip(MOTION_KEYS, names, ("-o", "--s", ":^"), SERIES[:3],
                                       strict=True):  # fmt: skip
        means = [sum(one[key]) / len(one[key]) for one in found.values()]
        right.semilogx(times, means, line, color=colour, label=name)
    right.set(ylabel="share of frames, of clips, of variance", title="What moves in them")
    right.set_ylim(0, 1.05)
    right.legend()
    for axis in (left, right):
        label_counts(axis, times)
        axis.set_xlabel("training compute")
    save_plot(figure, path)


CLIP_COMPUTE = Experiment(
    name="x-sora-3",
    claim="Quality of video rises markedly with training compute.",
    source="Video generation models as world simulators, OpenAI, 2024, scaling transformers for "
    "video generation",
    measured="Clips of 4 frames of 32x32 by one network, trained 40, 160 and 640 steps of 32 from "
    "the transformer for images. The Frechet distance of 500 clips to real ones, by the mean over "
    "frames of a classifier's features and the mean of their change from frame to frame; beside "
    "it, digits read, directions and motion.",
    rule="Supported if from 1 to 4 and from 4 to 16 times the compute the distance falls in the "
    "mean by more than the spread over seeds, and in every seed the last is at most half of the "
    "first. Refuted if either time it rises by more than the spread, or in every seed more than "
    "0.8 of the first is left. (One seed decides nothing.)",
    minutes=8,
    run=compute_study,
    decide=decide_clip_compute,
    plot=plot_clip_compute,
    remark="The distance halves at once and then falls slowly; directions and digits go on "
    "improving. It is still far from that of real clips, and digits are read in half of the "
    "frames.",
)
