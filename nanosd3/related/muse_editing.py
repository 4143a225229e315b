"""Sampling and editing with Muse: from prompts to tokens to images.

A masked transformer needs no inversion to edit. Known tokens stay, the others are hidden, and
`fill_hidden` draws them, which is what the network was trained for (arXiv 2301.00704, section 3.3).

    repaint       tokens under a mask are hidden and drawn for a prompt; all others stay
    edit_freely   without a mask: a few random tokens are hidden and redrawn, round after round;
                  the image moves towards the prompt, and stays where it already fits

Few tokens at a time keep most of the old image as context; guidance is strong and only the
likeliest tokens are drawn, so that the changes follow the prompt.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanosd3.data.mnist import to_uint8
from nanosd3.pipeline import Pipeline
from nanosd3.random_streams import rng
from nanosd3.related.muse import (
    MASK,
    Conditioning,
    Logits,
    Muse,
    draw_tokens,
    fill_hidden,
    guided_logits,
    hide,
)
from nanosd3.related.vq import VQAutoencoder

MUSE_STEPS, MUSE_GUIDANCE, MUSE_TEMPERATURE = 8, 1.5, 32.0
FREE_SHARE, FREE_ROUNDS, FREE_GUIDANCE, FREE_TOP_K = 0.08, 13, 3.0, 3
TOKENS_AT_ONCE = 250  # images


def repaint(
    logits: Logits,
    tokens: Tensor,
    marked: Tensor,
    steps: int,
    guidance: float,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Tokens (B, h, w), redrawn where `marked`, bool (h, w) or (B, h, w); the same elsewhere."""
    hidden = tokens.masked_fill(marked, MASK)
    return fill_hidden(logits, hidden, steps, guidance, temperature, generator)


@torch.no_grad()
def edit_freely(
    logits: Logits,
    tokens: Tensor,
    rounds: int,
    guidance: float,
    generator: torch.Generator,
    share: float = FREE_SHARE,
    top_k: int = FREE_TOP_K,
) -> Tensor:
    """Tokens (B, h, w) after some rounds, each of which redraws a random share of them."""
    shares = torch.full((len(tokens),), share)
    for _ in range(rounds):
        places = torch.rand(tokens.flatten(1).shape, generator=generator)
        seen = hide(tokens, shares, places)
        drawn, _ = draw_tokens(logits(seen, guidance), generator, top_k)
        tokens = torch.where(seen == MASK, drawn, tokens)
    return tokens


class VQPipeline:
    """Images to tokens and back by a VQ autoencoder, and prompts to text by the main model's
    encoders."""

    def __init__(self, vq: VQAutoencoder, main: Pipeline):
        self.vq, self.main = vq, main
        self.device = main.parts.device
        self.encode: Callable[[list[str]], Conditioning] = main.text.encode

    def texts(self, prompts: list[str], negative: str) -> tuple[Conditioning, Conditioning]:
        """The encoded prompts, and as many copies of the encoded negative prompt."""
        without = tuple(x.expand(len(prompts), *x.shape[1:]) for x in self.encode([negative]))
        return self.encode(prompts), without

    def fill(
        self,
        logits_of: Callable[[Tensor, Conditioning, Conditioning], Logits],
        side: int,
        prompts: list[str],
        generator: torch.Generator,
        steps: int,
        guidance: float,
        temperature: float,
        negative: str,
    ) -> Tensor:
        """Tokens (B, side, side) for prompts, all of them drawn, a part of the batch at a time.
        `logits_of` receives the rows, their texts and the texts to guide them away from."""
        found = []
        for rows in torch.arange(len(prompts)).split(TOKENS_AT_ONCE):
            logits = logits_of(rows, *self.texts([prompts[i] for i in rows], negative))
            hidden = torch.full((len(rows), side, side), MASK, device=self.device)
            found.append(fill_hidden(logits, hidden, steps, guidance, temperature, generator))
        return torch.cat(found)

    @torch.no_grad()
    def images(self, tokens: Tensor) -> np.ndarray:
        """Tokens (B, h, w) to images uint8 (B, H, W) or (B, H, W, C)."""
        parts = [to_uint8(self.vq.decode(part)).cpu() for part in tokens.split(TOKENS_AT_ONCE)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to tokens (B, h, w)."""
        parts = images.split(TOKENS_AT_ONCE)
        return torch.cat([self.vq.tokenise(part.to(self.device)) for part in parts])


class MusePipeline(VQPipeline):
    """Prompts to tokens to images, by Muse."""

    def __init__(self, vq: VQAutoencoder, muse: Muse, main: Pipeline):
        super().__init__(vq, main)
        self.muse = muse

    def logits(self, prompts: list[str], negative: str = "") -> Logits:
        """A function that gives logits for one prompt per image, guided away from `negative`."""
        return guided_logits(self.muse, *self.texts(prompts, negative))

    def draw(
        self,
        prompts: list[str],
        seed: int,
        steps: int = MUSE_STEPS,
        guidance: float = MUSE_GUIDANCE,
        temperature: float = MUSE_TEMPERATURE,
        negative: str = "",
    ) -> Tensor:
        """Tokens (B, h, w) for prompts."""
        return self.fill(
            lambda rows, *texts: guided_logits(self.muse, *texts),
            self.muse.config.grid,
            prompts,
            rng(seed, "muse"),
            steps,
            guidance,
            temperature,
            negative,
        )


def passes(steps: int, guidance: float) -> int:
    """Network evaluations of one image: two per step with guidance, except one in the first, whose
    scale is still 1."""
    return steps if guidance == 1 else 2 * steps - 1


def unpadded(x: Tensor, padding: int) -> Tensor:
    """Images (B, C, H, W) without the black frame that a finished run's latents need."""
    return x[:, :, padding : x.shape[2] - padding, padding : x.shape[3] - padding]
