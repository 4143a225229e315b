"""Exercises on evidence: a rule that decides, and ranks by two scores."""

import statistics

import torch
from torch import Tensor

from nanosd3.claims import experiment, sd3_ranks
from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large

# --- a rule ---------------------------------------------------------------------------------------


def seed_cases(generator: torch.Generator) -> list[Case]:
    results = {  # losses of the new method and of the old one, seed by seed
        "clearly lower": ([1.0, 1.2, 0.9], [2.0, 2.1, 2.2]),
        "clearly higher": ([2.0, 2.4, 2.1, 2.2], [1.0, 1.2, 1.1, 1.3]),
        "lower, but once": ([1.0, 1.0, 1.6, 1.0], [1.5, 1.4, 1.5, 1.6]),
        "lower in every seed, unevenly": ([1.0, 1.0, 1.0], [1.9, 1.1, 1.05]),
        "seeds differ more than methods": ([1.0, 3.0, 5.0], [1.5, 3.4, 5.6]),
        "hardly any difference": ([1.0, 1.3, 1.1], [1.2, 1.0, 1.2]),
        "two seeds": ([1.0, 1.0], [1.1, 2.0]),
        "just within": ([1.0, 1.0, 1.0], [1.6, 1.0, 0.95]),
        "one seed": ([1.0], [2.0]),
    }
    cases = [Case(label, tuple(map(torch.tensor, pair))) for label, pair in results.items()]
    many = torch.randn(2, 100, generator=generator)
    return [*cases, large("100 seeds", many[0], many[1] + 1.8)]


def verdict_spec(better: Tensor, worse: Tensor) -> str:
    n = len(better)
    if n == 1:
        return "undecided"  # one seed decides nothing
    differences = [float(b) - float(a) for a, b in zip(better, worse, strict=True)]
    mean = sum(differences) / n
    variance = 0.0
    for difference in differences:
        variance += (difference - mean) ** 2 / (n - 1)
    spread = variance**0.5
    if mean > spread:
        return "supported"
    if mean < -spread:
        return "refuted"
    return "undecided"


def verdict(better: Tensor, worse: Tensor) -> str:
    mean, spread = experiment.lead(better.tolist(), worse.tolist())
    return experiment.verdict(mean > spread, mean < -spread)


def decided(mean: float, spread: float) -> str:
    return experiment.verdict(mean > spread, mean < -spread)


def means_compared(better: Tensor, worse: Tensor) -> str:
    return decided(float((worse - better).mean()), 0.0)


def higher_is_better(better: Tensor, worse: Tensor) -> str:
    return verdict(worse, better)


def seeds_not_paired(better: Tensor, worse: Tensor) -> str:
    if len(better) == 1:
        return "undecided"
    spread = float((better.var() + worse.var()).sqrt())
    return decided(float(worse.mean() - better.mean()), spread)


def error_of_the_mean(better: Tensor, worse: Tensor) -> str:
    mean, spread = experiment.lead(better.tolist(), worse.tolist())
    return decided(mean, spread / len(better) ** 0.5)


def divided_by_all(better: Tensor, worse: Tensor) -> str:
    differences = (worse - better).tolist()
    alone = len(differences) == 1
    return decided(
        statistics.mean(differences), float("inf") if alone else statistics.pstdev(differences)
    )


def every_seed_decides(better: Tensor, worse: Tensor) -> str:
    if len(better) == 1:
        return "undecided"
    return experiment.verdict(bool((better < worse).all()), bool((better > worse).all()))


def one_seed_is_enough(better: Tensor, worse: Tensor) -> str:
    return means_compared(better, worse) if len(better) == 1 else verdict(better, worse)


def never_refuted(better: Tensor, worse: Tensor) -> str:
    found = verdict(better, worse)
    return "undecided" if found == "refuted" else found


def not_supported_is_refuted(better: Tensor, worse: Tensor) -> str:
    return "supported" if verdict(better, worse) == "supported" else "refuted"


def ranges_apart(better: Tensor, worse: Tensor) -> str:
    if len(better) == 1:
        return "undecided"
    return experiment.verdict(bool(better.max() < worse.min()), bool(better.min() > worse.max()))


VERDICT = Exercise(
    name="verdict",
    topic="claims",
    points=2,
    difficulty=1,
    signature="def verdict(better: Tensor, worse: Tensor) -> str:",
    task="Is the first method better, as claimed? Its losses and those of the other are (seeds,),\n"
    "in one order: seed i is the same data and noise for both. 'supported' if, in the mean over\n"
    "seeds, its loss is lower by more than the spread of the difference (the standard deviation,\n"
    "divided by seeds - 1), 'refuted' if higher by more than that, else 'undecided'. One seed\n"
    "decides nothing.",
    specification=verdict_spec,
    reference=verdict,
    cases=seed_cases,
    mutants=(
        Mutant(means_compared, "Some mean is always lower: is the difference above its spread?"),
        Mutant(higher_is_better, "These are losses: lower is better."),
        Mutant(seeds_not_paired, "Seed i is the same for both: take differences seed by seed."),
        Mutant(error_of_the_mean, "The spread is the deviation itself, not that of the mean."),
        Mutant(
            divided_by_all, "For a few seeds the variance is divided by their number minus one."
        ),
        Mutant(every_seed_decides, "How large the differences are counts, not only their signs."),
        Mutant(one_seed_is_enough, "With one seed nothing is known about the spread."),
        Mutant(never_refuted, "A claim can also be refuted."),
        Mutant(not_supported_is_refuted, "What lies within the spread is undecided."),
        Mutant(ranges_apart, "Seeds may differ more than methods: compare seed by seed."),
    ),
    why="A rule that is written first cannot be bent to what came out.",
    where="nanosd3/claims/experiment.py, lead and verdict",
    differentiable=False,
    other_devices=False,
    names=("better", "worse"),
)

