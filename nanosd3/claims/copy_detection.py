"""Finding near-copies of images among many, by features trained for it.

A classifier's features separate digits, not images: a shift by one pixel moves them, as it moves
pixels, further than the distance to the next image. SSCD (Pizzi et al., arXiv 2202.10261) is
trained on copies: the images of a batch are each altered twice, and every version has to find the
other (the contrastive loss of CLIP, between images). Labels are not used. Two images are then
copies if they are as near as only one image in a hundred is to the nearest of many others that are
known to differ from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.repeated_digits import Planted, altered
from nanosd3.claims.runs import network_job
from nanosd3.config_types import Recipe
from nanosd3.data.mnist import to_model
from nanosd3.related.finished_run import FinishedRun
from nanosd3.training.classifier import CLASSIFIER_SIZE, ConvNet
from nanosd3.training.evaluation import Scorer
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import build, finish_or_load, fit_average, in_chunks, training_of
from nanosd3.training.train_text import clip_loss

SHARPNESS = torch.tensor(20.0)  # of the contrastive loss: one over its temperature
DETECTOR = Recipe(steps=300, batch=64, lr=2e-3, warmup=50, weight_decay=1e-2)
DETECTOR_AVERAGE = 0.95  # decay of the average of the weights
KNOWN_DIFFERENT = 4000  # test images, none of which is a copy of another
TRAINED_FOR_IT = "copy detection"


@dataclass(frozen=True)
class Detector:
    """A trained network, and the seconds of a core that it took."""

    net: ConvNet
    seconds: float

    def descriptors(self, digits: Tensor) -> Tensor:
        """Directions (B, 64) of images uint8 (B, 28, 28): near each other for copies."""
        found = in_chunks(lambda chunk: self.net(to_model(chunk, CLASSIFIER_SIZE)), digits)
        return F.normalize(found, dim=1)


def trained_detector(conditions: Conditions, finished: FinishedRun, seed: int) -> Detector:
    """The network of a seed, trained now or before on the main job's training images."""
    recipe = replace(DETECTOR, steps=2, batch=8) if conditions.fast else DETECTOR
    training = replace(training_of(finished.config), flow=recipe)
    config = replace(finished.config, training=training)
    job = network_job(conditions, finished, "copy-detector", config, seed)
    net = build(job, "detector", lambda: ConvNet(64))
    images = finished.source.images.train_images

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator = step_rng.generator()
        batch = images[torch.randint(len(images), (recipe.batch,), generator=generator)]
        a, b = (net(to_model(altered(batch, generator), CLASSIFIER_SIZE)) for _ in range(2))
        return clip_loss(a, b, torch.eye(len(batch)), SHARPNESS), {}

    def train() -> dict:
        return fit_average(job, "detector", net, loss_of, DETECTOR_AVERAGE)

    with job.run.alone():
        done = finish_or_load(job, "detector", net, train)
    return Detector(net, done["thread_seconds"])


def rare_distance(features: Tensor) -> float:
    """The distance within which only 1% of the rows have another row."""
    distances = torch.cdist(features, features).fill_diagonal_(float("inf"))
    return float(distances.amin(1).quantile(0.01))


def repeats(features: Tensor, limit: float) -> Tensor:
    """Which rows (n,) to leave out: all but the first of each cluster. Two rows nearer than
    `limit` are in one cluster, and so are two that a chain of such pairs connects."""
    near = torch.cdist(features, features) < limit
    near.fill_diagonal_(True)
    numbers = torch.arange(len(features))
    cluster, before = numbers, torch.empty(0)
    while not torch.equal(cluster, before):
        before = cluster
        cluster = torch.where(near, cluster, len(features)).amin(1)
    return cluster < numbers


def precision_and_recall(left_out: Tensor, is_copy: Tensor) -> tuple[float, float]:
    """The share of copies among what is left out, and the share of copies that are left out. If
    nothing is left out, the first is 1."""
    right = float((left_out & is_copy).sum())
    return right / float(left_out.sum()) if left_out.any() else 1.0, right / float(is_copy.sum())


def found_repeats(
    scorer: Scorer, detector: Detector, planted: Planted
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """Which training images (n,) the detector leaves out; and, by kind of features, the precision
    and recall of what they leave out."""
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "pixels": lambda digits: digits.flatten(1).float(),
        "classifier": scorer.features,
        TRAINED_FOR_IT: detector.descriptors,
    }
    scores = {}
    for kind, features_of in kinds.items():
        limit = rare_distance(features_of(planted.images.test_images[:KNOWN_DIFFERENT]))
        left_out = repeats(features_of(planted.images.train_images), limit)
        scores[kind] = precision_and_recall(left_out, planted.is_copy)
    return left_out, scores  # those of the last kind
