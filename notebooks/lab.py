"""What the notebooks share: one small trained model, a cache, and pictures.

`trained()` gives a small Stable Diffusion 3 that has learned MNIST; the first notebook that asks
for it trains it (about four minutes on two cores), the others find it in the folder `cache` beside
this file (NANOSD3_CACHE names another). It is the main job of train_mnist.py with fewer steps,
through the same functions.

With NANOSD3_FAST=1 in the environment everything is smaller: all cells run in seconds and every
assertion holds, but nothing looks as it should. That is for tests; learn without it.

Everything runs on the CPU, also where there is a GPU: forty machines should behave the same.
All pictures are black on white, have units on their axes and a caption below.
"""

import contextlib
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nanosd3.checkpoint import Run, read_tensors, save_tensors
from nanosd3.config import CONFIGS, Config
from nanosd3.data import ImageSet, load_images, to_model
from nanosd3.features import Features
from nanosd3.jobs import get_encoders, get_features
from nanosd3.metrics import JUDGED, ConvNet
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.runtime import InputError, cores
from nanosd3.sources import Described, Digits
from nanosd3.stages import Job, train_flow, train_judge

FAST = os.environ.get("NANOSD3_FAST", "") not in ("", "0")
CACHE = Path(os.environ.get("NANOSD3_CACHE") or Path(__file__).parent / "cache") / (
    "fast" if FAST else "full"
)

plt.rcParams.update({
    "figure.figsize": (6.4, 3.2),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.formatter.min_exponent": 3,  # 0.01 rather than 10^-2
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=["0", "0.55"]) * cycler(linestyle=["-", "--", ":", "-."]),
    "image.cmap": "gray",
    "legend.frameon": False,
})  # fmt: skip


def pick(full: object, fast: object) -> object:
    """The first, or with NANOSD3_FAST the second."""
    return fast if FAST else full


# --- the trained model --------------------------------------------------------------------------


