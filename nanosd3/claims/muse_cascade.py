"""x-muse-3: coarse tokens before fine ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.claims.muse_networks import (
    MUSE_TRAINED,
    SHORT_STEPS,
    TrainedMuse,
    encoded_captions,
    in_steps,
    muse_study,
    trained_muse,
    with_recipes,
)
from nanosd3.related.cascade_system import (
    FINE_RECIPES,
    FINE_SIZES,
    fine_config,
    fine_vq_config,
)
from nanosd3.related.command import size_of
from nanosd3.related.muse import cosine_share
from nanosd3.related.muse_editing import (
    MUSE_GUIDANCE,
    MUSE_STEPS,
    MUSE_TEMPERATURE,
    MusePipeline,
)
from nanosd3.related.scoring import accuracy_and_ratio, draw_and_floor
from nanosd3.related.train_cascade import (
    SUPER_RESOLUTION,
    CascadePipeline,
    train_super_resolution,
)
from nanosd3.related.train_muse import train_muse, train_tokens
from nanosd3.training.plot_style import new_figure, save_plot

CASCADE_STEPS, DIRECT_STEPS = 150, 500  # of the fine tokens; alone they get the base's seconds too
FINE_TOKEN_STEPS = 120  # of their tokeniser
CASCADED = 500  # samples
CASCADE_VARIANTS = ("base tokens alone", "base, then fine tokens", "fine tokens alone")


def cascade_and_direct(
    conditions: Conditions, seed: int, muse: TrainedMuse
) -> tuple[CascadePipeline, MusePipeline, dict[str, float]]:
    """A cascade on the Muse of a seed, a Muse of fine tokens alone, and seconds of training."""
    texts = encoded_captions(conditions.run)
    with muse_study(conditions, seed, SHORT_STEPS) as study:
        job, source, size = study.job, study.finished.source, size_of(study.args, study.finished)
        few = with_recipes(
            job, autoencoder=in_steps(job.training.autoencoder, FINE_TOKEN_STEPS, size)
        )
        vq = train_tokens(few, fine_vq_config(job.config, size), "fine_tokens")
        config = fine_config(muse.pipeline.muse.config, size)
        some, many = (
            with_recipes(job, flow=in_steps(FINE_RECIPES[size], n, size))
            for n in (CASCADE_STEPS, DIRECT_STEPS)
        )
        network = train_super_resolution(
            some, source, muse.pipeline, vq, texts, config, FINE_SIZES[size][2]
        )
        deep = replace(config, depth=muse.pipeline.muse.config.depth)
        direct = train_muse(many, source, vq, texts, deep, cosine_share, "direct")
        stages = ("fine_tokens", SUPER_RESOLUTION, "direct")
        seconds = {name: job.run.stages[name]["thread_seconds"] for name in stages}
    cascade = CascadePipeline(muse.pipeline, network, vq)
    return cascade, MusePipeline(vq, direct, muse.finished.pipeline), seconds


def muse_cascade(conditions: Conditions) -> dict:
    """Accuracy and Frechet ratio of the three ways, and seconds of training, by seed."""
    count, sampling = 20 if conditions.fast else CASCADED, (MUSE_GUIDANCE, MUSE_TEMPERATURE)
    found: dict[str, list[list[float]]] = {name: [] for name in CASCADE_VARIANTS}
    seconds = 0.0
    for seed in conditions.seeds:
        muse = trained_muse(conditions, seed, SHORT_STEPS)
        cascade, direct, took = cascade_and_direct(conditions, seed, muse)
        draw, floor = draw_and_floor(muse.finished, count, 100 + seed)
        inputs = (draw.prompts, 100 + seed, MUSE_STEPS, *sampling)
        base = muse.pipeline.draw(*inputs)
        images = (
            muse.pipeline.images(base),
            cascade.images(cascade.refine(base, *inputs)),
            direct.images(direct.draw(*inputs)),
        )
        shared = muse.seconds, muse.seconds + took[SUPER_RESOLUTION], took["direct"]
        for name, made, alone in zip(CASCADE_VARIANTS, images, shared, strict=True):
            scores = accuracy_and_ratio(muse.finished, made, draw, floor)
            found[name].append([*scores, alone])
        seconds += muse.token_seconds + took["fine_tokens"] + shared[1] + shared[2]
    rows = [[name, *(list(x) for x in zip(*scores, strict=True))] for name, scores in found.items()]
    columns = ["", "read as asked", "Frechet ratio", "seconds of a core to train its transformers"]
    return {"scores": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def decide_cascade(results: dict) -> Verdict:
    cascade, direct = (results["scores"][name] for name in CASCADE_VARIANTS[1:])
    better = [a[0] >= b[0] and a[1] < b[1] for a, b in zip(cascade, direct, strict=True)]
    nearer = [a[1] < b[1] for a, b in zip(cascade, direct, strict=True)]
    return verdict(all(better), not any(nearer))


def plot_measures(results: dict, path: Path) -> None:
    """The two measures of each variant, one point per seed."""
    figure, axes = new_figure(9, 2)
    titles = results["table"]["columns"][1:3]
    for i, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for j, scores in enumerate(results["scores"].values()):
            axis.plot([j] * len(scores), np.array(scores)[:, i], "o")
        labels = [name.replace(", ", ",\n") for name in results["scores"]]
        axis.set_xticks(range(len(labels)), labels)
        axis.margins(0.25)
        axis.set_title(title)
    save_plot(figure, path)


CASCADE = Experiment(
    name="x-muse-3",
    claim="A cascade, coarse tokens before fine ones, is better than fine tokens alone.",
    source="Muse, arXiv 2301.00704, section 2.4",
    measured=f"{MUSE_TRAINED}: 7x7 tokens. On it, fine tokens, 14x14, by a second transformer that "
    f"is told the coarse ones ({CASCADE_STEPS} steps), and the same fine tokens by one transformer "
    f"alone in about the seconds of both ({DIRECT_STEPS} steps); each network has an order of "
    f"images of its own. {CASCADED} samples, 8 steps each: read as asked, and Frechet "
    "distance over that of real images.",
    rule="Supported if in every seed the cascade is nearer to real images than fine tokens alone "
    "and read as asked no less often. Refuted if it is nearer in no seed.",
    minutes=10,
    run=muse_cascade,
    decide=decide_cascade,
    plot=plot_measures,
    remark="The second transformer had 150 steps, 39 s of a core, and has not learned enough to "
    "improve on its base; fine tokens alone make better use of the time of both. The command "
    "`related muse-cascade` trains it for 267 s, and there the fine tokens help (4.29 against "
    "5.19).",
)
