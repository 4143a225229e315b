"""Spacetime patches (Sora, OpenAI's technical report of 2024): videos of any size and length from
one network, and whether frames need each other."""

from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, once, table_of, verdict
from nanosd3.claims.runs import open_main_run
from nanosd3.related.command import parse, study_in
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.motion import scored_clips, scores_of_size
from nanosd3.related.moving_digits import Clips, ClipSize
from nanosd3.related.train_video import CLIP_SIZES, FRAMES_IN_PATCH, size_name
from nanosd3.related.video_system import TrainedVideo, VideoSystem, trained_video
from nanosd3.training.plot_style import PALE, new_figure, save_plot

TRAINED_SIZES: tuple[ClipSize, ...] = tuple(
    size for size in dict.fromkeys(CLIP_SIZES) if size[0] > 1
)
OTHER_SIZES: tuple[ClipSize, ...] = ((8, 32, 48), (8, 48, 32))
OTHER_LENGTHS: tuple[ClipSize, ...] = ((12, 32, 32), (16, 32, 32))
CLIP_STEPS = 600  # of training: what a third of ten minutes allows on two cores
BY_THEMSELVES = "frames by themselves"
ENOUGH_KEPT = 0.6  # of the first size's share of right frames and right directions
MOSTLY_LOST = 0.4
SHARES = {
    "prompt_accuracy": "digit read in",
    "direction": "direction right in",
    "line_r2": "motion explained",
    "same_digit_in_all_frames": "one digit throughout",
}


def model_of(
    conditions: Conditions, finished: FinishedRun, seed: int
) -> tuple[TrainedVideo, float]:
    """The video model of a seed, trained or loaded, and its seconds."""
    size = ["--config", "tiny"] if conditions.fast else ["--steps", str(CLIP_STEPS)]
    system = VideoSystem()
    args = parse(system, ["--seed", str(seed), *size])
    folder = conditions.out / f"video-{'fast-' * conditions.fast}{seed}"
    with torch.enable_grad(), study_in(folder, system, args, finished) as study:
        assert study is not None
        model, stages = trained_video(study), study.job.run.stages
        return model, sum(stages[name]["seconds"] for name in ("clip", "t5", "video"))


