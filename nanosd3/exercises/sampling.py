"""Exercises on the two ends of the flow: latents from an image, and guidance towards a prompt;
and on the text between: positions in T5, and how three encoders become one context."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3 import samplers, t5, text, vae
from nanosd3.exercises.base import Case, Exercise, Mutant, normal

# --- latents ------------------------------------------------------------------------------------


def posterior_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", (normal(generator, *shape), normal(generator, *shape),
                                normal(generator, *shape)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ]  # fmt: skip


def posterior_spec(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    z = torch.empty_like(mean)
    triples = zip(mean.flatten(), logvar.flatten(), noise.flatten(), strict=True)
    for i, (m, log_variance, n) in enumerate(triples):
        variance = math.exp(log_variance)
        z.view(-1)[i] = m + math.sqrt(variance) * n
    return z


def variance_as_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + logvar.exp() * noise


def log_as_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + logvar * noise


def inverse_deviation(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean + torch.exp(-0.5 * logvar) * noise


POSTERIOR = Exercise(
    name="sample_posterior",
    topic="latents",
    points=1,
    difficulty=1,
    signature="def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:",
    task="A latent from the encoder's Gaussian: mean and log-variance from the network, noise\n"
    "from N(0, 1), all of one shape. Gradients should reach mean and logvar.",
    specification=posterior_spec,
    reference=vae.sample_posterior,
    cases=posterior_cases,
    mutants=(
        Mutant(variance_as_deviation, "exp(logvar) is the variance; noise is multiplied by its "
               "square root."),
        Mutant(log_as_deviation, "logvar is a logarithm; what is it the logarithm of?"),
        Mutant(inverse_deviation, "A larger logvar should mean more noise; yours means less."),
    ),
    why="The randomness comes from outside, so the encoder can be trained through it.",
    where="nanosd3/vae.py, sample_posterior",
    names=("mean", "logvar", "noise"),
)  # fmt: skip


def kl_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"shape {shape}", (normal(generator, *shape), normal(generator, *shape)))
        for shape in ((2, 3, 4, 5), (7, 2))
    ]


def kl_spec(mean: Tensor, logvar: Tensor) -> Tensor:
    totals = []
    for m, log_variance in zip(mean, logvar, strict=True):
        total = 0.0
        for a, b in zip(m.flatten().tolist(), log_variance.flatten().tolist(), strict=True):
            total += 0.5 * (a * a + math.exp(b) - 1 - b)
        totals.append(total)
    return torch.tensor(totals, dtype=mean.dtype)


def kl_averaged(mean: Tensor, logvar: Tensor) -> Tensor:
    return vae.kl_divergence(mean, logvar) / mean[0].numel()


def kl_without_half(mean: Tensor, logvar: Tensor) -> Tensor:
    return 2 * vae.kl_divergence(mean, logvar)


def kl_of_deviation(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + torch.exp(0.5 * logvar) - 1 - logvar).flatten(1).sum(1)


def kl_negative(mean: Tensor, logvar: Tensor) -> Tensor:
    return -vae.kl_divergence(mean, logvar)


KL = Exercise(
    name="kl_divergence",
    topic="latents",
    points=2,
    difficulty=1,
    signature="def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:",
    task="KL(N(mean, exp(logvar)) || N(0, 1)) of each image, summed over its latents:\n"
    "(B, ...) twice -> (B,). One latent has (mean^2 + variance - 1 - log variance) / 2.",
    specification=kl_spec,
    reference=vae.kl_divergence,
    cases=kl_cases,
    mutants=(
        Mutant(kl_averaged, "Summed over an image's latents, not averaged: the weight of the term "
               "depends on which."),
        Mutant(kl_without_half, "Each latent counts half of the bracket."),
        Mutant(kl_of_deviation, "The bracket has the variance, exp(logvar), not the deviation."),
        Mutant(kl_negative, "A divergence is never negative."),
    ),
    why="It keeps latents near each other, so that the flow has something simple to start from.",
    where="nanosd3/vae.py, kl_divergence",
    names=("mean", "logvar"),
)  # fmt: skip

# --- guidance -----------------------------------------------------------------------------------


def guide(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    """What `samplers.guided` makes of a network that answers with these two velocities."""

    def network(z: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return context

    prompt, negative = (v_prompt, v_prompt), (v_negative, v_negative)
    velocity = samplers.guided(network, prompt, negative, scale)
    return velocity(torch.zeros_like(v_prompt), torch.tensor(0.5))


def guide_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case(f"scale {s}", (normal(generator, 2, 3, 4, 5), normal(generator, 2, 3, 4, 5), s))
        for s in (4.5, 1.5, 1.0)
    ]


def guide_spec(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    v = torch.empty_like(v_prompt)
    for i, (a, b) in enumerate(zip(v_prompt.flatten(), v_negative.flatten(), strict=True)):
        v.view(-1)[i] = b + scale * (a - b)  # scale 0: the negative one, 1: the prompt's
    return v


def one_plus_scale(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_prompt + scale * (v_prompt - v_negative)


def away_from_prompt(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_prompt + scale * (v_negative - v_prompt)


def blended(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return (v_negative + scale * v_prompt) / (1 + scale)


def no_difference(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_negative + scale * v_prompt


GUIDANCE = Exercise(
    name="guide",
    topic="sampling",
    points=2,
    difficulty=1,
    signature="def guide(v_prompt: Tensor, v_negative: Tensor, scale: float) -> Tensor:",
    task="Classifier-free guidance: one velocity from the prompt's and the negative one's, all of\n"
    "one shape. Scale 0 is the negative one, 1 the prompt's, more goes beyond it.",
    specification=guide_spec,
    reference=guide,
    cases=guide_cases,
    mutants=(
        Mutant(one_plus_scale, "At scale 1 the prompt's velocity should come out unchanged; some "
               "papers count from 0."),
        Mutant(away_from_prompt, "This leads away from the prompt."),
        Mutant(blended, "A blend stays between the two; guidance goes beyond."),
        Mutant(no_difference, "What is scaled is the difference of the two."),
    ),
    why="It trades variety for doing as told; both conventions are in print.",
    where="nanosd3/samplers.py, guided",
    names=("v_prompt", "v_negative", "scale"),
)  # fmt: skip

# --- text ---------------------------------------------------------------------------------------


def bucket_cases(generator: torch.Generator) -> list[Case]:
    return [Case(f"{length} tokens", (length,)) for length in (5, 20, 140)]


def buckets_spec(length: int) -> Tensor:
    """16 buckets for keys before the query (or at it), 16 for those after it."""
    starts = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
    table = torch.zeros(length, length, dtype=torch.long)
    for query in range(length):
        for key in range(length):
            for start in starts:
                if abs(key - query) >= start:
                    table[query, key] += 1
            if key > query:
                table[query, key] += 16
    return table


def buckets_transposed(length: int) -> Tensor:
    return t5.distance_buckets(length).T


def no_direction(length: int) -> Tensor:
    return t5.distance_buckets(length) % 16


def not_logarithmic(length: int) -> Tensor:
    i = torch.arange(length)
    distance = i[None, :] - i[:, None]
    return distance.abs().clamp(max=15) + 16 * (distance > 0)


BUCKETS = Exercise(
    name="distance_buckets",
    topic="text",
    points=3,
    difficulty=3,
    signature="def distance_buckets(length: int) -> Tensor:",
    task="T5's relative positions: a bucket (length, length), of type long, for the distance from\n"
    "each query (row) to each key (column). Buckets 0 to 7 are single distances; 8 to 15 begin at\n"
    "8, 12, 16, 23, 32, 46, 64 and 91. For keys behind the query add 16.",
    specification=buckets_spec,
    reference=t5.distance_buckets,
    cases=bucket_cases,
    mutants=(
        Mutant(buckets_transposed, "Rows are queries, columns are keys; which lies behind?"),
        Mutant(no_direction, "Before and after are told apart: keys behind the query add 16."),
        Mutant(not_logarithmic, "From 8 on a bucket holds many distances, more the further away."),
    ),
    why="Near words are told apart one by one, far ones roughly.",
    where="nanosd3/t5.py, distance_buckets",
    differentiable=False,
    other_devices=False,  # nothing comes in
    names=("length",),
)


def context_cases(generator: torch.Generator) -> list[Case]:
    def case(B: int, Lc: int, dl: int, dg: int, Lt: int, Dc: int) -> Case:
        states = (normal(generator, B, Lc, dl), normal(generator, B, Lc, dg),
                  normal(generator, B, Lt, Dc))  # fmt: skip
        return Case(f"{Lc} and {Lt} tokens", states)

    return [case(2, 3, 4, 5, 6, 12), case(1, 4, 2, 3, 2, 5)]


def context_spec(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    B, Lc, dl = clip_l.shape
    dg, Lt, Dc = clip_g.shape[2], t5.shape[1], t5.shape[2]
    context = torch.zeros(B, Lc + Lt, Dc, dtype=t5.dtype)
    for b in range(B):
        for n in range(Lc):
            context[b, n, :dl] = clip_l[b, n]
            context[b, n, dl : dl + dg] = clip_g[b, n]
        for n in range(Lt):
            context[b, Lc + n] = t5[b, n]
    return context


def g_before_l(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    return text.join_context(clip_g, clip_l, t5)


def t5_first(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    return text.join_context(clip_l, clip_g, t5).roll(t5.shape[1], dims=1)


def padded_on_the_left(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    clip = torch.cat([clip_l, clip_g], dim=2)
    return torch.cat([F.pad(clip, (t5.shape[2] - clip.shape[2], 0)), t5], dim=1)


def encoders_as_tokens(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    wide = [F.pad(c, (0, t5.shape[2] - c.shape[2])) for c in (clip_l, clip_g)]
    return torch.cat([*wide, t5], dim=1)


CONTEXT = Exercise(
    name="join_context",
    topic="text",
    points=2,
    difficulty=2,
    signature="def join_context(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:",
    task="One context from three encoders: states of the CLIPs, (B, Lc, dl) and (B, Lc, dg), side\n"
    "by side, with zeros on the right up to T5's width Dc >= dl + dg; behind them, as further\n"
    "tokens, T5's (B, Lt, Dc). Result: (B, Lc + Lt, Dc).",
    specification=context_spec,
    reference=text.join_context,
    cases=context_cases,
    mutants=(
        Mutant(g_before_l, "CLIP-L comes first, then CLIP-G."),
        Mutant(t5_first, "T5's tokens stand behind the CLIPs'."),
        Mutant(padded_on_the_left, "The zeros go to the right of the CLIPs' features."),
        Mutant(encoders_as_tokens, "The CLIPs describe the same tokens: their features stand side "
               "by side, not their tokens one after the other."),
    ),
    why="Dropping an encoder is then only writing zeros over its part.",
    where="nanosd3/text.py, join_context (paper, section 4)",
    names=("clip_l", "clip_g", "t5"),
)  # fmt: skip

EXERCISES = (POSTERIOR, KL, GUIDANCE, BUCKETS, CONTEXT)