# --- fronts ---------------------------------------------------------------------------------------


def score_cases(generator: torch.Generator) -> list[Case]:
    def drawn(count: int) -> Tensor:
        return torch.rand(count, 2, generator=generator)

    ties = torch.tensor([[0.5, 2.0], [0.5, 1.0], [0.7, 2.0], [0.5, 1.0], [0.2, 3.0], [0.7, 1.5]])
    chain = torch.tensor([[0.1, 4.0], [0.4, 1.0], [0.3, 2.0], [0.2, 3.0]])
    return [
        Case("7 methods", (drawn(7),)),
        Case("equal scores", (ties,)),
        Case("each beats the next", (chain,)),
        Case("12 methods", (drawn(12),)),
        large("24 methods", drawn(24), lines=1600),
    ]


def fronts_spec(scores: Tensor) -> Tensor:
    n, front = len(scores), 0
    numbers = [0] * n
    left = list(range(n))
    while left:
        front += 1
        unbeaten = []
        for i in left:
            beaten = False
            for j in left:
                as_good = scores[j][0] >= scores[i][0] and scores[j][1] <= scores[i][1]
                better = scores[j][0] > scores[i][0] or scores[j][1] < scores[i][1]
                beaten = beaten or bool(as_good and better)
            if not beaten:
                unbeaten.append(i)
                numbers[i] = front
        left = [i for i in left if i not in unbeaten]
    return torch.tensor(numbers)


def fronts(scores: Tensor) -> Tensor:
    return torch.tensor(sd3_ranks.fronts([(a, d) for a, d in scores.tolist()]))


def places_by(scores: Tensor, order: Tensor) -> Tensor:
    """The place of each in an order: 1 for the first, and so on."""
    places = torch.empty(len(scores), dtype=torch.long)
    places[order] = torch.arange(1, len(scores) + 1)
    return places


def by_accuracy(scores: Tensor) -> Tensor:
    return places_by(scores, scores[:, 0].argsort(descending=True, stable=True))


def by_distance(scores: Tensor) -> Tensor:
    return places_by(scores, scores[:, 1].argsort(stable=True))


def both_scores_up(scores: Tensor) -> Tensor:
    return fronts(scores * torch.tensor([1.0, -1.0]))


def worst_first(scores: Tensor) -> Tensor:
    numbers = fronts(scores)
    return numbers.max() + 1 - numbers


def counted_from_zero(scores: Tensor) -> Tensor:
    return fronts(scores) - 1


def count_of_betters(scores: Tensor) -> Tensor:
    rows = [(a, d) for a, d in scores.tolist()]
    return torch.tensor([1 + sum(sd3_ranks.beats(b, a) for b in rows) for a in rows])


def two_fronts(scores: Tensor) -> Tensor:
    return fronts(scores).clamp(max=2)


def better_in_both(scores: Tensor) -> Tensor:
    """A tie in one score protects."""
    numbers, left = torch.zeros(len(scores), dtype=torch.long), set(range(len(scores)))
    while left:
        unbeaten = {
            i for i in left
            if not any(scores[j, 0] > scores[i, 0] and scores[j, 1] < scores[i, 1] for j in left)
        }  # fmt: skip
        numbers[list(left)] += 1
        left -= unbeaten
    return numbers


FRONTS = Exercise(
    name="fronts",
    topic="claims",
    points=3,
    difficulty=3,
    signature="def fronts(scores: Tensor) -> Tensor:",
    task="Sort methods by two scores at once, as the paper does: scores (n, 2) are accuracy\n"
    "(higher is better) and Frechet distance (lower is better). One method beats another if it\n"
    "is no worse in both and better in one. Front 1 are those that none beats, front 2 those\n"
    "that only methods of front 1 beat, and so on. Result: the front of each, (n,), from 1.",
    specification=fronts_spec,
    reference=fronts,
    cases=score_cases,
    mutants=(
        Mutant(by_accuracy, "Both scores count, not accuracy alone."),
        Mutant(by_distance, "Both scores count, not the distance alone."),
        Mutant(both_scores_up, "The second score is a distance: lower is better."),
        Mutant(worst_first, "Front 1 holds the best methods."),
        Mutant(counted_from_zero, "Fronts are counted from 1."),
        Mutant(
            count_of_betters,
            "It is not the number of methods that beat one: take front 1 away and look again.",
        ),
        Mutant(two_fronts, "There can be more than two fronts."),
        Mutant(
            better_in_both,
            "Being equal in one score and better in the other is enough to beat a method.",
        ),
    ),
    why="No weight has to be chosen between two scores that are in different units.",
    where="nanosd3/claims/sd3_ranks.py, fronts (arXiv 2403.03206, section 5.1)",
    differentiable=False,
    other_devices=False,
    slow_hint="Compare all pairs at once, (n, 1) with (1, n); a loop over the fronts is fine.",
    names=("scores",),
)

EXERCISES = (VERDICT, FRONTS)
