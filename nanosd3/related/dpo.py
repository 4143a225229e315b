"""Diffusion-DPO: tune a finished model on which of two images is preferred (arXiv 2311.12908).

A preference says which of two images for one prompt is better. It is modelled by a reward r and the
Bradley-Terry rule, p(winner preferred) = sigmoid(r(winner) - r(loser)). The reward need not be
learned: for the model that maximises it while staying near a reference, r is beta times the
logarithm of its likelihood over the reference's, up to a term that depends on the prompt alone. So
the model's own likelihoods replace the reward, and preferences train it by logistic regression.

A flow's likelihood is expensive to compute, but its training error bounds it. With the same time
and noise for both images and both models, the reward of an image is how far the model's error is
below the reference's (Wallace et al., eq. 14, with rectified flow's velocity errors in place of
noise errors; their factor T w and the one half are absorbed into beta):

    margin = (reference's error - error)(winner) - (reference's error - error)(loser)
    loss = -log sigmoid(beta margin)

The loss can fall in two ways: the winner's error falls, or the loser's rises. Only a large beta and
few steps keep a model from the second alone, which ruins all images.

The trained update has low rank (LoRA, arXiv 2106.09685): W + up down for each linear layer of the
blocks, with up (out, rank) and down (rank, in). `up` starts at zero, so training starts from the
model as it is. At the end the product is added to W, and the model has its usual shape. Stable
Diffusion 3 was tuned this way, with rank 128 on all linear layers (arXiv 2403.03206, appendix C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nanosd3.flow import flow_loss, interpolate
from nanosd3.mmdit import MMDiT
from nanosd3.training.train_flow import Network


class LowRank(nn.Module):
    """A parametrization of a weight (out, in): the stored one, plus a product of low rank."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator | None = None):
        super().__init__()
        outputs, inputs = weight.shape
        start = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        self.down = nn.Parameter(start.to(weight))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def linear_layers(model: MMDiT) -> list[nn.Linear]:
    """Those of the joint blocks: attention, MLPs and modulations of both streams."""
    return [layer for layer in model.joint_blocks.modules() if isinstance(layer, nn.Linear)]


def add_low_rank(model: MMDiT, rank: int, generator: torch.Generator | None = None) -> MMDiT:
    """Freeze a model and add trainable matrices of low rank to the linear layers of its blocks, in
    place. Its outputs do not change."""
    model.requires_grad_(False)
    for layer in linear_layers(model):
        addition = LowRank(layer.weight, rank, generator)
        parametrize.register_parametrization(layer, "weight", addition)
    return model


def merge_low_rank(model: MMDiT) -> MMDiT:
    """Add what was trained to the weights, in place: a model of the usual shape, frozen."""
    for layer in linear_layers(model):
        parametrize.remove_parametrizations(layer, "weight")
    return model


PromptText = tuple[Tensor, Tensor]  # context (B, M, Dc), pooled (B, Dp)


def pair_errors(
    network: Network, winner: Tensor, loser: Tensor, noise: Tensor, t: Tensor, text: PromptText
) -> tuple[Tensor, Tensor]:
    """Errors (B,) of the velocities of winners and of losers (B, C, h, w), which share a prompt,
    a time t (B,) and noise (B, C, h, w)."""
    x0, both = torch.cat([winner, loser]), torch.cat([noise, noise])
    times = torch.cat([t, t])
    velocity = network(interpolate(x0, both, times), times, *(torch.cat([x, x]) for x in text))
    on_winner, on_loser = flow_loss(velocity, x0, both).chunk(2)
    return on_winner, on_loser


def reward_margin(errors: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Tensor:
    """The implicit reward of the winner less that of the loser, (B,), without beta. `errors` and
    `reference` are those of (winner, loser)."""
    winner, loser = (before - now for before, now in zip(reference, errors, strict=True))
    return winner - loser


def dpo_loss(
    errors: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float
) -> Tensor:
    """-log of the probability of the given preferences, (B,): log 2 for the reference itself."""
    return -F.logsigmoid(beta * reward_margin(errors, reference))
