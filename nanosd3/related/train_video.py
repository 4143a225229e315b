"""Train the transformer on videos of moving digits, of several sizes and lengths at once, and
sample with it.

Frames go through a finished autoencoder, one by one. A batch has one size; sizes alternate. An
image is a video that is still for the length of a patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanosd3.config_types import Config
from nanosd3.flow import flow_loss, interpolate, logit_normal, shift, stratified
from nanosd3.mmdit import MMDiT
from nanosd3.official.checkpoint import Checkpoint
from nanosd3.official.own_runs import open_run_encoders, read_tokenizers
from nanosd3.pipeline import Pipeline, open_pipeline
from nanosd3.random_streams import rng
from nanosd3.related.finished_run import TEXT_DROPOUT
from nanosd3.related.moving_digits import Clips, ClipSize, MovingDigits
from nanosd3.related.video import VideoMMDiT, fold_time, inflated, unfold_time
from nanosd3.samplers import euler, guided
from nanosd3.storage.files import read_tensors, save_tensors, save_weights
from nanosd3.storage.run import Run
from nanosd3.text import TextEncoders
from nanosd3.training.loop import StepRNG, progress
from nanosd3.training.stages import Job, build, finish_or_load, fit_average
from nanosd3.training.train_flow import time_shift
from nanosd3.training.train_text import train_text_encoders
from nanosd3.vae import AutoencoderKL

CLIP_SIZES: tuple[ClipSize, ...] = (  # (frames, height, width) of the training steps, in turn
    (8, 32, 32),
    (8, 24, 40),
    (8, 32, 32),
    (8, 40, 24),
    (4, 32, 32),
    (1, 32, 32),
)
FRAMES_IN_PATCH = 2
CLIPS_AT_ONCE = 50  # encoded or sampled


@dataclass(frozen=True)
class EncodedCaptions:
    """All captions, encoded; the last row is for no text."""

    context: Tensor  # (n + 1, M, Dc)
    pooled: Tensor  # (n + 1, Dp)

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Context and pooled text of captions, by their index."""
        return self.context[index], self.pooled[index]

    def none(self, count: int) -> tuple[Tensor, Tensor]:
        return self.of(torch.full((count,), -1))


@torch.no_grad()
def encode_frames(vae: AutoencoderKL, videos: Tensor) -> Tensor:
    """Videos (B, 1, T, H, W) to normalised latents (B, C, T, h, w): the posteriors' means."""
    mean, _ = vae.encode(fold_time(videos, 1))
    return unfold_time(vae.normalise(mean), 1, videos.shape[2])


