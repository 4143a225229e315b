"""Measures of sample quality, by a small classifier trained on real images.

*Prompt accuracy* is the share of samples that the classifier reads as the class in the prompt. On
its own it rewards blur, since an average seven is easy to read. The *Frechet distance* complements
it: it fits a Gaussian to the classifier's features of the samples, another to those of real test
images, and says how far apart the two are. Its scale depends on the classifier and on the number
of samples, so compare it only with the floors reported beside it.
"""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features (n, F) and (m, F):
    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), where A and B are the covariances."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    difference = (a.mean(0) - b.mean(0)).square().sum()
    return ((difference + cov_a.trace() + cov_b.trace() - 2 * cross).clamp(min=0)).item()
