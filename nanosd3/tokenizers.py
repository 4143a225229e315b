"""Text to token ids: byte-pair encoding for the CLIPs, a unigram model for T5.

*Byte-pair encoding* starts from bytes and repeats one move: join the most frequent pair of
neighbours. The list of joins, in order, is the tokenizer; encoding replays it, so nothing is
ever unknown, only long. *Unigram* goes the other way: each piece has a log-probability and
encoding takes the split of a word whose sum is largest (Viterbi); characters without a piece
are unknown. Training starts from many pieces, estimates their probabilities by expectation
maximisation, and throws out the least used.

The full vocabularies (CLIP's 48,894 merges, T5's 32,100 pieces) are in the package; the small
ones of a run are trained here from its captions. Ids agree with the tokenizers published with
the models. Departures: T5's character map is NFKC plus the few characters it treats differently (by
Python's newer Unicode tables, and keeping a combining mark after a character that the map
rewrites, which the published fast tokenizer loses); a trailing space makes an empty last word
(as in the published tokenizer.json; SentencePiece itself strips it); no ftfy repair of broken text
in CLIP (as in transformers).
"""

import gzip
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from nanosd3.unigram_training import train_unigram

ASSETS = Path(__file__).parent / "assets" / "tokenizers"


def pad_or_truncate(ids: list[int], length: int, pad: int) -> list[int]:
    """Truncate or pad ids to `length`; truncated ids keep the end token last."""
    if len(ids) > length:
        return [*ids[: length - 1], ids[-1]]
    return ids + [pad] * (length - len(ids))


# --- byte-pair encoding -------------------------------------------------------------------------

END_OF_WORD = "</w>"
SPECIALS = ("<|startoftext|>", "<|endoftext|>")
CONTRACTION = re.compile("'s|'t|'re|'ve|'m|'ll|'d")


def byte_symbols() -> dict[int, str]:
    """A printable character for each of the 256 bytes, in the order of the vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_SYMBOLS = byte_symbols()


def character_kind(character: str) -> str:
    """L letter, N number, Z space, O other: what CLIP's pattern tells apart."""
    if character in "\t\n\v\f\r\x85":
        return "Z"
    kind = unicodedata.category(character)[0]
    return kind if kind in "LNZ" else "O"


def split_words(text: str) -> list[str]:
    """CLIP's words: contractions, runs of letters, single digits, runs of anything else."""
    text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    words, i = [], 0
    while i < len(text):
        kind = character_kind(text[i])
        if match := CONTRACTION.match(text, i):
            j = match.end()
        else:
            j = i + 1
            while kind in "LO" and j < len(text) and character_kind(text[j]) == kind:
                j += 1
        if kind != "Z":
            words.append(text[i:j])
        i = j
    return words


def word_symbols(word: str) -> tuple[str, ...]:
    """The bytes of a word as symbols, the last one marked as the word's end."""
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode()]
    return (*symbols[:-1], symbols[-1] + END_OF_WORD)


