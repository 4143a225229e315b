"""Exercises on clips: how much noise they need, and how their contents move."""

import math

import torch
from torch import Tensor

from nanosd3 import flow
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large
from nanosd3.related import motion

Size = tuple[int, int, int]


def time_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, count: int, size: Size, trained: Size) -> Case:
        return Case(label, (torch.rand(count, generator=generator), size, trained))

    ends = (torch.tensor([0.0, 1.0]), (8, 32, 48), (1, 32, 32))
    return [
        case("an image's times for 4 frames", 5, (4, 32, 32), (1, 32, 32)),
        case("other sides, other length", 7, (6, 24, 40), (2, 32, 16)),
        case("fewer pixels", 3, (2, 16, 24), (8, 32, 32)),
        Case("both ends", ends),
        large("300 times", *case("", 300, (12, 40, 32), (4, 24, 24)).arguments),
    ]


def clip_times_spec(t: Tensor, size: Size, trained: Size) -> Tensor:
    ratio = 1.0
    for own, known in zip(size, trained, strict=True):
        ratio *= own / known
    out = torch.empty_like(t)
    for i in range(len(t)):
        # Where noise over data is the root of the ratio times what it is at t.
        odds = ratio**0.5 * t[i] / (1 - t[i]) if t[i] < 1 else None
        out[i] = 1.0 if odds is None else odds / (1 + odds)
    return out


def clip_times(t: Tensor, size: Size, trained: Size) -> Tensor:
    return flow.shift(t, math.sqrt(math.prod(size) / math.prod(trained)))


def root_forgotten(t: Tensor, size: Size, trained: Size) -> Tensor:
    return flow.shift(t, math.prod(size) / math.prod(trained))


def towards_data(t: Tensor, size: Size, trained: Size) -> Tensor:
    return clip_times(t, trained, size)


def frames_not_counted(t: Tensor, size: Size, trained: Size) -> Tensor:
    return clip_times(t, (1, *size[1:]), (1, *trained[1:]))


def frames_only(t: Tensor, size: Size, trained: Size) -> Tensor:
    return clip_times(t, (size[0], 1, 1), (trained[0], 1, 1))


def one_side_only(t: Tensor, size: Size, trained: Size) -> Tensor:
    return flow.shift(t, size[1] / trained[1])


def time_scaled(t: Tensor, size: Size, trained: Size) -> Tensor:
    return (t * math.sqrt(math.prod(size) / math.prod(trained))).clamp(max=1)


def cube_root(t: Tensor, size: Size, trained: Size) -> Tensor:
    return flow.shift(t, (math.prod(size) / math.prod(trained)) ** (1 / 3))


def not_relative(t: Tensor, size: Size, trained: Size) -> Tensor:
    return flow.shift(t, math.sqrt(math.prod(size)))


def sizes_added(t: Tensor, size: Size, trained: Size) -> Tensor:
    return flow.shift(t, math.sqrt(sum(size) / sum(trained)))


CLIP_TIMES = Exercise(
    name="clip_times",
    topic="video",
    points=2,
    difficulty=2,
    signature="def clip_times(t: Tensor, size: tuple[int, int, int], "
    "trained: tuple[int, int, int]) -> Tensor:",
    task="Times t (B,) that suit clips of `trained` = (frames, height, width), moved to those\n"
    "that are as hard for clips of `size`: the ratio of noise to data, t / (1 - t), grows by the\n"
    "root of the ratio of their numbers of pixels, all frames together. 0 and 1 stay.",
    specification=clip_times_spec,
    reference=clip_times,
    cases=time_cases,
    mutants=(
        Mutant(root_forgotten, "A mean of n numbers has a deviation of 1 / sqrt(n), not 1 / n."),
        Mutant(towards_data, "More pixels need more noise, that is, larger t."),
        Mutant(frames_not_counted, "Pixels of all frames count: frames repeat each other, too."),
        Mutant(frames_only, "The size of a frame counts as well as their number."),
        Mutant(one_side_only, "Frames need not be square: count their pixels."),
        Mutant(time_scaled, "It is t / (1 - t) that grows, not t itself: times never exceed 1."),
        Mutant(cube_root, "Take the square root, although there are three axes."),
        Mutant(not_relative, "Clips of the trained size keep their times: take the ratio."),
        Mutant(sizes_added, "The number of pixels is a product."),
    ),
    why="At the image's times a network sees through the noise of a clip by averaging its frames.",
    where="nanosd3/training/train_flow.py, time_shift (paper, eq. 23)",
    names=("t", "size", "trained"),
)


