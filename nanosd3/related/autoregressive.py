"""The autoregressive baseline for Muse: a transformer that predicts tokens one after another.

The image's tokens, in reading order, are treated as text that a language model continues: the
logits for token n depend on tokens 0 .. n-1 alone (and on the caption). That takes two changes to
Muse's network:

    causal attention   position n attends to positions up to n
    a shift by one     position n is given token n-1, and the first position MASK

so that one pass over a whole image trains all its positions at once, without masking:

    loss = cross-entropy of token n at position n, for all n

Parti (arXiv 2206.10789) samples this way, as did DALL-E (arXiv 2102.12092). Sampling draws token 0
from its logits, feeds it in, draws token 1, ...: N passes for N tokens, where Muse needs 8. Each
pass is cheap, however: what earlier positions computed does not change, so keys and values are kept
and only the new token runs through the network.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.layers import attention
from nanosd3.related.dit import PlainBlock, SelfAttention, separate_heads
from nanosd3.related.muse import MASK, Conditioning, Muse, MuseConfig, draw_tokens
from nanosd3.samplers import guided


class CausalAttention(SelfAttention):
    """Every token attends to itself and to those before it."""

    past: tuple[Tensor, ...] | None = None  # keys and values so far, while they are kept

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = separate_heads(self.qkv(x), 3, self.heads)
        if self.past is None:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.proj(x.transpose(1, 2).flatten(2))
        if self.past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.past, (k, v), strict=True))
        self.past = (k, v)
        return self.proj(attention(q, k, v))


class CausalMuse(Muse):
    """The same network for tokens in reading order. A freshly initialised one gives all tokens
    equal probability."""

    def __init__(self, config: MuseConfig):
        super().__init__(config)
        self.attentions = []
        for block in self.blocks:
            assert isinstance(block, PlainBlock)
            causal = CausalAttention(config.width, block.attn.heads)
            causal.load_state_dict(block.attn.state_dict())
            block.attn = causal
            self.attentions.append(causal)

    def forward(self, tokens: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B, h, w, K) for each of tokens (B, h, w) from those before it, given context
        (B, M, Dc) and pooled text (B, Dp). Raises ValueError as a Muse does."""
        before = F.pad(tokens.flatten(1)[:, :-1], (1, 0), value=MASK)  # (B, N)
        return super().forward(before.view_as(tokens), context, pooled)

    @contextmanager
    def keeping_past(self) -> Iterator[None]:
        """In this context `next_logits` runs one token at a time."""
        try:
            for layer in self.attentions:
                layer.past = ()
            yield
        finally:
            for layer in self.attentions:
                layer.past = None

    def next_logits(self, last: Tensor, n: int, context: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B, K) for token n, given token n-1 (B,), or MASK for the first; called for each n
        in turn."""
        x = self.embed(last[:, None]) + self.pos_embed[:, n : n + 1]  # (B, 1, D)
        return self.transform(x, context, pooled)[:, 0]


@torch.no_grad()
def write_tokens(
    model: CausalMuse,
    prompt: Conditioning,
    negative: Conditioning,
    guidance: float,
    generator: torch.Generator,
) -> Tensor:
    """Tokens (B, h, w), drawn one after the other, for one prompt each."""
    side = model.config.grid
    last = torch.full((len(prompt[0]),), MASK, device=prompt[0].device)

    def next_logits(last: Tensor, n: Tensor, *text: Tensor) -> Tensor:
        return model.next_logits(last, int(n), *text)

    logits, found = guided(next_logits, prompt, negative, guidance), []
    with model.keeping_past():
        for n in torch.arange(side * side):
            last, _ = draw_tokens(logits(last, n), generator)
            found.append(last)
    return torch.stack(found, dim=1).unflatten(1, (side, side))
