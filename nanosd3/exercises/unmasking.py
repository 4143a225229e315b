"""Exercises on sampling hidden tokens, many at a time."""

import math

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related import muse
from nanosd3.related.muse import MASK


def count_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, step: int, steps: int, hidden: list[int], at_first: list[int]) -> Case:
        return Case(label, (torch.tensor(hidden), torch.tensor(at_first), step, steps))

    cases = [
        case("first step of 8", 0, 8, [49, 48, 28, 7], [49, 48, 28, 7]),
        case("fifth step of 8", 4, 8, [34, 33, 19], [49, 48, 28]),
        case("last step of 5", 4, 5, [15, 3], [49, 11]),
        case("few tokens, many steps", 1, 16, [4, 2, 1, 48], [5, 3, 2, 49]),
        case("a single step", 0, 1, [49, 20, 1], [49, 20, 1]),
    ]
    return [*cases, large("300 images", *case("", 2, 7, [30] * 300, [49] * 300).arguments)]


def left_hidden_spec(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    left = torch.zeros_like(hidden)
    if step + 1 < steps:  # the last step leaves none
        for i in range(len(hidden)):
            planned = math.floor(at_first[i] * math.cos(math.pi / 2 * (step + 1) / steps))
            left[i] = max(1, min(planned, int(hidden[i]) - 1))  # fewer than now, at least one
    return left


def by_plan(planned: Tensor, hidden: Tensor, step: int, steps: int) -> Tensor:
    left = torch.minimum(planned.floor().long(), hidden - 1).clamp(min=1)
    return left if step + 1 < steps else torch.zeros_like(hidden)


def cosine(step: float, steps: int) -> float:
    return math.cos(math.pi / 2 * step / steps)


def evenly(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return by_plan(at_first * (1 - (step + 1) / steps), hidden, step, steps)


def before_the_step(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return by_plan(at_first * cosine(step, steps), hidden, step, steps)


def many_at_first(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    share = 1 - math.sin(math.pi / 2 * (step + 1) / steps)
    return by_plan(at_first * share, hidden, step, steps)


def how_many_are_kept(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return hidden - muse.left_hidden(hidden, at_first, step, steps)


def share_of_now(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return by_plan(hidden * cosine(step + 1, steps), hidden, step, steps)


def all_may_stay(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return by_plan(at_first * cosine(step + 1, steps), hidden + 1, step, steps)


def none_may_be_left(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    planned = (at_first * cosine(step + 1, steps)).floor().long()
    return torch.minimum(planned, hidden - 1).clamp(min=0)


def one_is_left_over(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return by_plan(at_first * cosine(step + 1, steps), hidden, step, steps + 1)


def rounded_up(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return by_plan((at_first * cosine(step + 1, steps)).ceil(), hidden, step, steps)


def half_a_turn(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:
    return by_plan(at_first * (1 + cosine(2 * step + 2, steps)) / 2, hidden, step, steps)


LEFT_HIDDEN = Exercise(
    name="left_hidden",
    topic="muse",
    points=2,
    difficulty=2,
    signature="def left_hidden(hidden: Tensor, at_first: Tensor, step: int, steps: int) -> Tensor:",
    task="How many tokens of each image (B,), of type long, stay hidden after a step; steps are\n"
    "counted from 0. `hidden` (B,) are hidden before it, `at_first` (B,) were before step 0. The\n"
    "share is that of a quarter of a cosine, rounded down; fewer than before, at least one before\n"
    "the last step, and none after it.",
    specification=left_hidden_spec,
    reference=muse.left_hidden,
    cases=count_cases,
    mutants=(
        Mutant(
            evenly, "The number follows a cosine: few tokens are kept at first, many at the end."
        ),
        Mutant(before_the_step, "After the first step, number 0, some have already been kept."),
        Mutant(
            many_at_first, "The first guesses have the least context: few tokens are kept at first."
        ),
        Mutant(how_many_are_kept, "How many stay hidden, not how many are kept."),
        Mutant(share_of_now, "It is a share of the tokens that were hidden at first."),
        Mutant(all_may_stay, "Each step keeps at least one token."),
        Mutant(none_may_be_left, "Before the last step at least one token stays hidden."),
        Mutant(one_is_left_over, "After the last step nothing is hidden."),
        Mutant(rounded_up, "Round down."),
        Mutant(half_a_turn, "A quarter of a turn: from cos 0 to cos(pi / 2)."),
    ),
    why="The fewer tokens are drawn at once, the less they can contradict each other.",
    where="nanosd3/related/muse.py, left_hidden (arXiv 2202.04200, section 3.2)",
    names=("hidden", "at_first", "step", "steps"),
    differentiable=False,
)


def step_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, left: list[int], hidden: float, *shape: int) -> Case:
        tokens = torch.randint(9, shape, generator=generator)
        tokens[torch.rand(shape, generator=generator) < hidden] = MASK
        guess = torch.randint(9, shape, generator=generator)
        return Case(label, (tokens, guess, normal(generator, *shape), torch.tensor(left)))

    cases = [
        case("2 images of 3x5, half hidden", [2, 4], 0.7, 2, 3, 5),
        case("3 images of 4x2, all hidden", [7, 3, 1], 2.0, 3, 4, 2),
        case("the last step", [0, 0], 0.4, 2, 5, 3),
        case("nothing was hidden", [0, 0], -1.0, 2, 2, 3),
    ]
    return [*cases, large("images of 7x7", *case("", [20] * 9, 0.9, 9, 7, 7).arguments)]


def keep_surest_spec(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    out = tokens.clone()
    for b in range(len(tokens)):
        hidden = [place for place in range(tokens[b].numel()) if tokens[b].flatten()[place] == -1]
        hidden.sort(key=lambda place: float(confidence[b].flatten()[place]))
        for place in hidden[int(left[b]) :]:  # all but the least sure
            out[b].view(-1)[place] = guess[b].flatten()[place]
    return out


def least_sure_kept(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    return muse.keep_surest(tokens, guess, -confidence, left)


def known_ones_compete(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    everything = torch.full_like(tokens, MASK)
    found = muse.keep_surest(everything, guess, confidence, left)
    return torch.where((tokens == MASK) | (found == MASK), found, tokens)


def known_replaced(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    found = muse.keep_surest(tokens, guess, confidence, left)
    return torch.where(found == MASK, found, guess)


def so_many_kept(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    hidden = (tokens == MASK).flatten(1).sum(1)
    return muse.keep_surest(tokens, guess, confidence, hidden - left)


def all_kept(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    return torch.where(tokens == MASK, guess, tokens)


def first_places(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    place = torch.arange(confidence[0].numel()).view_as(confidence[0])
    return muse.keep_surest(tokens, guess, place.expand_as(confidence).float(), left)


def one_plan_for_all(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    return muse.keep_surest(tokens, guess, confidence, left[:1].expand_as(left))


def surest_of_the_batch(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    t, g, c = (x.flatten()[None, None] for x in (tokens, guess, confidence))
    return muse.keep_surest(t, g, c, left.sum()[None]).view_as(tokens)


def order_for_rank(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) -> Tensor:
    hidden = tokens == MASK
    order = confidence.masked_fill(~hidden, math.inf).flatten(1).argsort(1).view_as(tokens)
    return torch.where(hidden & (order >= left[:, None, None]), guess, tokens)


KEEP_SUREST = Exercise(
    name="keep_surest",
    topic="muse",
    points=3,
    difficulty=3,
    signature="def keep_surest(tokens: Tensor, guess: Tensor, confidence: Tensor, left: Tensor) "
    "-> Tensor:",
    task="What a step keeps. Of tokens (B, h, w) the hidden ones are -1; each has a guess\n"
    "(B, h, w) and how sure it is, its confidence (B, h, w). The `left` (B,) least sure of each\n"
    "image's hidden tokens stay hidden; for the others the guess is put in. What is known stays.",
    specification=keep_surest_spec,
    reference=muse.keep_surest,
    cases=step_cases,
    mutants=(
        Mutant(least_sure_kept, "The least sure stay hidden; large confidence is sure."),
        Mutant(known_ones_compete, "Only hidden tokens are ranked; known ones are never hidden."),
        Mutant(known_replaced, "What is known stays as it is, whatever was guessed there."),
        Mutant(so_many_kept, "`left` tokens stay hidden; all other guesses are kept."),
        Mutant(all_kept, "Not all guesses are kept: the least sure stay hidden."),
        Mutant(first_places, "Confidence decides which guesses are kept, not their place."),
        Mutant(one_plan_for_all, "Each image has its own number of tokens that stay hidden."),
        Mutant(surest_of_the_batch, "Rank the tokens of each image separately."),
        Mutant(
            order_for_rank,
            "argsort gives the token at each rank; sort that again for each token's rank.",
        ),
    ),
    why="This one step, repeated, draws an image; started from a picture with a hole, it repairs.",
    where="nanosd3/related/muse.py, keep_surest (arXiv 2202.04200, section 3.2)",
    names=("tokens", "guess", "confidence", "left"),
    differentiable=False,
)


EXERCISES = (LEFT_HIDDEN, KEEP_SUREST)
