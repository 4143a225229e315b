"""x-muse-1: how much to hide in training."""

import statistics
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.muse_networks import trained_muse
from nanosd3.related.muse import cosine_share
from nanosd3.related.scoring import accuracy_and_ratio, draw_and_floor
from nanosd3.training.plot_style import new_figure, save_plot


def uniform_share(u: Tensor) -> Tensor:
    """Every share is equally likely."""
    return u


def bert_share(u: Tensor) -> Tensor:
    """15% of the tokens, always, as language models hide them."""
    return torch.full_like(u, 0.15)


SHARES_HIDDEN = {"cosine": cosine_share, "uniform": uniform_share, "always 15%": bert_share}
MASK_STEPS = 400


def muse_masks(conditions: Conditions) -> dict:
    """Accuracy and Frechet ratio after 8 steps, by what was hidden in training and seed."""
    count, seconds = 20 if conditions.fast else 1000, 0.0
    found: dict[str, list[list[float]]] = {}
    for i, (name, share_of) in enumerate(SHARES_HIDDEN.items()):
        found[name] = []
        for seed in conditions.seeds:
            muse = trained_muse(conditions, seed, MASK_STEPS, share_of, f"muse-{i}")
            seconds += muse.seconds + (i == 0) * muse.token_seconds  # the same tokens for all
            draw, floor = draw_and_floor(muse.finished, count, 100 + seed)
            images = muse.pipeline.images(muse.pipeline.draw(draw.prompts, 100 + seed))
            found[name].append(list(accuracy_and_ratio(muse.finished, images, draw, floor)))
    rows = [[name, *(list(x) for x in zip(*pairs, strict=True))] for name, pairs in found.items()]
    columns = ["hidden in training", "read as asked", "Frechet ratio"]
    return {"scores": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def ratios_of(results: dict, name: str) -> list[float]:
    return [ratio for _, ratio in results["scores"][name]]


def decide_masks(results: dict) -> Verdict:
    cosine = ratios_of(results, "cosine")
    uniform, few = (ratios_of(results, name) for name in ("uniform", "always 15%"))
    mean, spread = lead(cosine, uniform)
    useless = all(b >= 2 * a for a, b in zip(cosine, few, strict=True))
    return verdict(mean > spread and useless, mean < -spread or min(few) <= statistics.mean(cosine))


def plot_masks(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(5.5, 1)
    for i, name in enumerate(results["scores"]):
        ratios = ratios_of(results, name)
        axis.semilogy([i] * len(ratios), ratios, "o")
    axis.set_xticks(range(len(results["scores"])), list(results["scores"]))
    axis.margins(0.3)
    axis.set(ylabel="Frechet distance / that of real images", title="Hidden in training")
    save_plot(figure, path)


MASKS = Experiment(
    name="x-muse-1",
    claim="Hiding a share cos(pi u / 2) of the tokens in training is best for drawing in parallel, "
    "and hiding few, as language models do, is of no use for it.",
    source="MaskGIT, arXiv 2202.04200, section 4.4; Muse, arXiv 2301.00704, section 2.6",
    measured=f"A Muse trained for {MASK_STEPS} steps with each of three shares: the cosine's, "
    "uniform, and always 15%. 1,000 samples in 8 steps: Frechet distance over that of real images.",
    rule="Supported if over seeds the cosine's distance is below the uniform one's by more than "
    "the spread of that difference, and if in every seed the distance with 15% is at least twice "
    "the cosine's. Refuted if the uniform one's is below by more than the spread, or 15% reaches "
    "the cosine's mean in any seed.",
    minutes=9,
    run=muse_masks,
    decide=decide_masks,
    plot=plot_masks,
    remark="The three see images and captions in an order of their own.",
)