def merge_pair(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of `pair`, from the left."""
    merged, i = [], 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


class BPE:
    """CLIP's tokenizer. Ids: 256 bytes, the same as word ends, merges, ..., start, end."""

    def __init__(self, merges: list[tuple[str, str]], vocab: int):
        symbols = list(BYTE_SYMBOLS.values())
        symbols += [symbol + END_OF_WORD for symbol in symbols]
        symbols += [a + b for a, b in merges]
        if len(symbols) + 2 > vocab:
            raise ValueError(f"{len(merges)} merges do not fit into a vocabulary of {vocab}")
        self.merges, self.vocab = merges, vocab
        self.start, self.end = vocab - 2, vocab - 1
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.symbols = dict(enumerate(symbols))
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self._cached = lru_cache(65536)(self._encode_word)

    def __reduce__(self) -> tuple:
        return type(self), (self.merges, self.vocab)  # without the cache, which this object owns

    @classmethod
    @cache
    def official(cls) -> "BPE":
        """The vocabulary of 49,408 shared by both CLIPs, read once."""
        lines = gzip.decompress((ASSETS / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
        merges = [(left, right) for left, right in map(str.split, lines)]
        return cls(merges, vocab=49408)

    @classmethod
    def train(cls, corpus: Iterable[str], vocab: int) -> "BPE":
        """Learn merges from text until the vocabulary is full or every word is one symbol."""
        counts = Counter(word for text in corpus for word in split_words(text))
        words = {word_symbols(word): count for word, count in counts.items()}
        merges: list[tuple[str, str]] = []
        while len(merges) < vocab - 2 - 512:
            pairs: Counter = Counter()
            for symbols, count in words.items():
                for pair in pairwise(symbols):
                    pairs[pair] += count
            if not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(best)
            words = {merge_pair(symbols, best): count for symbols, count in words.items()}
        return cls(merges, vocab)

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word."""
        return list(self._cached(word))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = word_symbols(word)
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = merge_pair(symbols, best)
        return tuple(self.ids[symbol] for symbol in symbols)

    def encode(self, text: str) -> list[int]:
        """Start, the text's ids, end."""
        ids = [self.start]
        for part in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text):
            if part in SPECIALS:
                ids.append((self.start, self.end)[SPECIALS.index(part)])
            else:
                ids += [i for word in split_words(part) for i in self.encode_word(word)]
        return [*ids, self.end]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, words joined by spaces; start, end and unused ids are left out."""
        text = "".join(self.symbols.get(i, "") for i in ids).replace(END_OF_WORD, " ")
        byte = {symbol: b for b, symbol in BYTE_SYMBOLS.items()} | {" ": 32}
        return bytes(byte[c] for c in text).decode(errors="replace").strip(" ")


# --- unigram ------------------------------------------------------------------------------------

SPACE = "▁"  # stands for the space before a word
PAD, END, UNKNOWN = 0, 1, 2
CONTROLS = ["<pad>", "</s>", "<unk>"]
SENTINEL = re.compile(r"(</s>|<pad>|<unk>|<extra_id_\d+>)")
# Where T5's own character map differs from NFKC: some controls vanish, some become spaces, and
# the fullwidth tilde stays as it is.
CHARACTER_MAP = (
    dict.fromkeys(map(chr, [*range(1, 9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F]), "")
    | dict.fromkeys(
        "\t\n\f\r\u1680\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd", " "
    )
    | {"\uff5e": "\uff5e"}
)
MAPPED = re.compile("([" + "".join(map(re.escape, CHARACTER_MAP)) + "])")


def t5_tokenizer() -> dict:
    """The content of T5's published tokenizer.json."""
    return json.loads(gzip.decompress((ASSETS / "t5_tokenizer.json.gz").read_bytes()))


def normalise_t5(text: str) -> str:
    """T5's characters: NFKC with the exceptions above, runs of spaces collapsed."""
    parts = MAPPED.split(text)
    parts[::2] = [unicodedata.normalize("NFKC", part) for part in parts[::2]]
    parts[1::2] = [CHARACTER_MAP[part] for part in parts[1::2]]
    return re.sub(" +", " ", "".join(parts))


class Unigram:
    """T5's tokenizer. `pieces` are (text, log-probability) in the order of their ids: padding,
    end, unknown, the pieces, then the sentinels <extra_id_n> ... <extra_id_0>."""

    def __init__(self, pieces: list[tuple[str, float]], lower_case: bool = False):
        self.pieces, self.lower_case = pieces, lower_case
        self.controls = {p: i for i, (p, _) in enumerate(pieces) if SENTINEL.fullmatch(p)}
        self.score = {p: (s, i) for i, (p, s) in enumerate(pieces) if p not in self.controls}
        self.longest = max(map(len, self.score))
        self.unknown_score = min(s for s, _ in self.score.values()) - 10
        self._cached = lru_cache(65536)(self._encode_word)

    def __reduce__(self) -> tuple:
        return type(self), (self.pieces, self.lower_case)

    @classmethod
    @cache
    def official(cls) -> "Unigram":
        """The 32,000 pieces and 100 sentinels of T5 v1.1, read once."""
        return cls([(piece, score) for piece, score in t5_tokenizer()["model"]["vocab"]])

    @classmethod
    def train(cls, corpus: Iterable[str], vocab: int, sentinels: int = 8) -> "Unigram":
        """Learn pieces and their probabilities from text, folded to lower case."""
        texts = (normalise_t5(text).strip().lower() for text in corpus)
        words = Counter(SPACE + word for text in texts for word in text.split(" ") if word)
        pieces = train_unigram(words, vocab - len(CONTROLS) - sentinels)
        extra = [(f"<extra_id_{n}>", 0.0) for n in reversed(range(sentinels))]
        return cls([(control, 0.0) for control in CONTROLS] + pieces + extra, lower_case=True)

    def sentinel(self, n: int) -> int:
        """The id of <extra_id_n>, which stands for the n-th removed span."""
        return self.controls[f"<extra_id_{n}>"]

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word, which begins with SPACE."""
        return list(self._cached(word))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """The most probable split. best[j]: (score, start of the last piece, its id)."""
        best = [(0.0, 0, -1)] + [(-math.inf, 0, -1)] * len(word)
        for j in range(1, len(word) + 1):
            for i in range(max(0, j - self.longest), j):
                score, piece = self.score.get(word[i:j], (-math.inf, -1))
                if j == i + 1 and piece == -1:
                    score, piece = self.unknown_score, UNKNOWN
                if best[i][0] + score > best[j][0]:
                    best[j] = (best[i][0] + score, i, piece)
        ids: list[int] = []
        j = len(word)
        while j > 0:
            _, i, piece = best[j]
            if not (piece == UNKNOWN and ids and ids[-1] == UNKNOWN):  # a run of them is one
                ids.append(piece)
            j = i
        return tuple(ids[::-1])

    def encode(self, text: str) -> list[int]:
        """The text's ids, end."""
        ids: list[int] = []
        for part in SENTINEL.split(text):
            if part in self.controls:
                ids.append(self.controls[part])
                continue
            part = normalise_t5(part)
            part = part.lower().strip() if self.lower_case else part
            if part and part[0] != " ":
                part = " " + part
            for word in part.split(" ")[1:]:  # a trailing space makes an empty last word
                ids += self.encode_word(SPACE + word)
        return [*ids, END]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; padding and end are left out."""
        text = "".join(self.pieces[i][0] for i in ids if i not in (PAD, END))
        return text.replace(SPACE, " ").strip()
