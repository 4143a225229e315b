"""T5 v1.1's encoder: the text encoder pretrained on plain text.

CLIP has seen only captions, of at most 77 tokens. T5 learned from plain text by filling in removed
spans, and gives SD3 its spelling and its grasp of long prompts. It is a plain bidirectional
transformer with a few peculiarities, each essential:

- attention logits are *not* divided by sqrt(d); the initial weights make up for it;
- there are no position vectors: a learned bias for each head and distance is added to the
  logits, near distances one by one, far ones in buckets. Only the first layer owns the table;
  all layers use it;
- no biases, RMSNorm, and a gated GELU in the MLP;
- no mask over padding in SD3, so the padded length is part of the input's definition;
- never float16: its feed-forward activations overflow.

Keys are named as in the published files, which is why modules sit in lists and dicts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.config_types import T5Config
from nanosd3.layers import RMSNorm

BUCKETS = 32  # half for keys before the query, half for keys after it
BUCKET_STARTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)  # distance of bucket 1, 2...


def distance_buckets(length: int) -> Tensor:
    """Bucket (length, length) of the distance from each query (row) to each key (column)."""
    i = torch.arange(length)
    distance = i[None, :] - i[:, None]
    bucket = torch.bucketize(distance.abs(), torch.tensor(BUCKET_STARTS), right=True)
    return bucket + BUCKETS // 2 * (distance > 0)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.q, self.k, self.v = (nn.Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.width, bias=False)
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(BUCKETS, config.heads)

    def position_bias(self, length: int) -> Tensor:
        """The bias added to the logits, (1, heads, length, length)."""
        buckets = distance_buckets(length).to(self.q.weight.device)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, head_dim)
            for proj in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.wi_0 = nn.Linear(width, hidden, bias=False)
        self.wi_1 = nn.Linear(width, hidden, bias=False)
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Block(nn.Module):
    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        attn, mlp = T5Attention(config, owns_bias), GatedMLP(config.width, config.hidden)
        self.layer = nn.ModuleList(
            [
                nn.ModuleDict({"SelfAttention": attn, "layer_norm": RMSNorm(config.width)}),
                nn.ModuleDict({"DenseReluDense": mlp, "layer_norm": RMSNorm(config.width)}),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attn, mlp = self.layer
        x = x + attn["SelfAttention"](attn["layer_norm"](x), bias)
        return x + mlp["DenseReluDense"](mlp["layer_norm"](x))


class T5Encoder(nn.Module):
    """Token ids (B, L) to states (B, L, D)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.encoder = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab, config.width),
                "block": nn.ModuleList(Block(config, i == 0) for i in range(config.layers)),
                "final_layer_norm": RMSNorm(config.width),
            }
        )
        initialise_t5(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder["embed_tokens"](ids)  # (B, L, D)
        first = self.encoder["block"][0].layer[0]["SelfAttention"]
        bias = first.position_bias(ids.shape[1])
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)


def initialise_t5(model: T5Encoder) -> None:
    """T5's own initial weights: queries start small enough to do without 1/sqrt(d)."""
    config = model.config
    D, inner = config.width, config.heads * config.head_dim
    nn.init.normal_(model.encoder["embed_tokens"].weight)
    for block in model.encoder["block"]:
        attn, mlp = block.layer[0]["SelfAttention"], block.layer[1]["DenseReluDense"]
        nn.init.normal_(attn.q.weight, std=(D * config.head_dim) ** -0.5)
        for linear, fan_in in ((attn.k, D), (attn.v, D), (attn.o, inner)):
            nn.init.normal_(linear.weight, std=fan_in**-0.5)
        for linear, fan_in in ((mlp.wi_0, D), (mlp.wi_1, D), (mlp.wo, config.hidden)):
            nn.init.normal_(linear.weight, std=fan_in**-0.5)
    first = model.encoder["block"][0].layer[0]["SelfAttention"]
    nn.init.normal_(first.relative_attention_bias.weight, std=D**-0.5)
