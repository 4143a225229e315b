"""Exercises on byte-pair encoding: merging a pair, learning which pairs to merge."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant
from nanosd3.tokenizers import BPE, END_OF_WORD
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
    ),
    why="A tokenizer is this step, repeated in the order in which the pairs were learned.",
    where="nanosd3/tokenizers.py, merge_pair",
    names=("symbols", "pair"),
    differentiable=False,
    other_devices=False,
)


def corpus_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("four words", ({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 6)),
        Case("ties", ({"cd": 2, "ab": 2, "ba": 1}, 3)),
        Case("twice in a word", ({"banana": 5}, 6)),
        Case("more merges than pairs", ({"aa": 1, "aaaa": 2}, 9)),
    ]


def train_spec(counts: dict[str, int], merges: int) -> list[Pair]:
    words = []
    for word, count in counts.items():  # letters, the last one marked as the end of the word
        words.append(([*word[:-1], word[-1] + "</w>"], count))
    learned = []
    for _ in range(merges):
        pairs: dict[Pair, int] = {}
        for symbols, count in words:
            for i in range(len(symbols) - 1):
                pair = (symbols[i], symbols[i + 1])
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        most = max(pairs.values())
        best = min(pair for pair in pairs if pairs[pair] == most)  # ties: alphabetical order
        learned.append(best)
        words = [(list(pair_spec(tuple(symbols), best)), count) for symbols, count in words]
    return learned


def train_bpe(counts: dict[str, int], merges: int) -> list[Pair]:
    """The merges of `BPE.train` on a corpus with these word counts."""
    corpus = [word for word, count in counts.items() for _ in range(count)]
    return BPE.train(corpus, vocab=512 + 2 + merges).merges


def trained(
    words: dict[Symbols, int], merges: int, rank: Callable[[Pair, int], tuple]
) -> list[Pair]:
    """Byte pairs learned by another rule: the pair with the least `rank(pair, count)` is best."""
    learned = []
    for _ in range(merges):
        pairs: Counter[Pair] = Counter()
        for symbols, count in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: rank(pair, pairs[pair]))
        learned.append(best)
        words = {package_merge_pair(symbols, best): count for symbols, count in words.items()}
    return learned


def spelled(counts: dict[str, int], end: str = END_OF_WORD) -> dict[Symbols, int]:
    return {(*word[:-1], word[-1] + end): count for word, count in counts.items()}


def words_counted_once(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(dict.fromkeys(spelled(counts), 1), merges, lambda p, n: (-n, p))


def no_end_of_word(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(spelled(counts, ""), merges, lambda p, n: (-n, p))


def ties_by_last(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(spelled(counts), merges, lambda p, n: (-n, [-ord(c) for c in "".join(p)]))


def ties_by_occurrence(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(spelled(counts), merges, lambda p, n: (-n,))  # min takes the first


def rarest_first(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(spelled(counts), merges, lambda p, n: (n, p))


def counted_only_at_start(counts: dict[str, int], merges: int) -> list[Pair]:
    pairs: Counter[Pair] = Counter()
    for symbols, count in spelled(counts).items():
        for pair in pairwise(symbols):
            pairs[pair] += count
    return sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:merges]


TRAIN = Exercise(
    name="train_bpe",
    topic="tokenizers",
    points=4,
    difficulty=3,
    signature="def train_bpe(counts: dict[str, int], merges: int) -> list[tuple[str, str]]:",
    task="Learn byte pairs. `counts` says how often each word occurs; a word starts as its\n"
    "letters, the last one with '</w>' appended. Repeatedly merge the most common pair of\n"
    "adjacent symbols (of equals, the first in alphabetical order) everywhere. Return the pairs\n"
    "in the order learned, at most `merges`, fewer if nothing is left to merge.",
    specification=train_spec,
    reference=train_bpe,
    cases=corpus_cases,
    mutants=(
        Mutant(words_counted_once, "A pair counts as often as its words occur."),
        Mutant(
            no_end_of_word, "The last letter carries the mark '</w>': an ending is not a beginning."
        ),
        Mutant(ties_by_last, "Of equally common pairs, take the first in alphabetical order."),
        Mutant(ties_by_occurrence, "Ties go by alphabetical order, not by which pair came first."),
        Mutant(rarest_first, "The most common pair is merged first."),
        Mutant(counted_only_at_start, "Merging makes new neighbours: count again every time."),
    ),
    why="Common words become one token, rare ones stay spellable.",
    where="nanosd3/tokenizers.py, BPE.train",
    names=("counts", "merges"),
    differentiable=False,
    other_devices=False,
)

EXERCISES = (MERGE, TRAIN)
