"""x-muse-7: a larger decoder for the same tokens."""

import torch

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.claims.muse_cascade import plot_measures
from nanosd3.claims.muse_networks import (
    MUSE_TRAINED,
    SHORT_STEPS,
    TrainedMuse,
    in_steps,
    muse_study,
    trained_muse,
    with_recipes,
)
from nanosd3.related.cascade_system import larger_channels
from nanosd3.related.command import Study, size_of
from nanosd3.related.muse_editing import VQPipeline, unpadded
from nanosd3.related.scoring import draw_and_floor
from nanosd3.related.train_cascade import train_decoder
from nanosd3.training.evaluation import to_digits

DECODERS = ("as wide", "twice as wide")
DECODED = 1000  # images
DECODER_STEPS = 80


def decoders_of(study: Study, muse: TrainedMuse) -> dict[str, VQPipeline]:
    """Two decoders trained on the Muse's tokens for equally many steps."""
    vq = muse.pipeline.vq
    channels = (vq.config.decoder_channels, larger_channels(vq.config))
    recipe = in_steps(
        study.job.training.autoencoder, DECODER_STEPS, size_of(study.args, muse.finished)
    )
    job, made = with_recipes(study.job, autoencoder=recipe), {}
    for i, (name, widths) in enumerate(zip(DECODERS, channels, strict=True)):
        made[name] = train_decoder(job, vq, widths, f"decoder-{i}")
    return {name: VQPipeline(vq, muse.finished.pipeline) for name, vq in made.items()}


def muse_decoders(conditions: Conditions) -> dict:
    """Squared error a pixel and Frechet ratio of reconstructions by either decoder, by seed."""
    count, seconds = 20 if conditions.fast else DECODED, 0.0
    found: dict[str, list[list[float]]] = {name: [] for name in DECODERS}
    same = []
    for seed in conditions.seeds:
        muse = trained_muse(conditions, seed, SHORT_STEPS)
        finished = muse.finished
        with muse_study(conditions, seed, SHORT_STEPS) as study:
            decoders = decoders_of(study, muse)
            seconds += sum(study.job.run.stages[f"decoder-{i}"]["thread_seconds"] for i in (0, 1))
        draw, floor = draw_and_floor(finished, count, 100 + seed)
        x = unpadded(finished.source.pixels(draw.chosen), finished.config.padding)
        tokens = muse.pipeline.tokens(x)
        for name, decoder in decoders.items():
            same.append(bool(decoder.tokens(x).equal(tokens)))
            images = torch.from_numpy(decoder.images(tokens))
            error = (images[:, None].float() / 127.5 - 1 - x).square().mean()
            distance = finished.scorer.score(to_digits(images), draw)[1]
            found[name].append([float(error), distance / floor])
    rows = [[name, *(list(x) for x in zip(*scores, strict=True))] for name, scores in found.items()]
    table = table_of(["decoder", "squared error", "Frechet ratio"], rows)
    return {"scores": found, "same": all(same), "training_seconds": seconds, "table": table}


def decide_decoder(results: dict) -> Verdict:
    smaller, larger = (results["scores"][name] for name in DECODERS)
    pairs = list(zip(smaller, larger, strict=True))
    lower = [[big < small for small, big in zip(*pair, strict=True)] for pair in pairs]
    return verdict(results["same"] and all(map(all, lower)), not any(map(any, lower)))


LARGER_DECODERS = Experiment(
    name="x-muse-7",
    claim="A larger decoder, trained on frozen tokens, makes better images of the same tokens.",
    source="Muse, arXiv 2301.00704, section 2.5",
    measured=f"{MUSE_TRAINED}. Two new decoders for its tokens, one as wide as its own and one "
    f"twice as wide, trained in {DECODER_STEPS} steps each. {DECODED:,} training images as tokens "
    "and back: squared error (pixels from -1 to 1), and Frechet distance over that of real images.",
    rule="Supported if the tokens are the same and in every seed both are lower with the wider "
    "decoder. Refuted if in no seed either is.",
    minutes=8,
    run=muse_decoders,
    decide=decide_decoder,
    plot=plot_measures,
    remark="In two seeds of three the wider one is better by both measures. 80 steps are few, and "
    "the two see the images in different orders, which at this length is as large an effect.",
)
