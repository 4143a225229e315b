"""What a training step of the MMDiT holds in memory at its peak, in closed form.

In the forward pass every block saves what its backward pass will need. In the backward pass these
tensors are freed, block by block, while gradients of the weights take their place. So the peak is
in the MLP of the last block if there are many tokens, at the very end if there are many weights,
and rarely in between. A step lists every such point; training_memory.py takes the largest.

Not counted: tensors whose size does not depend on the width (means, logsumexp), scratch memory of
libraries, and what an allocator reserves. tests/measure/test_memory.py compares the formula with
measurements: in float32 on a CPU, and with PyTorch's FSDP2 in both precisions. For bfloat16 with
autocast, the formula is compared with what autograd saves when CUDA's casts are imitated. On an
H200 it was within 9% of the measured peak.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nanosd3.config_types import MMDiTConfig
from nanosd3.embeddings import TIMESTEP_FEATURES
from nanosd3.measure.costs import (
    Matrix,
    block,
    block_parameters,
    embedders,
    final_layer,
    is_last,
    parameter_count,
    patch_features,
)


@dataclass(frozen=True)
class Step:
    """A training step in one process. Sizes are numbers of elements unless called bytes."""

    config: MMDiTConfig
    batch: int
    image: int  # tokens
    text: int  # tokens
    size: int  # bytes of an activation's element
    checkpointing: bool  # blocks save their inputs only and are recomputed in the backward pass
    shards: int | None  # processes that share all weights (FSDP2), or None

    def streams(self, image: int, text: int) -> int:
        """Size of `image` vectors per image token and `text` vectors per text token, each as wide
        as the model."""
        return self.batch * (image * self.image + text * self.text) * self.config.width

    def outside_blocks(self) -> int:
        """Saved outside the blocks: patches, and the inputs and outputs of the embedders."""
        config, D = self.config, self.config.width
        patches = self.image * patch_features(config)
        saved = patches + TIMESTEP_FEATURES + 5 * D
        if self.size == 2:  # the network's inputs once more, cast to bfloat16
            saved += patches + self.text * config.context_dim + config.pooled_dim
        return self.batch * saved + patch_features(config) * D

    def saved(self, i: int) -> int:
        """Saved by block i for its backward pass, besides its inputs. Vectors per token:

            1  modulated input of the attention
            3  q, k, v, concatenated with those of the other stream
            1  output of the attention
            1  its copy with heads joined and streams split
            1  its projection, needed for the gradient of the gate
            1  the residual sum
            1  modulated input of the MLP
            4  hidden layer
            1  output of the MLP, needed for the gradient of the gate

        In total 14. (The copy is made on a CPU by joining heads, on CUDA by splitting streams.)

        QK norms save their inputs, a single tensor with v: 3. On a CPU the norm is several
        operations, which also save the 2 normalised tensors before the weight is applied; on CUDA,
        which bfloat16 implies here, it is one fused operation.
        """
        dual, norm, fused = i in self.config.dual_attention, self.config.qk_norm, self.size == 2
        image, text, vectors = 14, 14, 18  # vectors per image: SiLU, gates, scales, 1 + scale
        norms = (3, 3) if fused else (5, 5)
        if is_last(self.config, i):  # text has k and v only; q is saved uncopied, along with k, v
            image, text, vectors = 15, 3, 11
            norms = (1, 2) if fused else (4, 3)
        if dual:  # modulated input, q, k, v, output, projection
            image, vectors = image + 6 + norm * (2 if fused else 5), vectors + 4
        saved = self.streams(image + norm * norms[0], text + norm * norms[1])
        return saved + self.batch * vectors * self.config.width

    def saved_by_recomputation(self, i: int) -> int:
        """Saved in addition while block i is recomputed as a whole: normalised inputs and the
        output of the GELU, which otherwise are recomputed one by one (accelerate.recomputed)."""
        dual = i in self.config.dual_attention
        return self.streams(6 + dual, 1 if is_last(self.config, i) else 6)

    def backward(self, i: int) -> Iterator[tuple[int, int]]:
        """Candidates for the peak in the backward pass of block i: gradients of its weights so far,
        and activations beyond those saved, less those freed already."""
        square, streams, recomputed = self.config.width**2, self.streams, self.checkpointing
        freed = self.saved(i) + recomputed * self.saved_by_recomputation(i)
        # In an MLP: the gradient of its output (1) and a copy of it for the product (1), the
        # gradient of the GELU (4), and the output of the GELU again (4) unless it was saved.
        mlp = 6 if recomputed else 10
        if is_last(self.config, i):
            yield 4 * square, streams(mlp, 0)
            # The key and value projections, if the text is long and the image small.
            yield 15 * square, streams(5, 6 + 3 * self.config.qk_norm + recomputed) - freed
        else:  # the MLP of the text, then that of the image
            yield 4 * square, streams(1, mlp)
            yield 13 * square, streams(mlp, -11 if recomputed else -6)
        yield block_parameters(self.config, i), streams(1, 1) - freed  # the end of the block

    def gradients(self, current: int, finished: list[int]) -> int:
        """Bytes of gradients: those of the current part and those of finished parts, latest first.
        FSDP2 holds the latest in float32 while it is reduced, and a share of every one."""
        if self.shards is None:
            return 4 * (current + sum(finished))
        return self.size * current + 4 * sum(finished[:1]) + 4 * sum(finished) // self.shards

    def candidates(self) -> Iterator[tuple[int, int, int]]:
        """Bytes of gathered or cast weights, gradients and activations at every point of the step
        that may be the peak."""
        config, blocks, sharded = self.config, range(self.config.depth), self.shards is not None
        final = parameter_count(final_layer(config))
        ends = parameter_count(final_layer(config) + embedders(config))
        weights = [block_parameters(config, i) for i in blocks]
        inputs = self.streams(1, 1)
        held = [inputs + (0 if self.checkpointing else self.saved(i)) for i in blocks]
        for i in reversed(blocks):
            before = self.outside_blocks() + sum(held[:i])
            own = inputs + self.saved(i) + self.checkpointing * self.saved_by_recomputation(i)
            # FSDP2 gathers embedders and final layer for the whole step, and prefetches one block.
            gathered = sharded * self.size * (ends + sum(weights[max(0, i - 1) : i + 1]))
            for new, beyond in self.backward(i):
                gradients = self.gradients(final + new, weights[i + 1 :])
                yield gathered, gradients, self.size * (before + own + beyond)
        # In the embedders: the gradients of x and y, and a copy of one for the product.
        gradients = self.gradients(ends, [ends, *weights] if sharded else weights)
        embedding = max(self.streams(2, 0), self.streams(1, 2))
        yield 0, gradients, self.size * (self.outside_blocks() + embedding)


def cast_bytes(matrices: list[Matrix]) -> int:
    """Bytes of the bfloat16 copies of weights that autocast makes."""
    return 2 * sum(m.inputs * m.outputs for m in matrices)


class Autocast(Step):
    """A step in bfloat16 without FSDP2: float32 weights under torch.autocast. All sizes are bytes.

    Matrix products and attention take and return bfloat16, norms float32; an operation on both
    returns float32. So the image stream is float32, since positions are, and the text stream is
    bfloat16. No activation is recomputed on its own. A weight is cast once; its copy is kept for
    the backward pass together with all others, or with those of its block if blocks are
    recomputed. Copies count as parameters. The gradient of a weight is first bfloat16, then cast
    to float32.
    """

    def outside_blocks(self) -> int:
        """Saved outside the blocks: cast inputs of the network, and outputs of the embedders."""
        config = self.config
        inputs = self.image * patch_features(config) + self.text * config.context_dim
        return 2 * self.batch * (inputs + config.pooled_dim + TIMESTEP_FEATURES + 5 * config.width)

    def saved(self, i: int) -> int:
        """Saved by block i for its backward pass, besides the image stream's input. Bytes per image
        token, in units of the width:

            6      q, k, v
            2      output of the attention
            2      the image's part of it, split off
            2      its projection
            4      the residual sum
            4 + 4  normalised inputs of attention and MLP, float32
            2 + 2  both after modulation, cast for the products
            8      hidden layer
            8      output of the GELU
            4      output of the MLP, cast for the residual sum

        In total 48. Text saves 2 for the output of the MLP and no sum, but 4 + 4 for both inputs of
        the norms, cast to float32: 50. QK norms save q and k in float32: 8.
        """
        dual, norm = i in self.config.dual_attention, self.config.qk_norm
        image, text, vectors = 48 + 8 * norm, 50 + 8 * norm, 48
        if is_last(self.config, i):  # k, v of both streams; without QK norm q is saved uncopied
            image, text, vectors = 50 + 4 * norm, 14 + 4 * norm, 32
        if dual:  # normalised, modulated, q, k, v, output, projection; with QK norm q, k again
            image, vectors = image + 16 + 12 * norm, vectors + 10
        return self.streams(image, text) + self.batch * vectors * self.config.width

    def backward(self, i: int) -> Iterator[tuple[int, int]]:
        """As in Step. A block saves only the image's input itself: norms save a cast of the
        text's."""
        square, streams = self.config.width**2, self.streams
        if is_last(self.config, i):
            # The MLP of the image: gradients of x, of the output and, unreduced, of the gate.
            yield 0, streams(12, 0)
            # The modulation of a long text: its gradient in float32, and three products with it.
            own_text = 14 + 4 * self.config.qk_norm
            yield 15 * square, streams(12, own_text + 10) - self.saved(i)
        else:
            # With checkpointing, when the block has just been recomputed: image 4 gradient,
            # 4 output, 2 attention, 2 its projection; text 2 gradient, 2 attention, 2 sum,
            # 4 modulated input. Without, in the MLP of the text: gradients of its output (2) and of
            # the GELU (8).
            yield 0, streams(12 if self.checkpointing else 4, 10)
            yield 8 * square, streams(12, -26)  # the MLP of the image
        yield block_parameters(self.config, i), streams(4, 2) - self.saved(i)

    def candidates(self) -> Iterator[tuple[int, int, int]]:
        """As in Step."""
        config, recomputed, D = self.config, self.checkpointing, self.config.width
        blocks, final = range(config.depth), parameter_count(final_layer(config))
        weights = [block_parameters(config, i) for i in blocks]
        cast = [cast_bytes(block(config, i)) for i in blocks]
        inputs = self.streams(4, 2 * recomputed)
        held = [inputs + (0 if recomputed else self.saved(i)) for i in blocks]
        # In the final layer. End of the forward pass: all cast weights; image tokens with 4 bytes
        # of input, 4 normalised, 4 + 2 modulated. Backward: the cast weights that were kept; 4 of
        # gradient and 12 of products with it instead.
        forward = sum(cast) + cast_bytes(embedders(config) + final_layer(config))
        hidden = 2 * 2 * D**2  # cast weights in embedders whose input needs a gradient
        outside = self.outside_blocks()
        yield forward, 0, outside + sum(held) + self.streams(14, 2)
        yield (
            hidden + (0 if recomputed else sum(cast)),
            0,
            outside + sum(held) + self.streams(24, 2),
        )
        for i in reversed(blocks):
            own = outside + sum(held[:i]) + inputs + self.saved(i)
            others = hidden + (0 if recomputed else sum(cast[:i]))
            for new, beyond in self.backward(i):  # a gradient takes the place of a cast weight
                gradients = 4 * (final + new + sum(weights[i + 1 :]))
                yield others + max(0, cast[i] - 2 * new), gradients, own + beyond
        # In the embedders: the gradient of the largest weight in bfloat16, then in both types.
        gradients = 4 * (parameter_count(embedders(config)) + final + sum(weights))
        largest = config.context_dim * D
        yield 0, gradients - 4 * largest, outside + self.streams(4, 2) + 2 * largest
        yield 0, gradients, self.streams(4, 0) + 2 * largest
