"""Learn a unigram vocabulary from words: pieces with probabilities."""

import math
from collections import Counter


def piece_counts(words: Counter, score: dict[str, float]) -> Counter:
    """How often each piece is expected in the words, over all splits of each (forward-backward)."""
    expected: Counter = Counter()
    for word, count in words.items():
        L = len(word)
        spans = [(i, j) for i in range(L) for j in range(i + 1, L + 1) if word[i:j] in score]
        forward, backward = [0.0] * (L + 1), [0.0] * (L + 1)
        forward[0] = backward[L] = 1.0
        for i, j in spans:  # sorted by start, so forward[i] is complete when it is used
            forward[j] += forward[i] * math.exp(score[word[i:j]])
        for i, j in reversed(spans):
            backward[i] += backward[j] * math.exp(score[word[i:j]])
        for i, j in spans:
            share = forward[i] * math.exp(score[word[i:j]]) * backward[j] / forward[L]
            expected[word[i:j]] += count * share
    return expected


def train_unigram(words: Counter, size: int) -> list[tuple[str, float]]:
    """Pieces with log-probabilities, at most `size` of them, most probable first.

    All substrings start; each round re-estimates the probabilities and keeps the three quarters
    with the largest expected counts. Single characters always stay, so that what was in the
    corpus can be spelled.
    """
    counts: Counter = Counter()
    for word, count in words.items():
        for i in range(len(word)):
            for j in range(i + 1, len(word) + 1):
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
