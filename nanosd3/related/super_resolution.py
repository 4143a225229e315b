"""Muse's cascade: coarse tokens give the content of an image, fine tokens its details.

With tokens of half the side there are four times as many, attention costs sixteen times as much,
and most of what they hold is local. So Muse predicts coarse ones first (muse.py), and a second
transformer then predicts the fine ones from them (paper, section 2.4):

    base tokens (B, h, w)        codes of a tokeniser that shrinks a lot; self-attention layers of
                                 their own turn them into features (B, h*w, D)
    text (B, M, Dc)              a linear layer to (B, M, D)
    what the fine tokens cross-attend to: the features of both, one after the other

The second transformer is again a Muse, whose "text" is that sequence: it is trained the same way,
with a random share of the fine tokens hidden and all base tokens known, and sampled the same way,
in few steps, since the base tokens fix the shape.

Last, a larger decoder is trained for the fine tokens, with the encoder, the codes and both
transformers left unchanged (section 2.5): better images from the same tokens, without retraining
the transformers. `with_decoder` is that tokeniser.
Paper: Muse, arXiv 2301.00704.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nanosd3.layers import HEAD_DIM
from nanosd3.patchify import centre_crop, sincos_positions
from nanosd3.related.dit import PlainBlock, SelfAttention
from nanosd3.related.muse import Muse, MuseConfig
from nanosd3.related.vq import VQAutoencoder


class SuperResolution(nn.Module):
    """Predicts hidden fine tokens from base tokens, text and the other fine tokens. A freshly
    initialised one gives all fine tokens equal probability.

    `config` is that of the fine tokens, `base` that of the network whose tokens it is given.
    """

    pos_embed: Tensor

    def __init__(self, config: MuseConfig, base: MuseConfig, base_depth: int):
        super().__init__()
        self.config, self.base_config, D = config, base, config.width
        self.base_embedder = nn.Embedding(base.codes, D)
        self.register_buffer("pos_embed", sincos_positions(D, base.grid, base.grid, base.grid))
        blocks = [PlainBlock(D, D // HEAD_DIM, cross=False) for _ in range(base_depth)]
        self.base_blocks = nn.ModuleList(blocks)
        self.text_embedder = nn.Linear(config.context_dim, D)
        initialise_base(self)
        self.muse = Muse(replace(config, context_dim=D))

    def forward(self, tokens: Tensor, base: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B, H, W, K) for fine tokens (B, H, W), given base tokens (B, h, w), context
        (B, M, Dc) and pooled text (B, Dp).

        Raises ValueError as a Muse does, and if a base token is hidden or not a code.
        """
        codes = self.base_config.codes
        if not 0 <= int(base.min()) <= int(base.max()) < codes:
            raise ValueError(f"base tokens must be from 0 to {codes - 1}, none hidden")
        x = self.base_embedder(base.flatten(1))  # (B, h*w, D)
        x = x + centre_crop(self.pos_embed, *base.shape[1:])
        for block in self.base_blocks:
            x = block(x, x, x)  # self-attention only
        y = self.text_embedder(context)  # (B, M, D)
        return self.muse(tokens, torch.cat([y, x], dim=1), pooled)


def initialise_base(model: SuperResolution) -> None:
    """As in muse.py, for the layers that read base tokens and text."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.base_embedder.weight, std=0.5)  # beside positions of 0.7
    for module in model.modules():
        if isinstance(module, SelfAttention):
            nn.init.normal_(module.qkv.bias, std=0.5)


def with_decoder(vq: VQAutoencoder, channels: tuple[int, ...]) -> VQAutoencoder:
    """A tokeniser with the same encoder and codes, so with the same tokens, and a new decoder of
    these widths; only the decoder has gradients."""
    larger = VQAutoencoder(replace(vq.config, decoder_channels=channels))
    larger.encoder.load_state_dict(vq.encoder.state_dict())
    larger.quantiser.load_state_dict(vq.quantiser.state_dict())
    larger.encoder.requires_grad_(False)
    larger.quantiser.requires_grad_(False)
    return larger
