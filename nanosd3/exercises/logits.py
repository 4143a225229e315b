"""An exercise on guidance of logits."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.related import muse


def logit_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, guidance: float, step: int, steps: int, *shape: int) -> Case:
        pair = normal(generator, *shape), normal(generator, *shape)
        return Case(label, (*pair, guidance, step, steps))

    cases = [
        case("scale 4, third step of 8", 4.0, 2, 8, 2, 3, 4, 5),
        case("scale 1.5, first step of 5", 1.5, 0, 5, 3, 2, 3, 7),
        case("scale 3, last step of 6", 3.0, 5, 6, 1, 4, 2, 6),
        case("a single step", 2.5, 0, 1, 2, 2, 3, 4),
    ]
    return [*cases, large("64 codes", *case("", 2.0, 3, 8, 4, 7, 7, 64).arguments)]


def guide_logits_spec(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    scale = 1.0  # in the first step, and if it is the only one
    if steps > 1:
        scale = 1 + (guidance - 1) * step / (steps - 1)  # `guidance` in the last
    out = torch.empty(l_prompt.shape, dtype=l_prompt.dtype)
    for i, (a, b) in enumerate(zip(l_prompt.flatten(), l_negative.flatten(), strict=True)):
        out.view(-1)[i] = b + scale * (a - b)
    return out


def guide_logits(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    """`guided_logits` of a network that gives these two."""

    def network(tokens: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return context

    logits = muse.guided_logits(network, (l_prompt, l_prompt), (l_negative, l_negative))
    return logits(torch.zeros_like(l_prompt[..., 0]), muse.rising(guidance, step, steps))


def moved(l_prompt: Tensor, l_negative: Tensor, scale: float) -> Tensor:
    return l_negative + scale * (l_prompt - l_negative)


def full_from_the_start(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    return moved(l_prompt, l_negative, guidance)


def rises_from_zero(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    return moved(l_prompt, l_negative, guidance * step / max(1, steps - 1))


def never_arrives(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    return moved(l_prompt, l_negative, 1 + (guidance - 1) * step / steps)


def one_step_early(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    return moved(l_prompt, l_negative, 1 + (guidance - 1) * (step + 1) / steps)


def the_papers_w(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    return moved(l_prompt, l_negative, 1 + guidance * step / max(1, steps - 1))


def falls(l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int) -> Tensor:
    return guide_logits(l_prompt, l_negative, guidance, steps - 1 - step, steps)


def towards_negative(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    return guide_logits(l_negative, l_prompt, guidance, step, steps)


def probabilities_moved(
    l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, steps: int
) -> Tensor:
    return guide_logits(l_prompt.softmax(-1), l_negative.softmax(-1), guidance, step, steps)


GUIDE_LOGITS = Exercise(
    name="guide_logits",
    topic="muse",
    points=2,
    difficulty=2,
    signature="def guide_logits(l_prompt: Tensor, l_negative: Tensor, guidance: float, step: int, "
    "steps: int) -> Tensor:",
    task="Guidance of a step, counted from 0, on logits (B, h, w, K) for the prompt and for the\n"
    "negative one. Its scale rises evenly, from 1 in the first step, where the prompt's logits\n"
    "come out, to `guidance` in the last. A single step has scale 1.",
    specification=guide_logits_spec,
    reference=guide_logits,
    cases=logit_cases,
    mutants=(
        Mutant(full_from_the_start, "The scale rises from step to step."),
        Mutant(rises_from_zero, "In the first step the prompt's own logits come out: scale 1."),
        Mutant(never_arrives, "In the last step, number steps - 1, the scale is `guidance`."),
        Mutant(one_step_early, "In step 0 the scale is still 1."),
        Mutant(
            the_papers_w, "Here scale 1 gives the prompt's own logits; the paper's w counts from 0."
        ),
        Mutant(falls, "The scale rises: early tokens give diversity, late ones fit the prompt."),
        Mutant(towards_negative, "This leads away from the prompt."),
        Mutant(probabilities_moved, "Move the logits; probabilities could fall below 0."),
    ),
    why="Early tokens are drawn freely, so samples differ; late ones follow the prompt.",
    where="nanosd3/related/muse.py, rising and guided_logits (arXiv 2301.00704, section 2.7)",
    names=("l_prompt", "l_negative", "guidance", "step", "steps"),
)

EXERCISES = (GUIDE_LOGITS,)
