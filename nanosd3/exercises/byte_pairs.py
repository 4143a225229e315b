"""An exercise on byte-pair encoding: learning which pairs to merge."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant
from nanosd3.exercises.tokenizers import Pair, Symbols, package_merge_pair, pair_spec
from nanosd3.tokenizers import BPE, END_OF_WORD


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


def leftmost_first(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(spelled(counts), merges, lambda p, n: ())  # min takes the first


def once_per_word(counts: dict[str, int], merges: int) -> list[Pair]:
    learned, words = [], spelled(counts)
    for _ in range(merges):
        pairs: Counter[Pair] = Counter()
        for symbols, count in words.items():
            for pair in set(pairwise(symbols)):
                pairs[pair] += count
        if not pairs:
            break
        learned.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {package_merge_pair(s, learned[-1]): count for s, count in words.items()}
    return learned


def pairs_joined(counts: dict[str, int], merges: int) -> list[str]:
    return ["".join(pair) for pair in train_bpe(counts, merges)]


def longest_first(counts: dict[str, int], merges: int) -> list[Pair]:
    return trained(spelled(counts), merges, lambda p, n: (-len("".join(p)), -n, p))


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
        Mutant(
            ties_by_occurrence,
            "Ties are broken by alphabetical order, not by which pair came first.",
        ),
        Mutant(rarest_first, "The most common pair is merged first."),
        Mutant(
            counted_only_at_start, "Merging creates new neighbours: count again after every merge."
        ),
        Mutant(leftmost_first, "The most common pair is merged, not the first one in the text."),
        Mutant(once_per_word, "A pair that occurs twice in a word counts twice."),
        Mutant(pairs_joined, "Return the pairs themselves: which two symbols were merged."),
        Mutant(longest_first, "How often a pair occurs decides, not how long it is."),
    ),
    formulas="A word is a tuple of symbols: its letters, the last one with '</w>' appended.\n"
    "    n(a, b) = sum over the words of count(word) times the occurrences of a, b in it\n"
    "Repeat, at most `merges` times, while there is a pair:\n"
    "    learn the pair with the largest n, of equals the first in alphabetical order;\n"
    "    merge it in all words, as merge_pair does.",
    why="Common words become one token, rare ones stay spellable.",
    where="nanosd3/tokenizers.py, BPE.train",
    names=("counts", "merges"),
    differentiable=False,
    other_devices=False,
)

EXERCISES = (TRAIN,)
