"""The Consistency Decoder: a consistency model in place of the autoencoder's decoder.

An autoencoder's decoder is trained to be near the image on average, and where its latents do not
say what was there, the average is a blur. A generative decoder draws one of the possible images
instead: noise in, and the latents, enlarged to the image's size, as additional channels. Encoder
and generator stay as they are (OpenAI, 2023: weights and code for Stable Diffusion 1's autoencoder,
no paper; its training is not published).

    z_t (B, C, H, W) and latents (B, c, h, w), each repeated f times --U-Net, t--> velocity

The network is this project's own, a small U-Net, trained by consistency training (consistency.py),
which is far easier with the latents known than when images are drawn from nothing. It decodes in
two steps: from almost pure noise, t = 0.978, then from half of it, t = 0.504.

Also below, for comparison, are the constants of the published decoder, in its own convention
(variance-preserving, 1,024 steps).
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.embeddings import TIMESTEP_FEATURES, Embedder, batch_times, timestep_embedding
from nanosd3.vae import Down, Up, conv3, norm

DECODING_TIMES = (0.978, 0.504, 0.0)  # the published decoder's two levels, in our time
GROUPS = 8


class TimedBlock(nn.Module):
    """A residual block whose features are shifted by the time."""

    def __init__(self, c_in: int, c_out: int, time_features: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, GROUPS), conv3(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out, GROUPS), conv3(c_out, c_out)
        self.time = nn.Linear(time_features, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.shortcut(x)


class ConsistencyDecoder(nn.Module):
    """A U-Net: noisy images and latents to the velocity. A fresh one outputs zero."""

    def __init__(self, image_channels: int, latent_channels: int, widths: tuple[int, ...]):
        super().__init__()
        features = 4 * widths[0]
        self.embedder = Embedder(TIMESTEP_FEATURES, features)
        self.conv_in = conv3(image_channels + latent_channels, widths[0])
        inner = list(pairwise(widths))
        self.down_blocks = nn.ModuleList(TimedBlock(c, c, features) for c in widths)
        self.downs = nn.ModuleList(nn.Sequential(Down(a), conv3(a, b)) for a, b in inner)
        self.middle = TimedBlock(widths[-1], widths[-1], features)
        self.ups = nn.ModuleList(nn.Sequential(Up(b), conv3(b, a)) for a, b in reversed(inner))
        self.up_blocks = nn.ModuleList(TimedBlock(2 * c, c, features) for c in reversed(widths))
        self.norm_out, self.conv_out = norm(widths[0], GROUPS), conv3(widths[0], image_channels)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """Velocity (B, C, H, W) of noisy images z (B, C, H, W) at t (B,), or () if all share it,
        given normalised latents (B, c, H/f, W/f)."""
        time = timestep_embedding(batch_times(t, z)).to(z.dtype)  # (B, 256)
        time = F.silu(self.embedder(time))  # (B, features)
        enlarged = F.interpolate(latents, z.shape[2:], mode="nearest")
        x = self.conv_in(torch.cat([z, enlarged], dim=1))  # (B, widths[0], H, W)
        skips = []
        for i, block in enumerate(self.down_blocks):
            x = block(x, time)
            skips.append(x)
            x = self.downs[i](x) if i < len(self.downs) else x
        x = self.middle(x, time)
        for i, block in enumerate(self.up_blocks):
            x = block(torch.cat([x, skips.pop()], dim=1), time)
            x = self.ups[i](x) if i < len(self.ups) else x
        return self.conv_out(F.silu(self.norm_out(x)))


def decode_in_steps(
    decoder: nn.Module, latents: Tensor, noise: Tensor, ts: tuple[float, ...] = DECODING_TIMES
) -> Tensor:
    """Normalised latents (B, c, h, w) to images (B, C, H, W) in [-1, 1], with `noise`
    (steps, B, C, H, W) for each time but the last, 0. It starts from x0 = 0: no image is known."""
    x0 = torch.zeros_like(noise[0])
    for t, fresh in zip(ts[:-1], noise, strict=True):
        z = (1 - t) * x0 + t * fresh
        x0 = (z - t * decoder(z, torch.tensor(t, device=z.device), latents)).clamp(-1, 1)
    return x0


# --- the published decoder's constants ------------------------------------------------------------

PUBLISHED_STEPS, PUBLISHED_DATA_STD = 1024, 0.5
PUBLISHED_LATENT_SCALE = 0.18215  # Stable Diffusion 1's; then each channel's mean and deviation:
PUBLISHED_LATENT_MEAN = (0.3886, 0.0225, 0.0738, -0.0171)
PUBLISHED_LATENT_STD = (0.9654, 1.0440, 0.7615, 0.7702)
PUBLISHED_LEVELS = (1008, 512)  # of its two steps


def published_latents(latents: Tensor) -> Tensor:
    """The unscaled latents (B, 4, h, w) of Stable Diffusion 1's autoencoder, as the published
    decoder's network sees them."""
    mean, std = latents.new_tensor((PUBLISHED_LATENT_MEAN, PUBLISHED_LATENT_STD))[..., None, None]
    return (latents * PUBLISHED_LATENT_SCALE - mean) / std


def published_alpha_bar() -> Tensor:
    """The cosine schedule: alpha_bar (1024,) float64 after each step; no step leaves less than
    0.001 of it."""
    i = torch.arange(PUBLISHED_STEPS + 1, dtype=torch.float64) / PUBLISHED_STEPS
    curve = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
    kept = (curve[1:] / curve[:-1]).clamp(min=1 - 0.999)
    return kept.cumprod(0)


def published_scalings(alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in for images noised as x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar)
    noise, which is EDM's x0 + sigma noise times sqrt(alpha_bar)."""
    variance = 1 / alpha_bar - 1  # sigma^2
    total = variance + PUBLISHED_DATA_STD**2
    back = alpha_bar.rsqrt()
    c_skip = back * PUBLISHED_DATA_STD**2 / total
    return c_skip, (variance / total).sqrt() * PUBLISHED_DATA_STD, back / total.sqrt()


def rectified_time(alpha_bar: Tensor) -> Tensor:
    """The t at which rectified flow has as much noise beside the image: sigma / (1 + sigma)."""
    sigma = (1 / alpha_bar - 1).sqrt()
    return sigma / (1 + sigma)
