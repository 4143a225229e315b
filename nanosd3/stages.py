"""The stages of training from scratch: what each one learns, and from what loss.

    judge         a classifier of real digits, for the metrics only
    autoencoder   images to latents and back
    flow          the velocity of latents, given what the text encoders say of the captions

Each takes a `Job` and returns its trained module; a stage that is finished is loaded instead. All
but the flow are small, and trained by the first process alone. The text encoders' stages are in
train_text.py, the loop itself in loop.py.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3 import states
from nanosd3.accelerate import accelerate
from nanosd3.checkpoint import Run, load_weights, save_tensors, save_weights
from nanosd3.config import Config
from nanosd3.data import ImageSet, to_model
from nanosd3.features import Features
from nanosd3.flow import flow_loss, interpolate, logit_normal, shift, stratified
from nanosd3.loop import Draw, fit, make_ema
from nanosd3.metrics import JUDGED, ConvNet
from nanosd3.mmdit import MMDiT
from nanosd3.parallel import ALONE, Compute, Placed, Team, whole
from nanosd3.parts import State
from nanosd3.runtime import rng
from nanosd3.sources import Source
from nanosd3.speed import Speed
from nanosd3.text import drop_encoders
from nanosd3.vae import AutoencoderKL, kl_divergence, sample_posterior

CHUNK = 500  # small images at once where nothing is trained
MEASURED = 5000  # images, at most, from which the latents' mean and deviation are taken
MEASURED_AT_ONCE = 8
TIMES = 8  # of the validation loss, equally spaced


@dataclass(frozen=True)
class Job:
    """Everything a stage needs to know."""

    run: Run
    config: Config
    source: Source
    device: torch.device
    seed: int
    team: Team = ALONE
    compute: Compute = Compute()  # noqa: RUF009 - frozen


def build(job: Job, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose initial weights depend on the seed and its name alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(job.seed, name, "init").initial_seed())
        return accelerate(make(), keep_activations=job.compute.checkpointing)


def finish_or_load(job: Job, stage: str, module: nn.Module, train: Callable[[], dict]) -> dict:
    """Run a stage, in the first process, and keep its weights, or load them if it is finished;
    what it measured, with the seconds that this process spent on it."""
    path = job.run.folder / f"{stage}.safetensors"
    if stage in job.run.stages:
        load_weights(module, path)
    elif job.team.leads:
        begin = time.perf_counter()
        results = train()
        save_weights(module, path)
        finish(job, stage, results, begin)
    job.team.wait()
    if stage not in job.run.stages:  # another process has trained it
        job.run.stages = Run.read(job.run.folder).stages
        load_weights(module, path)
    module.requires_grad_(False).eval()
    return job.run.stages[stage]


def finish(job: Job, stage: str, results: dict, begin: float) -> None:
    """Mark a stage as finished; its states are no longer needed."""
    job.run.finish(stage, results | {"seconds": round(time.perf_counter() - begin, 1)})
    states.forget(job.run.folder)


def last_loss(job: Job, stage: str) -> float:
    """The mean of the last tenth of a stage's losses."""
    losses = [entry["loss"] for entry in job.run.read_log(stage)]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


# --- judge --------------------------------------------------------------------------------------


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in x.split(CHUNK)])


def train_judge(job: Job, images: ImageSet) -> ConvNet:
    """Learn to read real images."""
    recipe = job.config.training.judge
    net = build(job, "judge", lambda: ConvNet(len(images.names))).to(job.device)

    def loss_of(draw: Draw) -> tuple[Tensor, dict]:
        i = draw.of(job.source.draw(recipe.batch, draw.generator()))
        x = to_model(images.train_images[i], JUDGED).to(job.device)
        return F.cross_entropy(net(x), images.train_labels[i].to(job.device)), {}

    def train() -> dict:
        fit(job.run, "judge", net, loss_of, recipe, job.seed)
        test = to_model(images.test_images, JUDGED).to(job.device)
        right = in_chunks(net, test).argmax(1).cpu() == images.test_labels
        return {"accuracy": right.float().mean().item()}

    results = finish_or_load(job, "judge", net, train)
    print(f"judge: reads {results['accuracy']:.2%} of the test images as labelled")
    return net


