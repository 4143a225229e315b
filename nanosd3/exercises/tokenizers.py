"""An exercise on byte-pair encoding: merging a pair."""

from itertools import pairwise

import torch

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant
from nanosd3.tokenizers import merge_pair as package_merge_pair

Symbols = tuple[str, ...]
Pair = tuple[str, str]


def pair_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("twice in a word", (("b", "a", "n", "a", "n", "a"), ("a", "n"))),
        Case("overlapping", (("a", "a", "a", "b"), ("a", "a"))),
        Case("longer symbols", (("th", "e", "th", "o", "th", "e"), ("th", "e"))),
        Case("pair not present", (("x", "y", "z"), ("z", "y"))),
        Case("symbol that ends like the pair", (("xa", "b", "a", "b"), ("a", "b"))),
        Case("same letters, other symbols", (("a", "bc", "ab", "c"), ("ab", "c"))),
    ]


def pair_spec(symbols: Symbols, pair: Pair) -> Symbols:
    merged, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2  # both are used up
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


def only_first(symbols: Symbols, pair: Pair) -> Symbols:
    for i, two in enumerate(pairwise(symbols)):
        if two == pair:
            return (*symbols[:i], "".join(pair), *symbols[i + 2 :])
    return symbols


def from_the_right(symbols: Symbols, pair: Pair) -> Symbols:
    backwards = tuple(s[::-1] for s in symbols[::-1])
    merged = package_merge_pair(backwards, (pair[1][::-1], pair[0][::-1]))
    return tuple(s[::-1] for s in merged[::-1])


def used_twice(symbols: Symbols, pair: Pair) -> Symbols:
    merged = []
    for i, symbol in enumerate(symbols):
        if symbols[i : i + 2] == pair:
            merged.append("".join(pair))
        elif i == 0 or symbols[i - 1 : i + 1] != pair:
            merged.append(symbol)
    return tuple(merged)


def either_order(symbols: Symbols, pair: Pair) -> Symbols:
    return package_merge_pair(package_merge_pair(symbols, pair), pair[::-1])


def as_a_list(symbols: Symbols, pair: Pair) -> list[str]:
    return list(package_merge_pair(symbols, pair))


def joined_to_one_string(symbols: Symbols, pair: Pair) -> Symbols:
    return tuple("".join(symbols).replace("".join(pair), " ".join(["", "".join(pair), ""])).split())


def merged_again(symbols: Symbols, pair: Pair) -> Symbols:
    merged = package_merge_pair(symbols, pair)
    return tuple(symbol for symbol in merged if symbol not in pair)


MERGE = Exercise(
    name="merge_pair",
    topic="tokenizers",
    points=1,
    difficulty=1,
    signature="def merge_pair(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:",
    task="One step of byte-pair encoding: merge every occurrence of the pair of adjacent symbols\n"
    "into one symbol, from left to right; no symbol is used twice. Return a tuple.",
    specification=pair_spec,
    reference=package_merge_pair,
    cases=pair_cases,
    mutants=(
        Mutant(only_first, "Merge every occurrence, not just the first."),
        Mutant(from_the_right, "Start from the left: of three equal symbols the first two merge."),
        Mutant(used_twice, "A symbol that has been merged is used up."),
        Mutant(either_order, "The order of the pair matters."),
        Mutant(as_a_list, "Return a tuple: it serves as a key of a dictionary, and a list cannot."),
        Mutant(
            joined_to_one_string,
            "Compare symbols, not letters: two symbols with the same letters may differ.",
        ),
        Mutant(merged_again, "Symbols of the pair that stand alone stay as they are."),
    ),
    formulas="Start with i = 0 and an empty result. While a symbol is left at i:\n"
    "    if symbols i and i + 1 are the pair, append the two joined, and go on at i + 2;\n"
    "    if not, append symbol i, and go on at i + 1.",
    why="A tokenizer is this step, repeated in the order in which the pairs were learned.",
    where="nanosd3/tokenizers.py, merge_pair",
    names=("symbols", "pair"),
    differentiable=False,
    other_devices=False,
)

EXERCISES = (MERGE,)
