"""How good are the samples? A small judge network, trained on real images, looks at them.

*Prompt accuracy*: the share of samples the judge reads as the class that was asked for. Alone it
rewards blur, since an average seven is easy to read. So beside it stands the *Frechet distance*
between the judge's features of samples and of real test images: how far the two clouds are
apart if each were a Gaussian. Its scale depends on the judge and on the number of samples;
compare it only with the floors printed beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

JUDGED = 32  # pixels a side that the networks here look at


class ConvNet(nn.Module):
    """Images (B, channels, 32, 32) in [-1, 1] to features (B, 64), and those to outputs
    (B, outputs).

    The judge is one, with the classes as outputs; CLIP's small image tower is another.
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
    """Images (B, C, H, W) of any size as these networks look at them: (B, C, 32, 32)."""
    size = (JUDGED, JUDGED)
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features (n, F) and (m, F), each taken as a Gaussian:
    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    difference = (a.mean(0) - b.mean(0)).square().sum()
    return ((difference + cov_a.trace() + cov_b.trace() - 2 * cross).clamp(min=0)).item()