# --- autoencoder --------------------------------------------------------------------------------


def train_autoencoder(job: Job) -> AutoencoderKL:
    """Learn latents; measure their mean and deviation, which the config returned applies."""
    config, training = job.config, job.config.training
    vae = build(job, "autoencoder", lambda: AutoencoderKL(config.vae)).to(job.device)
    recipe = training.autoencoder

    def loss_of(draw: Draw) -> tuple[Tensor, dict]:
        generator = draw.generator()
        x = job.source.pixels(draw.of(job.source.draw(recipe.batch, generator))).to(job.device)
        mean, logvar = vae.encode(x)
        noise = torch.randn(mean.shape, generator=generator).to(job.device)
        difference = vae.decode(sample_posterior(mean, logvar, noise)) - x
        reconstruction = difference.square().flatten(1).sum(1).mean()
        kl = kl_divergence(mean, logvar).mean()
        loss = reconstruction + training.kl_weight * kl
        return loss, {"reconstruction": reconstruction.item(), "kl": kl.item()}

    def train() -> dict:
        fit(job.run, "autoencoder", vae, loss_of, recipe, job.seed)
        return measured_latents(job, vae)

    results = finish_or_load(job, "autoencoder", vae, train)
    vae.config = replace(vae.config, shift=results["shift"], scale=results["scale"])
    deviation = 1 / results["scale"]
    print(f"autoencoder: latents have mean {results['shift']:.3f}, deviation {deviation:.3f}")
    return vae


@torch.no_grad()
def measured_latents(job: Job, vae: AutoencoderKL) -> dict[str, float]:
    """What makes the latents' mean 0 and their deviation 1, as `shift` and `scale`."""
    count = total = squares = 0.0
    for group in job.source.groups(range(min(job.source.trained, MEASURED))):
        for index in group.split(MEASURED_AT_ONCE):
            mean, logvar = vae.encode(job.source.pixels(index).to(job.device))
            count += mean.numel()
            total += mean.double().sum().item()
            squares += (mean.double().square() + logvar.double().exp()).sum().item()
    centre = total / count
    return {"shift": centre, "scale": 1 / math.sqrt(squares / count - centre**2)}


# --- flow ---------------------------------------------------------------------------------------


def start(job: Job, init: State | None) -> MMDiT:
    """The network to train: fresh, or with the weights of `init`. Under FSDP the first process
    makes it, the others know its shapes."""
    with torch.device("cpu" if job.team.mode != "fsdp" or job.team.leads else "meta"):
        model = build(job, "flow", lambda: MMDiT(job.config.mmdit))
    if init and not model.pos_embed.is_meta:
        model.load_state_dict({key: init[key].read() for key in model.state_dict()})
    return model if job.team.mode == "fsdp" else model.to(job.device)


def train_flow(
    job: Job,
    features: Features,
    watch: Callable[[int, Placed], None] | None = None,
    init: State | None = None,
) -> MMDiT | None:
    """Train the transformer on latents and text features; its average (EMA), in the first process.

    `watch(step, average)` is called after every step, in all processes.
    """
    path = job.run.folder / "flow.safetensors"
    if "flow" not in job.run.stages:
        begin = time.perf_counter()
        model = start(job, init)
        ema = make_ema(model)
        plain = replace(job.compute, checkpointing=False, compiled=False)
        network = Placed(model, job.team, job.compute, model.joint_blocks)
        average = Placed(ema, job.team, plain, ema.joint_blocks)
        fit_flow(job, features, network, average, watch)
        tensors = {}
        for key, value in ema.state_dict().items():  # one at a time: only one process keeps them
            value = whole(value).cpu()
            if job.team.leads:
                tensors[key] = value
        if job.team.leads:
            save_tensors(tensors, path)
            finish(job, "flow", {"loss": last_loss(job, "flow")}, begin)
        job.team.wait()
    if not job.team.leads:
        return None
    model = MMDiT(job.config.mmdit).to(job.device)
    load_weights(model, path)
    print(f"flow: velocity loss {job.run.stages['flow']['loss']:.3f} (2 for a guess of zero)")
    return model.requires_grad_(False).eval()


