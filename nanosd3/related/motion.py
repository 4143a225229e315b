"""Measure a clip of a moving digit: where it is in every frame, which digit it is, and how it
moves.

A still picture of the right digit would score 100% prompt accuracy, so motion is always reported
with it. The share of the variance that a bouncing straight line explains (R^2) is not enough
either: some line fits a few frames of noise. So the line's direction and speed are compared with
the caption's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.data.mnist import SIDE
from nanosd3.random_streams import rng
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.moving_digits import (
    DIGIT_SIDE,
    SPRITE,
    Clips,
    ClipSize,
    MovingDigits,
    bounced,
    velocities,
)
from nanosd3.related.video import fold_time
from nanosd3.training.classifier import thumbnails
from nanosd3.training.evaluation import Scorer
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.stages import in_chunks

FAINT = 0.2  # ink below this is ignored
EDGE = 2  # pixels; the autoencoder, trained on padded digits, never draws in the outermost one
SPEEDS_TRIED = torch.arange(-16, 17) / 4  # pixels a frame
STARTS_A_PIXEL = 2
STILL = 0.5  # a line slower than this is not motion
SPEED_TOLERANCE = 0.5  # pixels a frame


def centres(ink: Tensor) -> Tensor:
    """Centre of mass, (B, T, 2) rows and columns, of the ink in frames (B, T, H, W) in [0, 1]."""
    return centres_of_mass(torch.where(ink > FAINT, ink, 0.0))


def centres_of_mass(weight: Tensor) -> Tensor:
    """Mean rows and columns (B, T, 2), weighted by `weight` (B, T, H, W); 0 if all weights are
    0."""
    mass = weight.sum((2, 3)).clamp(min=1e-3)
    y, x = (torch.arange(side).to(weight) for side in weight.shape[2:])
    return torch.stack([weight.sum(3) @ y, weight.sum(2) @ x], dim=2) / mass[:, :, None]


def located_digits(ink: Tensor, centre: Tensor) -> Tensor:
    """The surroundings of the centre of each frame, enlarged to digits uint8 (B * T, 28, 28)."""
    B, T, H, W = ink.shape
    around = ((torch.arange(SIDE) + 0.5) / SIDE - 0.5) * DIGIT_SIDE  # pixels from the centre
    size = torch.tensor([H, W])
    place = (centre.reshape(-1, 1, 2) + around[:, None] + 0.5) / size * 2 - 1  # (B * T, 28, 2)
    rows, columns = place.unbind(2)
    where = torch.stack(
        [columns[:, None].expand(-1, SIDE, -1), rows[:, :, None].expand(-1, -1, SIDE)], dim=3
    )
    frames = ink.reshape(B * T, 1, H, W)
    digits = F.grid_sample(frames, where, mode="bicubic", align_corners=False)
    return (digits[:, 0].clamp(0, 1) * 255).round().to(torch.uint8)


def fitted_motion(centre: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The velocity (B, 2), at the start, of the bouncing straight line along rows or columns that
    is nearest to the centres (B, T, 2), and the share of their variance that it explains, (B,)."""
    frames, corner = torch.arange(centre.shape[1]), centre - (SPRITE - 1) / 2
    spread = (centre - centre.mean(1, keepdim=True)).square().sum(1)  # (B, 2)
    errors, speeds = [], []
    for axis in (0, 1):
        room = torch.tensor(size[axis] - SPRITE)
        start = torch.arange(STARTS_A_PIXEL * int(room) + 1) / STARTS_A_PIXEL
        lines = start[:, None, None] + SPEEDS_TRIED[:, None] * frames  # (S, V, T)
        lines = bounced(lines, room).flatten(0, 1)  # (S * V, T)
        error = torch.cdist(corner[:, :, axis], lines).square() + spread[:, 1 - axis, None]
        best = error.min(1)
        errors.append(best.values)
        first = lines[best.indices, :2].diff(dim=1).sum(1).sign()  # at a wall it turns at once
        speeds.append(first * SPEEDS_TRIED[best.indices % len(SPEEDS_TRIED)].abs())
    along = torch.stack(errors, 1).argmin(1)  # (B,)
    velocity = F.one_hot(along, 2) * torch.stack(speeds, 1)
    explained = 1 - torch.stack(errors, 1).amin(1) / spread.sum(1).clamp(min=1e-6)
    return velocity, explained


@dataclass(frozen=True)
class ClipMeasurements:
    """Measurements of some clips."""

    features: Tensor  # (B * T, F) of the classifier, of every frame's digit
    digits: Tensor  # (B, T), as classified in every frame
    velocity: Tensor  # (B, 2)
    explained: Tensor  # (B,)


