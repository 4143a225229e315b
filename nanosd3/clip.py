"""CLIP's text transformer, twice: OpenAI's L/14 and OpenCLIP's bigG/14 differ only in numbers.

Trained so that a caption's vector lies near its image's, CLIP knows what words look like; that
is why SD3 uses it beside T5. Two things are taken from it:

- the *sequence*: the output of the penultimate layer, without the final norm (the last layer
  serves the contrastive task more than the words);
- the *pooled* vector: the final-normed output of the last layer at the first end-of-text token.
  The attention is causal, so only that position has read the whole caption. bigG's is multiplied
  by its projection; SD3 uses L's unprojected.

No mask hides the padding: being causal, real tokens never see it, and the padded positions'
outputs are part of the context as trained. Keys are named as in the published files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.config_types import CLIPConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): OpenAI's stand-in for GELU, part of the L/14 model."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATION_FUNCTIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPAttention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D/heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = ACTIVATION_FUNCTIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = CLIPAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = CLIPMLP(config.width, 4 * config.width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(config) for _ in range(config.layers))}
        )
        self.final_layer_norm = nn.LayerNorm(config.width)


class CLIPText(nn.Module):
    """Token ids (B, L) to penultimate states (B, L, D) and a pooled vector (B, pooled_dim)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.width, bias=False)
        initialise_clip(self)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.text_model.embeddings(ids)  # (B, L, D)
        for layer in self.text_model.encoder["layers"]:
            penultimate, x = x, layer(x)
        x = self.text_model.final_layer_norm(x)
        pooled = pool_at_end(x, ids, self.config.vocab - 1)  # (B, D)
        return penultimate, self.text_projection(pooled) if self.config.projection else pooled


def pool_at_end(states: Tensor, ids: Tensor, end: int) -> Tensor:
    """States (B, L, D) at the first `end` token of ids (B, L): (B, D). There may be several such
    tokens, since some models pad with them."""
    first = (ids == end).int().argmax(1)
    return states[torch.arange(len(states), device=states.device), first]


def initialise_clip(model: CLIPText) -> None:
    """CLIP's own initial weights (its appendix): small embeddings, residuals scaled by depth."""
    D, layers = model.config.width, model.config.layers
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.01)
    for layer in model.text_model.encoder["layers"]:
        attn, mlp = layer.self_attn, layer.mlp
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
            nn.init.normal_(linear.weight, std=D**-0.5)
        for linear in (attn.out_proj, mlp.fc2):
            nn.init.normal_(linear.weight, std=D**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(mlp.fc1.weight, std=(2 * D) ** -0.5)
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, mlp.fc1, mlp.fc2):
            nn.init.zeros_(linear.bias)
    if model.config.projection:
        nn.init.normal_(model.text_projection.weight, std=D**-0.5)