def fit_flow(
    job: Job,
    features: Features,
    network: Placed,
    average: Placed,
    watch: Callable[[int, Placed], None] | None,
) -> None:
    """Train `network` and its `average` in place, and log validation losses and speed."""
    config, training, source = job.config, job.config.training, job.source
    recipe = training.flow
    speed = Speed(job.run, config.mmdit, network)
    every = every_so_often(recipe.steps)

    def loss_of(draw: Draw) -> tuple[Tensor, dict]:
        generator = draw.generator()
        i = draw.of(source.draw(recipe.batch, generator))
        caption = source.captions(i, draw.of(torch.rand(recipe.batch, generator=generator)))
        keep = torch.rand(recipe.batch, 3, generator=generator) >= training.encoder_dropout
        t = logit_normal(stratified(recipe.batch, generator), training.time_mean, training.time_std)
        mean, std = features.latents(i)
        noise, posterior = draw.noise((2, *mean.shape[1:])).unbind(1)
        t = shift(draw.of(t), time_shift(config, mean.shape[2:]))

        x0 = features.normalise(mean + std * posterior).to(job.device)
        t, noise, keep = (x.to(job.device) for x in (t, noise, draw.of(keep)))
        context, pooled = (x.to(job.device) for x in features.text(caption))
        context, pooled = drop_encoders(context, pooled, keep, config.text)
        speed.seen(x0, context)
        velocity = network(interpolate(x0, noise, t), t, context, pooled)
        return flow_loss(velocity, x0, noise), {}

    def after(step: int) -> None:
        speed.log(step)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            losses = {"validation": validation_loss(job, features, network),
                      "validation_ema": validation_loss(job, features, average)}  # fmt: skip
            if job.team.leads and losses["validation"]:
                job.run.log(stage="flow", step=step, **losses)
        if watch:
            watch(step, average)

    fit(job.run, "flow", network.module, loss_of, recipe, job.seed, average.module,
        training.ema_decay, after, network)  # fmt: skip


def every_so_often(steps: int) -> int:
    """Every how many steps a run is looked at: ten times, and oftener in a long one."""
    return min(-(-steps // 10), 5000)


def time_shift(config: Config, size: tuple[int, int]) -> float:
    """How far t moves towards noise for latents of this size: as the config samples at its own,
    and otherwise with the root of the number of pixels (paper, eq. 23)."""
    pixels = size[0] * size[1] * config.vae.factor**2
    return config.sampling.shift * math.sqrt(pixels) / config.image_size


@torch.no_grad()
def validation_loss(job: Job, features: Features, network: Placed) -> list[float]:
    """The mean loss of the images held out at TIMES equally spaced t, with noise and captions that
    are always the same; empty without such images. Latents are the posterior's means: a little
    easier than those of training, which are drawn from it. Each process takes some images."""
    source, team = job.source, job.team
    totals = torch.zeros(TIMES + 1, dtype=torch.float64)  # and how many there are
    for group in source.groups(range(source.trained, source.count)):
        for index in padded(group, team.size).view(-1, team.size)[:, team.rank].split(CHUNK // 10):
            real = index >= 0
            index = torch.where(real, index, group[0])  # one of the same size, not counted
            mean, _ = features.latents(index)
            x0 = features.normalise(mean).to(job.device)
            noise = torch.stack([torch.randn(x0.shape[1:], generator=rng("validation", int(i)))
                                 for i in index]).to(job.device)  # fmt: skip
            caption = source.captions(index, torch.zeros(len(index)))
            text = [x.to(job.device) for x in features.text(caption)]
            totals[TIMES] += real.sum()
            for k in range(TIMES):
                t = torch.full((len(index),), (k + 0.5) / TIMES, device=job.device)
                losses = flow_loss(network(interpolate(x0, noise, t), t, *text), x0, noise)
                totals[k] += losses.cpu().double()[real].sum()
    sums = team.gathered(totals[None]).sum(0)
    return [round(float(x / sums[TIMES]), 5) for x in sums[:TIMES]] if sums[TIMES] else []


def padded(index: Tensor, multiple: int) -> Tensor:
    """Numbers filled up with -1, so that all processes do the same number of passes."""
    return F.pad(index, (0, -len(index) % multiple), value=-1)
