"""Frechet distance against closed forms, the loop's small parts, figures."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nanosd3.config import CONFIGS, Recipe
from nanosd3.figures import caption_lines, grid, shades, smooth
from nanosd3.loop import decay_groups, learning_rate, make_ema, update_ema
from nanosd3.metrics import JUDGED, ConvNet, frechet_distance, thumbnails
from nanosd3.parallel import Team
from nanosd3.report import balanced, followed, to_digits
from nanosd3.runtime import cores, memory_found, rng
from nanosd3.stages import every_so_often, padded, time_shift, validation_loss
from nanosd3.train_text import clip_loss, span_corruptions


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
    """Fewer samples than features: covariances are singular, the distance still a number."""
    assert np.isfinite(frechet_distance(torch.randn(5, 64), torch.randn(100, 64)))


def test_judge_shapes():
    net, x = ConvNet(10), torch.randn(3, 1, 32, 32)
    assert net.features(x).shape == (3, 64)
    torch.testing.assert_close(net(x), net.head(net.features(x)))
    assert ConvNet(10, channels=3)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_thumbnails():
    """What networks of 32 pixels look at: the picture itself if it is of that size."""
    x = torch.randn(2, 3, JUDGED, JUDGED)
    assert thumbnails(x) is x
    large = torch.zeros(1, 1, 64, 96)
    large[..., 48:] = 1
    small = thumbnails(large)
    assert small.shape == (1, 1, JUDGED, JUDGED)
    assert (small[..., :15] == 0).all() and small[..., 17:].min() > 0.999


def test_large_and_coloured_samples_are_judged_as_digits():
    digits = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    assert to_digits(digits) is digits
    large = torch.zeros(2, 64, 64, dtype=torch.uint8)  # twice as large, its border included
    large[:, 4:-4, 4:-4] = digits.repeat_interleave(2, 1).repeat_interleave(2, 2)
    colour = torch.stack([large] * 3, dim=3)
    for samples in (large, colour):
        found = to_digits(samples)
        assert found.shape == digits.shape and found.dtype == torch.uint8
    flat = torch.full((1, 64, 64), 77, dtype=torch.uint8)
    assert (to_digits(flat) == 77).all()


# --- loop -----------------------------------------------------------------------------------------


def test_learning_rate():
    recipe = Recipe(steps=100, batch=1, lr=1.0, warmup=10, weight_decay=0.0)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1 and rates[55] == pytest.approx(0.505, abs=0.01)
    assert rates[-1] < 0.02 and all(a > b for a, b in pairwise(rates[10:]))
    constant = replace(recipe, decay="constant")
    assert [learning_rate(step, constant) for step in range(100)] == rates[:10] + [1.0] * 90


def test_ema_warms_up():
    module, start = nn.Linear(1, 1), 5.0
    nn.init.constant_(module.weight, start)
    ema = make_ema(module)
    nn.init.constant_(module.weight, 0.0)
    expected = start
    for step in range(300):
        update_ema(ema, module, step, 0.9999)
        expected *= min(0.9999, (1 + step) / (10 + step))
    assert ema.weight.item() == pytest.approx(expected, rel=1e-3)
    assert ema.weight.item() < 1e-3 * start  # 0.9999^300 alone would have kept 97%
    assert not ema.weight.requires_grad


def test_weight_decay_is_for_matrices():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[0].bias.requires_grad_(False)
    matrices, vectors = decay_groups(module, 0.1)
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1] and vectors["weight_decay"] == 0


def test_random_streams_are_named():
    draw = lambda *name: torch.rand(4, generator=rng(*name)).tolist()  # noqa: E731
    assert draw(0, "flow", 1) == draw(0, "flow", 1)
    streams = [
        draw(*name) for name in ((0, "flow", 1), (1, "flow", 1), (0, "t5", 1), (0, "flow", 2))
    ]
    assert len({tuple(stream) for stream in streams}) == 4


def test_runtime_facts():
    assert cores() >= 1 and memory_found()[0] > 0


# --- stages ---------------------------------------------------------------------------------------


class HeldOut:
    """13 images, of which those from 4 on are held out, in two sizes, with a caption each."""

    trained, count, texts = 4, 13, [str(i) for i in range(13)]

    def groups(self, numbers):
        sizes = [[i for i in numbers if i % 3 == 0], [i for i in numbers if i % 3]]
        return [torch.tensor(size) for size in sizes if size]

    def captions(self, index, u):
        assert (u == 0).all()
        return index

    def latents(self, index):
        side = 2 if index[0] % 3 == 0 else 4
        mean = (index.float() / 10).view(-1, 1, 1, 1).expand(-1, 2, side, side)
        return mean, torch.full_like(mean, torch.nan)  # means are enough

    def normalise(self, z):
        return z

    def text(self, captions):
        return captions.view(-1, 1, 1).float(), captions.view(-1, 1).float()


@dataclass(frozen=True)
class OneOfThree(Team):
    brought: list = field(default_factory=list)

    def gathered(self, rows):
        self.brought.append(rows)
        return rows


def job_with(source, team=None) -> SimpleNamespace:
    return SimpleNamespace(source=source, team=team or Team(), device=torch.device("cpu"))


def test_validation_loss():
    """The mean over all held-out images, at eight times, with the same noise for each always."""
    seen, source = {}, HeldOut()

    def network(z, t, context, pooled):
        """The exact velocity, but for an error of the image's number times t."""
        number = context[:, 0, 0]
        noise = (z - (1 - t.view(-1, 1, 1, 1)) * number.view(-1, 1, 1, 1) / 10) / t.view(
            -1, 1, 1, 1
        )
        for n, x, time in zip(number.tolist(), noise, t.tolist(), strict=True):
            torch.testing.assert_close(x, seen.setdefault(n, x), atol=1e-5, rtol=1e-4)
            times.add(time)
        return noise - number.view(-1, 1, 1, 1) / 10 + (number * t).view(-1, 1, 1, 1)

    times = set()
    losses = validation_loss(job_with(source), source, network)
    assert sorted(times) == [(k + 0.5) / 8 for k in range(8)] and sorted(seen) == list(range(4, 13))
    numbers = torch.arange(4, 13).double()
    expected = [(numbers * t).square().mean().item() for t in sorted(times)]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses == validation_loss(job_with(source), source, network)
    source.count = source.trained
    assert validation_loss(job_with(source), source, network) == []


