"""The paper's way to compare many models by two scores in many settings (arXiv 2403.03206).

In each setting, the models are sorted into fronts. The first holds those that no other beats in
both scores, the second those that only the first beats, and so on (non-dominated sorting). A
model's rank is its front's number; its overall place is its average rank over settings.
"""

from collections.abc import Sequence

Score = tuple[float, float]  # accuracy, and Frechet distance over that of real images
BySetting = dict[str, list[list[Score]]]  # by name, setting, seed
Ranks = dict[str, list[float]]  # by name and seed


def fronts(points: Sequence[Score]) -> list[int]:
    """The number of each point's front, from 1. Of accuracy and Frechet ratio, more of the first
    and less of the second is better."""
    numbers, left, front = [0] * len(points), set(range(len(points))), 0
    while left:
        front += 1
        beaten = {i for i in left if any(beats(points[j], points[i]) for j in left)}
        for i in left - beaten:
            numbers[i] = front
        left = beaten
    return numbers


def beats(a: Score, b: Score) -> bool:
    """No worse in both scores, and better in one."""
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def average_ranks(scores: BySetting, settings: list[int]) -> Ranks:
    """Over some settings, seed by seed."""
    names = list(scores)
    found: Ranks = {name: [] for name in names}
    for seed in range(len(scores[names[0]][0])):
        rows = [fronts([scores[name][i][seed] for name in names]) for i in settings]
        for name, numbers in zip(names, zip(*rows, strict=True), strict=True):
            found[name].append(sum(numbers) / len(numbers))
    return found
