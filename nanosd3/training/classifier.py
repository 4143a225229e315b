"""A small image classifier, trained on real images, on which the metrics of samples are based.

On disk it is called `judge`: the stage in run.json and the log, judge.safetensors, the config field
`training.judge` and the random streams of its training keep that name, so that existing runs stay
valid.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.data.mnist import ImageSet, to_model
from nanosd3.training.loop import StepRNG, fit
from nanosd3.training.stages import Job, build, finish_or_load, in_chunks

CLASSIFIER_SIZE = 32  # side of the input images, in pixels


class ConvNet(nn.Module):
    """Images (B, channels, 32, 32) in [-1, 1] to features (B, 64) to outputs (B, outputs).

    Used twice: as the classifier, with the classes as outputs, and as the image tower that the
    text encoders' CLIP training needs.
    """

    def __init__(self, outputs: int, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, c) for c in (16, 32, 64))
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.head = nn.Linear(64, outputs)

    def features(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))  # (B, 16, 16, 16)
        x = F.max_pool2d(F.gelu(self.norm2(self.conv2(x))), 2)  # (B, 32, 8, 8)
        x = F.max_pool2d(F.gelu(self.norm3(self.conv3(x))), 2)  # (B, 64, 4, 4)
        return F.gelu(self.hidden(x.flatten(1)))  # (B, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def thumbnails(x: Tensor) -> Tensor:
    """Resize images (B, C, H, W) to the classifier's input size: (B, C, 32, 32)."""
    size = (CLASSIFIER_SIZE, CLASSIFIER_SIZE)
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def train_classifier(job: Job, images: ImageSet) -> ConvNet:
    """Train the classifier on the training images, or load it; print its test accuracy."""
    recipe = job.training.judge
    net = build(job, "judge", lambda: ConvNet(len(images.names))).to(job.device)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        i = step_rng.take(job.source.draw(recipe.batch, step_rng.generator()))
        x = to_model(images.train_images[i], CLASSIFIER_SIZE).to(job.device)
        return F.cross_entropy(net(x), images.train_labels[i].to(job.device)), {}

    def train() -> dict:
        fit(job.run, "judge", net, loss_of, recipe, job.seed)
        test = to_model(images.test_images, CLASSIFIER_SIZE).to(job.device)
        correct = in_chunks(net, test).argmax(1).cpu() == images.test_labels
        return {"accuracy": correct.float().mean().item()}

    results = finish_or_load(job, "judge", net, train)
    print(f"classifier: {results['accuracy']:.2%} accuracy on the test images")
    return net