def frame_by_frame(model: TrainedVideo, clips: Clips, size: ClipSize) -> Tensor:
    """Videos whose patches of frames are drawn independently, each for the whole caption."""
    short = (FRAMES_IN_PATCH, *size[1:])
    parts = range(size[0] // FRAMES_IN_PATCH)
    return torch.cat([model.draw(clips, short, seed=1 + part) for part in parts], dim=2)


@once
@torch.no_grad()
def video_study(conditions: Conditions) -> dict:
    """Scores of every size and length, and of frames drawn independently; a list over seeds."""
    finished = open_main_run(conditions)
    count = 10 if conditions.fast else 100
    ways = {size_name(size): size for size in (*TRAINED_SIZES, *OTHER_SIZES, *OTHER_LENGTHS)}
    ways[BY_THEMSELVES] = first = TRAINED_SIZES[0]
    scores: dict[str, dict[str, list[float]]] = {way: {key: [] for key in SHARES} for way in ways}
    seconds = 0.0
    for seed in conditions.seeds:
        model, took = model_of(conditions, finished, seed)
        seconds += took
        for way, size in ways.items():
            clips = scored_clips(model.moving, size, count)
            draw = frame_by_frame if way == BY_THEMSELVES else TrainedVideo.draw
            videos = draw(model, clips, size)
            found = scores_of_size(finished, model.moving, videos, clips, size)
            for key, values in scores[way].items():
                values.append(found[key])
    rows = [[way, *(scores[way][key] for key in SHARES)] for way in ways]
    return {
        "scores": scores,
        "first": size_name(first),
        "training_seconds": seconds,
        "table": table_of(["frames x height x width", *SHARES.values()], rows),
    }


def least_kept(results: dict, sizes: tuple[ClipSize, ...]) -> list[float]:
    """What is kept of the first size's scores at the worst of some sizes, for each seed."""
    scores = results["scores"]
    kept = [
        [a / max(b, 1e-6) for a, b in zip(scores[size_name(size)][key], base, strict=True)]
        for key in ("prompt_accuracy", "direction")
        for base in [scores[results["first"]][key]]
        for size in sizes
    ]
    return [min(of_seed) for of_seed in zip(*kept, strict=True)]


def decide_kept(results: dict, sizes: tuple[ClipSize, ...]) -> Verdict:
    kept = least_kept(results, sizes)
    return verdict(all(x >= ENOUGH_KEPT for x in kept), all(x < MOSTLY_LOST for x in kept))


def decide_sizes(results: dict) -> Verdict:
    return decide_kept(results, OTHER_SIZES)


def decide_lengths(results: dict) -> Verdict:
    return decide_kept(results, OTHER_LENGTHS)


def decide_coherence(results: dict) -> Verdict:
    together, alone = (results["scores"][way] for way in (results["first"], BY_THEMSELVES))
    keys = ("same_digit_in_all_frames", "line_r2")
    gains = [a - b for key in keys for a, b in zip(together[key], alone[key], strict=True)]
    return verdict(all(gain > 0.2 for gain in gains), all(gain <= 0 for gain in gains))


def plot_scores(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(8, 1)
    scores, ways = results["scores"], list(results["scores"])
    for key, style in zip(SHARES, ("o", "s", "^", "x"), strict=True):
        means = [sum(scores[way][key]) / len(scores[way][key]) for way in ways]
        axis.plot(range(len(ways)), means, style, label=SHARES[key])
    axis.set_xticks(range(len(ways)), ways, rotation=30, ha="right")
    axis.set(ylabel="share of frames or clips", ylim=(-0.05, 1.05))
    axis.axvline(len(TRAINED_SIZES) - 0.5, color=PALE)
    axis.axvline(len(ways) - 1.5, color=PALE)
    axis.set_title("trained on | not trained on | frames by themselves")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_plot(figure, path)


CLIPS_MEASURED = (
    "The model of `python -m nanosd3.related video --steps 600`, trained on 8 frames of 32x32, "
    "24x40 and 40x24, on 4 frames and on pictures; 100 clips. Shares of frames whose digit is read "
    "as asked and of clips that move as asked. "
)
KEPT_RULE = (
    "Supported if in every seed both shares are at least 0.6 of those at 8x32x32, at the worst of "
    "the sizes named. Refuted if in every seed one of them is below 0.4."
)
SORA = "Video generation models as world simulators, OpenAI, 2024"

OTHER_SIZES_KEPT = Experiment(
    name="x-sora-1",
    claim="A transformer on spacetime patches draws frames of sizes it was not trained on: one "
    "lays out noise in a grid of that size.",
    source=SORA,
    measured=CLIPS_MEASURED + "Not trained on: 8 frames of 32x48 and of 48x32.",
    rule=KEPT_RULE,
    minutes=10,
    run=video_study,
    decide=decide_sizes,
    plot=plot_scores,
    remark="In frames of 24 pixels a digit of 20 has 4 to move in and turns at once, which makes "
    "its direction hard to draw and to see, although these sizes were trained on.",
)

LENGTHS = Experiment(
    name="x-sora-1-length",
    claim="The same for lengths that it was not trained on.",
    source=SORA,
    measured=CLIPS_MEASURED + "Not trained on: 12 and 16 frames of 32x32.",
    rule=KEPT_RULE,
    minutes=10,
    run=video_study,
    decide=decide_lengths,
    plot=plot_scores,
    remark="Frames beyond the length trained on stand at times that the network has never seen. "
    "Digits are read 0.7 times as often; the direction is right in 17% of clips.",
)

COHERENCE = Experiment(
    name="x-sora-4",
    claim="It is attention across frames that keeps a clip coherent.",
    source=SORA,
    measured=CLIPS_MEASURED
    + "The same network on 8 frames at once, and on two frames at a time, each "
    "pair from noise of its own and told the whole caption: the share of clips that show one digit "
    "throughout, and what a bouncing line explains of the motion (median R^2).",
    rule="Supported if in every seed both are higher by more than 0.2 at once. Refuted if neither "
    "is higher in any seed.",
    minutes=10,
    run=video_study,
    decide=decide_coherence,
    plot=plot_scores,
    remark="The direction is right in 97% of clips, and in 12% where pairs of frames are drawn by "
    "themselves. But pairs cannot agree on where they are, and two frames are a length that the "
    "network knows only from still images: not all of it is the attention. After this little "
    "training digits change on their way in either case.",
)
