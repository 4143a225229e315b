"""The three encoders joined: order, padding, dropping."""

from dataclasses import replace

import pytest
import torch

from nanosd3.config import CONFIGS
from nanosd3.data.mnist import DIGITS, make_captions
from nanosd3.errors import InputError
from nanosd3.lazy_modules import LazyModules
from nanosd3.text import (
    ENCODERS,
    TextEncoders,
    Tokenizers,
    drop_encoders,
    join_context,
    make_encoders,
    widened,
)

CONFIG = CONFIGS["tiny"].text
CAPTIONS = make_captions(DIGITS).texts
DL, DG, L = CONFIG.clip_l.width, CONFIG.clip_g.width, CONFIG.clip_l.length


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    parts = LazyModules(make_encoders(CONFIG).eval(), torch.device("cpu"))
    return TextEncoders(CONFIG, Tokenizers.train(CAPTIONS, CONFIG), parts, CONFIG.t5.width, DL + DG)


def test_join_order():
    clip_l, clip_g = torch.full((1, 2, 3), 1.0), torch.full((1, 2, 2), 2.0)
    context = join_context(clip_l, clip_g, torch.full((1, 4, 7), 3.0))
    assert context.shape == (1, 6, 7)
    assert context[0, 0].tolist() == [1, 1, 1, 2, 2, 0, 0] and context[0, 2].tolist() == [3] * 7


def test_encoding(text):
    context, pooled = text.encode(["a handwritten seven", "the digit 7"])
    assert context.shape == (2, L + CONFIG.t5.length, CONFIG.t5.width)
    assert pooled.shape == (2, DL + DG)
    ids_l, ids_g = text.clip_ids(["a handwritten seven"])
    states, pooled_l = text.parts["clip_l"](ids_l)
    torch.testing.assert_close(context[:1, :L, :DL], states)
    torch.testing.assert_close(pooled[:1, :DL], pooled_l)
    torch.testing.assert_close(pooled[:1, DL:], text.parts["clip_g"](ids_g)[1])
    torch.testing.assert_close(
        context[:1, L:], text.parts["t5"](text.t5_ids(["a handwritten seven"]))
    )


def test_for_a_wider_transformer_features_are_filled_up_with_zeros(text):
    wide = TextEncoders(CONFIG, text.tokenizers, text.parts, CONFIG.t5.width + 9, DL + DG + 5)
    assert widened(torch.ones(2, 3), 5).tolist() == [[1, 1, 1, 0, 0]] * 2
    for options in ({}, {"drop": ["t5"]}, {"drop": ["clip_g"]}):
        for a, b in zip(text.encode(["a bold 3", ""], **options),
                        wide.encode(["a bold 3", ""], **options), strict=True):  # fmt: skip
            assert torch.equal(b[..., : a.shape[-1]], a) and (b[..., a.shape[-1] :] == 0).all()
            assert b.shape[-1] - a.shape[-1] == (9 if a.ndim == 3 else 5)


def test_dropping_from_wider_features_drops_the_same(text):
    """In training they are dropped after they were filled up, from what was kept of them."""
    wide = TextEncoders(CONFIG, text.tokenizers, text.parts, CONFIG.t5.width + 9, DL + DG + 5)
    prompts = ["a bold 3"] * 8
    keep = torch.tensor([[i & 1, i & 2, i & 4] for i in range(8)]).bool()
    dropped = drop_encoders(*wide.encode(prompts), keep, CONFIG)
    for i, (context, pooled) in enumerate(zip(*dropped, strict=True)):
        drop = [name for name, kept in zip(ENCODERS, keep[i].tolist(), strict=True) if not kept]
        expected = wide.encode(prompts[:1], drop=drop)
        for a, b in ((context, expected[0][0]), (pooled, expected[1][0])):
            assert torch.equal(a == 0, b == 0), drop
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_padding(text):
    ids_l, ids_g = text.clip_ids(["7"])
    end = CONFIG.clip_l.vocab - 1
    assert ids_l[0, 2:].tolist() == [end] * (L - 2)
    assert ids_g[0, 2:].tolist() == [end] + [0] * (L - 3)


