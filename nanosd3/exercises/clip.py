"""Exercises on CLIP: its pooled vector and its loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3 import clip
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.training import train_text


def pool_cases(generator: torch.Generator) -> list[Case]:
    long = torch.full((8, 77), 3)
    long[torch.arange(8), 60 + torch.arange(8)] = 9
    return [
        Case(
            "padded with the end token",
            (
                normal(generator, 3, 6, 4),
                torch.tensor([[8, 1, 2, 7, 7, 7], [8, 3, 7, 7, 7, 7], [8, 1, 9, 4, 5, 7]]),
                7,
            ),
        ),
        Case(
            "padded with zeros",
            (normal(generator, 2, 5, 3), torch.tensor([[6, 1, 7, 0, 0], [6, 2, 3, 7, 0]]), 7),
        ),
        large("8 texts of 77 tokens", normal(generator, 8, 77, 4), long, 9),
    ]


def pool_spec(states: Tensor, ids: Tensor, end: int) -> Tensor:
    rows = []
    for b in range(len(ids)):
        n = 0
        while ids[b, n] != end:
            n += 1
        rows.append(states[b, n])
    return torch.stack(rows)


def last_state(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return states[:, -1]


def largest_id(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return states[torch.arange(len(ids), device=ids.device), ids.argmax(1)]


def last_end(states: Tensor, ids: Tensor, end: int) -> Tensor:
    length = ids.shape[1]
    return clip.pool_at_end(states.flip(1), ids.flip(1), end) if length else states


def averaged(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return states.mean(1)


def before_the_end(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return clip.pool_at_end(states.roll(1, dims=1), ids, end)


def over_features(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return states.mean(2)


def first_state(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return states[:, 0]


def mean_up_to_end(states: Tensor, ids: Tensor, end: int) -> Tensor:
    n = (ids == end).int().argmax(1)
    kept = torch.arange(ids.shape[1], device=ids.device) <= n[:, None]
    return (states * kept[:, :, None]).sum(1) / (n[:, None] + 1)


def sum_at_ends(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return (states * (ids == end)[:, :, None]).sum(1)


def axis_kept(states: Tensor, ids: Tensor, end: int) -> Tensor:
    return clip.pool_at_end(states, ids, end)[:, None]


POOL = Exercise(
    name="pool_at_end",
    topic="text",
    points=1,
    difficulty=1,
    signature="def pool_at_end(states: Tensor, ids: Tensor, end: int) -> Tensor:",
    task="CLIP's pooled vector: from states (B, L, D) take the one at the first end-of-text token\n"
    "of each row of ids (B, L), whose id is `end`. Result: (B, D). There may be several end\n"
    "tokens.",
    specification=pool_spec,
    reference=clip.pool_at_end,
    cases=pool_cases,
    mutants=(
        Mutant(last_state, "The last position is padding; where does the text end?"),
        Mutant(largest_id, "The end token need not have the largest id."),
        Mutant(last_end, "The first end token, not the last: some models pad with it."),
        Mutant(averaged, "Take one position, not the mean of all."),
        Mutant(
            before_the_end, "One position too early: the end token itself has read the whole text."
        ),
        Mutant(
            over_features,
            "Choose along the axis of tokens, (B, L, D) -> (B, D), not along the features.",
        ),
        Mutant(first_state, "The first token has read nothing: attention is causal."),
        Mutant(
            mean_up_to_end, "Take the state at the end token alone, not a mean of those before it."
        ),
        Mutant(sum_at_ends, "There may be several end tokens: take the state at the first."),
        Mutant(axis_kept, "The result has no axis of tokens: (B, D)."),
    ),
    why="Attention is causal, so only that position has seen every word.",
    where="nanosd3/clip.py, pool_at_end",
    names=("states", "ids", "end"),
)


def pairs_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            f"{B} pairs of {D} features, scale {scale}",
            (normal(generator, B, D), 2 * normal(generator, B, D), scale),
        )
        for B, D, scale in ((4, 6, 10.0), (3, 5, 2.0))
    ] + [large("16 pairs", normal(generator, 16, 8), normal(generator, 16, 8), 5.0)]


def contrastive_spec(image: Tensor, text: Tensor, scale: float) -> Tensor:
    B = len(image)
    images = [x / x.norm() for x in image]
    texts = [x / x.norm() for x in text]
    total = torch.zeros((), dtype=image.dtype)
    for i in range(B):
        to_texts = torch.stack([scale * images[i] @ texts[j] for j in range(B)])
        to_images = torch.stack([scale * texts[i] @ images[j] for j in range(B)])
        for logits in (to_texts, to_images):  # the partner of i is i
            total = total - (logits[i] - torch.log(logits.exp().sum()))
    return total / (2 * B)


def contrastive_loss(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """`train_text.clip_loss` of a batch in which no two captions are equal."""
    same = torch.eye(len(image), dtype=image.dtype, device=image.device)
    return train_text.clip_loss(image, text, same, image.new_tensor(scale))


def not_on_the_sphere(image: Tensor, text: Tensor, scale: float) -> Tensor:
    logits, answer = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


def one_direction(image: Tensor, text: Tensor, scale: float) -> Tensor:
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    return F.cross_entropy(logits, torch.arange(len(image), device=image.device))


def both_added(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return 2 * contrastive_loss(image, text, scale)


def scale_forgotten(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return contrastive_loss(image, text, 1.0)


def scale_divides(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return contrastive_loss(image, text, 1 / scale)


def scale_times_loss(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return scale * contrastive_loss(image, text, 1.0)


def softmax_twice(image: Tensor, text: Tensor, scale: float) -> Tensor:
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    answer = torch.arange(len(image), device=image.device)
    each = F.cross_entropy(logits.softmax(1), answer), F.cross_entropy(logits.T.softmax(1), answer)
    return (each[0] + each[1]) / 2


def summed_over_pairs(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return len(image) * contrastive_loss(image, text, scale)


def normed_over_batch(image: Tensor, text: Tensor, scale: float) -> Tensor:
    logits = scale * F.normalize(image, dim=0) @ F.normalize(text, dim=0).T
    answer = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


def loss_per_pair(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return contrastive_loss(image, text, scale).expand(len(image))


CONTRASTIVE = Exercise(
    name="contrastive_loss",
    topic="text",
    points=3,
    difficulty=2,
    signature="def contrastive_loss(image: Tensor, text: Tensor, scale: float) -> Tensor:",
    task="CLIP's loss for B pairs, image and text (B, D) in the same order. The logits are scale\n"
    "times the cosine similarity of each image with each text; each image should find its text\n"
    "among all, and each text its image (cross-entropy). Return the mean over both directions, a\n"
    "tensor of shape ().",
    specification=contrastive_spec,
    reference=contrastive_loss,
    cases=pairs_cases,
    mutants=(
        Mutant(not_on_the_sphere, "Use cosines: the lengths of the vectors should not matter."),
        Mutant(one_direction, "Texts must find their images as well."),
        Mutant(both_added, "The mean of the two directions, not their sum."),
        Mutant(
            scale_forgotten,
            "The scale is not used: the softmax of cosines alone is never confident.",
        ),
        Mutant(scale_divides, "The scale multiplies; a temperature would divide."),
        Mutant(scale_times_loss, "The scale multiplies the logits, not the loss."),
        Mutant(softmax_twice, "cross_entropy takes logits: it contains the softmax already."),
        Mutant(summed_over_pairs, "The mean over the pairs, not the sum."),
        Mutant(normed_over_batch, "Each vector is divided by its own length, over its features."),
        Mutant(loss_per_pair, "One number for the batch, of shape ()."),
    ),
    size_hint="The length of each vector needs keepdim=True, or use F.normalize.",
    why="It taught CLIP what captions mean without a single label.",
    where="nanosd3/training/train_text.py, clip_loss (arXiv 2103.00020)",
    names=("image", "text", "scale"),
)

EXERCISES = (POOL, CONTRASTIVE)
