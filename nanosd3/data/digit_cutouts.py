"""Handwritten digits cut out of their images and scaled to any box of a canvas."""

import torch
from torch import Tensor

FAINT_INK = 64  # out of 255; only more than this counts for a digit's box
BOLDER = 1.5  # strokes get fainter when scaled down


class Handwriting:
    """Images of digits (n, 28, 28) uint8, indexed by label, and the boxes of their ink."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels
        self.of_label = [
            (labels == label).nonzero()[:, 0].tolist() for label in range(int(labels.max()) + 1)
        ]
        self.boxes = ink_boxes(images > FAINT_INK)  # (n, 4)

    def drawn(self, numbers: Tensor, boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
        """The ink (B, *canvas) in [0, 1] of some images' digits, each filling a box (B, 4)."""
        ink = self.images[numbers].float() / 255
        ink = transferred(ink, self.boxes[numbers], boxes, canvas)
        return (BOLDER * ink / ink.amax((1, 2), keepdim=True).clamp(min=0.1)).clamp(max=1)


def ink_boxes(ink: Tensor) -> Tensor:
    """The box (top, left, height, width) of what is True in each mask: (B, H, W) to (B, 4)."""
    starts, lengths = [], []
    for line in (ink.any(2), ink.any(1)):  # (B, H), (B, W)
        first = line.int().argmax(1)
        last = line.shape[1] - 1 - line.int().flip(1).argmax(1)
        starts.append(first)
        lengths.append(last - first + 1)
    return torch.stack([*starts, *lengths], 1)


def scaling(part: Tensor, to_part: Tensor, size: int, to_size: int) -> Tensor:
    """Weights (B, to_size, size) that scale a part of one line of pixels, given by its start and
    length (B, 2), to a part of another: interpolating, and averaging where it shrinks."""
    (start, length), (to_start, to_length) = (
        part.float().T[:, :, None],
        to_part.float().T[:, :, None],
    )
    share = (torch.arange(to_size) + 0.5 - to_start) / to_length  # (B, to_size): of the way
    middle = start + share * length - 0.5
    pixel = torch.arange(size)
    reach = (length / to_length).clamp(min=1)[:, :, None]
    weight = (1 - (pixel - middle[:, :, None]).abs() / reach).clamp(min=0)
    weight = weight * ((pixel >= start) & (pixel < start + length))[:, None]
    weight = weight / weight.sum(2, keepdim=True).clamp(min=1e-6)
    return weight * ((share > 0) & (share < 1))[:, :, None]


def transferred(images: Tensor, boxes: Tensor, to_boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """The content of a box of each image (B, H, W), scaled to fill a box of an otherwise black
    canvas: (B, *canvas). Boxes (B, 4) are top, left, height, width."""
    H, W = images.shape[1:]
    rows = scaling(boxes[:, ::2], to_boxes[:, ::2], H, canvas[0])  # (B, canvas height, H)
    columns = scaling(boxes[:, 1::2], to_boxes[:, 1::2], W, canvas[1])
    return rows @ images @ columns.mT
