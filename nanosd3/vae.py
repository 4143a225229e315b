"""The KL autoencoder: images to small latents and back.

The flow works on latents, 8 times smaller in height and width (4 times for MNIST), because most
of a picture's pixels are detail that a decoder can fill in. The encoder gives a Gaussian for
each latent, mean and log-variance; a light pull towards N(0, 1) (the KL term) keeps the latents
near each other without blurring the image. SD3's has 16 channels, the widest of its line: more
channels reconstruct better and are harder to generate, which pays off at scale (paper, table 3).

Latents reach the flow with mean 0 and standard deviation 1: `normalise` and `denormalise` are
the only places that apply the shift and scale in the config, subtracting first.

Modules are named as in the official files. Levels of the decoder are numbered by resolution, as
there: up.3 runs first. Of the published training recipe for this family, the
perceptual and adversarial terms are left out: they need a network trained on photographs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.config_types import VAEConfig


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResBlock(nn.Module):
    """Two convolutions and a skip around them: a 1x1 convolution if the channels change."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), conv3(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out, groups), conv3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class VAEAttention(nn.Module):
    """One head over all positions, its projections stored as 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])  # (B, 1, HW, C)
        h = h[:, 0].transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + self.proj_out(h)


class Down(nn.Module):
    """Halve the size. Padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the size: repeat each pixel, then smooth."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, then a change of resolution unless it is the outermost."""

    def __init__(self, widths: tuple[int, int], blocks: int, groups: int, *, down=False, up=False):
        super().__init__()
        c_in, c_out = widths
        self.block = nn.ModuleList(
            ResBlock(c_out if i else c_in, c_out, groups) for i in range(blocks)
        )
        self.downsample = Down(c_out) if down else None
        self.upsample = Up(c_out) if up else None

    def steps(self) -> list[nn.Module]:
        """The layers to apply, in order. (The caller applies them one by one: a call of the whole
        level would keep its input, the largest tensor there is, until the end.)"""
        return [m for m in (*self.block, self.downsample, self.upsample) if m is not None]


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = VAEAttention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image (B, image_channels, H, W) to moments (B, 2 C, H/f, W/f), f = 2^(levels - 1)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        self.conv_in = conv3(config.image_channels, widths[0])
        inputs = (widths[0], *widths[:-1])
        last = len(widths) - 1
        self.down = nn.ModuleList(
            Level(pair, config.blocks, groups, down=i < last)
            for i, pair in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = conv3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for step in level.steps():
                x = step(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to image (B, image_channels, f h, f w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        self.conv_in = conv3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], groups)
        inputs = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(  # one more block per level than in the encoder
            Level(pair, config.blocks + 1, groups, up=i > 0)
            for i, pair in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = norm(widths[0], groups)
        self.conv_out = conv3(widths[0], config.image_channels)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for step in level.steps():
                z = step(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] (B, image_channels, H, W) to latents (B, C, H/f, W/f) and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, C, H/f, W/f), not normalised.

        Raises ValueError if H or W is not divisible by f.
        """
        f = self.config.factor
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"image size {x.shape[2]}x{x.shape[3]} is not divisible by {f}")
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalised, to an image, roughly in [-1, 1]."""
        return self.decoder(z)

    def normalise(self, z: Tensor) -> Tensor:
        """Encoder latents to what the flow works on: (z - shift) scale."""
        return (z - self.config.shift) * self.config.scale

    def denormalise(self, x0: Tensor) -> Tensor:
        """Inverse of `normalise`, before `decode`."""
        return x0 / self.config.scale + self.config.shift


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """mean + std noise: a latent from the encoder's Gaussian, differentiable in both."""
    return mean + torch.exp(0.5 * logvar) * noise


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over each image's latents: (B,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
