"""Two samples of one prompt, one right and one wrong; and the main job's transformer, tuned on such
pairs with weights of low rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import network_job
from nanosd3.claims.sd3_variants import TrainedVariant
from nanosd3.config_types import Recipe
from nanosd3.data.mnist import bins, measure_strokes
from nanosd3.flow import flow_loss, interpolate, logit_normal, stratified
from nanosd3.mmdit import MMDiT
from nanosd3.pipeline import Pipeline
from nanosd3.random_streams import rng
from nanosd3.related.dpo import PromptText, add_low_rank, dpo_loss, merge_low_rank, pair_errors
from nanosd3.related.finished_run import FinishedRun
from nanosd3.text import rows_of
from nanosd3.training.cached_features import Features
from nanosd3.training.evaluation import Draw, draw_prompts, to_digits
from nanosd3.training.loop import StepRNG
from nanosd3.training.report import SLANT_WORDS, WEIGHT_WORDS, thirds_asked
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, training_of

RANK, BETA = 8, 200.0
PAIRS_DRAWN = 1000  # prompts, with two samples each; for most of them both or neither are right
UNGUIDED_STEPS = 5  # of Heun
TUNING = Recipe(steps=80, batch=32, lr=1e-3, warmup=20, weight_decay=0.0, decay="constant")
TUNED_ON = ("preferences", "winners alone")


@dataclass(frozen=True)
class ScoredSamples:
    """Samples of a draw of prompts."""

    latents: Tensor  # (B, C, h, w), normalised
    features: Tensor  # (B, F), of the classifier
    right: Tensor  # (B,), which have the digit and the attributes of their prompts


@torch.no_grad()
def sample_and_score(
    finished: FinishedRun, pipeline: Pipeline, draw: Draw, seed: int
) -> ScoredSamples:
    """Samples without guidance, and which of them are right."""
    latents = pipeline(
        draw.prompts, seed=seed, steps=UNGUIDED_STEPS, guidance=1.0, sampler="heun", output="latent"
    )
    assert isinstance(latents, Tensor)
    digits = to_digits(torch.from_numpy(pipeline.decode(latents)))
    features = finished.scorer.features(digits)
    right = finished.scorer.read(features) == draw.labels
    return ScoredSamples(latents, features, right & attributes_shown(finished, draw, digits))


def attributes_shown(finished: FinishedRun, draw: Draw, digits: Tensor) -> Tensor:
    """Which digits uint8 (B, 28, 28) have the stroke and the slant that their prompts name (B,);
    those whose prompts name none do."""
    described, shown = finished.source.described, torch.ones(len(digits), dtype=torch.bool)
    limits = described.weight_limits, described.slant_limits
    words = WEIGHT_WORDS, SLANT_WORDS
    for values, limit, meant in zip(measure_strokes(digits), limits, words, strict=True):
        third = thirds_asked(draw.prompts, meant)
        shown &= (third < 0) | (bins(values, draw.labels, limit) == third)
    return shown


@dataclass(frozen=True)
class Pairs:
    """Preferences: latents (n, C, h, w) of winners and losers, and the text of their prompts."""

    winners: Tensor
    losers: Tensor
    text: PromptText  # (n, M, Dc), (n, Dp)


@torch.no_grad()
def preferred_pairs(finished: FinishedRun, features: Features, seed: int, count: int) -> Pairs:
    """Of `count` prompts, with two samples each of the finished model: the pairs of a right one and
    a wrong one."""
    draw = draw_prompts(finished.source, count, 200 + seed)
    pipeline = features.pipeline(finished.pipeline.mmdit, finished.device)
    a, b = (sample_and_score(finished, pipeline, draw, start + seed) for start in (200, 300))
    differ, first = a.right != b.right, a.right[:, None, None, None]
    prompts = [prompt for prompt, kept in zip(draw.prompts, differ.tolist(), strict=True) if kept]
    text = rows_of({prompt: features[prompt] for prompt in {*prompts}}, prompts)
    winners = torch.where(first, a.latents, b.latents)
    losers = torch.where(first, b.latents, a.latents)
    return Pairs(winners[differ], losers[differ], text)


def tuned_transformer(
    conditions: Conditions,
    finished: FinishedRun,
    features: Features,
    pairs: Callable[[], Pairs],
    what: str,
    seed: int,
) -> TrainedVariant:
    """The finished transformer, tuned now or before on one of TUNED_ON. `pairs` makes them, if
    they are needed."""
    recipe = TUNING
    if conditions.fast:
        recipe = replace(recipe, steps=3, batch=8, warmup=1)
    training = replace(training_of(finished.config), flow=recipe, ema_decay=0.98)
    config = replace(finished.config, training=training)
    name = f"tuned-{what.replace(' ', '-')}"
    numbers = [RANK, BETA, PAIRS_DRAWN]
    job = network_job(conditions, finished, name, config, seed, tuned_on=what, numbers=numbers)
    model = build(job, "flow", lambda: MMDiT(config.mmdit))
    model.load_state_dict(finished.pipeline.mmdit.state_dict())
    add_low_rank(model, RANK, rng(seed, "low-rank"))

    def train() -> dict:
        print(f"tuned on {what}, seed {seed}", flush=True)
        known = pairs()
        loss_of = partial(tuning_loss, job, model, finished.pipeline.mmdit, known, what)
        results = fit_average(job, "flow", model, loss_of, training.ema_decay)
        return results | {"pairs": len(known.winners)}

    with job.run.alone():
        finish_or_load(job, "flow", model, train)
    return TrainedVariant(merge_low_rank(model), job, features)


def tuning_loss(
    job: Job, model: MMDiT, reference: MMDiT, pairs: Pairs, what: str, step_rng: StepRNG
) -> tuple[Tensor, dict]:
    """A step's losses (B,): of preferences, or of their winners alone, as in any training."""
    training, generator = job.training, step_rng.generator()
    size = training.flow.batch
    index = step_rng.take(torch.randint(len(pairs.winners), (size,), generator=generator))
    u = stratified(size, generator)
    t = step_rng.take(logit_normal(u, training.time_mean, training.time_std))  # (B,)
    winner, loser = pairs.winners[index], pairs.losers[index]  # (B, C, h, w)
    noise = step_rng.noise(winner.shape[1:])
    context, pooled = (x[index] for x in pairs.text)
    if what == "winners alone":
        velocity = model(interpolate(winner, noise, t), t, context, pooled)
        return flow_loss(velocity, winner, noise), {}
    given = winner, loser, noise, t, (context, pooled)
    with torch.no_grad():
        before = pair_errors(reference, *given)
    return dpo_loss(pair_errors(model, *given), before, BETA), {}