@torch.no_grad()
def measure_clips(scorer: Scorer, videos: Tensor) -> ClipMeasurements:
    """Locate, classify and track the digit in clips (B, 1, T, H, W) in [-1, 1]."""
    ink = (videos[:, 0] / 2 + 0.5).clamp(0, 1)
    centre = centres(ink)
    features = scorer.features(located_digits(ink, centre))
    read = scorer.classifier.head(features.to(scorer.device)).argmax(1).cpu()
    velocity, explained = fitted_motion(centre, (ink.shape[2], ink.shape[3]))
    return ClipMeasurements(features, read.view(ink.shape[:2]), velocity, explained)


@torch.no_grad()
def clip_features(scorer: Scorer, videos: Tensor) -> Tensor:
    """Appearance and change of clips (B, 1, T, H, W) in [-1, 1], (B, 2 F): the mean of the
    classifier's features of whole frames, and their mean absolute difference from each frame to the
    next. The Frechet distance of these stands in for the video distance (FVD), whose features see
    motion as well."""
    frames = thumbnails(fold_time(videos, 1).clamp(-1, 1))
    found = in_chunks(scorer.classifier.features, frames.to(scorer.device)).cpu()
    by_frame = found.unflatten(0, (len(videos), -1))  # (B, T, F)
    return torch.cat([by_frame.mean(1), by_frame.diff(dim=1).abs().mean(1)], dim=1)


def ink_at_border(videos: Tensor) -> Tensor:
    """Whether the digit of each clip (B, 1, T, H, W) reaches the outer EDGE pixels in some frame,
    (B,): it is then partly out of view, or nearly so."""
    ink = (videos[:, 0] / 2 + 0.5 > FAINT).any(1)  # in some frame
    inside = ink[:, EDGE:-EDGE, EDGE:-EDGE]
    return ink.flatten(1).sum(1) > inside.flatten(1).sum(1)


def motion_scores(
    measured: ClipMeasurements, labels: Tensor, velocity: Tensor, real: Tensor
) -> dict:
    """How well clips show digits `labels` (B,) that move by `velocity` (B, 2) at the start.

    `real` are features of digits in real frames, for the Frechet distance.
    """
    moves = (velocity != 0).any(1)
    expected, found = velocity[moves].float(), measured.velocity[moves]
    along = (expected * found).sum(1) / expected.norm(dim=1)  # pixels a frame
    across = (found - along[:, None] * expected / expected.norm(dim=1, keepdim=True)).norm(dim=1)
    turned = (along >= STILL) & (across < STILL)
    close = turned & ((along - expected.norm(dim=1)).abs() <= SPEED_TOLERANCE)
    return {
        "prompt_accuracy": mean(measured.digits == labels[:, None]),
        "same_digit_in_all_frames": mean((measured.digits == measured.digits[:, :1]).all(1)),
        "direction": mean(turned),
        "speed": mean(close),
        "line_r2": float(measured.explained[moves].median()) if moves.any() else None,
        "frechet_distance": frechet_distance(measured.features, real),
    }


def scored_clips(moving: MovingDigits, size: ClipSize, count: int, draw: int = 0) -> Clips:
    """The clips whose captions prompt a model; other draws are for comparison."""
    return moving.draw_clips(count, rng("scored clips", draw, *size), moving=size[0] > 1)


def scores_of_size(
    finished: FinishedRun, moving: MovingDigits, videos: Tensor, clips: Clips, size: ClipSize
) -> dict:
    """How well videos match the captions of `clips` and, for comparison, how well real ones do."""
    real, others = (scored_clips(moving, size, len(clips.digits), i) for i in (1, 2))
    reference = measure_clips(finished.scorer, moving.videos(others, size)).features
    found = []
    for shown, of in ((videos, clips), (moving.videos(real, size), real)):
        measured, labels = measure_clips(finished.scorer, shown), moving.digits.labels[of.digits]
        found.append(motion_scores(measured, labels, velocities(of.motion), reference))
    ours, theirs = found
    return ours | {
        "frechet_floor_real": theirs["frechet_distance"],
        "frechet_ratio_to_real": ours["frechet_distance"] / theirs["frechet_distance"],
        "real": theirs,
    }


def scores_of_pairs(
    finished: FinishedRun, moving: MovingDigits, videos: Tensor, clips: Clips, size: ClipSize
) -> dict:
    """The distance of clips of two digits from real ones: digits that overlap cannot be
    classified."""
    real, others = (scored_clips(moving, size, len(clips.digits), i) for i in (1, 2))
    shown, floor, reference = (
        clip_features(finished.scorer, x)
        for x in (videos, moving.videos(real, size), moving.videos(others, size))
    )
    distance, least = (frechet_distance(x, reference) for x in (shown, floor))
    return {
        "frechet_distance": distance,
        "frechet_floor_real": least,
        "frechet_ratio_to_real": distance / least,
    }


def mean(hits: Tensor) -> float | None:
    """The share of hits; None if there are none to count."""
    return hits.float().mean().item() if len(hits) else None
