"""How much memory a training step of the MMDiT needs, in closed form: a story told backwards.

Forward, every block leaves behind what its gradient will need. On the way back that is used up,
block by block, while gradients of weights take its place. So the peak is in the last block's MLP
where tokens are many, at the very end where weights are many, and seldom between: `memory` looks at
every such moment and takes the largest.

Left out are numbers that do not grow with the width (means, logsumexp), scratch memory of the
libraries, and what an allocator holds in reserve. tests/test_costs.py compares with measurements:
in float32 on CPU, and under PyTorch's own FSDP2 in both types; for bfloat16 by autocast with what
autograd keeps where CUDA's casts are imitated, without a GPU. CUDA was not measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from nanosd3.config import MMDiTConfig
from nanosd3.costs import (
    TIMESTEP_FEATURES,
    Matrix,
    block,
    block_parameters,
    embedders,
    final_layer,
    is_last,
    parameters,
    patch_features,
    stored,
)
from nanosd3.runtime import InputError

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes in one process at the peak of a step."""

    parameters: int  # this process's float32 share, copies gathered for use, positions
    gradients: int
    optimizer: int  # AdamW's two moments
    average: int  # EMA
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Step:
    """A step as one process sees it. Sizes are counts of numbers unless they are called bytes."""

    config: MMDiTConfig
    batch: int
    image: int  # tokens
    text: int
    size: int  # bytes of an activation
    checkpointing: bool  # a block keeps its inputs, and is computed again on the way back
    shards: int | None  # processes that divide all weights (FSDP2), or None

    def streams(self, image: int, text: int) -> int:
        """So many vectors of the model's width for each image token, so many for each of text."""
        return self.batch * (image * self.image + text * self.text) * self.config.width

    def outside(self) -> int:
        """Kept beside the blocks: patches, and what the embedders read and make."""
        config, D = self.config, self.config.width
        patches = self.image * patch_features(config)
        kept = patches + TIMESTEP_FEATURES + 5 * D
        if self.size == 2:  # inputs in the type in which they are read
            kept += patches + self.text * config.context_dim + config.pooled_dim
        return self.batch * kept + patch_features(config) * D

    def kept(self, i: int) -> int:
        """Kept by block i for its gradient, beside its inputs. For each token, in vectors:

        1 modulated input of the attention; 3 q, k, v beside those of the other stream; 1 output of
        the attention; 1 its copy, with heads joined and streams apart; 1 its projection, for the
        gate; 1 its sum with x; 1 modulated input of the MLP; 4 hidden layer; 1 output, for the
        gate: 14 in all. (The copy is made by joining on CPU, by cutting on CUDA.)

        Norms of q and k keep these as they came, in one piece with v: 3. On CPU a norm is many
        operations, and keeps the 2 before they meet its weight; on CUDA it is one, and bfloat16
        means CUDA here.
        """
        dual, norm, fused = i in self.config.dual_attention, self.config.qk_norm, self.size == 2
        image, text, vectors = 14, 14, 18  # vectors of an image: SiLUs, gates, scales, 1 + scale
        by_norms = (3, 3) if fused else (5, 5)
        if is_last(self.config, i):  # k and v of both streams, but q as it came, k and v with it
            image, text, vectors = 15, 3, 11
            by_norms = (1, 2) if fused else (4, 3)
        if dual:  # modulated input, q, k, v, output, projection
            image, vectors = image + 6 + norm * (2 if fused else 5), vectors + 4
        kept = self.streams(image + norm * by_norms[0], text + norm * by_norms[1])
        return kept + self.batch * vectors * self.config.width

    def also_kept(self, i: int) -> int:
        """Kept too where a whole block is computed twice: normalised inputs and the GELU, which
        elsewhere are computed twice one by one (accelerate.recomputed)."""
        dual = i in self.config.dual_attention
        return self.streams(6 + dual, 1 if is_last(self.config, i) else 6)

    def way_back(self, i: int) -> Iterator[tuple[int, int]]:
        """Moments at which much is alive: gradients of block i's weights so far, and activations
        beyond those kept, less those used up."""
        square, streams, twice = self.config.width**2, self.streams, self.checkpointing
        gone = self.kept(i) + twice * self.also_kept(i)
        # In an MLP: gradient of its output (1) and a copy that the product takes (1), gradient of
        # the GELU (4), and the GELU computed again (4) unless it was kept.
        mlp = 6 if twice else 10
        if is_last(self.config, i):
            yield 4 * square, streams(mlp, 0)
            # Where a long text and a small image are projected to keys and values.
            yield 15 * square, streams(5, 6 + 3 * self.config.qk_norm + twice) - gone
        else:  # the text's MLP, then the image's
            yield 4 * square, streams(1, mlp)
            yield 13 * square, streams(mlp, -11 if twice else -6)
        yield block_parameters(self.config, i), streams(1, 1) - gone  # done, nothing given back yet

    def gradients(self, new: int, finished: list[int]) -> int:
        """Bytes of gradients: new ones, and those of finished parts, latest first. FSDP2 holds the
        latest in float32 while processes exchange theirs, and a share of each."""
        if self.shards is None:
            return 4 * (new + sum(finished))
        return self.size * new + 4 * sum(finished[:1]) + 4 * sum(finished) // self.shards

    def moments(self) -> Iterator[tuple[int, int, int]]:
        """Bytes of gathered weights, gradients and activations whenever that may be the peak."""
        config, blocks, sharded = self.config, range(self.config.depth), self.shards is not None
        final, ends = stored(final_layer(config)), stored(final_layer(config) + embedders(config))
        weights = [block_parameters(config, i) for i in blocks]
        inputs = self.streams(1, 1)
        left = [inputs + (0 if self.checkpointing else self.kept(i)) for i in blocks]
        for i in reversed(blocks):
            before = self.outside() + sum(left[:i])
            own = inputs + self.kept(i) + self.checkpointing * self.also_kept(i)
            # FSDP2 gathers the ends for the whole step, and a block while another is computed.
            gathered = sharded * self.size * (ends + sum(weights[max(0, i - 1) : i + 1]))
            for new, beyond in self.way_back(i):
                gradients = self.gradients(final + new, weights[i + 1 :])
                yield gathered, gradients, self.size * (before + own + beyond)
        # At the embedders: gradients of x and y, and a copy of one that the product takes.
        gradients = self.gradients(ends, [ends, *weights] if sharded else weights)
        embedding = max(self.streams(2, 0), self.streams(1, 2))
        yield 0, gradients, self.size * (self.outside() + embedding)


