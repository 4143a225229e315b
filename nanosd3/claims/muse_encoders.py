"""Muses with three text encoders, trained on half of the captions.

The main job's text encoders were trained before any generator: the CLIPs to match captions with
images, T5 to fill in removed words. They are compared with the same encoders with random weights,
whose states differ from word to word but have no meaning, and with one-hot words, whose embedding
is Muse's own first linear layer.

Each digit has two names, a word and a numeral, and each image has equally many captions of both.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from nanosd3.claims.data_sets import with_captions
from nanosd3.claims.muse_networks import in_steps, with_recipes
from nanosd3.claims.sd3_without_t5 import attributes_right
from nanosd3.data.sources import Digits
from nanosd3.flow import stratified
from nanosd3.lazy_modules import LazyModules
from nanosd3.random_streams import rng
from nanosd3.related.command import Study, size_of
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.muse import Conditioning, Muse, cosine_share, hide, masked_loss
from nanosd3.related.muse_editing import TOKENS_AT_ONCE, MusePipeline, unpadded
from nanosd3.related.muse_system import MUSE_RECIPES, muse_config, vq_config
from nanosd3.related.train_muse import token_prediction_loss, train_tokens
from nanosd3.text import TextEncoders, make_encoders
from nanosd3.training.evaluation import draw_prompts, to_digits
from nanosd3.training.loop import StepLoss
from nanosd3.training.stages import Job, build, finish_or_load, fit_average

TEXT_STEPS = 300  # of the transformer
TEXT_AVERAGE = 0.98  # decay of the average of its weights
TEXT_ENCODERS = ("trained encoders", "the same, untrained", "a table of words")
ENCODER_SCORES = ("loss", "digit", "attributes", "unheard")
MASKS_PER_IMAGE = 4  # of held-out images, in the validation loss
TEXT_STAGE = "told"  # of training: its name in finished runs and random streams
Encode = Callable[[list[str]], Conditioning]


def untrained(text: TextEncoders, job: Job) -> Encode:
    """The same encoders with fresh weights, by the job's seed."""
    encoders = build(job, "text", lambda: make_encoders(text.config))
    encoders.requires_grad_(False).eval()
    parts = LazyModules(dict(encoders.items()), job.device)
    tokenizers, widths = text.tokenizers, (text.context_dim, text.pooled_dim)
    return TextEncoders(text.config, tokenizers, parts, *widths).encode


def one_hot(text: TextEncoders, captions: list[str]) -> Encode:
    """A token for each word of a prompt, zero but for one entry, and all of them as one vector;
    both have the length of vectors of that width whose numbers have a variance of 1. No order."""
    words = sorted({word for caption in captions for word in caption.split()})
    place = {word: i for i, word in enumerate(words)}
    longest = max(len(caption.split()) for caption in captions)

    def encode(prompts: list[str]) -> Conditioning:
        context = torch.zeros(len(prompts), longest, text.context_dim)
        for i, prompt in enumerate(prompts):
            for j, word in enumerate(prompt.split()):
                context[i, j, place[word]] = 1.0
        counts = context.sum(1)[:, : text.pooled_dim]
        pooled = F.normalize(counts, dim=1) * text.pooled_dim**0.5
        return context * text.context_dim**0.5, pooled

    assert len(words) <= min(text.context_dim, text.pooled_dim)
    return encode


def with_names(source: Digits, numerals: bool) -> Digits:
    """The same images, with those of their captions that name the digit by a numeral, or by a
    word."""
    texts = source.described.captions.texts
    return with_captions(source, [any(map(str.isdecimal, text)) == numerals for text in texts])


def stage_of(name: str) -> str:
    return f"{TEXT_STAGE}-{TEXT_ENCODERS.index(name)}"


def muse_by_encoder(study: Study, name: str) -> MusePipeline:
    """The Muse with one of TEXT_ENCODERS, trained now or before. All see the same images, captions
    and hidden tokens, and start from the same weights."""
    job, finished, size = study.job, study.finished, size_of(study.args, study.finished)
    job = with_recipes(job, flow=in_steps(MUSE_RECIPES[size], TEXT_STEPS, size))
    vq = train_tokens(job, vq_config(job.config, size))
    muse = build(job, "muse", lambda: Muse(muse_config(job.config, size))).to(job.device)
    text, captions = finished.pipeline.text, finished.source.texts
    pipeline = MusePipeline(vq, muse, finished.pipeline)
    makers: tuple[Callable[[], Encode], ...] = (
        lambda: text.encode,
        lambda: untrained(text, job),
        lambda: one_hot(text, captions),
    )
    pipeline.encode = makers[TEXT_ENCODERS.index(name)]()
    loss_of = token_prediction_loss(
        job, with_names(finished.source, False), vq, pipeline.encode(captions), cosine_share,
        lambda seen, tokens, x, *text: muse(seen, *text),
    )  # fmt: skip
    stage, decay = stage_of(name), TEXT_AVERAGE
    train = partial(fit_average, job, stage, muse, same_draws(job, loss_of), decay)
    finish_or_load(job, stage, muse, train)
    return pipeline


def same_draws(job: Job, loss_of: StepLoss) -> StepLoss:
    """With the same random numbers in a step, whatever the stage is called."""
    return lambda step_rng: loss_of(
        replace(step_rng, name=(job.seed, TEXT_STAGE, step_rng.name[-1]))
    )


@torch.no_grad()
def held_out_loss(pipeline: MusePipeline, source: Digits) -> float:
    """The cross-entropy of hidden tokens of held-out images, the same ones for every Muse."""
    generator = rng(0, "x-muse-6")
    index = torch.arange(source.trained, source.count).repeat(MASKS_PER_IMAGE)
    captions = source.captions(index, torch.rand(len(index), generator=generator))
    share = cosine_share(stratified(len(index), generator))
    tokens = pipeline.tokens(unpadded(source.pixels(index), source.config.padding))
    places = torch.rand(len(index), tokens[0].numel(), generator=generator)
    seen, losses = hide(tokens, share, places), []
    for rows in torch.arange(len(index)).split(TOKENS_AT_ONCE):
        text = pipeline.encode([source.texts[i] for i in captions[rows].tolist()])
        losses.append(masked_loss(pipeline.muse(seen[rows], *text), tokens[rows], seen[rows]))
    return float(torch.cat(losses).mean())


def encoder_scores(
    finished: FinishedRun, pipeline: MusePipeline, count: int, seed: int
) -> list[float]:
    """Values of ENCODER_SCORES: the loss, and shares of samples."""
    words, numerals = (with_names(finished.source, has_numeral) for has_numeral in (False, True))
    shares = []
    for source in (words, numerals):
        draw = draw_prompts(source, count, 100 + seed)
        images = pipeline.images(pipeline.draw(draw.prompts, 100 + seed))
        digits = to_digits(torch.from_numpy(images))
        right = finished.scorer.score(digits, draw)[0]
        shares.append((right, attributes_right(finished.source.described, draw, digits)))
    return [held_out_loss(pipeline, words), *shares[0], shares[1][0]]
