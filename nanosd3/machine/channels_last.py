"""The autoencoder in channels-last memory, in which convolutions on a CPU take half the time.

Encoder, Decoder    convert their input
GroupNorm           moments without cancellation
ResBlock            its second norm in place
Up                  upsampling with 4/9 of the multiplications
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.vae import Decoder, Encoder, ResBlock, Up

SQUARES_PER_SUM = 2**16  # numbers whose squares are summed in float32: they fit in a core's cache
MULTIPLICATIONS = 2**18  # per tap when upsampling an image: fewer are not worth the trouble


class ChannelsLastEncoder(Encoder):
    """The encoder on a channels-last image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class ChannelsLastDecoder(Decoder):
    """The decoder on channels-last latents."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.contiguous(memory_format=torch.channels_last))


# --- group norm -----------------------------------------------------------------------------------


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, groups) in float64 of a channels-last x (B, C, H, W)."""
    B, C, H, W = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C), a view
    size = max(256, SQUARES_PER_SUM // (B * C))

    def group_mean(each: Tensor) -> Tensor:
        return each.double().unflatten(1, (groups, -1)).mean(2)

    # Squares of distances from a typical value: the variance is then no small part of them.
    center = group_mean(rows[:, :size].mean(1)).to(x.dtype)  # (B, groups)
    centers = center.repeat_interleave(C // groups, 1)[:, None]  # (B, 1, C)
    first = second = torch.zeros(B, C, dtype=torch.float64, device=x.device)
    for block in rows.split(size, 1):
        distance = block - centers
        first = first + distance.sum(1)
        second = second + distance.square_().sum(1)
    offset, square = group_mean(first) / (H * W), group_mean(second) / (H * W)
    return center + offset, square - offset.square()


class ChannelsLastGroupNorm(nn.GroupNorm):
    """Group norm, as accurate as in the usual layout.

    PyTorch's version for channels-last tensors on a CPU sums all squares of a group one by one in
    float32 and subtracts the squared mean: with a mean of 10 and a deviation of 1, half of the
    digits are lost, and the larger the image, the more.
    """

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Group norm of `x`, written into the memory of `out` if that is given and possible."""
        usual = x.device.type != "cpu" or x.dtype == torch.float64 or x.dim() != 4
        if usual or x.is_contiguous():
            return super().forward(x)
        small = x.numel() <= SQUARES_PER_SUM
        if torch.is_grad_enabled() or x.dtype != torch.float32 or small:
            # Two copies. The faster backward pass of the usual layout makes up for them, and for a
            # small image they are cheaper than many small operations.
            out = super().forward(x.contiguous())
            return out.contiguous(memory_format=torch.channels_last)
        mean, variance = group_moments(x, self.num_groups)
        scale = self.spread((variance + self.eps).rsqrt()) * self.weight  # (B, C)
        shift = self.bias - self.spread(mean) * scale
        scale, shift = (a.to(x.dtype)[:, :, None, None] for a in (scale, shift))
        return torch.addcmul(shift, x, scale, out=out)

    def spread(self, each: Tensor) -> Tensor:
        """A value for each group (B, groups) as one for each channel (B, C)."""
        return each.repeat_interleave(self.num_channels // self.num_groups, 1)


class InPlaceResBlock(ResBlock):
    """A block that, if no gradient is needed, overwrites whatever is not read again: all but its
    input. (If someone has removed its norms, that would be overwritten too: then nothing is.)"""

    def forward(self, x: Tensor) -> Tensor:
        normed = all(isinstance(norm, ChannelsLastGroupNorm) for norm in (self.norm1, self.norm2))
        if torch.is_grad_enabled() or not normed:
            return super().forward(x)
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h, out=h), inplace=True))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


# --- upsampling -----------------------------------------------------------------------------------


def convolve_repeated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution of the image x (B, C, H, W) upsampled twofold by repetition: (B, C, 2H, 2W).

    The nine taps of an output pixel fall on only 2x2 distinct input pixels. Which taps share a
    pixel depends on whether the output's row and column are even or odd, so four 2x2 filters, in
    which shared taps are summed beforehand, give the same result with 4/9 of the multiplications.
    """
    B, _, H, W = x.shape
    out = x.new_empty(B, 2 * H, 2 * W, len(weight)).permute(0, 3, 1, 2)  # channels last
    x = F.pad(x, (1, 1, 1, 1))
    for row in (0, 1):
        for column in (0, 1):
            taps = merge_taps(merge_taps(weight, 2, row), 3, column)  # (C_out, C_in, 2, 2)
            seen = x[:, :, row : row + H + 1, column : column + W + 1]
            out[:, :, row::2, column::2] = F.conv2d(seen, taps, bias)
    return out


def merge_taps(weight: Tensor, dim: int, odd: int) -> Tensor:
    """Merge three taps into two: at even positions the last two share a pixel, at odd the first."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first + middle, last] if odd else [first, middle + last], dim)


class ChannelsLastUp(Up):
    """`Up` through `convolve_repeated` where that is faster: on a CPU, with enough to multiply."""

    def forward(self, x: Tensor) -> Tensor:
        C, H, W = x.shape[1:]
        worth_it = C >= 32 and C * C * H * W >= MULTIPLICATIONS
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            worth_it = False
        if worth_it and not torch.is_grad_enabled():
            return convolve_repeated(x, self.conv.weight, self.conv.bias)
        return super().forward(x)
