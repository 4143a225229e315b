"""Train the transformer: the velocity of noisy latents, given time and text.

`flow_step` computes the losses of a training step from the indices of the batch's images; the loop
around it (loop.py) takes gradients and updates the weights and their average. The same loss on
held-out images, at fixed times and with fixed noise, is the validation loss.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.components import on_meta
from nanosd3.config_types import Config
from nanosd3.flow import flow_loss, interpolate, logit_normal, shift, stratified
from nanosd3.machine.distributed import ParallelModel, gather_full
from nanosd3.mmdit import MMDiT
from nanosd3.official.own_runs import open_run_weights
from nanosd3.official.tensors import State, fill
from nanosd3.pipeline import latents_at_once
from nanosd3.random_streams import rng
from nanosd3.storage.files import save_tensors
from nanosd3.text import drop_encoders
from nanosd3.training.cached_features import Features
from nanosd3.training.ema import make_ema
from nanosd3.training.loop import StepRNG, fit
from nanosd3.training.stages import Job, build, finish, last_loss
from nanosd3.training.throughput import Throughput

VALIDATION_TIMES = 8  # equally spaced t
VALIDATIONS = 5  # per run
VALIDATION_BATCH = 50  # images, at most
Watch = Callable[[int, ParallelModel], None]
Network = nn.Module | Callable[..., Tensor]


def flow_step(job: Job, features: Features, network: Network, step_rng: StepRNG) -> Tensor:
    """The loss of a training step, for each of this process's rows of the batch: (B,).

    Every process draws the numbers of the whole batch and takes its own rows, so the step does
    not depend on how many processes share it.
    """
    training, source = job.training, job.source
    size, generator = training.flow.batch, step_rng.generator()
    images = step_rng.take(source.draw(size, generator))
    captions = source.captions(images, step_rng.take(torch.rand(size, generator=generator)))
    keep = step_rng.take(torch.rand(size, 3, generator=generator) >= training.encoder_dropout)
    u = stratified(size, generator)
    t = step_rng.take(logit_normal(u, training.time_mean, training.time_std))  # (B,)

    x0, noise = features.latents_and_noise(images, step_rng)  # (B, C, h, w) each
    t = shift(t, time_shift(job.config, x0.shape[2:]))
    x0, noise, t, keep = (x.to(job.device) for x in (x0, noise, t, keep))
    context, pooled = (x.to(job.device) for x in features.text(captions))  # (B, M, Dc), (B, Dp)
    context, pooled = drop_encoders(context, pooled, keep, job.config.text)

    velocity = network(interpolate(x0, noise, t), t, context, pooled)  # (B, C, h, w)
    return flow_loss(velocity, x0, noise)  # (B,)


def time_shift(config: Config, size: torch.Size | tuple[int, ...]) -> float:
    """The timestep shift for latents of this size (..., h, w): the config's at its own resolution,
    otherwise scaled by the root of the number of pixels (paper, eq. 23)."""
    pixels = math.prod(size) * config.vae.factor**2
    return config.sampling.shift * math.sqrt(pixels) / config.image_size


# --- validation ---------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(job: Job, features: Features, network: Network) -> list[float]:
    """Mean loss of the held-out images at VALIDATION_TIMES times; empty if none are held out.

    Noise and captions are the same every time. The latents are the posterior's means, which are a
    little easier than samples of it. Each process takes some of the images.
    """
    source, group = job.source, job.group
    totals = torch.zeros(VALIDATION_TIMES + 1, dtype=torch.float64)  # losses, then a count
    for same_size in source.groups(range(source.trained, source.count)):
        mine = padded(same_size, group.size).view(-1, group.size)[:, group.rank]
        for index in mine.split(validated_at_once(job, features, same_size[:1])):
            real = index >= 0
            index = torch.where(real, index, same_size[0])  # padding: one of this size, not counted
            totals[VALIDATION_TIMES] += real.sum()
            for k, losses in enumerate(losses_over_time(job, features, network, index)):
                totals[k] += losses.cpu().double()[real].sum()
    *sums, count = group.all_gather(totals[None]).sum(0).tolist()
    return [round(x / count, 5) for x in sums] if count else []


def validated_at_once(job: Job, features: Features, one: Tensor) -> int:
    """How many images of the size of `one` are validated at once, so that they fit into memory."""
    config, (mean, _) = job.config, features.latents(one)
    tokens = config.text.clip_l.length + config.text.t5.length
    return min(VALIDATION_BATCH, latents_at_once(config.mmdit, mean[0, 0].numel(), tokens))


def losses_over_time(
    job: Job, features: Features, network: Network, images: Tensor
) -> list[Tensor]:
    """The losses (B,) of images of one size at each of the validation times."""
    mean, _ = features.latents(images)
    x0 = features.normalise(mean).to(job.device)  # (B, C, h, w)
    noise = torch.stack(
        [torch.randn(x0.shape[1:], generator=rng("validation", int(i))) for i in images]
    ).to(job.device)
    captions = job.source.captions(images, torch.zeros(len(images)))
    text = [x.to(job.device) for x in features.text(captions)]
    losses = []
    for k in range(VALIDATION_TIMES):
        t = torch.full((len(images),), (k + 0.5) / VALIDATION_TIMES, device=job.device)
        losses.append(flow_loss(network(interpolate(x0, noise, t), t, *text), x0, noise))
    return losses


def padded(index: Tensor, multiple: int) -> Tensor:
    """Indices padded with -1, so that all processes make the same number of passes."""
    return F.pad(index, (0, -len(index) % multiple), value=-1)


# --- the stage ----------------------------------------------------------------------------------


def train_flow(
    job: Job, features: Features, watch: Watch | None = None, init: State | None = None
) -> MMDiT | None:
    """Train the transformer, or load it if it is trained. Returns its moving average in the main
    process and None in the others.

    `watch(step, average)` is called after every step, in all processes.
    """
    path = job.run.folder / "flow.safetensors"
    if "flow" not in job.run.stages:
        train_average(job, features, watch, init, path)
        job.group.barrier()
    if not job.group.is_main:
        return None
    state = open_run_weights(path, job.config, {"mmdit": ""})
    model = fill(on_meta(job.config, "mmdit"), state, job.device, dtype_after(job))
    print(f"flow: velocity loss {job.run.stages['flow']['loss']:.3f} (2 for a guess of zero)")
    return cast(MMDiT, model)


def dtype_after(job: Job) -> torch.dtype | None:
    """The type of the trained network, None for its own: a GPU that has trained a shard of it need
    not have room for all of it in float32."""
    return torch.bfloat16 if job.group.mode == "fsdp" and job.device.type == "cuda" else None


def train_average(
    job: Job, features: Features, watch: Watch | None, init: State | None, path: Path
) -> None:
    """Train the transformer; the main process writes its moving average."""
    begin = time.perf_counter()
    model = start(job, init)
    ema = cast(MMDiT, make_ema(model))
    network = ParallelModel(model, job.group, job.compute, list(model.joint_blocks))
    plain = replace(job.compute, checkpointing=False, compiled=False)
    average = ParallelModel(ema, job.group, plain, list(ema.joint_blocks))
    fit_flow(job, features, network, average, watch)
    tensors = {}
    for key, value in ema.state_dict().items():  # gathered one at a time: only main keeps them
        value = gather_full(value).cpu()
        if job.group.is_main:
            tensors[key] = value
    if job.group.is_main:
        save_tensors(tensors, path)
        finish(job, "flow", {"loss": last_loss(job, "flow")}, begin)


def start(job: Job, init: State | None) -> MMDiT:
    """The network to train: freshly initialised, or with the weights of `init`. Under FSDP only the
    main process holds values; the others need shapes only."""
    with torch.device("cpu" if job.group.mode != "fsdp" or job.group.is_main else "meta"):
        model = build(job, "flow", lambda: MMDiT(job.config.mmdit))
    assert isinstance(model, MMDiT)
    if init and not model.pos_embed.is_meta:
        model.load_state_dict({key: init[key].read() for key in model.state_dict()})
    return model if job.group.mode == "fsdp" else model.to(job.device)


def fit_flow(
    job: Job,
    features: Features,
    network: ParallelModel,
    average: ParallelModel,
    watch: Watch | None,
) -> None:
    """Train `network` and its `average` in place; log validation losses and throughput."""
    recipe = job.training.flow
    throughput = Throughput(job.run, job.config.mmdit, network)
    interval = every_so_often(recipe.steps, VALIDATIONS)

    def counted(z: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        throughput.seen(z, context)
        return network(z, t, context, pooled)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        throughput.start()
        return flow_step(job, features, counted, step_rng), {}

    def after(step: int) -> None:
        throughput.log(step)
        if (step + 1) % interval == 0 or step + 1 == recipe.steps:
            losses = validation_loss(job, features, network)
            of_average = validation_loss(job, features, average)
            if job.group.is_main and losses:
                job.run.log(stage="flow", step=step, validation=losses, validation_ema=of_average)
        if watch:
            watch(step, average)

    ema, decay = average.module, job.training.ema_decay
    fit(job.run, "flow", network.module, loss_of, recipe, job.seed, ema, decay, after, network)


def every_so_often(steps: int, times: int) -> int:
    """An interval in steps: `times` times per run, and at least every 5,000 steps."""
    return min(-(-steps // times), 5000)
