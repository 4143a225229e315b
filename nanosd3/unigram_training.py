"""Learn a unigram vocabulary from words: pieces with probabilities."""

import math
from collections import Counter
from collections.abc import Iterator

LONGEST = 16  # characters in a piece, as in SentencePiece

Span = tuple[int, int, float]  # where a piece begins and ends in a word, and its probability


def substrings(word: str) -> Iterator[tuple[int, int]]:
    """Where pieces may begin and end in a word, in order."""
    for i in range(len(word)):
        for j in range(i + 1, min(i + LONGEST, len(word)) + 1):
            yield i, j


def path_sums(length: int, spans: list[Span]) -> tuple[list[float], list[int]]:
    """For each place in a word, the summed probability of all ways to get there, as m and e of
    m * 2**e: in a long word it is too small for a float. `spans` are ordered so that all that end
    at a place come before those that begin there."""
    m, e = [1.0, *[0.0] * length], [0] * (length + 1)
    for i, j, p in spans:
        if not 0.5 <= m[i] < 1:
            m[i], shift = math.frexp(m[i])
            e[i] += shift
        if not m[j]:
            e[j] = e[i]
        m[j] += math.ldexp(m[i] * p, e[i] - e[j])
    return m, e


def piece_counts(words: Counter, score: dict[str, float]) -> Counter:
    """How often each piece is expected in the words, over all splits of each (forward-backward)."""
    expected: Counter = Counter()
    probability = {piece: math.exp(s) for piece, s in score.items()}
    for word, count in words.items():
        L = len(word)
        pieces = ((i, j, word[i:j]) for i, j in substrings(word))
        spans = [(i, j, probability[piece]) for i, j, piece in pieces if piece in probability]
        forward, e = path_sums(L, spans)
        backward, f = path_sums(L, [(L - j, L - i, p) for i, j, p in reversed(spans)])
        for i, j, p in spans:
            share = forward[i] * p * backward[L - j] / forward[L]
            expected[word[i:j]] += count * math.ldexp(share, e[i] + f[L - j] - e[L])
    return expected


def train_unigram(words: Counter, size: int) -> list[tuple[str, float]]:
    """Pieces with log-probabilities, at most `size` of them, most probable first.

    It starts from all substrings of up to LONGEST characters; each round re-estimates the
    probabilities and keeps the three quarters with the largest expected counts. Single characters
    always stay, so that everything in the corpus can be spelled.
    """
    counts: Counter = Counter()
    for word, count in words.items():
        for i, j in substrings(word):
            counts[word[i:j]] += count
    while True:
        total = sum(counts.values())
        score = {p: math.log(max(c, 1e-6) / total) for p, c in counts.items()}
        counts = piece_counts(words, score)
        ordered = sorted(counts, key=lambda p: (-counts[p], p))
        characters = [p for p in ordered if len(p) == 1]
        if len(characters) > size:
            raise ValueError(f"{len(characters)} characters do not fit into {size} pieces")
        longer = [p for p in ordered if len(p) > 1 and counts[p] > 0.5]
        room = size - len(characters)
        if len(longer) <= room:
            break
        kept = [*characters, *longer[: max(room, len(longer) * 3 // 4)]]
        counts = Counter({p: counts[p] for p in kept})
    kept = [*characters, *longer]
    total = sum(max(counts[p], 1e-3) for p in kept)
    pieces = [(p, math.log(max(counts[p], 1e-3) / total)) for p in kept]
    return sorted(pieces, key=lambda piece: (-piece[1], piece[0]))