@torch.no_grad()
def decode_frames(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The inverse, with values in [-1, 1]."""
    frames = vae.decode(vae.denormalise(fold_time(latents, 1)))
    return unfold_time(frames.clamp(-1, 1), 1, latents.shape[2])


def clip_shift(config: Config, size: ClipSize) -> float:
    """The timestep shift for a size. Frames are redundant, so it takes more noise to destroy their
    information, as in larger images. Without the shift, digits did not match the captions."""
    frames, height, width = size
    factor = config.vae.factor
    return time_shift(config, (frames, height // factor, width // factor))


def size_name(size: ClipSize) -> str:
    """'8x32x32'."""
    return "x".join(map(str, size))


# --- text -----------------------------------------------------------------------------------------


def encoders_of(run: Run, config: Config, device: torch.device) -> Pipeline:
    """The text encoders that the run has trained, and its autoencoder."""
    tokenizers = read_tokenizers(run.folder / "tokenizers.json", config)
    parts = open_run_encoders(run, config)
    checkpoint = Checkpoint(run.folder, config, parts, tokenizers, "a training run", [])
    return open_pipeline(checkpoint, device, None, staged=False)


def train_encoders(job: Job, vae: AutoencoderKL, moving: MovingDigits) -> Pipeline:
    """The text encoders, trained on the captions of clips or loaded. The run keeps a finished
    autoencoder beside them, so that both can be opened."""
    save_weights(vae, job.run.folder / "autoencoder.safetensors")
    train_text_encoders(replace(job, source=moving))
    return encoders_of(job.run, job.config, job.device)


def encode_captions(text: TextEncoders, moving: MovingDigits) -> EncodedCaptions:
    with torch.no_grad():
        return EncodedCaptions(*text.encode([*moving.texts, ""]))


# --- training -------------------------------------------------------------------------------------


Encoded = tuple[Clips, Tensor]  # clips of one size, and their latents (n, C, T, h, w)


def encoded_clips(
    job: Job,
    moving: MovingDigits,
    vae: AutoencoderKL,
    size: ClipSize,
    count: int,
    drawn_for: ClipSize | None = None,
) -> Encoded:
    """`count` training clips of a size, different ones for each size, or those of the size
    `drawn_for`; their latents are computed once and kept on disk until the run is finished."""
    generator = rng(job.seed, "clips", *(drawn_for or size))
    clips = moving.draw_clips(count, generator, moving=size[0] > 1)
    path = job.run.folder / "cache" / f"clips-{size_name(size)}.safetensors"
    if not path.exists():
        latents, batches = [], range(-(-count // CLIPS_AT_ONCE))
        with progress(batches, f"clips {size_name(size)}", len(batches)) as bar:
            for i in bar:
                some = clips.at(slice(i * CLIPS_AT_ONCE, (i + 1) * CLIPS_AT_ONCE))
                latents.append(encode_frames(vae, moving.videos(some, size).to(job.device)).half())
        save_tensors({"latents": torch.cat(latents).cpu()}, path)
    return clips, read_tensors(path)["latents"]


def filled(latents: Tensor, frames: int) -> Tensor:
    """A single frame repeated to the length of a patch, `frames`."""
    return latents.expand(-1, -1, frames, -1, -1) if latents.shape[2] == 1 else latents


def video_step(
    job: Job,
    moving: MovingDigits,
    encoded: dict[ClipSize, Encoded],
    captions: EncodedCaptions,
    network: VideoMMDiT,
    step_rng: StepRNG,
    sizes: Sequence[ClipSize] = CLIP_SIZES,
) -> Tensor:
    """The losses of a training step on a batch of clips of one size, (B,); sizes take turns."""
    training, generator = job.training, step_rng.generator()
    count = training.flow.batch
    size = sizes[int(step_rng.name[-1]) % len(sizes)]
    clips, latents = encoded[size]
    chosen = step_rng.take(torch.randint(len(latents), (count,), generator=generator))
    u = step_rng.take(torch.rand(2, count, generator=generator).T)  # (B, 2)
    t = logit_normal(stratified(count, generator), training.time_mean, training.time_std)
    t = shift(t, clip_shift(job.config, size))
    index = moving.captions_of(clips.at(chosen), u[:, 0])
    text = captions.of(index.masked_fill(u[:, 1] < TEXT_DROPOUT, -1))
    x0 = filled(latents[chosen].float(), network.frames)  # (B, C, T, h, w)
    noise = step_rng.noise(x0.shape[1:])
    x0, noise, t = (x.to(job.device) for x in (x0, noise, step_rng.take(t)))
    return flow_loss(network(interpolate(x0, noise, t), t, *text), x0, noise)


def first_network(job: Job, images: MMDiT) -> VideoMMDiT:
    """The network before training: a finished one for images, except the layers that read the
    text."""
    network = build(job, "video", partial(VideoMMDiT, job.config.mmdit, FRAMES_IN_PATCH))
    known = inflated(images.state_dict(), FRAMES_IN_PATCH)
    text = ("context_embedder.", "y_embedder.")  # from other encoders
    own = {key: x for key, x in network.state_dict().items() if key.startswith(text)}
    network.load_state_dict(known | own)
    return network.to(job.device)


def train_video(
    job: Job,
    images: MMDiT,
    moving: MovingDigits,
    encoded: dict[ClipSize, Encoded],
    captions: EncodedCaptions,
    sizes: Sequence[ClipSize] = CLIP_SIZES,
) -> VideoMMDiT:
    """The network, trained from one for images or loaded: the moving average of its weights."""
    network = first_network(job, images)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return video_step(job, moving, encoded, captions, network, step_rng, sizes), {}

    train = partial(fit_average, job, "video", network, loss_of, job.training.ema_decay)
    finish_or_load(job, "video", network, train)
    return network


# --- sampling -------------------------------------------------------------------------------------


@torch.no_grad()
def sample_video(
    network: VideoMMDiT,
    vae: AutoencoderKL,
    text: tuple[Tensor, Tensor],
    no_text: tuple[Tensor, Tensor],
    size: ClipSize,
    config: Config,
    seed: int,
) -> Tensor:
    """Videos (B, 1, T, H, W) in [-1, 1] from noise in a grid of this size, by the config's
    `sampling`. Surplus frames of the last patch are cut off."""
    B, channels = len(text[0]), vae.config.latent_channels
    frames = math.ceil(size[0] / network.frames) * network.frames
    timed = size if size[0] == 1 else (frames, *size[1:])  # as in training
    shape = (channels, frames, size[1] // vae.config.factor, size[2] // vae.config.factor)
    noise = torch.stack([torch.randn(shape, generator=rng(seed, "video", i)) for i in range(B)])
    ts = shift(torch.linspace(1, 0, config.sampling.steps + 1), clip_shift(config, timed))
    made = []
    for rows in torch.arange(B).split(CLIPS_AT_ONCE):
        given, without = (tuple(x[rows] for x in pair) for pair in (text, no_text))
        velocity = guided(network, given, without, config.sampling.guidance)
        made.append(decode_frames(vae, euler(velocity, noise[rows].to(text[0].device), ts)).cpu())
    return torch.cat(made)[:, :, : size[0]]
