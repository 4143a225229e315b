"""Muse: a transformer that predicts masked tokens of an image, many at a time.

An image is a grid of tokens (vq.py). In training some are hidden, and the network predicts them
from the others and from the text: logits over the K codes for each position. One u in (0, 1) per
image sets how many:

    share hidden = cos(pi u / 2)          2 / pi of them on average, often nearly all
    loss = cross-entropy of the true tokens, at the hidden positions alone

To sample, start with everything hidden and repeat K times: guess all hidden tokens at once, keep
the most confident guesses, hide the rest again. After step k = 0 .. K - 1 there remain hidden

    floor(N0 cos(pi / 2 (k + 1) / K))     of N0: 48, 45, 40, 34, 27, 18, 9, 0 for N0 = 49, K = 8

Few tokens are kept at first, when the least is known; tokens drawn in the same step are independent
of each other, hence the many steps. Keeping only the most confident ones would reduce diversity, so
confidence gets fading noise: log p(guess) + temperature (1 - (k + 1) / K) g, g from a Gumbel
distribution.

Guidance acts on logits, l = l_negative + scale (l_prompt - l_negative), as on velocities in
samplers.py; its scale rises linearly from 1 in the first step to its end value in the last: early
tokens give diversity, late ones fit the prompt. (The paper writes (1 + w) l_prompt - w l_negative:
the scale is 1 + w.) The negative is no text, or a text to move away from.

The network is a plain transformer: attention among the tokens, attention to the text (cross-
attention, the pooled text as one more text token), an MLP. There is no time input: the share hidden
is visible. The MMDiT's joint blocks, which update the text too, were tried in their place: in the
same time they learned less, since separate weights for text tokens cost a layer (LOG.md).
Papers: MaskGIT, arXiv 2202.04200; Muse, arXiv 2301.00704.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.embeddings import Embedder
from nanosd3.layers import HEAD_DIM
from nanosd3.patchify import centre_crop, sincos_positions
from nanosd3.related.dit import PlainBlock, PlainFinalLayer
from nanosd3.samplers import guided

MASK = -1  # a hidden token: as an index, the last row of the embedding
Logits = Callable[[Tensor, float], Tensor]  # tokens (B, h, w), guidance scale -> (B, h, w, K)
Conditioning = tuple[Tensor, ...]  # context (B, M, Dc), pooled (B, Dp)


@dataclass(frozen=True)
class MuseConfig:
    """The sizes of a Muse."""

    depth: int
    width: int  # a multiple of 64
    codes: int  # K, the number of different tokens
    grid: int  # tokens in height and in width, at most
    context_dim: int
    pooled_dim: int


class Muse(nn.Module):
    """The masked transformer. A freshly initialised one gives all tokens equal probability."""

    pos_embed: Tensor

    def __init__(self, config: MuseConfig):
        super().__init__()
        self.config = config
        D, grid = config.width, config.grid
        self.token_embedder = nn.Embedding(config.codes + 1, D)  # and one for MASK
        self.register_buffer("pos_embed", sincos_positions(D, grid, grid, grid))  # (1, N, D)
        self.context_embedder = nn.Linear(config.context_dim, D)
        self.y_embedder = Embedder(config.pooled_dim, D)
        self.blocks = nn.ModuleList(
            PlainBlock(D, D // HEAD_DIM, cross=True) for _ in range(config.depth)
        )
        self.final_layer = PlainFinalLayer(D, config.codes)
        initialise_muse(self)

    def forward(self, tokens: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B, h, w, K) for tokens (B, h, w), given context (B, M, Dc), pooled (B, Dp).

        Raises ValueError if the tokens exceed the grid of positions or are not codes, or if the
        batch sizes differ.
        """
        h, w = tokens.shape[1:]
        x = self.embed(tokens.flatten(1)) + centre_crop(self.pos_embed, h, w)  # (B, N, D)
        return self.transform(x, context, pooled).unflatten(1, (h, w))  # (B, h, w, K)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) to their vectors (B, N, D). Raises ValueError for other values."""
        codes = self.config.codes
        if not MASK <= int(tokens.min()) <= int(tokens.max()) < codes:
            raise ValueError(f"tokens must be from 0 to {codes - 1}, or MASK")
        return self.token_embedder(tokens % (codes + 1))

    def transform(self, x: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Vectors with positions (B, N, D) to logits (B, N, K). Raises ValueError if the batch
        sizes differ."""
        if not len(context) == len(pooled) == len(x):
            sizes = f"tokens {len(x)}, context {len(context)}, pooled {len(pooled)}"
            raise ValueError(f"batch sizes differ: {sizes}")
        c = self.y_embedder(pooled)  # (B, D)
        y = torch.cat([self.context_embedder(context), c[:, None]], dim=1)  # (B, M+1, D)
        for block in self.blocks:
            x = block(x, c, y)
        return self.final_layer(x, c)


def initialise_muse(model: Muse) -> None:
    """All initial weights, as in mmdit.py and for the same reasons."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.token_embedder.weight, std=0.5)  # beside positions of 0.7
    for layer in (model.y_embedder.mlp[0], model.y_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    for block in model.blocks:
        for projection in (block.attn.qkv, block.cross_attn.q, block.cross_attn.kv):
            nn.init.normal_(projection.bias, std=0.5)
    nn.init.zeros_(model.final_layer.linear.weight)


# --- training -------------------------------------------------------------------------------------


def cosine_share(u: Tensor) -> Tensor:
    """The share of tokens to hide, for u uniform in (0, 1); density 2 / (pi sqrt(1 - share^2))."""
    return torch.cos(math.pi / 2 * u)


def hide(tokens: Tensor, share: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, h, w) with a share (B,) of each image's, at least one, replaced by MASK: those
    with the smallest of the random numbers `places` (B, N)."""
    N = places.shape[1]
    count = (share * N).ceil().clamp(1, N)
    chosen = places.argsort(1).argsort(1) < count[:, None]  # (B, N)
    return tokens.masked_fill(chosen.view_as(tokens).to(tokens.device), MASK)


def masked_loss(logits: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
    """Mean cross-entropy of each image's tokens (B, h, w) that are hidden in `seen`, (B,); ln K for
    uniform logits.

    Each image has the same weight, however much of it is hidden.
    """
    hidden = (seen == MASK).flatten(1)  # (B, N)
    losses = F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none").flatten(1)  # (B, N)
    return (losses * hidden).sum(1) / hidden.sum(1)


# --- decoding -------------------------------------------------------------------------------------


def guided_logits(
    model: Callable[..., Tensor], prompt: Conditioning, negative: Conditioning
) -> Logits:
    """The logits of a network for a prompt, guided away from a negative."""

    def without_time(tokens: Tensor, t: Tensor, *text: Tensor) -> Tensor:
        return model(tokens, *text)

    def logits(tokens: Tensor, scale: float) -> Tensor:
        return guided(without_time, prompt, negative, scale)(tokens, torch.zeros(()))

    return logits


def rising(guidance: float, step: int, steps: int) -> float:
    """The guidance scale of a step: linearly from 1 in the first to `guidance` in the last."""
    return 1 + (guidance - 1) * step / max(1, steps - 1)


def left_hidden(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    """How many tokens of each image are hidden again after a step, given those `hidden` now and
    `at_first` (B,): fewer than now, at least one before the last step, and none after it."""
    if step + 1 == steps:
        return torch.zeros_like(hidden)
    planned = (at_first * math.cos(math.pi / 2 * (step + 1) / steps)).floor().long()
    return torch.minimum(planned, hidden - 1).clamp(min=1)


def draw_tokens(
    logits: Tensor, generator: torch.Generator, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from logits (..., K), from only the `top_k` likeliest if given, and the
    logarithms of their probabilities, (...) each."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    log_p = logits.log_softmax(-1)
    p = log_p.exp().flatten(0, -2).cpu()
    drawn = torch.multinomial(p, 1, generator=generator).view(logits.shape[:-1]).to(logits.device)
    return drawn, log_p.gather(-1, drawn[..., None])[..., 0]


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Gumbel noise, -ln(-ln u)."""
    u = torch.rand(shape, generator=generator).clamp(1e-20, 1 - 1e-7)
    return -(-u.log()).log()


def keep_surest(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    """Tokens (B, h, w) with guesses for the hidden ones, except the `left` (B,) of each image with
    the lowest confidence, which stay hidden."""
    hidden = tokens == MASK
    confidence = confidence.masked_fill(~hidden, math.inf).flatten(1)
    rank = confidence.argsort(1).argsort(1).view_as(tokens)  # 0 for the least sure
    return torch.where(hidden & (rank >= left[:, None, None]), guess, tokens)


@torch.no_grad()
def fill_hidden(
    logits: Logits,
    tokens: Tensor,
    steps: int,
    guidance: float,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Draw the hidden tokens among (B, h, w) in `steps` steps; the others stay unchanged."""
    at_first = (tokens == MASK).flatten(1).sum(1)  # (B,)
    for step in range(steps):
        hidden = (tokens == MASK).flatten(1).sum(1)
        guess, confidence = draw_tokens(logits(tokens, rising(guidance, step, steps)), generator)
        noise = gumbel(confidence.shape, generator).to(confidence)
        confidence = confidence + temperature * (1 - (step + 1) / steps) * noise
        left = left_hidden(hidden, at_first, step, steps)
        tokens = keep_surest(tokens, guess, confidence, left)
    return tokens
