"""Random streams by name."""

import torch

from nanosd3.errors import rng


def test_random_streams_are_named():
    draw = lambda *name: torch.rand(4, generator=rng(*name)).tolist()  # noqa: E731
    assert draw(0, "flow", 1) == draw(0, "flow", 1)
    streams = [
        draw(*name) for name in ((0, "flow", 1), (1, "flow", 1), (0, "t5", 1), (0, "flow", 2))
    ]
    assert len({tuple(stream) for stream in streams}) == 4