def copies(matrices: list[Matrix]) -> int:
    """Bytes of bfloat16 copies of weights, as autocast makes them."""
    return 2 * sum(m.inputs * m.outputs for m in matrices)


class Autocast(Step):
    """A step in bfloat16 without FSDP2: weights are float32, and torch.autocast casts on the way.
    All sizes are bytes.

    Products and attention read and give bfloat16; norms read and give float32; what is made of
    both is float32. So the image's stream is float32, as positions are, and the text's bfloat16.
    Nothing is computed twice one by one. A weight is cast once, and its copy is kept for the way
    back with all others, or with its block's if blocks are computed twice; for as long as it is,
    it counts among the parameters. Its gradient is bfloat16 before it is float32.
    """

    def outside(self) -> int:
        """Kept beside the blocks: copies of what the network is given, and what embedders make."""
        config = self.config
        given = self.image * patch_features(config) + self.text * config.context_dim
        return 2 * self.batch * (given + config.pooled_dim + TIMESTEP_FEATURES + 5 * config.width)

    def kept(self, i: int) -> int:
        """Kept by block i for its gradient, beside the image's input. For each image token, times
        the width: 6 q, k, v; 2 output of the attention; 2 its part, cut off; 2 its projection;
        4 its sum with x; 4 + 4 normalised inputs, float32; 2 + 2 both modulated, for products;
        8 hidden layer; 8 GELU; 4 output, cast to be added: 48 in all. Text has 2 for the output,
        and no sum; but 4 + 4 for both inputs of norms, cast: 50.

        Norms of q and k keep these in float32: 8.
        """
        dual, norm = i in self.config.dual_attention, self.config.qk_norm
        image, text, vectors = 48 + 8 * norm, 50 + 8 * norm, 48
        if is_last(self.config, i):  # k, v of both streams; q as it came with k, v, if no norm
            image, text, vectors = 50 + 4 * norm, 14 + 4 * norm, 32
        if dual:  # normalised, modulated, q, k, v, output, projection; normed q, k beside v
            image, vectors = image + 16 + 12 * norm, vectors + 10
        return self.streams(image, text) + self.batch * vectors * self.config.width

    def way_back(self, i: int) -> Iterator[tuple[int, int]]:
        """As of a Step. Only the image's input is kept by a block itself: norms cast the text."""
        square, streams = self.config.width**2, self.streams
        if is_last(self.config, i):
            # The image's MLP: gradient of x, of the output and, before it is summed, of the gate.
            yield 0, streams(12, 0)
            # A long text is modulated: its gradient in float32, and three products of it.
            own_text = 14 + 4 * self.config.qk_norm
            yield 15 * square, streams(12, own_text + 10) - self.kept(i)
        else:
            # The end of the second computation, in front of the text's MLP: image 4 gradient,
            # 4 output, 2 attention, 2 its projection; text 2 gradient, 2 attention, 2 sum,
            # 4 modulated input. Else its MLP: gradients of output 2 and GELU 8.
            yield 0, streams(12 if self.checkpointing else 4, 10)
            yield 8 * square, streams(12, -26)  # the image's MLP
        yield block_parameters(self.config, i), streams(4, 2) - self.kept(i)

    def moments(self) -> Iterator[tuple[int, int, int]]:
        config, twice, D = self.config, self.checkpointing, self.config.width
        blocks, final = range(config.depth), stored(final_layer(config))
        weights = [block_parameters(config, i) for i in blocks]
        cast = [copies(block(config, i)) for i in blocks]
        inputs = self.streams(4, 2 * twice)
        left = [inputs + (0 if twice else self.kept(i)) for i in blocks]
        # The final layer: all copies are there, then those that are kept; and of the image 4 its
        # input, 4 normalised, 4 + 2 modulated; later 4 gradient and 12 its products instead.
        forward = sum(cast) + copies(embedders(config) + final_layer(config))
        deep = 2 * 2 * D**2  # copies in embedders of weights whose input has a gradient
        outside = self.outside()
        yield forward, 0, outside + sum(left) + self.streams(14, 2)
        yield deep + (0 if twice else sum(cast)), 0, outside + sum(left) + self.streams(24, 2)
        for i in reversed(blocks):
            own = outside + sum(left[:i]) + inputs + self.kept(i)
            others = deep + (0 if twice else sum(cast[:i]))
            for new, beyond in self.way_back(i):  # a copy goes when its gradient comes
                gradients = 4 * (final + new + sum(weights[i + 1 :]))
                yield others + max(0, cast[i] - 2 * new), gradients, own + beyond
        # At the embedders: the largest weight's gradient in bfloat16, then in both types.
        gradients = 4 * (stored(embedders(config)) + final + sum(weights))
        large = config.context_dim * D
        yield 0, gradients - 4 * large, outside + self.streams(4, 2) + 2 * large
        yield 0, gradients, self.streams(4, 0) + 2 * large


