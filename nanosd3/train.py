"""The stages of training from scratch: what each one learns, and from what loss.

    judge         a classifier of real images, for the metrics only
    autoencoder   images to latents and back
    flow          the velocity of latents, given the frozen text encoders' outputs

Each takes a `Job` and returns its trained module; a stage that is finished is loaded instead.
The text encoders' stages are in train_text.py, the loop itself in loop.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.checkpoint import Run, load_weights, read_tensors, save_tensors, save_weights
from nanosd3.config import Config, Recipe
from nanosd3.data import (
    Captions,
    ImageSet,
    bins,
    make_captions,
    measure,
    thirds,
    to_model,
)
from nanosd3.flow import flow_loss, interpolate, logit_normal, stratified
from nanosd3.loop import fit, make_ema
from nanosd3.metrics import ConvNet
from nanosd3.mmdit import MMDiT
from nanosd3.runtime import rng
from nanosd3.text import TextEncoders, drop_encoders
from nanosd3.vae import AutoencoderKL, kl_divergence, sample_posterior

CHUNK = 500  # images at once where nothing is trained
BINS = 8  # of the timestep, for the logged loss


@dataclass(frozen=True)
class Job:
    """Everything a stage needs to know."""

    run: Run
    config: Config
    images: ImageSet
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Described:
    """The captions that fit each training image, and the ruler that measured it."""

    captions: Captions
    weight_limits: Tensor  # (classes, 2)
    slant_limits: Tensor  # (classes, 2)
    weight: Tensor  # third of each training image, (n,)
    slant: Tensor


def describe_images(images: ImageSet) -> Described:
    """Measure the training images and find the captions that fit them."""
    labels, classes = images.train_labels, len(images.names)
    weight, slant = measure(images.train_images)
    weight_limits, slant_limits = thirds(weight, labels, classes), thirds(slant, labels, classes)
    return Described(
        make_captions(images.names),
        weight_limits,
        slant_limits,
        bins(weight, labels, weight_limits),
        bins(slant, labels, slant_limits),
    )


def build(job: Job, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose initial weights depend on the seed and its name alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(job.seed, name, "init").initial_seed())
        return make().to(job.device)


def finish_or_load(job: Job, stage: str, module: nn.Module, train: Callable[[], dict]) -> dict:
    """Run a stage and keep its weights, or load them if it is finished; what it measured, with
    the seconds that this process spent on it."""
    path = job.run.folder / f"{stage}.safetensors"
    if stage in job.run.stages:
        load_weights(module, path)
    else:
        begin = time.perf_counter()
        results = train()
        save_weights(module, path)
        job.run.finish(stage, results | {"seconds": round(time.perf_counter() - begin, 1)})
    module.requires_grad_(False).eval()
    return job.run.stages[stage]


def last_loss(job: Job, stage: str) -> float:
    """The mean of the last tenth of a stage's losses."""
    losses = [entry["loss"] for entry in job.run.read_log(stage)]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def draw_batch(count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Indices of one batch among `count` items."""
    return torch.randint(count, (recipe.batch,), generator=generator)


# --- judge --------------------------------------------------------------------------------------


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in x.split(CHUNK)])


def train_judge(job: Job) -> ConvNet:
    """Learn to read real images."""
    images, size, recipe = job.images, job.config.image_size, job.config.training.judge
    net = build(job, "judge", lambda: ConvNet(len(images.names)))

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(images.train_images), recipe, generator)
        x = to_model(images.train_images[i], size).to(job.device)
        return F.cross_entropy(net(x), images.train_labels[i].to(job.device)), {}

    def train() -> dict:
        fit(job.run, "judge", net, loss_of, recipe, job.seed)
        test = to_model(images.test_images, size).to(job.device)
        right = in_chunks(net, test).argmax(1).cpu() == images.test_labels
        return {"accuracy": right.float().mean().item()}

    results = finish_or_load(job, "judge", net, train)
    print(f"judge: reads {results['accuracy']:.2%} of the test images as labelled")
    return net


# --- autoencoder --------------------------------------------------------------------------------


def train_autoencoder(job: Job) -> AutoencoderKL:
    """Learn latents; measure their mean and deviation, which the config returned applies."""
    images, config, training = job.images, job.config, job.config.training
    vae = build(job, "autoencoder", lambda: AutoencoderKL(config.vae))
    recipe = training.autoencoder

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(images.train_images), recipe, generator)
        x = to_model(images.train_images[i], config.image_size).to(job.device)
        mean, logvar = vae.encode(x)
        noise = torch.randn(mean.shape, generator=generator).to(job.device)
        difference = vae.decode(sample_posterior(mean, logvar, noise)) - x
        reconstruction = difference.square().flatten(1).sum(1).mean()
        kl = kl_divergence(mean, logvar).mean()
        loss = reconstruction + training.kl_weight * kl
        return loss, {"reconstruction": reconstruction.item(), "kl": kl.item()}

    def train() -> dict:
        fit(job.run, "autoencoder", vae, loss_of, recipe, job.seed)
        latents_file(job).unlink(missing_ok=True)
        mean, std = latents(job, vae)
        centre = mean.double().mean()
        variance = (mean.double() - centre).square().mean() + std.double().square().mean()
        return {"shift": centre.item(), "scale": variance.rsqrt().item()}

    results = finish_or_load(job, "autoencoder", vae, train)
    vae.config = replace(vae.config, shift=results["shift"], scale=results["scale"])
    deviation = 1 / results["scale"]
    print(f"autoencoder: latents have mean {results['shift']:.3f}, deviation {deviation:.3f}")
    return vae


def encode_images(
    vae: AutoencoderKL, images: Tensor, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, C, h, w) of the latents of uint8 images, not normalised."""

    def moments(chunk: Tensor) -> Tensor:
        x = to_model(chunk, size).to(device)
        mean, logvar = vae.encode(x)
        return torch.stack([mean, (0.5 * logvar).exp()], dim=1)

    mean, std = in_chunks(moments, images).unbind(1)
    return mean.contiguous(), std.contiguous()


def latents_file(job: Job) -> Path:
    return job.run.folder / "latents.safetensors"


def latents(job: Job, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all training images' latents, from the run's file of them
    (in float16, which is far finer than the deviation) or encoded into it."""
    path = latents_file(job)
    if not path.exists():
        size = job.config.image_size
        mean, std = encode_images(vae, job.images.train_images, size, job.device)
        save_tensors({"mean": mean.half(), "std": std.half()}, path)
    tensors = read_tensors(path)
    return tensors["mean"].float(), tensors["std"].float()


# --- flow ---------------------------------------------------------------------------------------


def loss_by_time(losses: Tensor, t: Tensor) -> list[float | None]:
    """Mean loss in each of BINS equal intervals of t; None where there is no sample."""
    which = (t * BINS).long().clamp(max=BINS - 1)
    total = torch.zeros(BINS).index_add_(0, which, losses)
    count = torch.zeros(BINS).index_add_(0, which, torch.ones_like(losses))
    return [
        round(a / n, 4) if n else None for a, n in zip(total.tolist(), count.tolist(), strict=True)
    ]


def train_flow(
    job: Job,
    described: Described,
    vae: AutoencoderKL,
    text: TextEncoders,
    watch: Callable[[int, nn.Module], None],
) -> MMDiT:
    """Train the transformer on cached latents and text features; returns its average (EMA)."""
    images, config, training = job.images, job.config, job.config.training
    recipe = training.flow
    model = build(job, "flow", lambda: MMDiT(config.mmdit))
    if "flow" not in job.run.stages:
        ema = make_ema(model)
        mean, std = latents(job, vae)
        context, pooled = text.encode(described.captions.texts)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(mean), recipe, generator)
        u = torch.rand(recipe.batch, generator=generator)
        caption = described.captions.draw(
            images.train_labels[i], described.weight[i], described.slant[i], u
        )
        keep = torch.rand(recipe.batch, 3, generator=generator) >= training.encoder_dropout
        t = logit_normal(stratified(recipe.batch, generator), training.time_mean, training.time_std)
        noise, posterior = torch.randn(2, recipe.batch, *mean.shape[1:], generator=generator)

        caption, keep, t, noise = (x.to(job.device) for x in (caption, keep, t, noise))
        x0 = vae.normalise(mean[i] + std[i] * posterior).to(job.device)
        text_of_batch = drop_encoders(context[caption], pooled[caption], keep, config.text)
        losses = flow_loss(model(interpolate(x0, noise, t), t, *text_of_batch), x0, noise)
        return losses.mean(), {"by_time": loss_by_time(losses.detach().cpu(), t.cpu())}

    def train() -> dict:
        fit(job.run, "flow", model, loss_of, recipe, job.seed, ema, training.ema_decay,
            watch=lambda step: watch(step, ema))  # fmt: skip
        model.load_state_dict(ema.state_dict())
        latents_file(job).unlink(missing_ok=True)
        return {"loss": last_loss(job, "flow")}

    results = finish_or_load(job, "flow", model, train)
    print(f"flow: velocity loss {results['loss']:.3f} (2 for a guess of zero)")
    return model
