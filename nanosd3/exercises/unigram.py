"""Exercises on unigram tokenizers: the most probable split of a word."""

import math
from collections.abc import Callable

import torch

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large
from nanosd3.tokenizers import CONTROLS, Unigram

RARE = {"a": -75.0, "b": -75.0, "c": -30.0, "ab": -130.0, "bc": -160.0, "abc": -175.0}
LETTERS = dict.fromkeys("unhapyblet", -6.0)


def split_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(
            "a long piece loses",
            ("unhappy", LETTERS | {"unh": -5.0, "un": -2.0, "happy": -3.0, "appy": -4.0}),
        ),
        Case(
            "more pieces win",
            ("table", LETTERS | {"table": -13.0, "ta": -3.0, "ble": -4.0, "tab": -2.5, "le": -9.0}),
        ),
        Case("letters only", ("hub", LETTERS | {"hubble": -1.0})),
        Case("one long piece", ("abc", {"a": -1.0, "b": -1.0, "c": -1.0, "abc": -2.0})),
        large("a long word of rare pieces", "abc" * 6, RARE, lines=1500),
    ]


def split_spec(word: str, scores: dict[str, float]) -> list[str]:
    def splits(rest: str) -> list[list[str]]:  # every way to cut it into pieces
        if not rest:
            return [[]]
        return [
            [rest[:n], *others]
            for n in range(1, len(rest) + 1)
            if rest[:n] in scores
            for others in splits(rest[n:])
        ]

    return max(splits(word), key=lambda pieces: sum(scores[piece] for piece in pieces))


def best_split(word: str, scores: dict[str, float]) -> list[str]:
    """The pieces into which `Unigram` splits with this vocabulary."""
    pieces = [(control, 0.0) for control in CONTROLS] + list(scores.items())
    return [pieces[i][0] for i in Unigram(pieces).encode_word(word)]


def longest_first(word: str, scores: dict[str, float]) -> list[str]:
    pieces, i = [], 0
    while i < len(word):
        j = max(j for j in range(i + 1, len(word) + 1) if word[i:j] in scores)
        pieces.append(word[i:j])
        i = j
    return pieces


def best_first(word: str, scores: dict[str, float]) -> list[str]:
    pieces, i = [], 0
    while i < len(word):
        ends = [j for j in range(i + 1, len(word) + 1) if word[i:j] in scores]
        j = max(ends, key=lambda j: scores[word[i:j]])
        pieces.append(word[i:j])
        i = j
    return pieces


def fewest_pieces(word: str, scores: dict[str, float]) -> list[str]:
    return best_split(word, {piece: -100.0 + score for piece, score in scores.items()})


def backwards(word: str, scores: dict[str, float]) -> list[str]:
    return best_split(word, scores)[::-1]


def viterbi(
    word: str, scores: dict[str, float], start: float, join: Callable[[float, float], float]
) -> list[str]:
    """The best split by another measure: `start` for no pieces, join(best, score) for one more."""
    best: list[tuple[float, list[str]]] = [(start, [])]
    for j in range(1, len(word) + 1):
        starts = [i for i in range(j) if word[i:j] in scores]
        ends = [(join(best[i][0], scores[word[i:j]]), [*best[i][1], word[i:j]]) for i in starts]
        best.append(max(ends, key=lambda end: end[0]))
    return best[-1][1]


def by_products(word: str, scores: dict[str, float]) -> list[str]:
    return viterbi(word, scores, 1.0, lambda best, score: best * math.exp(score))


def by_last_piece(word: str, scores: dict[str, float]) -> list[str]:
    return viterbi(word, scores, 0.0, lambda best, score: score)


def smallest_sum(word: str, scores: dict[str, float]) -> list[str]:
    return best_split(word, {piece: -score for piece, score in scores.items()})


def every_letter(word: str, scores: dict[str, float]) -> list[str]:
    return list(word)


SPLIT = Exercise(
    name="best_split",
    topic="tokenizers",
    points=4,
    difficulty=3,
    signature="def best_split(word: str, scores: dict[str, float]) -> list[str]:",
    task="Unigram: of all ways to split the word into pieces that have a score\n"
    "(a log-probability), the one with the largest sum. Do not try them all: go through the ends\n"
    "j from left to right and store, for each, the best sum up to it and where its last piece\n"
    "begins (Viterbi).",
    specification=split_spec,
    reference=best_split,
    cases=split_cases,
    mutants=(
        Mutant(longest_first, "The longest piece is not always in the most probable split."),
        Mutant(best_first, "The best piece here may force bad ones later; compare whole splits."),
        Mutant(fewest_pieces, "Fewer pieces are often better, but the sum of the scores decides."),
        Mutant(backwards, "You walked back from the end: now reverse the pieces."),
        Mutant(
            by_products,
            "Products of probabilities underflow to 0: add their logarithms, the scores.",
        ),
        Mutant(by_last_piece, "Add the best sum up to the piece's start to its score."),
        Mutant(
            smallest_sum, "Scores are logarithms of probabilities: the largest sum is the best."
        ),
        Mutant(every_letter, "Longer pieces count too: which split has the largest sum?"),
    ),
    slow_hint="Each letter doubles the number of splits: store the best one up to each position.",
    why="2^(n-1) splits, searched in n^2 steps: each best split contains a best split.",
    where="nanosd3/tokenizers.py, Unigram",
    names=("word", "scores"),
    differentiable=False,
    other_devices=False,
)

EXERCISES = (SPLIT,)
