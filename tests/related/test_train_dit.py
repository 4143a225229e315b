"""A DiT's objectives, its noise levels in training, and its samples."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanosd3.config import CONFIGS
from nanosd3.config_types import Recipe
from nanosd3.flow import interpolate, logit_normal, uniform
from nanosd3.related.ddpm import ancestral, ddim, guided_noise, linear_schedule, spaced_steps
from nanosd3.related.dit import DIT_CONFIGS, DiT
from nanosd3.related.train_dit import (
    OBJECTIVES,
    DiTLoss,
    dit_step,
    flow_times,
    nearest_step,
    sample_dit,
    steps_evenly,
    train_dit,
    validation_error,
)
from nanosd3.samplers import euler
from nanosd3.storage.run import Run
from nanosd3.training import stages
from nanosd3.training.cached_features import Features
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job

TINY = DIT_CONFIGS["tiny"]
U = torch.tensor([0.0001, 0.2, 0.5, 0.9999])


# --- levels of noise ------------------------------------------------------------------------------


def test_times_have_the_same_share_of_noise():
    schedule = linear_schedule()
    t = flow_times(schedule)
    ratio = (1 - schedule.alpha_bar).sqrt() / schedule.alpha_bar.sqrt()
    torch.testing.assert_close(t / (1 - t), ratio)
    assert (t.diff() > 0).all() and t[0] < 0.01 and t[-1] > 0.99


def test_density_of_even_steps():
    """u picks the step, and the step comes back from its t."""
    t = steps_evenly(U)
    assert nearest_step(linear_schedule(), t).tolist() == [0, 200, 500, 999]
    torch.testing.assert_close(t, flow_times(linear_schedule())[[0, 200, 500, 999]].float())
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(nearest_step(linear_schedule(), steps_evenly(u)), torch.arange(1000))


def test_nearest_step():
    times = flow_times(linear_schedule())
    between = times[3] + 0.4 * (times[4] - times[3])
    t = torch.stack([torch.tensor(0.0).double(), between, torch.tensor(1.0).double()])
    assert nearest_step(linear_schedule(), t).tolist() == [0, 3, 999]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    return x0, noise, torch.tensor([0, 3, 10, 9])


def remembering(calls: list, channels: int):
    def network(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append((z, t, y))
        return 0.5 * z.repeat(1, channels // 4, 1, 1)

    return network


def test_the_loss_of_the_flow():
    x0, noise, y = batch()
    calls: list = []
    losses = DiTLoss("flow", logit_normal).losses(remembering(calls, 4), x0, noise, U, y)
    ((z, t, labels),) = calls
    torch.testing.assert_close(t, logit_normal(U))
    torch.testing.assert_close(z, interpolate(x0, noise, t))
    assert torch.equal(labels, y)
    torch.testing.assert_close(losses, (0.5 * z - (noise - x0)).square().mean((1, 2, 3)))


@pytest.mark.parametrize("channels", [4, 8])
def test_the_loss_of_ddpm(channels):
    x0, noise, y = batch()
    calls: list = []
    losses = DiTLoss("ddpm", steps_evenly).losses(remembering(calls, channels), x0, noise, U, y)
    ((z, t, labels),) = calls
    torch.testing.assert_close(t, torch.tensor([0.0, 0.2, 0.5, 0.999]))
    schedule, n = linear_schedule(), torch.tensor([0, 200, 500, 999])
    torch.testing.assert_close(z, schedule.add_noise(x0, noise, n))
    assert torch.equal(labels, y)
    error = (0.5 * z - noise).square().mean((1, 2, 3))
    if channels == 4:
        torch.testing.assert_close(losses, error)
    else:
        assert (losses > error).all()  # the bound is added


# --- training: a source of 40 images, of which 30 are trained on ---------------------------------


class Images:
    trained, count = 30, 40

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.trained, (batch,), generator=generator)


class Latents(Features):
    """Image i has latents of mean i and deviation 0.5, which are normalised to i / 100."""

    def __init__(self):  # of no folder
        pass

    def latents(self, index: Tensor) -> tuple[Tensor, Tensor]:
        mean = index.float().view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
        return mean, torch.full_like(mean, 0.5)

    def normalise(self, z: Tensor) -> Tensor:
        return z / 100


LABELS = torch.arange(40) % 10


def job_in(folder: Path, steps: int = 2, batch: int = 400) -> Job:
    recipe = Recipe(steps, batch, lr=1e-2, warmup=1, weight_decay=0.0)
    training = replace(CONFIGS["tiny"].training, flow=recipe, ema_decay=0.9)
    run = Run.open(folder, {"config": {}})
    config = replace(CONFIGS["tiny"], training=training)
    return Job(run, config, Images(), torch.device("cpu"), seed=0)


def test_one_step(tmp_path):
    """Samples of the posterior, the label of each image, and one in ten dropped."""
    job, rows, seen = job_in(tmp_path), range(400), []
    loss = DiTLoss("flow", lambda u: torch.full_like(u, 1e-6))  # z is x0

    class Watched(torch.nn.Module):
        config = TINY

        def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append((z * 100, y))
            return torch.zeros_like(z)

    losses = dit_step(job, Latents(), LABELS, Watched(), loss, StepRNG((0, "dit", 0), rows))
    ((z, y),) = seen
    assert losses.shape == (400,)
    images = z.mean((1, 2, 3)).round().long()
    assert len(set(images.tolist())) > 20 and images.max() < 30
    kept = y != TINY.null
    assert torch.equal(y[kept], LABELS[images[kept]])
    assert 0.85 < kept.float().mean() < 0.95
    assert (z - images.view(-1, 1, 1, 1)).std().item() == pytest.approx(0.5, rel=0.05)
    half = StepRNG((0, "dit", 0), range(200, 400))
    dit_step(job, Latents(), LABELS, Watched(), loss, half)
    torch.testing.assert_close(seen[1][0], z[200:])
    assert torch.equal(seen[1][1], y[200:])


def test_levels_of_a_step_cover_all_of_time(tmp_path):
    job, seen = job_in(tmp_path), []
    loss = DiTLoss("flow", lambda u: seen.append(u) or u)
    network = DiT(replace(TINY, learned_variance=False))
    dit_step(job, Latents(), LABELS, network, loss, StepRNG((0, "dit", 0), range(400)))
    u = seen[0].sort().values
    assert torch.equal((u * 400).long(), torch.arange(400))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_validation(tmp_path, objective):
    """Of held-out images' means, with their labels and always the same noise; only the
    prediction counts, not the bound."""
    job, seen = job_in(tmp_path), []

    def network(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((z, t, y))
        return torch.cat([torch.zeros_like(z), 50 * torch.ones_like(z)], dim=1)

    loss = DiTLoss(objective, steps_evenly)
    first, second = (validation_error(job, Latents(), LABELS, network, loss) for _ in range(2))
    (z, t, y), (again, _, _) = seen
    assert first == second and torch.equal(z, again)
    assert torch.equal(y, LABELS[30:]) and len(z) == 10 and len(set(t.tolist())) == 10
    assert first == pytest.approx(1 if objective == "ddpm" else 1 + 0.35**2, rel=0.15)


def test_what_is_kept_is_the_average(tmp_path, monkeypatch):
    """Trained once, saved, and loaded from then on."""

    def fit(run, stage, module, loss_of, recipe, seed, ema, decay, watch):
        assert (stage, recipe.steps, seed, decay, watch) == ("dit", 2, 0, 0.9, None)
        run.log(stage="dit", step=0, loss=1.5)
        for parameter in ema.parameters():
            parameter.data.fill_(0.25)

    monkeypatch.setattr(stages, "fit", fit)
    loss = DiTLoss("ddpm", steps_evenly)
    job = job_in(tmp_path)
    model = train_dit(job, Latents(), LABELS, TINY, loss)
    assert all((p == 0.25).all() and not p.requires_grad for p in model.parameters())
    assert job.run.stages["dit"]["loss"] == 1.5 and job.run.stages["dit"]["validation"] > 0
    monkeypatch.delattr(stages, "fit")
    job = replace(job, run=Run.read(tmp_path))
    again = train_dit(job, Latents(), LABELS, TINY, loss)
    assert all((p == 0.25).all() for p in again.parameters())


def test_it_learns(tmp_path):
    """A label that says everything: latents of i mod 10 alone."""

    class Classes(Latents):
        def latents(self, index: Tensor) -> tuple[Tensor, Tensor]:
            mean = torch.where(LABELS[index] < 5, -100.0, 100.0)
            mean = mean.view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
            return mean, torch.zeros_like(mean)

    config = replace(TINY, learned_variance=False)
    job = job_in(tmp_path, steps=60, batch=32)
    model = train_dit(job, Classes(), LABELS, config, DiTLoss("flow", uniform))
    noise = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = sample_dit(model, "flow", noise, torch.tensor([2, 7] * 10), 10, 1.0)
    assert x[::2].mean() < -0.5 and x[1::2].mean() > 0.5


# --- sampling -------------------------------------------------------------------------------------


def shaken(**changes: object) -> DiT:
    torch.manual_seed(0)
    model = DiT(replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sampling_with_the_flow(scale):
    model, (noise, _, y) = shaken(learned_variance=False), batch()
    null = torch.full_like(y, 10)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        with_class, without = model(z, t, y), model(z, t, null)
        return without + scale * (with_class - without)

    expected = euler(velocity, noise, torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    torch.testing.assert_close(sample_dit(model, "flow", noise, y, 4, scale), expected)


@torch.no_grad()
@pytest.mark.parametrize("fresh", [False, True])
def test_sampling_with_ddpm(fresh, monkeypatch):
    """In pieces, each with its own labels."""
    monkeypatch.setattr("nanosd3.related.train_dit.CHUNK", 2)
    model, (noise, _, y) = shaken(), batch()
    schedule = linear_schedule().respaced(spaced_steps(5))
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = []
    for i in (slice(0, 2), slice(2, 4)):
        answer = guided_noise(model, y[i], 10, 2.0)
        if fresh:
            expected.append(ancestral(answer, noise[i], schedule, theirs))
        else:
            expected.append(ddim(answer, noise[i], schedule))
    found = sample_dit(model, "ddpm", noise, y, 5, 2.0, ours if fresh else None)
    torch.testing.assert_close(found, torch.cat(expected))
