"""Validation loss, and when and how far."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from nanosd3.config import CONFIGS
from nanosd3.machine.distributed import ProcessGroup
from nanosd3.training import train_flow
from nanosd3.training.train_flow import (
    dtype_after,
    every_so_often,
    padded,
    time_shift,
    validated_at_once,
    validation_loss,
)


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
class OneOfThree(ProcessGroup):
    brought: list = field(default_factory=list)

    def all_gather(self, rows):
        self.brought.append(rows)
        return rows


def job_with(source, group=None) -> SimpleNamespace:
    return SimpleNamespace(
        config=CONFIGS["tiny"],
        source=source,
        group=group or ProcessGroup(),
        device=torch.device("cpu"),
    )


def test_validation_loss(monkeypatch):
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
    monkeypatch.setattr(train_flow, "VALIDATION_TIMES", 8)
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
    for group in teams:
        passes.clear()
        validation_loss(job_with(source, group), source, network)
        counts.append(list(passes))
    assert counts[0] == counts[1] == counts[2] and counts[0]
    sums = torch.cat([rows for group in teams for rows in group.brought]).sum(0)
    assert sums[-1] == 9
    assert (sums[:-1] / 9).tolist() == pytest.approx(alone, abs=1e-5)


def test_validation_takes_as_many_images_as_fit(monkeypatch):
    """One of 1024x1024 in the largest model, 50 small ones; the losses are the same."""
    source, passes = HeldOut(), []
    large = SimpleNamespace(config=CONFIGS["sd3.5-large"])
    of_size = SimpleNamespace(latents=lambda one: (torch.empty(1, 16, 128, 128), None))
    assert validated_at_once(large, of_size, torch.tensor([0])) == 1
    assert validated_at_once(job_with(source), source, torch.tensor([0])) == 50

    def network(z, t, context, pooled):
        passes.append(len(z))
        return z * t.view(-1, 1, 1, 1)

    whole = validation_loss(job_with(source), source, network)
    assert max(passes) > 2
    passes.clear()
    monkeypatch.setattr(train_flow, "validated_at_once", lambda *_: 2)
    assert validation_loss(job_with(source), source, network) == pytest.approx(whole, abs=1e-5)
    assert max(passes) == 2


@pytest.mark.parametrize(
    ("mode", "device", "dtype"),
    [("fsdp", "cuda", torch.bfloat16), ("fsdp", "cpu", None), ("ddp", "cuda", None)],
)
def test_type_after_training(mode, device, dtype):
    """Half as large as in training where it has been trained in shards on GPUs."""
    job = SimpleNamespace(group=SimpleNamespace(mode=mode), device=torch.device(device))
    assert dtype_after(job) is dtype


def test_padded():
    assert padded(torch.arange(5), 3).tolist() == [0, 1, 2, 3, 4, -1]
    assert padded(torch.arange(6), 3).tolist() == list(range(6))


def test_every_so_often():
    """So many times, at every step of a very short run, and every 5000 in a long one."""
    assert [every_so_often(steps, 10) for steps in (1, 9, 10, 12, 3000, 10**6)] == [
        1, 1, 1, 2, 300, 5000
    ]  # fmt: skip
    assert [every_so_often(steps, 5) for steps in (1, 9, 3000)] == [1, 2, 600]


def test_time_shift():
    """As the config samples at its own size; with twice as many pixels a root of 2 further."""
    config = CONFIGS["sd3-medium"]
    side = config.image_size // config.vae.factor
    assert time_shift(config, (side, side)) == pytest.approx(config.sampling.shift)
    assert time_shift(config, (2 * side, side)) == pytest.approx(config.sampling.shift * 2**0.5)
    assert time_shift(config, (side // 2, side // 2)) == pytest.approx(config.sampling.shift / 2)