def ink_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, *shape: int) -> Case:
        return Case(label, (torch.rand(shape, generator=generator) ** 3,))

    some = torch.rand(2, 3, 4, 6, generator=generator)
    some[:, 1] *= 0.19  # all of it faint
    cases = [case("clips (2, 3, 5, 7)", 2, 3, 5, 7), case("one frame of 9x4", 3, 1, 9, 4)]
    return [
        *cases,
        Case("a dark frame", (some,)),
        large("40 clips", *case("", 40, 8, 32, 24).arguments),
    ]


def centres_spec(ink: Tensor) -> Tensor:
    B, T, H, W = ink.shape
    out = torch.zeros(B, T, 2, dtype=ink.dtype)
    for b in range(B):
        for t in range(T):
            mass, rows, columns = ink.new_zeros(3)
            for y in range(H):
                for x in range(W):
                    m = ink[b, t, y, x]
                    if m > 0.2:
                        mass, rows, columns = mass + m, rows + y * m, columns + x * m
            if mass > 0:
                out[b, t, 0], out[b, t, 1] = rows / mass, columns / mass
    return out


def column_first(ink: Tensor) -> Tensor:
    return motion.centres(ink).flip(2)


def haze_counted(ink: Tensor) -> Tensor:
    return motion.centres_of_mass(ink)


def all_ink_alike(ink: Tensor) -> Tensor:
    return motion.centres_of_mass((ink > motion.FAINT).to(ink))


def brightest_place(ink: Tensor) -> Tensor:
    place = ink.flatten(2).argmax(2)
    return torch.stack([place // ink.shape[3], place % ink.shape[3]], dim=2).to(ink)


def not_divided_by_mass(ink: Tensor) -> Tensor:
    mass = torch.where(ink > motion.FAINT, ink, 0.0).sum((2, 3))
    return motion.centres(ink) * mass[:, :, None]


def divided_by_area(ink: Tensor) -> Tensor:
    return not_divided_by_mass(ink) / (ink.shape[2] * ink.shape[3])


def counted_from_one(ink: Tensor) -> Tensor:
    return motion.centres(ink) + 1


def from_the_middle(ink: Tensor) -> Tensor:
    return motion.centres(ink) - (torch.tensor(ink.shape[2:]).to(ink) - 1) / 2


def threshold_taken_off(ink: Tensor) -> Tensor:
    return motion.centres_of_mass((ink - motion.FAINT).clamp(min=0))


def one_for_the_clip(ink: Tensor) -> Tensor:
    return motion.centres(ink.mean(1, keepdim=True)).expand(-1, ink.shape[1], -1).contiguous()


CENTRES = Exercise(
    name="centres",
    topic="video",
    points=2,
    difficulty=2,
    signature="def centres(ink: Tensor) -> Tensor:",
    task="Where the digit is in each frame: the centre of mass (B, T, 2), row then column, both\n"
    "from 0, of ink (B, T, H, W) in [0, 1]. Ink up to 0.2 is haze and does not count. A frame\n"
    "without any other gets (0, 0).",
    specification=centres_spec,
    reference=motion.centres,
    cases=ink_cases,
    mutants=(
        Mutant(column_first, "The row comes first, as in the shape (H, W)."),
        Mutant(
            haze_counted, "Haze covers the whole frame and pulls the centre towards its middle."
        ),
        Mutant(all_ink_alike, "Ink counts in proportion to its brightness."),
        Mutant(brightest_place, "The brightest pixel jumps about; take the mean of all places."),
        Mutant(not_divided_by_mass, "This is a mean: divide by the sum of the weights."),
        Mutant(divided_by_area, "Divide by the mass of the ink, not by the number of pixels."),
        Mutant(counted_from_one, "Rows and columns count from 0."),
        Mutant(from_the_middle, "Rows and columns count from the corner."),
        Mutant(threshold_taken_off, "Ink above 0.2 counts in full."),
        Mutant(one_for_the_clip, "Each frame has a centre of its own: that is how it moves."),
    ),
    why="A still clip of the right digit has perfect prompt accuracy; only this shows it.",
    where="nanosd3/related/motion.py, centres",
    names=("ink",),
)

EXERCISES = (CLIP_TIMES, CENTRES)