def lesson_config() -> Config:
    """The `mnist` config with fewer steps in each stage."""
    config = CONFIGS["mnist"]
    training = config.training
    steps = pick(
        {"judge": 400, "autoencoder": 300, "clip": 250, "t5": 200, "flow": 1800},
        {"judge": 20, "autoencoder": 15, "clip": 15, "t5": 15, "flow": 20},
    )
    recipes = {
        stage: replace(getattr(training, stage), steps=n, warmup=min(n // 4, 50))
        for stage, n in steps.items()
    }
    images = pick((60000, 10000), (3000, 100))
    small = replace(training, train_images=images[0], test_images=images[1], **recipes)
    return replace(config, training=small)


def begin_job(
    name: str = "model", config: Config | None = None, source: Digits | None = None
) -> Job:
    """A run folder in the cache, opened for training or reading, with its data."""
    config = config or lesson_config()
    if source is None:
        sizes = config.training.train_images, config.training.test_images
        source = Digits(load_images().first(*sizes), config)
    identity = {"config": asdict(config), "data": source.fingerprint, "seed": 0}
    try:
        run = Run.open(CACHE / name, identity, fresh=False)
    except InputError:
        raise InputError(f"{CACHE / name}: of another version; delete {CACHE}") from None
    torch.set_num_threads(pick(min(cores(), 8), 1))
    return Job(run, config, source, torch.device("cpu"), seed=0)


@dataclass(frozen=True)
class Lesson:
    """The trained model and what it was trained with."""

    job: Job
    judge: ConvNet
    features: Features
    pipeline: Pipeline

    @property
    def images(self) -> ImageSet:
        """MNIST."""
        return self.job.source.images

    @property
    def described(self) -> Described:
        """The captions that fit each training image."""
        return self.job.source.described

    def reads(self, images: np.ndarray) -> list[int]:
        """The digit that the judge network sees in each uint8 image (B, 28, 28)."""
        x = to_model(torch.from_numpy(np.ascontiguousarray(images)), JUDGED)
        with torch.no_grad():
            return self.judge(x).argmax(1).tolist()

    def drawing_with(self, mmdit: MMDiT) -> Pipeline:
        """The pipeline with another transformer in it."""
        return self.features.pipeline(mmdit, self.job.device)

    def another(self, name: str, config: Config) -> Job:
        """A job beside this one in the cache, on the same images."""
        return begin_job(name, config, self.job.source)


def trained() -> Lesson:
    """The model of all notebooks: from the cache, or trained now, stage by stage."""
    job = begin_job()
    with contextlib.nullcontext() if "flow" in job.run.stages else job.run.alone():
        return train(job)


def train(job: Job) -> Lesson:
    """All stages of a job, as in train_mnist.py; those that are finished are loaded."""
    judge = train_judge(job, job.source.images)
    features = get_features(job, get_encoders(job, None), [])
    mmdit = train_flow(job, features)
    return Lesson(job, judge, features, features.pipeline(mmdit, job.device))


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` returns, computed once and kept in the cache under `name`."""
    path = CACHE / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({key: value.contiguous() for key, value in make().items()}, path)
    return read_tensors(path)


# --- pictures -----------------------------------------------------------------------------------


def finish(figure: Figure, caption: str) -> None:
    """Put the caption below and show the figure."""
    width = int(figure.get_size_inches()[0] * 16)
    figure.supxlabel(textwrap.fill(caption, width), fontsize=9, style="italic")
    plt.show()


def panels(count: int, width: float = 3.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, list(axes[0])


def to_numpy(x: Tensor | np.ndarray | Sequence) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def lines(
    curves: Mapping[str, tuple[Sequence, Sequence]],
    xlabel: str,
    ylabel: str,
    caption: str,
    log: str = "",
) -> None:
    """A plot of name -> (x, y); `log` may be "x", "y" or "xy"."""
    figure, (axis,) = panels(1, 6.4, 3.4)
    for mark, (name, (x, y)) in zip("os^vDxP*" * 4, curves.items(), strict=False):
        x, y = to_numpy(x), to_numpy(y)
        axis.plot(x, y, marker=mark if len(x) <= 20 else "", markersize=4, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_xscale("log" if "x" in log else "linear")
    axis.set_yscale("log" if "y" in log else "linear")
    if len(curves) > 1:
        axis.legend()
    finish(figure, caption)


def images(rows: Mapping[str, Tensor | np.ndarray], caption: str, cell: float = 0.6) -> None:
    """Rows of images, each a label -> (n, H, W), drawn dark on light to save ink."""
    most = max(len(row) for row in rows.values())
    figure, axes = plt.subplots(
        len(rows), most, figsize=(1.6 + most * cell, len(rows) * cell + 0.5), squeeze=False
    )
    for line, (label, row) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, row, strict=False):
            axis.imshow(-to_numpy(image).astype(float), interpolation="nearest")
        line[0].text(-0.15, 0.5, textwrap.fill(label, 22), transform=line[0].transAxes,
                     ha="right", va="center")  # fmt: skip
    finish(figure, caption)


def maps(
    tables: Mapping[str, Tensor | np.ndarray], xlabel: str, ylabel: str, caption: str, unit: str
) -> None:
    """Tables of numbers side by side as shades of grey, dark for large, on one scale."""
    arrays = {name: to_numpy(table) for name, table in tables.items()}
    low = min(float(a.min()) for a in arrays.values())
    high = max(float(a.max()) for a in arrays.values())
    figure, axes = panels(len(arrays), 2.6, 2.9)
    for axis, (name, array) in zip(axes, arrays.items(), strict=True):
        drawn = axis.imshow(array, cmap="gray_r", vmin=low, vmax=high, interpolation="nearest",
                            aspect="auto")  # fmt: skip
        axis.set(title=name, xlabel=xlabel, ylabel=ylabel if axis is axes[0] else "")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(drawn, ax=axes, label=unit, shrink=0.8)
    finish(figure, caption)
