"""What a step of the MMDiT costs, in closed form: weights and arithmetic.

A transformer is a list of matrices. Each stores inputs x outputs numbers, and multiplies and adds
as often for every token that it reads; attention has no weights and adds two products of all
queries with all keys. What a step needs of memory is a longer story (footprint.py).

An image is `rows` x `columns` patches, which are its tokens.
"""

from typing import NamedTuple

from nanosd3.config import MMDiTConfig

HEAD_DIM = 64
TIMESTEP_FEATURES = 256


class Matrix(NamedTuple):
    """A linear layer with its bias."""

    reads: str  # "image" or "text": every token; "vector": the conditioning, once an image
    inputs: int
    outputs: int
    unused: int = 0  # further outputs, stored and never computed


def patch_features(config: MMDiTConfig) -> int:
    return config.patch_size**2 * config.latent_channels


def embedders(config: MMDiTConfig) -> list[Matrix]:
    D = config.width
    vectors = [TIMESTEP_FEATURES, D, config.pooled_dim, D]
    tokens = [Matrix("image", patch_features(config), D), Matrix("text", config.context_dim, D)]
    return [*tokens, *(Matrix("vector", features, D) for features in vectors)]


def final_layer(config: MMDiTConfig) -> list[Matrix]:
    D = config.width
    return [Matrix("vector", D, 2 * D), Matrix("image", D, patch_features(config))]


def is_last(config: MMDiTConfig, i: int) -> bool:
    """Whether block i is the one whose text has keys and values only."""
    return i == config.depth - 1


def block(config: MMDiTConfig, i: int) -> list[Matrix]:
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


def stored(matrices: list[Matrix]) -> int:
    return sum((m.inputs + 1) * (m.outputs + m.unused) for m in matrices)


def block_parameters(config: MMDiTConfig, i: int) -> int:
    attentions = 3 if i in config.dual_attention else 2
    return stored(block(config, i)) + config.qk_norm * attentions * 2 * HEAD_DIM


def parameters(config: MMDiTConfig) -> int:
    """How many numbers are trained, or stored for the files' sake; without the positions."""
    blocks = sum(block_parameters(config, i) for i in range(config.depth))
    return stored(embedders(config) + final_layer(config)) + blocks


def multiplied(matrices: list[Matrix], batch: int, image: int, text: int) -> int:
    """FLOPs of products: a multiplication and an addition for each weight and what it reads."""
    count = {"image": batch * image, "text": batch * text, "vector": batch}
    return sum(2 * count[m.reads] * m.inputs * m.outputs for m in matrices)


def block_flops(config: MMDiTConfig, i: int, batch: int, image: int, text: int) -> int:
    queries = image if is_last(config, i) else image + text
    pairs = queries * (image + text) + (i in config.dual_attention) * image**2
    attention = 2 * 2 * batch * pairs * config.width  # queries with keys, weights with values
    return multiplied(block(config, i), batch, image, text) + attention


def forward_flops(
    config: MMDiTConfig, batch: int, rows: int, columns: int, text_tokens: int
) -> int:
    """FLOPs of one pass: matrix products and attention, which are nearly all of it."""
    sizes = batch, rows * columns, text_tokens
    blocks = sum(block_flops(config, i, *sizes) for i in range(config.depth))
    return multiplied(embedders(config) + final_layer(config), *sizes) + blocks


def training_flops(
    config: MMDiTConfig,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
    checkpointing: bool = False,
) -> int:
    """FLOPs of a step: the gradient of a product is two products, for its input and its weight.
    (A few per cent more than there are: what the network itself is given needs no gradient.)"""
    sizes = batch, rows * columns, text_tokens
    again = checkpointing * sum(block_flops(config, i, *sizes) for i in range(config.depth))
    return 3 * forward_flops(config, batch, rows, columns, text_tokens) + again
