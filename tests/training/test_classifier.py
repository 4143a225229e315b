"""The classifier and its input images."""

import torch

from nanosd3.training.classifier import CLASSIFIER_SIZE, ConvNet, thumbnails


def test_shapes():
    net, x = ConvNet(10), torch.randn(3, 1, 32, 32)
    assert net.features(x).shape == (3, 64)
    torch.testing.assert_close(net(x), net.head(net.features(x)))
    assert ConvNet(10, channels=3)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_thumbnails():
    """Images that already have the classifier's size are returned as they are."""
    x = torch.randn(2, 3, CLASSIFIER_SIZE, CLASSIFIER_SIZE)
    assert thumbnails(x) is x
    large = torch.zeros(1, 1, 64, 96)
    large[..., 48:] = 1
    small = thumbnails(large)
    assert small.shape == (1, 1, CLASSIFIER_SIZE, CLASSIFIER_SIZE)
    assert (small[..., :15] == 0).all() and small[..., 17:].min() > 0.999