def test_pooled_is_read_at_the_first_end_token(text):
    """So what CLIP is padded with cannot change the pooled vector."""
    ids_l, _ = text.clip_ids(["7"])
    other = ids_l.clone()
    other[0, 3:] = 5
    assert torch.equal(text.parts["clip_l"](ids_l)[1], text.parts["clip_l"](other)[1])
    other[0, 1] = 5
    assert not torch.allclose(text.parts["clip_l"](ids_l)[1], text.parts["clip_l"](other)[1])


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_can_be_dropped(text, name):
    context, pooled = text.encode(["a bold 3"])
    dropped, dropped_pooled = text.encode(["a bold 3"], drop=[name])
    zeroed = {
        "clip_l": ([(slice(0, L), slice(0, DL))], slice(0, DL)),
        "clip_g": ([(slice(0, L), slice(DL, DL + DG))], slice(DL, DL + DG)),
        "t5": ([(slice(L, None), slice(None))], slice(0, 0)),
    }[name]
    expected, expected_pooled = context.clone(), pooled.clone()
    for rows, columns in zeroed[0]:
        expected[:, rows, columns] = 0
    expected_pooled[:, zeroed[1]] = 0
    assert torch.equal(dropped, expected) and torch.equal(dropped_pooled, expected_pooled)
    assert not torch.equal(dropped, context)


def test_dropping_is_independent():
    """At 0.464 each, a tenth of the samples has no text at all."""
    context, pooled = torch.ones(20000, 2 * L, CONFIG.t5.width), torch.ones(20000, DL + DG)
    keep = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0)) >= 0.464
    context, pooled = drop_encoders(context[:, : L + 1], pooled, keep, CONFIG)
    parts = [context[:, 0, 0], context[:, 0, DL], context[:, L, 0]]
    for part in parts:
        assert (part == 0).float().mean() == pytest.approx(0.464, abs=0.012)
    none = torch.stack(parts).sum(0) == 0
    assert none.float().mean() == pytest.approx(0.464**3, abs=0.01)
    assert (pooled[none] == 0).all() and (pooled[~none].sum(1) > 0).any()


def test_empty_prompt_is_zero(text):
    context, pooled = text.encode(["", "7", "  "])
    assert (context[[0, 2]] == 0).all() and (pooled[[0, 2]] == 0).all() and (pooled[1] != 0).any()


def test_unknown_encoder(text):
    with pytest.raises(InputError, match="no encoder 'bert'"):
        text.encode(["7"], drop=["bert"])


def test_numbers_are_known_by_their_digits(text):
    seen = ["the number 40", "the number 175", "the number seven"]
    known = replace(text.tokenizers, words=frozenset(" ".join(seen).split()))
    assert known.unknown_words(["the number 510 or 7"]) == ["or"]
    assert known.unknown_words(["5104 28 4.0"]) == ["5104", "28", "4.0"]  # long; new digits
    assert text.tokenizers.unknown_words(["38"]) == ["38"]  # captions have single digits
    assert replace(known, words=frozenset(["seven"])).unknown_words(["7"]) == ["7"]


def test_unknown_words_and_long_prompts(text):
    assert text.tokenizers.unknown_words(["a Bold zebra", "zebra 7 !"]) == ["zebra", "!"]
    (line,) = text.truncated(["a thin 4", "a " * 30])
    assert line.startswith("too long for the CLIPs (12 of 32 tokens kept) and T5 (12 of 31 tokens")
    assert text.truncated(["a " * 12], t5_length=20)[0].startswith("too long for the CLIPs (12 of")
    assert "CLIPs (" in line and not text.truncated(["a"], t5_length=2)
    assert text.truncated(["a"], t5_length=1)[0].startswith("too long for T5 (1 of 2 tokens kept)")


def test_tokenizers_are_saved_whole(text):
    again = Tokenizers.from_json(text.tokenizers.to_json())
    for caption in [*CAPTIONS[:50], "Zebra crossing!", ""]:
        assert again.bpe.encode(caption) == text.tokenizers.bpe.encode(caption)
        assert again.unigram.encode(caption) == text.tokenizers.unigram.encode(caption)
    assert again.words == text.tokenizers.words


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_parameter_gets_a_gradient(text, name):
    module = text.parts[name]
    ids = (
        text.t5_ids(CAPTIONS[:8]) if name == "t5" else text.clip_ids(CAPTIONS[:8])[name == "clip_g"]
    )
    out = module(ids)
    loss = out.square().sum() if name == "t5" else sum(part.square().sum() for part in out)
    for p in module.parameters():
        p.grad = None
    loss.backward()
    unread = [n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not unread
