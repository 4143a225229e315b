"""x-cdec-3: the Consistency Decoder on latents that a generator has made (OpenAI, 2023)."""

from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.decoder_networks import DECODER_SHORT, decoder_job
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, once, table_of, verdict
from nanosd3.claims.runs import open_main_run
from nanosd3.pipeline import Pipeline
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.scoring import accuracy_and_ratio, draw_and_floor
from nanosd3.related.train_consistency_decoder import (
    decoding,
    replaced_decoder,
    trained_decoder,
)
from nanosd3.training.plot_style import new_figure, save_plot

BY_ITS_OWN, BY_ANOTHER = "the autoencoder's decoder", "the consistency decoder, 2 steps"
GENERATED = 500  # samples


def consistent_pipeline(
    conditions: Conditions, finished: FinishedRun, seed: int
) -> tuple[Pipeline, float]:
    """The finished run's pipeline with a consistency decoder of this seed, trained now or before,
    and the seconds of a core that training it took."""
    vae = finished.pipeline.vae
    job = decoder_job(conditions, finished, "drop-in", seed, vae.config)
    with job.run.alone(), torch.enable_grad():
        print(f"decoder of the main job's latents, seed {seed}", flush=True)
        decoder = trained_decoder(job, vae)
    other = replaced_decoder(finished.pipeline, decoding(decoder, vae.config.factor))
    return other, job.run.stages["decoder"]["thread_seconds"]


@once
def drop_in_study(conditions: Conditions) -> dict:
    """Share classified as prompted and distance of the same latents decoded both ways, by seed."""
    finished = open_main_run(conditions)
    found: dict[str, list[list[float]]] = {BY_ITS_OWN: [], BY_ANOTHER: []}
    seconds = 0.0
    for seed in conditions.seeds:
        other, taken = consistent_pipeline(conditions, finished, seed)
        seconds += taken
        draw, floor = draw_and_floor(finished, 20 if conditions.fast else GENERATED, 100 + seed)
        latents = finished.pipeline(draw.prompts, seed=seed, output="latent")
        assert isinstance(latents, Tensor)
        for name, pipeline in ((BY_ITS_OWN, finished.pipeline), (BY_ANOTHER, other)):
            scores = accuracy_and_ratio(finished, pipeline.decode(latents), draw, floor)
            found[name].append(list(scores))
    rows = [[name, *map(list, zip(*each, strict=True))] for name, each in found.items()]
    table = table_of(["decoded by", "read as asked", "Frechet ratio"], rows)
    return {"decoded": found, "training_seconds": seconds, "table": table}


def decide_drop_in(results: dict) -> Verdict:
    pairs = list(zip(*(results["decoded"][n] for n in (BY_ITS_OWN, BY_ANOTHER)), strict=True))
    as_good = [ours[1] <= own[1] and ours[0] >= own[0] - 0.01 for own, ours in pairs]
    farther = [ours[1] > own[1] for own, ours in pairs]
    enough = len(pairs) > 1
    return verdict(enough and all(as_good), enough and all(farther))


def plot_drop_in(results: dict, path: Path) -> None:
    figure, axes = new_figure(8, 2)
    names = list(results["decoded"])
    panels = ((axes[0], 1, 1, "Frechet distance / real"), (axes[1], 0, 100, "Read as asked (%)"))
    for axis, i, unit, title in panels:
        for row, name in enumerate(names):
            values = [unit * scores[i] for scores in results["decoded"][name]]
            axis.plot(values, [row] * len(values), "o")
        labels = [name.replace("the ", "").replace("decoder", "\ndecoder") for name in names]
        axis.set_yticks(range(len(names)), labels if axis is axes[0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set(title=title)
    save_plot(figure, path)


DROP_IN = Experiment(
    name="x-cdec-3",
    claim="A consistency decoder simply takes the place of the autoencoder's decoder: what a "
    "generator has made is decoded at least as well, and nothing else is trained again.",
    source="OpenAI's Consistency Decoder, 2023 (no paper)",
    measured="A consistency decoder trained on real images for the main job's latents (8x8x4), "
    f"{DECODER_SHORT.steps} steps of {DECODER_SHORT.batch}; {GENERATED} samples of the main model "
    "with its own sampling, the same latents decoded by either decoder: share read as asked, and "
    "Frechet distance over that of real images.",
    rule="Supported if in every seed the distance is no higher by the consistency decoder than by "
    "the autoencoder's own, and the share read at most 0.01 lower. Refuted if in every seed the "
    "distance is higher. (One seed decides nothing.)",
    minutes=9,
    run=drop_in_study,
    decide=decide_drop_in,
    plot=plot_drop_in,
    remark="By 12%, with 100 s of a core for a decoder of each seed. These latents say more of an "
    "image than those of x-cdec-1 (256 numbers in place of 32), and 300 steps are enough for them. "
    "How far the old decoder would come with 300 steps more was not measured here.",
)
