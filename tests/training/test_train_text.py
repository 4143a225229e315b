"""The training tasks of the text encoders."""

import numpy as np
import pytest
import torch

from nanosd3.training.train_text import clip_loss, span_corruptions


def test_clip_loss():
    """Perfect matches at a high scale have no loss; equal captions share the probability."""
    eye = torch.eye(4)
    assert clip_loss(eye, eye, eye, torch.tensor(100.0)) < 1e-6
    assert clip_loss(eye, eye.flip(0), eye, torch.tensor(100.0)) > 10
    same = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    text = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert clip_loss(text, text, same, torch.tensor(100.0)) == pytest.approx(np.log(2), abs=1e-4)


def test_span_corruption():
    inputs, targets = span_corruptions([[5, 6, 7, 8, 1], [9, 1]], sentinels=(30, 31), length=6)
    rows = list(zip(inputs.tolist(), targets.tolist(), strict=True))
    assert ([5, 30, 8, 1, 0, 0], [30, 6, 7, 31, 1, 0]) in rows
    assert ([30, 6, 7, 8, 1, 0], [30, 5, 31, 1, 0, 0]) in rows
    assert ([30, 1, 0, 0, 0, 0], [30, 9, 31, 1, 0, 0]) in rows
    assert len(rows) == 4 + 3 + 1
