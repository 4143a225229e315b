"""Does a model that is trained on square crops draw subjects out of view? (Sora, OpenAI, 2024)

Data used to be made square before training, by cutting out the middle. What is lost is not only
what was cut off: the model learns that things reach beyond the frame, and draws them that way. On
native frames it learns where the edges are.
"""

from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.claims.video_networks import SQUARE, WIDE, ClipTrainer, TrainedClips
from nanosd3.related.motion import EDGE, ink_at_border, scored_clips, scores_of_size
from nanosd3.related.moving_digits import ClipSize, MovingDigits
from nanosd3.related.train_video import decode_frames, encode_frames, size_name
from nanosd3.training.plot_style import MEANINGS, new_figure, save_plot
from nanosd3.vae import AutoencoderKL

FRAMING_STEPS = 400
CLEARLY_MORE, HARDLY_MORE = 2.0, 1.25  # times as often
POINTS = 0.05  # and by at least so much more
NATIVE, CROPPED = "native frames", "square crops"
FRAMES_OF: dict[str, ClipSize] = {NATIVE: WIDE, CROPPED: SQUARE}


def share_at_border(videos: Tensor) -> float:
    """The share of clips whose digit reaches the edge in some frame."""
    return ink_at_border(videos).float().mean().item()


def framing_of(trainer: ClipTrainer, network: TrainedClips, size: ClipSize, count: int) -> dict:
    """Of clips of a size: the share that reaches the edge, and how well they follow captions."""

    def measure() -> dict:
        moving = network.video.moving
        clips = scored_clips(moving, size, count)
        videos = network.video.draw(clips, size, network.run.identity["seed"])
        found = scores_of_size(trainer.finished, moving, videos, clips, size)
        keys = ("prompt_accuracy", "direction")
        return {"border": share_at_border(videos)} | {key: found[key] for key in keys}

    return network.once(f"border of {EDGE} in {size_name(size)}", measure)


@torch.no_grad()
def real_border(vae: AutoencoderKL, moving: MovingDigits, size: ClipSize, count: int) -> float:
    """The share of clips to train on, as the autoencoder shows them."""
    videos = moving.videos(scored_clips(moving, size, count, 1), size)
    return share_at_border(decode_frames(vae, encode_frames(vae, videos)))


def framing_study(conditions: Conditions) -> dict:
    """By way of training: at its own size and at the other's, lists over seeds; and real clips."""
    trainer, count = ClipTrainer(conditions), 10 if conditions.fast else 200
    found: dict[str, dict] = {}
    seconds = trainer.seconds
    for way, own in FRAMES_OF.items():
        moving = trainer.cropped if way == CROPPED else trainer.moving
        other = SQUARE if own == WIDE else WIDE
        one: dict[str, list] = {key: [] for key in ("border", "digits", "direction", "elsewhere")}
        for seed in conditions.seeds:
            name = f"framing-{size_name(own)}"
            network = trainer.trained(name, moving, own, FRAMING_STEPS, seed)
            seconds += network.seconds
            scores = framing_of(trainer, network, own, count)
            one["border"].append(scores["border"])
            one["digits"].append(scores["prompt_accuracy"])
            one["direction"].append(scores["direction"])
            one["elsewhere"].append(framing_of(trainer, network, other, count // 2)["border"])
        real = real_border(trainer.finished.pipeline.vae, moving, own, 2 * count)
        found[way] = one | {"size": size_name(own), "real": real}
    rows = [
        [way, one["size"], one["border"], one["real"], one["digits"], one["direction"],
         one["elsewhere"]] for way, one in found.items()
    ]  # fmt: skip
    columns = ["trained on", "clips", "at the border", "of real ones", "digit read in",
               "direction right in", "at the border in the other's size"]  # fmt: skip
    return {"ways": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def times_as_often(results: dict) -> list[float]:
    """How often clips reach the border after training on crops, relative to native frames, by
    seed."""
    native, cropped = (results["ways"][way]["border"] for way in (NATIVE, CROPPED))
    return [b / max(a, 1e-6) for a, b in zip(native, cropped, strict=True)]


def decide_framing(results: dict) -> Verdict:
    times = times_as_often(results)
    native, cropped = (results["ways"][way]["border"] for way in (NATIVE, CROPPED))
    enough, more = len(times) > 1, min(b - a for a, b in zip(native, cropped, strict=True))
    return verdict(
        enough and min(times) >= CLEARLY_MORE and more >= POINTS,
        enough and max(times) < HARDLY_MORE,
    )


def plot_framing(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(6, 1)
    for i, one in enumerate(results["ways"].values()):
        shares = [100 * x for x in one["border"]]
        axis.plot([i - 0.08] * len(shares), shares, "o", color=MEANINGS["prediction"],
                  label="drawn, each seed's" if i == 0 else None)  # fmt: skip
        axis.plot([i + 0.08], [100 * one["real"]], "s", color=MEANINGS["data"],
                  label="real clips, decoded" if i == 0 else None)  # fmt: skip
    labels = [f"{way}\n{one['size']}" for way, one in results["ways"].items()]
    axis.set_xticks(range(len(labels)), labels)
    axis.set(
        ylabel="clips whose digit reaches the border (%)", title="Out of view", xlim=(-0.6, 1.6)
    )
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left")
    save_plot(figure, path)


FRAMING = Experiment(
    name="x-sora-2",
    claim="Trained on native frames, a model keeps its subjects in view; trained on square crops, "
    "it draws them partly out of it.",
    source="Video generation models as world simulators, OpenAI, 2024, improved framing",
    measured="Clips of a moving digit, 4 frames of 32x48, and their middle, 32x32: a network for "
    "each, 400 steps of 32 from the transformer for images, the same clips in the same order. Each "
    "draws 200 clips of its own size: the share whose digit reaches the outer two pixels of some "
    "frame. Beside it the same of real clips, seen through the autoencoder, and at the other's "
    "size.",
    rule="Supported if in every seed clips reach the border at least twice as often after training "
    "on crops, and at least 5 points more often. Refuted if in every seed they do so less than "
    "1.25 times as often. (One seed decides nothing.)",
    minutes=9,
    run=framing_study,
    decide=decide_framing,
    plot=plot_framing,
    remark="17% and 50% of clips, where those shown in training, seen through the autoencoder, "
    "have 0.5% and 32%: after 400 steps digits are often half formed, and larger than they should "
    "be. In a size that they were not trained on, both networks reach the border in most clips.",
)
