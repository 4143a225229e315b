"""What the MMDiT costs, in closed form: parameters and FLOPs.

A transformer is a list of matrices. Each one stores inputs x outputs numbers, and multiplies and
adds that many times for every token it reads. Attention has no weights of its own; it adds two
products between all queries and all keys. Memory is less simple: see training_memory.py.

An image is `rows` x `columns` patches, one token each.
"""

from typing import NamedTuple

from nanosd3.config_types import MMDiTConfig
from nanosd3.embeddings import TIMESTEP_FEATURES
from nanosd3.layers import HEAD_DIM


class Matrix(NamedTuple):
    """A linear layer with bias."""

    reads: str  # "image" or "text": every token of it; "vector": one conditioning vector per image
    inputs: int
    outputs: int
    unused: int = 0  # further outputs that are stored but never computed


def patch_features(config: MMDiTConfig) -> int:
    """Numbers in one patch of the latents."""
    return config.patch_size**2 * config.latent_channels


def embedders(config: MMDiTConfig) -> list[Matrix]:
    """The linear layers before the blocks."""
    D = config.width
    vectors = [TIMESTEP_FEATURES, D, config.pooled_dim, D]
    tokens = [Matrix("image", patch_features(config), D), Matrix("text", config.context_dim, D)]
    return [*tokens, *(Matrix("vector", features, D) for features in vectors)]


def final_layer(config: MMDiTConfig) -> list[Matrix]:
    """The linear layers after the blocks."""
    D = config.width
    return [Matrix("vector", D, 2 * D), Matrix("image", D, patch_features(config))]


def is_last(config: MMDiTConfig, i: int) -> bool:
    """Whether block i is the last one, whose text stream has keys and values only."""
    return i == config.depth - 1


def block(config: MMDiTConfig, i: int) -> list[Matrix]:
    """The linear layers of block i."""
    D, dual, last = config.width, i in config.dual_attention, is_last(config, i)
    attention, mlp = [(D, 3 * D), (D, D)], [(D, 4 * D), (4 * D, D)]
    image = [Matrix("image", *sides) for sides in attention + mlp + dual * attention]
    text = [Matrix("text", *sides) for sides in attention + mlp]
    modulations = [(D, (9 if dual else 6) * D), (D, (2 if last else 6) * D)]
    return [
        *image,
        *([Matrix("text", D, 2 * D, unused=D)] if last else text),
        *(Matrix("vector", *sides) for sides in modulations),
    ]


def parameter_count(matrices: list[Matrix]) -> int:
    """Weights and biases of linear layers."""
    return sum((m.inputs + 1) * (m.outputs + m.unused) for m in matrices)


def block_parameters(config: MMDiTConfig, i: int) -> int:
    """Parameters of block i, including its QK norms."""
    attentions = 3 if i in config.dual_attention else 2
    return parameter_count(block(config, i)) + config.qk_norm * attentions * 2 * HEAD_DIM


def parameters(config: MMDiTConfig) -> int:
    """Parameters of the network, including those stored but unused, excluding the position
    buffer."""
    blocks = sum(block_parameters(config, i) for i in range(config.depth))
    return parameter_count(embedders(config) + final_layer(config)) + blocks


def linear_flops(matrices: list[Matrix], batch: int, image: int, text: int) -> int:
    """FLOPs of linear layers: one multiplication and one addition per weight and token."""
    count = {"image": batch * image, "text": batch * text, "vector": batch}
    return sum(2 * count[m.reads] * m.inputs * m.outputs for m in matrices)


def block_flops(config: MMDiTConfig, i: int, batch: int, image: int, text: int) -> int:
    """FLOPs of the forward pass of block i, for this many image and text tokens."""
    queries = image if is_last(config, i) else image + text
    pairs = queries * (image + text) + (i in config.dual_attention) * image**2
    attention = 2 * 2 * batch * pairs * config.width  # queries with keys, weights with values
    return linear_flops(block(config, i), batch, image, text) + attention


def forward_flops(
    config: MMDiTConfig, batch: int, rows: int, columns: int, text_tokens: int
) -> int:
    """FLOPs of one forward pass, counting matrix products and attention: nearly all of it."""
    sizes = batch, rows * columns, text_tokens
    blocks = sum(block_flops(config, i, *sizes) for i in range(config.depth))
    return linear_flops(embedders(config) + final_layer(config), *sizes) + blocks


def training_flops(
    config: MMDiTConfig,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
    checkpointing: bool = False,
) -> int:
    """FLOPs of a training step. The backward pass of a product is two products, one for the
    gradient of its input and one for that of its weight. (Slightly too high: the network's own
    inputs need no gradient.)"""
    sizes = batch, rows * columns, text_tokens
    recomputed = checkpointing * sum(block_flops(config, i, *sizes) for i in range(config.depth))
    return 3 * forward_flops(config, batch, rows, columns, text_tokens) + recomputed
