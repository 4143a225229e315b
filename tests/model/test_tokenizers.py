"""Both tokenizers: known ids, round trips, training, and agreement with the published ones."""

import copy
import gzip
import itertools
import pickle
import random
import string
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanosd3.config import CONFIGS
from nanosd3.data.class_names import DIGITS, FASHION
from nanosd3.data.mnist import make_captions
from nanosd3.tokenizers import (
    ASSETS,
    BPE,
    Unigram,
    merge_pair,
    normalise_t5,
    pad_or_truncate,
    split_words,
)
from nanosd3.unigram_training import LONGEST, piece_counts

BPE_FULL, UNIGRAM_FULL = BPE.official(), Unigram.official()
CAPTIONS = make_captions(DIGITS).texts
BPE_TINY, UNIGRAM_TINY = BPE.train(CAPTIONS, 640), Unigram.train(CAPTIONS, 128)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
        ("don't stop!!!", [847, 713, 1691, 995]),
        ("fish & chips 2023", [2759, 261, 8855, 273, 271, 273, 274]),
        ("naïve café", [1097, 35689, 563, 15304]),
        ("猫", [163, 234, 360]),
        ("a (red) cat", [320, 263, 736, 264, 2368]),
    ],
)
def test_clip_ids(text, ids):
    assert BPE_FULL.encode(text) == [49406, *ids, 49407]


def test_exclamation_mark_is_an_ordinary_token():
    assert BPE_FULL.encode("!") == [49406, 256, 49407] and BPE_FULL.symbols[0] == "!"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", [1]),
        ("a photo of a cat", [3, 9, 1202, 13, 3, 9, 1712, 1]),
        ("The house is wonderful.", [37, 629, 19, 1627, 5, 1]),
    ],
)
def test_t5_ids(text, ids):
    assert UNIGRAM_FULL.encode(text) == ids


def test_sizes():
    assert len(BPE_FULL.merges) == 48894 and (BPE_FULL.start, BPE_FULL.end) == (49406, 49407)
    assert len(UNIGRAM_FULL.pieces) == 32100 and UNIGRAM_FULL.sentinel(0) == 32099


def test_published_vocabularies_are_read_once():
    assert BPE.official() is BPE_FULL and Unigram.official() is UNIGRAM_FULL


def test_fit_length():
    assert pad_or_truncate([7, 1, 2, 9], 6, 0) == [7, 1, 2, 9, 0, 0]
    assert pad_or_truncate([7, 1, 2, 9], 3, 0) == [7, 1, 9]
    assert pad_or_truncate([7, 1, 2, 9], 4, 0) == [7, 1, 2, 9]


def test_words():
    assert split_words("It's 42  CATS, naïve!?") == [
        "it",
        "'s",
        "4",
        "2",
        "cats",
        ",",
        "naïve",
        "!?",
    ]
    assert merge_pair(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")


# --- round trips ---------------------------------------------------------------------------------

WORD = st.text(string.ascii_lowercase, min_size=1, max_size=12)


@given(st.lists(WORD, max_size=8))
def test_clip_round_trip(words):
    text = " ".join(words)
    for tokenizer in (BPE_FULL, BPE_TINY):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(max_size=40))
def test_clip_loses_nothing_but_case_and_spacing(text):
    squeezed = "".join(split_words(text))
    back = BPE_FULL.decode(BPE_FULL.encode(text)).replace(" ", "")
    if not any(special in text for special in ("<|startoftext|>", "<|endoftext|>")):
        assert back == squeezed.replace(" ", "")


@given(
    st.lists(
        st.text(string.ascii_letters + string.digits + ".,!'-", min_size=1, max_size=12), max_size=8
    )
)
def test_t5_round_trip(words):
    text = " ".join(words)
    assert UNIGRAM_FULL.decode(UNIGRAM_FULL.encode(text)) == text


@given(st.text())
def test_any_text_has_ids(text):
    for tokenizer in (BPE_FULL, BPE_TINY, UNIGRAM_FULL, UNIGRAM_TINY):
        ids = tokenizer.encode(text)
        assert ids and all(isinstance(i, int) and i >= 0 for i in ids)


# --- training ------------------------------------------------------------------------------------


def test_trained_vocabularies_know_their_words():
    for names, corpus in ((DIGITS, CAPTIONS), (FASHION, make_captions(FASHION).texts)):
        bpe, unigram = BPE.train(corpus, 640), Unigram.train(corpus, 128)
        assert len(unigram.pieces) <= 128 and bpe.end == 639
        for name in (name for alternatives in names for name in alternatives):
            assert 2 not in unigram.encode(name)
            assert len(bpe.encode(name)) <= 2 + 3  # start, end, and "t", "-", "shirt"
        lengths = CONFIGS["mnist"].text
        assert max(len(bpe.encode(text)) for text in corpus) <= lengths.clip_l.length
        assert max(len(unigram.encode(text)) for text in corpus) <= lengths.t5.length
        assert all(unigram.decode(unigram.encode(text)) == text for text in corpus)


def test_trained_on_nothing_it_still_spells():
    bpe = BPE.train([], 640)
    assert bpe.decode(bpe.encode("zebra")) == "zebra" and len(bpe.encode("zebra")) == 7


def test_bpe_training_by_hand():
    """'ab' thrice, 'abc' once: first a+b at word ends, then ab+c."""
    bpe = BPE.train(["ab ab ab abc"], 516)
    assert bpe.merges == [("a", "b</w>"), ("a", "b")]