def memory(
    config: MMDiTConfig,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
    *,
    precision: str = "float32",
    checkpointing: bool = False,
    processes: int = 1,
    sharded: bool = False,
) -> Memory:
    """What one of `processes` needs, each with a batch of its own: under DDP, or FSDP2 (`sharded`);
    in bfloat16 by FSDP2's own casts, or by autocast without it. Raises InputError for other types.
    """
    if precision not in BYTES:
        raise InputError(f"memory in {precision}: known are {' and '.join(BYTES)}")
    kind = Step if sharded or precision == "float32" else Autocast
    step = kind(config, batch, rows * columns, text_tokens, BYTES[precision], checkpointing,
                processes if sharded else None)  # fmt: skip
    gathered, gradients, activations = max(step.moments(), key=sum)
    whole, positions = 4 * parameters(config), 4 * config.grid**2 * config.width
    share = -(-whole // processes) if sharded else whole
    buckets = whole if processes > 1 and not sharded else 0  # in which DDP exchanges gradients
    return Memory(
        parameters=share + positions + gathered,
        gradients=gradients + buckets,
        optimizer=2 * share,
        average=share + positions,
        activations=activations,
    )


def table(
    config: MMDiTConfig,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
    *,
    precision: str = "float32",
    checkpointing: bool = False,
    processes: Sequence[int] = (1, 8, 64),
) -> str:
    """GB of each process, a column for each number of them; several are sharded (FSDP2)."""
    found = [
        memory(config, batch, rows, columns, text_tokens, precision=precision, processes=n,
               checkpointing=checkpointing, sharded=n > 1)
        for n in processes
    ]  # fmt: skip
    lines = ["GB per process of".ljust(18) + "".join(f"{n:10}" for n in processes)]
    for name in (*asdict(found[0]), "total"):
        lines.append(f"{name:18}" + "".join(f"{getattr(m, name) / 1e9:10.2f}" for m in found))
    return "\n".join(lines)
