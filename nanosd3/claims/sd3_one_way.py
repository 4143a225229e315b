"""An MMDiT whose streams do not both read each other.

In joint attention every token attends to all tokens of both streams. Here the queries of one stream
may see only its own keys: the text is then independent of the image, or the image gets the text
only through the pooled vector. Weights and their names are MMDiT's, so those of a trained one can
be loaded into a cut one, and vice versa.
"""

from torch import Tensor

from nanosd3.config_types import MMDiTConfig
from nanosd3.layers import attention
from nanosd3.mmdit import JointBlock, MMDiT, Modulation, join_streams


class OneWayBlock(JointBlock):
    """A joint block in which a stream may attend to itself alone."""

    image_reads_text = text_reads_image = True

    def attend(
        self, x: Tensor, y: Tensor, x_mod: Modulation, y_mod: Modulation
    ) -> tuple[Tensor, Tensor]:
        text = self.context_block.attn.project(self.context_block.modulated(y, y_mod))
        image = self.x_block.attn.project(self.x_block.modulated(x, x_mod))
        _, *both = join_streams(text, image)  # keys and values, (B, heads, M+N, 64)
        x_attn = attention(image[0], *(both if self.image_reads_text else image[1:]))  # (B, N, D)
        if self.context_block.attn.keys_only:
            return x_attn, x_attn[:, :0]
        return x_attn, attention(text[0], *(both if self.text_reads_image else text[1:]))


class OneWayMMDiT(MMDiT):
    """An MMDiT of such blocks. With both ways open it is the plain one, weight for weight."""

    def __init__(self, config: MMDiTConfig, image_reads_text: bool, text_reads_image: bool):
        super().__init__(config)
        for i, plain in enumerate(self.joint_blocks):
            last, dual = i == config.depth - 1, i in config.dual_attention
            block = OneWayBlock(config.width, config.qk_norm, dual, last)
            block.load_state_dict(plain.state_dict())
            block.image_reads_text, block.text_reads_image = image_reads_text, text_reads_image
            self.joint_blocks[i] = block