def test_piece_counts_by_hand():
    """As one piece or as two, ab is as probable; the probability of the word is no float."""
    score = {"a": -300.0, "b": -300.0, "ab": -600.0}
    counts = piece_counts(Counter({"abab": 3}), score)
    assert counts == pytest.approx({"a": 3, "b": 3, "ab": 3}) and set(counts) == set(score)


def test_words_without_spaces():
    """A dense Chinese caption, or an address, is one long word."""
    draw = random.Random(0)
    words = ["".join(draw.choices("一二三四五六七八九十", k=300)) for _ in range(5)]
    words.append("https://example.com/" + "".join(draw.choices(string.hexdigits, k=700)))
    unigram = Unigram.train(words, 200)
    assert max(len(piece) for piece in unigram.score) <= LONGEST
    for word in words:
        ids = unigram.encode(word)
        assert 2 not in ids and unigram.decode(ids) == word.lower()
    counts = piece_counts(Counter(words[:5]), {p: s for p, (s, _) in unigram.score.items()})
    covered = sum(len(piece) * count for piece, count in counts.items())
    assert covered == pytest.approx(5 * 300, rel=1e-9)  # whatever the split


def test_unigram_prefers_likely_pieces():
    controls = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*controls, ("▁a", -1.0), ("b", -1.0), ("▁ab", -2.5), ("c", -9.0), ("bc", -3.0)]
    unigram = Unigram(pieces)
    assert unigram.encode("ab") == [3, 4, 1]  # -1 - 1 beats -2.5
    assert unigram.encode("abc") == [3, 7, 1]  # -1 - 3 beats -2.5 - 9
    assert unigram.encode("axyb") == [3, 2, 4, 1]  # unknowns in a row are one
    pieces[5] = ("▁ab", -1.5)
    assert Unigram(pieces).encode("ab") == [5, 1]


# --- agreement with the published tokenizers -----------------------------------------------------


def varied_strings(count: int) -> list[str]:
    """Latin, accents, other scripts, emoji, digits, punctuation, spaces, controls."""
    rng = random.Random(0)
    alphabets = [
        string.ascii_letters, string.ascii_lowercase + " ", string.digits, string.punctuation,
        "àéîõüßñçøåœæÀÉÎ ", "αβγδεζΣσς ", "абвгдеёжЖ ", "猫狗日本語漢字 ", "한국어 ",
        "ไทยกข",
        "عربيةשלום ", "😀🎨🚀👍🏽❤️", " \t\n  ", "½²Ⅷ①ﬁﬂ™℃", "e\u0301a\u0308o\u0302 ",
        "'s't're've'm'll'd ",
        "\x01\x1f\x7f\u200b\u200d\ufeff", "«»“”‘’–—…", "ＡＢＣ１２～", "İıÅΩ",
    ]  # fmt: skip
    words = (
        "a photo of the cat's don't I'll 1,000 3.5 www.x.org C++ hello, world! (red) UPPER".split()
    )
    texts = []
    for _ in range(count):
        parts = [
            rng.choice(words) if rng.random() < 0.5
            else "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 8)))
            for _ in range(rng.randint(1, 12))
        ]  # fmt: skip
        texts.append(rng.choice(["", " "]).join(parts))
    hostile = [
        "",
        " ",
        "word " * 300,
        "\n",
        "a" * 300,
        "<|endoftext|> x",
        "x</s>y <pad>",
        "<extra_id_3> a",
    ]
    return texts + hostile


def test_clip_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer(
        vocab=BPE_FULL.ids | {"<|startoftext|>": 49406, "<|endoftext|>": 49407},
        merges=BPE_FULL.merges,
    )
    for text in varied_strings(400):
        assert BPE_FULL.encode(text) == tokenizer(text).input_ids, ascii(text)


def loses_a_mark(text: str) -> bool:
    """Whether a combining mark follows a character that NFKC rewrites: the published fast
    tokenizer looks such a pair up as one, finds the first alone, and drops the mark."""
    return any(
        unicodedata.normalize("NFKC", a) != a
        and unicodedata.category(b) in ("Mn", "Me", "Mc", "Cf")
        for a, b in itertools.pairwise(text)
    )


def test_t5_agrees_with_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    content = gzip.decompress((ASSETS / "t5_tokenizer.json.gz").read_bytes()).decode()
    reference = tokenizers.Tokenizer.from_str(content)
    compared = [text for text in varied_strings(400) if not loses_a_mark(text)]
    assert len(compared) > 350
    for text in compared:
        assert UNIGRAM_FULL.encode(text) == reference.encode(text).ids, ascii(text)
    assert normalise_t5("\uff5e\u2003ﬁ") == "\uff5e fi"


@pytest.mark.parametrize("tokenizer", [BPE_TINY, UNIGRAM_TINY], ids=["bpe", "unigram"])
def test_results_are_the_callers(tokenizer):
    """Who changes the ids of a word changes no later ones."""
    before = tokenizer.encode("seven"), tokenizer.encode_word("seven")
    tokenizer.encode_word("seven").append(0)
    assert (tokenizer.encode("seven"), tokenizer.encode_word("seven")) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_a_cache_of_their_own(copied):
    for tokenizer in (BPE_TINY, UNIGRAM_TINY):
        other, text = copied(tokenizer), "A bold seven leaning right"
        assert other.encode(text) == tokenizer.encode(text)
        assert vars(other).keys() == vars(tokenizer).keys()
        assert other._cached is not tokenizer._cached
