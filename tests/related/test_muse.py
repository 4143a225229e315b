"""Muse: what is hidden and what is learned, how many tokens are left at each step, and which."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanosd3.related.muse import (
    MASK,
    Muse,
    MuseConfig,
    cosine_share,
    draw_tokens,
    fill_hidden,
    guided_logits,
    gumbel,
    hide,
    left_hidden,
    masked_loss,
    rising,
)
from nanosd3.training.optimizer import matrices_of

CONFIG = MuseConfig(depth=2, width=64, codes=11, grid=4, context_dim=5, pooled_dim=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_in(tokens, share, seed=0):
    return hide(tokens, share, torch.rand(tokens.flatten(1).shape, generator=generator(seed)))


def everything(batch, side=7):
    return torch.full((batch, side, side), MASK)


@pytest.fixture
def model():
    """With random weights: a fresh one outputs zero."""
    torch.manual_seed(0)
    muse = Muse(CONFIG)
    for p in muse.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return muse


def texts(batch):
    torch.manual_seed(1)
    return torch.randn(batch, 6, 5), torch.randn(batch, 3)


# --- the network ----------------------------------------------------------------------------------


def test_a_fresh_network_knows_nothing():
    torch.manual_seed(0)
    muse = Muse(CONFIG)
    tokens = torch.randint(0, 11, (2, 4, 4))
    logits = muse(tokens, *texts(2))
    assert logits.shape == (2, 4, 4, 11) and not logits.any()
    seen = tokens.masked_fill(torch.rand(2, 4, 4) < 0.5, MASK)
    losses = masked_loss(logits, tokens, seen)
    assert losses.tolist() == pytest.approx([math.log(11)] * 2)
    losses.sum().backward()
    assert muse.final_layer.linear.weight.grad.any()  # training can start


def test_everything_reaches_the_logits(model):
    """Tokens (hidden ones too), both kinds of text and positions; and all of it is trained."""
    tokens, (context, pooled) = torch.randint(0, 11, (1, 4, 4)), texts(1)
    out = model(tokens, context, pooled)
    for i, other in enumerate((MASK, 10)):
        changed = tokens.clone()
        changed[0, 1, 2] = other if int(tokens[0, 1, 2]) != other else i
        assert (model(changed, context, pooled) - out).abs().max() > 1e-3
    assert (model(tokens, context + 1, pooled) - out).abs().max() > 1e-3
    assert (model(tokens, context, pooled + 1) - out).abs().max() > 1e-3
    alike = model(torch.zeros(1, 4, 4, dtype=torch.long), context, pooled)
    assert (alike[0, 0, 0] - alike[0, 3, 1]).abs().max() > 1e-3
    # the hidden token is a row of its own
    hidden = model(everything(1, 4), context, pooled)
    with torch.no_grad():
        model.token_embedder.weight[11] += 1
    assert torch.equal(model(tokens, context, pooled), out)
    assert not torch.equal(model(everything(1, 4), context, pooled), hidden)
    F.cross_entropy(model(hidden_in(tokens, torch.tensor([0.5])), context, pooled)
                    .flatten(0, -2), tokens.flatten()).backward()  # fmt: skip
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_muon_takes_fused_matrices_apart(model):
    """Queries, keys and values; the keys and values of text; nothing outside of the blocks."""
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: parts for p, parts in matrices_of(model).items()}
    inside = ("attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj",
              "mlp.fc1", "mlp.fc2")  # fmt: skip
    assert set(found) == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in inside}
    assert {parts for name, parts in found.items() if ".kv" in name} == {2}
    assert {parts for name, parts in found.items() if "qkv" in name} == {3}
    assert sorted(found.values()) == [1] * 10 + [2] * 2 + [3] * 2


def test_smaller_grids_and_bad_input(model):
    context, pooled = texts(1)
    assert model(everything(1, 2), context, pooled).shape == (1, 2, 2, 11)
    with pytest.raises(ValueError, match="5x5 patches do not fit into positions for 4x4"):
        model(everything(1, 5), context, pooled)
    with pytest.raises(ValueError, match="batch sizes differ: tokens 2, context 1, pooled 1"):
        model(everything(2, 4), context, pooled)
    for bad in (-2, 11):
        with pytest.raises(ValueError, match="tokens must be from 0 to 10, or MASK"):
            model(torch.full((1, 4, 4), bad), context, pooled)


# --- training -------------------------------------------------------------------------------------


def test_shares_hidden():
    """cos(pi u / 2): 2 / pi on average, and half of the images have more than 0.7."""
    share = cosine_share((torch.arange(10000) + 0.5) / 10000)
    assert float(share.mean()) == pytest.approx(2 / math.pi, abs=1e-4)
    assert float(share.median()) == pytest.approx(math.cos(math.pi / 4), abs=1e-3)
    torch.testing.assert_close(cosine_share(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 0.0]))


def test_hide():
    """As many as the share says, rounded up, at least one; the others stay; all positions alike."""
    tokens = torch.randint(0, 11, (5, 7, 7))
    share = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0])
    seen = hidden_in(tokens, share)
    assert (seen == MASK).flatten(1).sum(1).tolist() == [1, 1, 25, 49, 49]
    assert seen[seen != MASK].equal(tokens[seen != MASK])
    often = hidden_in(torch.zeros(4000, 2, 3, dtype=torch.long), torch.full((4000,), 0.5))
    share = (often == MASK).float().mean(0)
    torch.testing.assert_close(share, torch.full((2, 3), 0.5), atol=0.04, rtol=0)


def test_only_hidden_tokens_count():
    """Each image has the mean over its own."""
    logits, tokens = torch.randn(2, 3, 3, 11), torch.randint(0, 11, (2, 3, 3))
    seen = hidden_in(tokens, torch.tensor([0.3, 0.7]))
    losses = masked_loss(logits, tokens, seen)
    for b, count in enumerate((3, 7)):
        places = (seen[b] == MASK).nonzero().tolist()
        expected = [-float(logits[b, i, j].log_softmax(0)[tokens[b, i, j]]) for i, j in places]
        assert len(places) == count
        assert float(losses[b]) == pytest.approx(sum(expected) / count, abs=1e-5)


# --- decoding -------------------------------------------------------------------------------------


def counts(steps, at_first):
    """How many are hidden after each step."""
    hidden, left = at_first, []
    for step in range(steps):
        n = left_hidden(torch.tensor([hidden]), torch.tensor([at_first]), step, steps)
        hidden = int(n)
        left.append(hidden)
    return left


def test_masks_left():
    assert counts(8, 49) == [48, 45, 40, 34, 27, 18, 9, 0]
    assert counts(1, 49) == [0]
    assert counts(49, 49)[-3:] == [2, 1, 0]
    for steps in (2, 12, 24, 49):
        left = counts(steps, 49)
        assert left == sorted(left, reverse=True) and left[-1] == 0 and min(left[:-1]) >= 1
    assert counts(8, 4)[:4] == [3, 2, 1, 1]  # fewer each time, but not none before the last


def test_guidance_rises():
    assert [rising(3.0, k, 5) for k in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert rising(3.0, 0, 1) == 1.0


def test_guided_logits(model):
    prompt, negative = texts(2), (torch.zeros(2, 6, 5), torch.ones(2, 3))
    tokens = torch.randint(0, 11, (2, 4, 4))
    logits, a, b = guided_logits(model, prompt, negative), model(tokens, *prompt), \
        model(tokens, *negative)  # fmt: skip
    w = 1.5  # as the paper writes it: (1 + w) l_prompt - w l_negative
    torch.testing.assert_close(logits(tokens, 1 + w), (1 + w) * a - w * b, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(tokens, 1.0), a)


def test_gumbel_noise():
    """Its mean is Euler's constant, its variance pi^2 / 6."""
    g = gumbel(torch.Size((200_000,)), generator())
    assert float(g.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(g.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    tokens, log_p = draw_tokens(logits, generator())
    expected = logits[0].softmax(0)
    torch.testing.assert_close(tokens.bincount() / len(tokens), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(log_p, expected.log()[tokens])
    tokens, log_p = draw_tokens(logits, generator(), top_k=2)
    expected = logits[0, :2].softmax(0)
    torch.testing.assert_close(tokens.bincount() / len(tokens), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(log_p, expected.log()[tokens])
    assert torch.equal(draw_tokens(logits, generator(), top_k=9)[0],
                       draw_tokens(logits, generator())[0])  # fmt: skip


class Told:
    """Logits that are given, by position, and what was seen."""

    def __init__(self, logits):
        self.logits, self.seen, self.scales = logits, [], []

    def __call__(self, tokens, scale):
        self.seen.append(tokens.clone())
        self.scales.append(scale)
        return self.logits


def sure(batch, side, codes):
    """Logits that leave no doubt which token, but differ in how little they leave."""
    order = torch.randperm(batch * side**2, generator=generator(7)).view(batch, side, side)
    logits = torch.zeros(batch, side, side, codes)
    best = torch.randint(0, codes, (batch, side, side), generator=generator(8))
    height = 25 + 0.2 * order[..., None].double() / side
    return logits.double().scatter(3, best[..., None], height), best


def test_fill_keeps_the_surest():
    logits, best = sure(3, 7, 11)
    told = Told(logits)
    out = fill_hidden(told, everything(3), 8, 3.0, 0.0, generator())
    assert out.equal(best)
    left = [(seen == MASK).flatten(1).sum(1).tolist() for seen in told.seen]
    assert left == [[n] * 3 for n in (49, 48, 45, 40, 34, 27, 18, 9)]
    assert told.scales == pytest.approx([1 + 2 * k / 7 for k in range(8)])
    margin = logits.amax(-1).flatten(1)
    for before, after in zip(told.seen, told.seen[1:], strict=False):
        hidden, now = ((x == MASK).flatten(1) for x in (before, after))
        for row in range(3):
            kept = hidden[row] & ~now[row]
            assert margin[row][kept].min() > margin[row][now[row]].max()


def test_fill_leaves_what_is_known():
    """Rows may have different numbers of hidden tokens, or none; the plan is of those at first."""
    logits = torch.randn(3, 7, 7, 11, generator=generator())
    tokens = torch.randint(0, 11, (3, 7, 7), generator=generator(1))
    start = tokens.clone()
    start[0, 3:], start[1] = MASK, MASK
    told = Told(logits)
    out = fill_hidden(told, start, 8, 1.0, 4.0, generator())
    assert out[0, :3].equal(tokens[0, :3]) and out[2].equal(tokens[2])
    assert out.min() >= 0
    left = torch.stack([(seen == MASK).flatten(1).sum(1) for seen in told.seen])
    assert left[:, 0].tolist() == [28] + [int(28 * math.cos(math.pi / 2 * k / 8)) for k in
                                          range(1, 8)]  # fmt: skip
    assert not left[:, 2].any() and left[:, 1].tolist()[:2] == [49, 48]
    assert fill_hidden(told, tokens, 3, 1.0, 4.0, generator()).equal(tokens)


def test_temperature_fades():
    """With much noise the first steps keep tokens at random, the last the surest; with none,
    always the surest."""

    def chosen(temperature, step):
        """Share of what is kept by the plain rule among what the step keeps."""
        logits, _ = sure(200, 7, 11)
        told, plain = Told(logits), Told(logits)
        fill_hidden(told, everything(200), 8, 1.0, temperature, generator())
        fill_hidden(plain, everything(200), 8, 1.0, 0.0, generator())
        known, surest = ((t.seen[step] != MASK).flatten() for t in (told, plain))
        return float((known & surest).sum() / known.sum())

    assert chosen(0.0, 1) == 1
    assert chosen(1e9, 1) < 0.1
    assert 0.2 < chosen(1e9, 4) < 0.5


def test_the_noise_by_plain_loops():
    """log p + temperature (1 - (k + 1) / K) g, from the same draws."""
    N, steps = 48, 4
    logits = torch.randn(1, 6, 8, 5, generator=generator())
    told, g, hidden = Told(logits), generator(3), [True] * N
    out = fill_hidden(told, torch.full((1, 6, 8), MASK), steps, 1.0, 2.0, generator(3))
    for step, left in enumerate((44, 33, 18, 0)):
        guess, log_p = (x.flatten().tolist() for x in draw_tokens(logits, g))
        noise = gumbel(torch.Size((1, N)), g)[0].tolist()
        score = [log_p[i] + 2.0 * (1 - (step + 1) / steps) * noise[i] for i in range(N)]
        again = sorted((i for i in range(N) if hidden[i]), key=lambda i: score[i])[:left]
        if step + 1 < steps:
            now = (told.seen[step + 1] == MASK).flatten().tolist()
            assert [i for i in range(N) if now[i]] == sorted(again)
        for i in range(N):
            if hidden[i] and i not in again:
                assert int(out.flatten()[i]) == guess[i]
        hidden = [i in again for i in range(N)]


def test_diffusers_keeps_the_same():
    """AmusedScheduler, from everything hidden and without noise: the same tokens step by step.

    It differs in two things: its noise is temperature (1 - k / (K - 1)), from the whole
    temperature in the first step, ours (MaskGIT's) begins one K-th lower; and where some tokens
    are known, its plan is for as many hidden as the whole image has, unless it is told the share
    that was hidden.
    """
    diffusers = pytest.importorskip("diffusers")
    logits, _ = sure(2, 7, 11)
    scheduler = diffusers.AmusedScheduler(mask_token_id=11)
    known = torch.randint(0, 11, (2, 7, 7), generator=generator(5))
    half = known.clone()
    half[:, 3:] = MASK
    for start, share in ((everything(2), 1.0), (half, 28 / 49)):
        scheduler.set_timesteps(8, temperature=(0, 0))
        told = Told(logits)
        out = fill_hidden(told, start, 8, 1.0, 0.0, generator())
        theirs = start.masked_fill(start == MASK, 11)
        for t, ours in zip(scheduler.timesteps, told.seen, strict=True):
            assert theirs.masked_fill(theirs == 11, MASK).equal(ours)
            theirs = scheduler.step(logits.permute(0, 3, 1, 2), t, theirs, share).prev_sample
        assert theirs.equal(out)
    scheduler.set_timesteps(8, temperature=(8, 0))
    ours = [8 * (1 - (k + 1) / 8) for k in range(8)]
    assert scheduler.temperatures.tolist() == pytest.approx([8 * (1 - k / 7) for k in range(8)])
    assert ours[0] == 7 and ours[-1] == 0