def test_validation_loss_of_three_processes():
    """Each takes some images and as many passes as the others; together they are all, once."""
    source, passes = HeldOut(), []

    def network(z, t, context, pooled):
        passes.append(z.shape)
        return z * t.view(-1, 1, 1, 1)

    alone = validation_loss(job_with(source), source, network)
    teams = [OneOfThree(rank=rank, size=3) for rank in range(3)]
    counts = []
    for team in teams:
        passes.clear()
        validation_loss(job_with(source, team), source, network)
        counts.append(list(passes))
    assert counts[0] == counts[1] == counts[2] and counts[0]
    sums = torch.cat([rows for team in teams for rows in team.brought]).sum(0)
    assert sums[-1] == 9
    assert (sums[:8] / 9).tolist() == pytest.approx(alone, abs=1e-5)


def test_padded():
    assert padded(torch.arange(5), 3).tolist() == [0, 1, 2, 3, 4, -1]
    assert padded(torch.arange(6), 3).tolist() == list(range(6))


def test_every_so_often():
    """Ten times, at every step of a very short run, and every 5000 in a long one."""
    assert [every_so_often(steps) for steps in (1, 9, 10, 12, 3000, 10**6)] == [
        1, 1, 1, 2, 300, 5000
    ]  # fmt: skip


def test_time_shift():
    """As the config samples at its own size; with twice as many pixels a root of 2 further."""
    config = CONFIGS["sd3-medium"]
    side = config.image_size // config.vae.factor
    assert time_shift(config, (side, side)) == pytest.approx(config.sampling.shift)
    assert time_shift(config, (2 * side, side)) == pytest.approx(config.sampling.shift * 2**0.5)
    assert time_shift(config, (side // 2, side // 2)) == pytest.approx(config.sampling.shift / 2)


def test_clip_loss():
    """Perfect pairs at a high scale cost nothing; equal captions share the answer."""
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


def test_balanced():
    labels = torch.tensor([0] * 50 + [1] * 9 + [2] * 20)
    chosen = balanced(labels, 3, 15, rng("test"))
    assert (
        labels[chosen].tolist() == [0] * 5 + [1] * 5 + [2] * 5 and len(set(chosen.tolist())) == 15
    )


def test_followed():
    prompts = ["a thin 1", "a bold 1", "1", "a bold 2"]
    found = followed(prompts, {"thin": 0, "bold": 2}, torch.tensor([0, 2, 1, 1]), torch.arange(4.0))
    assert found == {"accuracy": pytest.approx(2 / 3), "mean_by_word": {"thin": 0.0, "bold": 2.0}}
    assert followed(["1"], {"thin": 0}, torch.tensor([0]), torch.ones(1))["accuracy"] is None


# --- figures --------------------------------------------------------------------------------------


def test_grid_places_images():
    images = np.zeros((3, 28, 28), np.uint8)
    images[1] = 255
    picture = np.asarray(grid([("seven", images)]).convert("L"))
    cells = picture[4:60, 190:]
    assert (
        cells[:, :56].max() == 0 and cells[:, 60:116].min() == 255 and cells[:, 120:176].max() == 0
    )
    assert picture[:, :190].min() < 100  # the caption
    assert grid([("x", np.zeros((20, 28, 28), np.uint8))]).height == 2 * 60 + 4
    assert grid([("x", np.zeros((2, 64, 64, 3), np.uint8))]).mode == "RGB"


def test_captions_wrap():
    assert len(caption_lines("a thin upright handwritten seven", 120, 15)) == 3


def test_shades():
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 4:10, 3:6] = 255
    assert shades(image) == "\n".join(["   @@@"] * 3)


def test_smooth():
    assert smooth([1, 2, 3, 4], 2).tolist() == [1.5, 2.5, 3.5]
