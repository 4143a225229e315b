"""Exercises on tokenizers: joining a pair, learning which pairs to join, the best split."""

from collections import Counter
from itertools import pairwise

import torch

from nanosd3.exercises.base import Case, Exercise, Mutant
from nanosd3.tokenizers import BPE, CONTROLS, END_OF_WORD, Unigram
from nanosd3.tokenizers import merge_pair as package_merge_pair

Symbols = tuple[str, ...]
Pair = tuple[str, str]

# --- byte pairs ---------------------------------------------------------------------------------


def pair_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("twice in a word", (("b", "a", "n", "a", "n", "a"), ("a", "n"))),
        Case("overlapping", (("a", "a", "a", "b"), ("a", "a"))),
        Case("longer symbols", (("th", "e", "th", "o", "th", "e"), ("th", "e"))),
        Case("not there", (("x", "y", "z"), ("z", "y"))),
        Case("a symbol that ends like the pair", (("xa", "b", "a", "b"), ("a", "b"))),
        Case("the same letters otherwise", (("a", "bc", "ab", "c"), ("ab", "c"))),
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
    task="A step of byte-pair encoding: join every occurrence of the pair of neighbouring symbols\n"
    "into one symbol, from the left; no symbol is used twice. Return a tuple.",
    specification=pair_spec,
    reference=package_merge_pair,
    cases=pair_cases,
    mutants=(
        Mutant(only_first, "Every occurrence is joined, not the first alone."),
        Mutant(from_the_right, "Start from the left: of three equal symbols the first two join."),
        Mutant(used_twice, "A symbol that has been joined is used up."),
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
    for word, count in counts.items():  # letters, the last one marked as the word's end
        words.append(([*word[:-1], word[-1] + "</w>"], count))
    learned = []
    for _ in range(merges):
        pairs = {}
        for symbols, count in words:
            for i in range(len(symbols) - 1):
                pair = (symbols[i], symbols[i + 1])
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        most = max(pairs.values())
        best = min(pair for pair in pairs if pairs[pair] == most)  # ties: the first in order
        learned.append(best)
        words = [(list(pair_spec(tuple(symbols), best)), count) for symbols, count in words]
    return learned


def train_bpe(counts: dict[str, int], merges: int) -> list[Pair]:
    """The merges of `BPE.train` on a corpus in which each word occurs so often."""
    corpus = [word for word, count in counts.items() for _ in range(count)]
    return BPE.train(corpus, vocab=512 + 2 + merges).merges


def trained(words: dict[Symbols, int], merges: int, rank: object) -> list[Pair]:
    """Byte pairs learned by another rule: `rank` of (pair, count) is least for the best."""
    learned = []
    for _ in range(merges):
        pairs: Counter = Counter()
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
    return trained(spelled(counts), merges, lambda p, n: -n)  # min takes the first it meets


def rarest_first(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(spelled(counts), merges, lambda p, n: (n, p))


def counted_only_at_start(counts: dict[str, int], merges: int) -> list[Pair]:
    pairs: Counter = Counter()
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
    task="Learn byte pairs. `counts` says how often a word occurs; it starts as its letters,\n"
    "the last one with '</w>' behind it. Again and again join the commonest pair of neighbours\n"
    "(of equals the first by alphabet) everywhere; return the pairs in the order learned, at most\n"
    "`merges`, fewer if nothing is left to join.",
    specification=train_spec,
    reference=train_bpe,
    cases=corpus_cases,
    mutants=(
        Mutant(words_counted_once, "A pair counts as often as its words occur."),
        Mutant(no_end_of_word, "The last letter carries the mark '</w>': an ending is not a "
               "beginning."),
        Mutant(ties_by_last, "Of pairs that are equally common, take the first by alphabet."),
        Mutant(ties_by_occurrence, "Equally common pairs go by alphabet, not by which came first."),
        Mutant(rarest_first, "The commonest pair is joined first."),
        Mutant(counted_only_at_start, "Joining makes new neighbours: count again every time."),
    ),
    why="Common words become one token, rare ones stay spellable.",
    where="nanosd3/tokenizers.py, BPE.train",
    names=("counts", "merges"),
    differentiable=False,
    other_devices=False,
)  # fmt: skip

# --- unigram ------------------------------------------------------------------------------------

LETTERS = dict.fromkeys("unhapyblet", -6.0)


def split_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("a long piece loses", ("unhappy", LETTERS | {"unh": -5.0, "un": -2.0, "happy": -3.0,
                                                          "appy": -4.0})),
        Case("more pieces win", ("table", LETTERS | {"table": -13.0, "ta": -3.0, "ble": -4.0,
                                                     "tab": -2.5, "le": -9.0})),
        Case("letters only", ("hub", LETTERS | {"hubble": -1.0})),
        Case("one long piece", ("abc", {"a": -1.0, "b": -1.0, "c": -1.0, "abc": -2.0})),
    ]  # fmt: skip


def split_spec(word: str, scores: dict[str, float]) -> list[str]:
    def splits(rest: str) -> list[list[str]]:  # every way to cut it into pieces
        if not rest:
            return [[]]
        return [
            [rest[:n], *others]
            for n in range(1, len(rest) + 1) if rest[:n] in scores
            for others in splits(rest[n:])
        ]  # fmt: skip

    return max(splits(word), key=lambda pieces: sum(scores[piece] for piece in pieces))


def best_split(word: str, scores: dict[str, float]) -> list[str]:
    """The pieces that `Unigram` finds with this vocabulary."""
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


SPLIT = Exercise(
    name="best_split",
    topic="tokenizers",
    points=4,
    difficulty=3,
    signature="def best_split(word: str, scores: dict[str, float]) -> list[str]:",
    task="Unigram: of all ways to cut the word into pieces that have a score (a log-probability),\n"
    "the one with the largest sum. Do not try them all: go through the ends j from left to right\n"
    "and remember for each the best sum up to it and where its last piece begins (Viterbi).",
    specification=split_spec,
    reference=best_split,
    cases=split_cases,
    mutants=(
        Mutant(longest_first, "The longest piece is not always in the most probable split."),
        Mutant(best_first, "The best piece here may force bad ones later; compare whole splits."),
        Mutant(fewest_pieces, "Few pieces are often better, but the sum of scores decides."),
        Mutant(backwards, "You walked back from the end: now turn the pieces round."),
    ),
    why="2^(n-1) splits, found in n^2 steps: each best split contains a best split.",
    where="nanosd3/tokenizers.py, Unigram",
    names=("word", "scores"),
    differentiable=False,
    other_devices=False,
)

EXERCISES = (MERGE, TRAIN, SPLIT)
