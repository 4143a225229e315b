"""What Muses are told by encoders that know the words, or do not."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from nanosd3.claims import muse_encoders
from nanosd3.claims.muse_encoders import (
    encoder_scores,
    held_out_loss,
    one_hot,
    same_draws,
    untrained,
    with_names,
)
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.related.muse import MASK, Muse
from nanosd3.related.muse_editing import MusePipeline
from nanosd3.related.muse_system import muse_config, vq_config
from nanosd3.related.vq import VQAutoencoder
from nanosd3.training.evaluation import draw_prompts
from nanosd3.training.loop import StepRNG
from nanosd3.training.stages import Job


@pytest.fixture(scope="module")
def finished(tiny_run) -> FinishedRun:
    return open_finished_run(tiny_run, None, torch.device("cpu"))


def job_of(finished: FinishedRun, seed: int) -> Job:
    return Job(finished.run, finished.config, finished.source, finished.device, seed)


@pytest.mark.parametrize("numerals", [False, True])
def test_half_of_the_captions(finished, numerals):
    source = finished.source
    half = with_names(source, numerals)
    index = torch.arange(200)
    said = set()
    for u in torch.linspace(0, 0.999, 40):
        texts = [half.texts[i] for i in half.captions(index, u.expand(len(index))).tolist()]
        for text, label in zip(texts, source.labels[index].tolist(), strict=True):
            named = set(text.split()) & set(source.images.names[label])
            assert named == {source.images.names[label][numerals]}
        said |= set(texts)
    assert any("bold" in text for text in said) and any(text.startswith("a hand") for text in said)
    whole, part = source.described.captions.choices, half.described.captions.choices
    assert part.shape == (*whole.shape[:3], whole.shape[3] // 2)
    before, after = (Counter(x[3, 1, 1].tolist()) for x in (whole, part))
    assert all(before[i] == n for i, n in after.items())  # each as often as before
    assert source.described.captions.choices is whole and half.pixels(index[:2]).equal(
        source.pixels(index[:2])
    )


def test_one_hot_words(finished):
    text = finished.pipeline.text
    encode = one_hot(text, finished.source.texts)
    prompts = ["a seven", "", "a bold seven leaning right", "seven a"]
    context, pooled = encode(prompts)
    assert context.shape[2] == text.context_dim and pooled.shape[1] == text.pooled_dim
    lengths = [len(prompt.split()) for prompt in prompts]
    assert (context != 0).sum((1, 2)).tolist() == lengths
    assert context.norm(dim=2)[2, :5].tolist() == pytest.approx([text.context_dim**0.5] * 5)
    assert pooled.norm(dim=1).tolist() == pytest.approx(
        [text.pooled_dim**0.5, 0, *[text.pooled_dim**0.5] * 2]
    )
    assert context[0, 1].equal(context[2, 2]) and not context[0, 0].equal(context[0, 1])
    assert pooled[0].equal(pooled[3]) and not pooled[0].equal(pooled[2])


def test_untrained_encoders(finished):
    text = finished.pipeline.text
    prompts = ["a seven", "a 7", ""]
    trained = text.encode(prompts)
    first, again, other = (untrained(text, job_of(finished, s))(prompts) for s in (1, 1, 2))
    for a, b, c, d in zip(first, again, other, trained, strict=True):
        assert a.equal(b) and a.shape == d.shape and not a.requires_grad
        assert not a[0].isclose(c[0]).all() and not a[0].isclose(d[0]).all()
        assert not a[0].isclose(a[1]).all() and not a[2].any()
    assert text.encode(prompts)[0].equal(trained[0])  # they stay as they are


def test_draws_do_not_depend_on_the_stage(finished):
    asked = []

    def loss_of(step_rng: StepRNG):
        asked.append(step_rng)
        return torch.zeros(()), {}

    for stage in ("told-0", "told-2"):
        same_draws(job_of(finished, 5), loss_of)(StepRNG((5, stage, 17), range(2, 6)))
    assert asked[0] == asked[1] and asked[0].rows == range(2, 6)
    assert asked[0].name[0] == 5 and asked[0].name[-1] == 17


def test_held_out_loss(finished, monkeypatch):
    """ln K for a Muse that knows nothing, whatever is hidden; and it is asked about images that
    were held out, with captions of theirs."""
    config = finished.config
    torch.manual_seed(0)
    vq, muse = VQAutoencoder(vq_config(config, "tiny")), Muse(muse_config(config, "tiny"))
    pipeline = MusePipeline(vq, muse.eval(), finished.pipeline)
    source = finished.source
    said, seen = [], []
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda prompts: said.extend(prompts) or encode(prompts))
    monkeypatch.setattr(muse_encoders, "TOKENS_AT_ONCE", 100)
    muse.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = held_out_loss(pipeline, with_names(source, False))
    assert loss == pytest.approx(math.log(muse.config.codes), rel=1e-5)
    held = source.labels[source.trained :].repeat(muse_encoders.MASKS_PER_IMAGE).tolist()
    assert len(said) == len(held)
    for text, label in zip(said, held, strict=True):
        assert source.images.names[label][0] in text.split()
    tokens = torch.cat(seen)
    share = (tokens == MASK).float().mean()
    assert float(share) == pytest.approx(2 / math.pi, abs=0.03)
    first = tokens[0]
    seen.clear()
    assert held_out_loss(pipeline, with_names(source, False)) == loss and seen[0][0].equal(first)
    assert MusePipeline(vq, muse, finished.pipeline).encode == finished.pipeline.text.encode


def test_only_hidden_tokens_count(finished):
    """A Muse that is sure of code 0, and images whose visible tokens are something else."""
    config = finished.config
    vq, muse = VQAutoencoder(vq_config(config, "tiny")), Muse(muse_config(config, "tiny"))
    pipeline = MusePipeline(vq, muse.eval(), finished.pipeline)

    def sure(seen, *text):
        logits = torch.zeros(*seen.shape, muse.config.codes)
        logits[..., 0] = 9.0
        return logits

    pipeline.tokens = lambda x: torch.ones(len(x), 7, 7, dtype=torch.long)
    pipeline.muse = sure
    wrong = held_out_loss(pipeline, with_names(finished.source, False))
    pipeline.tokens = lambda x: torch.zeros(len(x), 7, 7, dtype=torch.long)
    right = held_out_loss(pipeline, with_names(finished.source, False))
    assert wrong == pytest.approx(9.0, abs=0.1) and right == pytest.approx(0.0, abs=0.1)

    def sure_of_hidden(seen, *text):
        logits = torch.zeros(*seen.shape, muse.config.codes)
        logits[..., 0] = torch.where(seen == MASK, 9.0, -9.0)
        return logits

    pipeline.muse = sure_of_hidden
    assert held_out_loss(pipeline, with_names(finished.source, False)) == pytest.approx(right)


def test_told_scores(finished, monkeypatch):
    """Real digits where words are said; where numerals are, those of another class."""
    source = finished.source
    draws = [draw_prompts(with_names(source, numerals), 40, 103) for numerals in (False, True)]
    asked = []

    def images(tokens):
        asked.append([draw.prompts for draw in draws].index(tokens))
        chosen = draws[asked[-1]].chosen.roll(4 * asked[-1])
        return source.images.train_images[chosen].numpy()

    pipeline = SimpleNamespace(draw=lambda prompts, seed: prompts, images=images)
    monkeypatch.setattr(muse_encoders, "held_out_loss", lambda pipeline, source: 0.5)
    loss, digit, attributes, unheard = encoder_scores(finished, pipeline, 40, 3)
    assert (loss, attributes) == (0.5, 1.0) and asked == [0, 1]
    assert digit > unheard + 0.2
