"""A VQ autoencoder: an image as a small grid of tokens from a learned codebook, and back.

The KL autoencoder of the core (vae.py) gives each position a continuous vector. Here it is one of K
vectors, the codes, so that the image becomes a grid of indices, which a transformer can learn as it
learns words (muse.py). The blocks are the core's; between encoder and decoder stands

    z = encoder(x) / |.|      e = the code nearest to z      token = its index
    z_q = z + stop(e - z)     the value of e, the gradient of z ("straight through")

    loss = |x - decoder(z_q)|^2 + |stop(z) - e|^2 + 0.25 |z - stop(e)|^2

The index has no gradient, so the decoder's gradient is passed to the encoder as if nothing had been
rounded; the second term moves codes towards encodings, and the third (commitment) keeps encodings
near their codes. Both have length 1: "near" then means the angle alone, and a code's length has no
effect (arXiv 2110.04627, section 3.2).

On its own, this would leave most codes unused: one that is nearest to nothing gets no gradient. So
from time to time, codes that nothing in a whole batch chose restart as encodings of that batch. The
usage of codes is measured by the perplexity exp(H) of the tokens: K if all are used equally, 1 if
only one is.

There is no attention, only convolution, so one model takes images of any size. Left out, as in
vae.py: the perceptual and adversarial terms.
Papers: VQ-VAE, arXiv 1711.00937; VQGAN, arXiv 2012.09841; Muse, arXiv 2301.00704, section 2.2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.config_types import VAEConfig
from nanosd3.vae import Decoder, Encoder

COMMITMENT = 0.25


@dataclass(frozen=True)
class VQConfig:
    """The sizes of a VQ autoencoder."""

    image_channels: int
    channels: tuple[int, ...]  # width at each resolution of the encoder, finest first
    decoder_channels: tuple[int, ...]  # and of the decoder, which may be larger
    norm_groups: int
    codes: int  # K
    width: int  # of a code, even

    @property
    def factor(self) -> int:
        """How many times smaller than the image the grid of tokens is, in height and in width."""
        return 2 ** (len(self.channels) - 1)

    def half(self, channels: tuple[int, ...], latent_channels: int) -> VAEConfig:
        """The core's config of the encoder or the decoder."""
        return VAEConfig(self.image_channels, channels, 1, latent_channels, self.norm_groups, 0, 1)


class Quantiser(nn.Module):
    """The codes, and which of them is nearest."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(codes, width))

    def unit_codes(self) -> Tensor:
        """The codes (K, C) at length 1, as they are used."""
        return F.normalize(self.codes, dim=1)

    def nearest(self, z: Tensor) -> Tensor:
        """The nearest code of each position of z (B, C, h, w), of length 1: indices (B, h, w)."""
        # |z - e|^2 = 2 - 2 z e
        return torch.einsum("bchw,kc->bhwk", z, self.unit_codes()).argmax(-1)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Indices (B, h, w) to their codes (B, C, h, w)."""
        return F.embedding(tokens, self.unit_codes()).movedim(-1, 1)

    @torch.no_grad()
    def restart_unused(self, z: Tensor, generator: torch.Generator) -> int:
        """Move codes that no position of z (B, C, h, w) chooses to randomly drawn positions;
        returns how many."""
        unused = torch.bincount(self.nearest(z).flatten(), minlength=len(self.codes)) == 0
        positions = z.movedim(1, -1).flatten(0, -2)  # (B*h*w, C)
        count = int(unused.sum())
        drawn = torch.randint(len(positions), (count,), generator=generator)
        self.codes[unused] = positions[drawn.to(z.device)]
        return count


class VQAutoencoder(nn.Module):
    """Images in [-1, 1] (B, image_channels, H, W) to tokens (B, H/f, W/f), from 0 to K - 1, and
    back."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        # A KL encoder outputs mean and log-variance, two values per channel; here both are code.
        self.encoder = Encoder(config.half(config.channels, config.width // 2))
        self.quantiser = Quantiser(config.codes, config.width)
        self.decoder = Decoder(config.half(config.decoder_channels, config.width))
        for middle in (self.encoder.mid, self.decoder.mid):
            middle.attn_1 = nn.Identity()  # type: ignore[assignment]  # local, whatever the size

    def encode(self, x: Tensor) -> Tensor:
        """The vectors to quantise, of length 1, (B, C, H/f, W/f).

        Raises ValueError if H or W is not divisible by f.
        """
        f = self.config.factor
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"image size {x.shape[2]}x{x.shape[3]} is not divisible by {f}")
        return F.normalize(self.encoder(x), dim=1)

    def tokenise(self, x: Tensor) -> Tensor:
        """The tokens of images."""
        return self.quantiser.nearest(self.encode(x))

    def decode(self, tokens: Tensor) -> Tensor:
        """The images of tokens, roughly in [-1, 1]."""
        return self.decoder(self.quantiser.vectors(tokens))


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """The value of e with the gradient of z."""
    return z + (e - z).detach()


def quantising_loss(z: Tensor, e: Tensor) -> Tensor:
    """The two losses between codes e and encodings z, summed, of each image, (B,)."""
    codebook, commitment = (z.detach() - e).square(), (z - e.detach()).square()
    return (codebook + COMMITMENT * commitment).flatten(1).sum(1)


def perplexity(tokens: Tensor, codes: int) -> float:
    """exp of the entropy of the tokens: the number of equally used codes of the same entropy."""
    share = torch.bincount(tokens.flatten(), minlength=codes).double() / tokens.numel()
    return float(torch.exp(torch.special.entr(share).sum()))
