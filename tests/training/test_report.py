"""Metrics of samples."""

import pytest
import torch

from nanosd3.random_streams import rng
from nanosd3.training.evaluation import balanced, to_digits
from nanosd3.training.report import attribute_accuracy


def test_large_and_coloured_samples_become_digits():
    digits = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    assert to_digits(digits) is digits
    large = torch.zeros(2, 64, 64, dtype=torch.uint8)  # twice as large, including the padding
    large[:, 4:-4, 4:-4] = digits.repeat_interleave(2, 1).repeat_interleave(2, 2)
    colour = torch.stack([large] * 3, dim=3)
    for samples in (large, colour):
        converted = to_digits(samples)
        assert converted.shape == digits.shape and converted.dtype == torch.uint8
    flat = torch.full((1, 64, 64), 77, dtype=torch.uint8)
    assert (to_digits(flat) == 77).all()


def test_balanced():
    labels = torch.tensor([0] * 50 + [1] * 9 + [2] * 20)
    chosen = balanced(labels, 3, 15, rng("test"))
    assert (
        labels[chosen].tolist() == [0] * 5 + [1] * 5 + [2] * 5 and len(set(chosen.tolist())) == 15
    )


def test_attribute_accuracy():
    prompts = ["a thin 1", "a bold 1", "1", "a bold 2"]
    result = attribute_accuracy(
        prompts, {"thin": 0, "bold": 2}, torch.tensor([0, 2, 1, 1]), torch.arange(4.0)
    )
    assert result == {"accuracy": pytest.approx(2 / 3), "mean_by_word": {"thin": 0.0, "bold": 2.0}}
    assert (
        attribute_accuracy(["1"], {"thin": 0}, torch.tensor([0]), torch.ones(1))["accuracy"] is None
    )
