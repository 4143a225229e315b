"""Train a DiT on latents with their labels, and sample with it.

With DDPM's objective it learns the noise and a step's variance; with the flow's, the velocity. The
two differ in more than the loss: DDPM draws its thousand steps evenly, rectified flow draws t with
a density of its own. To change one thing at a time, noise levels are written in one way for both:
at step n, z mixes image and noise in the same proportion as rectified flow's line does at

    t = sqrt(1 - alpha_bar) / (sqrt(alpha_bar) + sqrt(1 - alpha_bar))

so a density of steps is a density of t, and vice versa, to the nearest step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.flow import flow_loss, interpolate, logit_normal, stratified
from nanosd3.random_streams import rng
from nanosd3.related.ddpm import (
    NoiseSchedule,
    ancestral,
    ddim,
    ddpm_loss,
    guided_noise,
    linear_schedule,
    spaced_steps,
)
from nanosd3.related.dit import DiT, DiTConfig
from nanosd3.samplers import euler, guided
from nanosd3.training.cached_features import Features
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import CHUNK, Job, build, finish_or_load, fit_average

OBJECTIVES = ("ddpm", "flow")
LABEL_DROPOUT = 0.1

LabelledNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]  # z, t, labels


@dataclass(frozen=True)
class DiTLoss:
    """The loss that a DiT is trained with: what it predicts, and at which levels of noise."""

    objective: str  # one of OBJECTIVES
    density: Callable[[Tensor], Tensor]  # from u, uniform in [0, 1], to t

    def losses(
        self, network: LabelledNetwork, x0: Tensor, noise: Tensor, u: Tensor, y: Tensor
    ) -> Tensor:
        """The loss of each sample, (B,), at the levels of noise u (B,)."""
        t = self.density(u)
        if self.objective == "flow":
            return flow_loss(network(interpolate(x0, noise, t), t, y), x0, noise)
        schedule = linear_schedule()
        n = nearest_step(schedule, t)
        z = schedule.add_noise(x0, noise, n)
        return ddpm_loss(schedule, network(z, schedule.times.to(t)[n], y), x0, noise, n)


# --- levels of noise ------------------------------------------------------------------------------


def flow_times(schedule: NoiseSchedule) -> Tensor:
    """The t of rectified flow with as much noise as each step, (S,), ascending."""
    signal, noise = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    return noise / (signal + noise)


def nearest_step(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The step with about as much noise as each t (B,)."""
    return (flow_times(schedule).to(t.device) - t[:, None]).abs().argmin(1)


def steps_evenly(u: Tensor) -> Tensor:
    """DDPM's density: each of the thousand steps as often as any other."""
    times = flow_times(linear_schedule()).to(u)
    return times[(u * len(times)).long()]


def density_of(job: Job) -> Callable[[Tensor], Tensor]:
    """The finished run's density of t."""
    mean, std = job.training.time_mean, job.training.time_std
    return lambda u: logit_normal(u, mean, std)


# --- training -------------------------------------------------------------------------------------


def dit_step(
    job: Job, features: Features, labels: Tensor, network: DiT, loss: DiTLoss, step_rng: StepRNG
) -> Tensor:
    """The loss of a training step for each row of a batch, (B,), of images with their labels, a
    tenth of which are dropped."""
    size, generator = job.training.flow.batch, step_rng.generator()
    images = step_rng.take(job.source.draw(size, generator))
    keep = step_rng.take(torch.rand(size, generator=generator) >= LABEL_DROPOUT)
    u = step_rng.take(stratified(size, generator))
    x0, noise = features.latents_and_noise(images, step_rng)  # (B, C, h, w) each
    y = drop_labels(labels[images], keep, network.config.null)
    x0, noise, u, y = (x.to(job.device) for x in (x0, noise, u, y))
    return loss.losses(network, x0, noise, u, y)


def drop_labels(y: Tensor, keep: Tensor, null: int) -> Tensor:
    """Labels y (B,) where keep (B,) is true, and the null class elsewhere."""
    return torch.where(keep, y, null)


@torch.no_grad()
def validation_error(
    job: Job, features: Features, labels: Tensor, network: LabelledNetwork, loss: DiTLoss
) -> float:
    """Mean square error of the prediction, noise or velocity, on held-out images, each with fixed
    noise at a fixed level; the levels are spread as in training."""
    images = torch.arange(job.source.trained, job.source.count)
    mean, _ = features.latents(images)
    x0 = features.normalise(mean)
    noise = torch.randn(x0.shape, generator=rng("validation", "dit"))
    u = stratified(len(images), rng("validation", "levels"))
    x0, noise, u, y = (x.to(job.device) for x in (x0, noise, u, labels[images]))

    def prediction(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(z, t, y)[:, : z.shape[1]]  # without the variance, whose bound is no error

    return loss.losses(prediction, x0, noise, u, y).mean().item()


def train_dit(
    job: Job, features: Features, labels: Tensor, config: DiTConfig, loss: DiTLoss
) -> DiT:
    """A DiT trained on the job's images, or loaded: the moving average of its weights. `labels` are
    those of all images of the source, by index."""
    model = build(job, "dit", lambda: DiT(config)).to(job.device)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return dit_step(job, features, labels, model, loss, step_rng), {}

    def train() -> dict:
        results = fit_average(job, "dit", model, loss_of, job.training.ema_decay)
        error = validation_error(job, features, labels, model, loss)
        return results | {"validation": error}

    finish_or_load(job, "dit", model, train)
    return model


# --- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def sample_dit(
    model: DiT,
    objective: str,
    noise: Tensor,
    y: Tensor,
    steps: int,
    guidance: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents (B, C, h, w) of labels y (B,) from noise like them. If the network learned the noise:
    by DDIM, or by ancestral sampling if there is a generator for fresh noise."""
    samples, null = [], model.config.null
    for z, labels in zip(noise.split(CHUNK), y.split(CHUNK), strict=True):
        if objective == "flow":
            without = torch.full_like(labels, null)
            velocity = guided(model, (labels,), (without,), guidance)
            times = torch.linspace(1, 0, steps + 1, device=z.device)
            samples.append(euler(velocity, z, times))
            continue
        schedule = linear_schedule().respaced(spaced_steps(steps))
        prediction = guided_noise(model, labels, null, guidance)
        if generator is None:
            samples.append(ddim(prediction, z, schedule))
        else:
            samples.append(ancestral(prediction, z, schedule, generator))
    return torch.cat(samples)
