"""What notebook 15 trains with and judges by, without a lesson model."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import lab
import pixels


def test_scores_are_what_is_read_as_asked_and_how_far_it_is():
    real = torch.randint(256, (40, 28, 28), generator=torch.Generator().manual_seed(0)).byte()

    class Real(lab.Lesson):
        images = SimpleNamespace(test_images=real)

        def classify(self, images):
            return [i % 4 for i in range(len(images))]

    classifier = SimpleNamespace(features=lambda x: x.flatten(1)[:, ::97])
    lesson = Real(None, None, classifier, None, None)
    asked = [i % 4 if i < 30 else 9 for i in range(40)]
    found = pixels.scores(lesson, {"same": real.numpy(), "dark": (real // 4).numpy()}, asked)
    assert found["same"] == pytest.approx((0.75, 0.0), abs=1e-3)
    assert found["dark"][1] > 1


def test_noise_lies_around_its_middle_and_some_texts_are_left_out():
    source = SimpleNamespace(
        draw=lambda n, g: torch.arange(n), captions=lambda i, u: torch.zeros(len(i)).long()
    )
    images, texts = torch.rand(64, 1, 8, 8), torch.ones(1, 5)
    seen = [pixels.batch(SimpleNamespace(source=source), images, texts, n, 4.0) for n in range(40)]
    assert all(torch.equal(x0, images[: len(x0)]) for x0, _, _, _ in seen)
    t = torch.cat([t for _, _, t, _ in seen])
    assert float((t / (1 - t)).median()) == pytest.approx(4.0, rel=0.1)
    told = torch.cat([text for _, _, _, text in seen])
    assert torch.equal(told, told[:, :1].expand(-1, 5)) and 0.8 < float(told.mean()) < 0.97
