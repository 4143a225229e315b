"""Frechet distance against closed forms."""

import numpy as np
import pytest
import torch

from nanosd3.training.metrics import frechet_distance


def test_frechet_distance_of_gaussians():
    """Diagonal covariances: sum of (mean difference)^2 + (deviation difference)^2."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=g)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    a, b = x * torch.tensor([1.0, 2.0, 0.5]) + 1, x * torch.tensor([2.0, 2.0, 1.0]) - 1
    assert frechet_distance(a, b) == pytest.approx(3 * 4 + 1 + 0.25, rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_frechet_distance_sees_correlation():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 2, generator=g)
    b = a @ torch.tensor([[1.0, 0.9], [0.0, (1 - 0.81) ** 0.5]])
    assert frechet_distance(a, b) > 0.1


def test_frechet_distance_of_few_samples():
    """With fewer samples than features the covariances are singular, but the distance finite."""
    assert np.isfinite(frechet_distance(torch.randn(5, 64), torch.randn(100, 64)))
