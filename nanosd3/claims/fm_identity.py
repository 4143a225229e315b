"""Flow Matching's loss: single pairs have the gradient of the true field (arXiv 2210.02747)."""

from pathlib import Path

import torch
from torch import nn

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.random_streams import rng
from nanosd3.related.paths import PATHS, exact_velocity, path_loss
from nanosd3.training.plot_style import GREY, new_figure, save_plot


def gradient_scores(name: str, other: str, seed: int, batches: int, draws: int) -> list[float]:
    """How far the mean gradient of the conditional loss is from that of the marginal loss, whose
    velocity is that of the path `other`: in standard errors, for each parameter of a network."""
    path, generator = PATHS[name], rng(seed, "identity", name)
    points = torch.randn(3, 2, generator=generator)
    exact = exact_velocity(PATHS[other], points)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))
    differences = []
    for _ in range(batches):
        x0 = points[torch.randint(3, (draws,), generator=generator)]
        noise = torch.randn(draws, 2, generator=generator)
        t = 0.05 + 0.95 * torch.rand(draws, generator=generator)
        z = path.interpolate(x0, noise, t)
        v = network(torch.cat([z, t[:, None]], dim=1))
        conditional = path_loss(path, v, x0, noise, t).mean()
        marginal = (v - exact(z, t)).square().mean()
        gradient = torch.autograd.grad(conditional - marginal, list(network.parameters()))
        differences.append(torch.cat([g.flatten() for g in gradient]).double())
    rows = torch.stack(differences)
    return (rows.mean(0) / rows.std(0) * batches**0.5).tolist()


def identity(conditions: Conditions) -> dict:
    batches, draws = (20, 100) if conditions.fast else (100, 1000)
    scores: dict[str, list[float]] = {}
    for name in PATHS:
        each = [gradient_scores(name, name, seed, batches, draws) for seed in conditions.seeds]
        scores[name] = [score for one in each for score in one]
    wrong = [gradient_scores("ot", "cosine", seed, batches, draws) for seed in conditions.seeds]
    scores["control"] = [score for one in wrong for score in one]
    rows = [[name, len(s), share_within(s), float(worst(s))] for name, s in scores.items()]
    columns = ["path", "gradients compared", "share within 3 s.e.", "largest difference, s.e."]
    return {"scores": scores, "table": table_of(columns, rows)}


def share_within(scores: list[float], limit: float = 3.0) -> float:
    return sum(abs(score) <= limit for score in scores) / len(scores)


def worst(scores: list[float]) -> float:
    return max(abs(score) for score in scores)


def decide_identity(results: dict) -> Verdict:
    scores = dict(results["scores"])
    can_fail = worst(scores.pop("control")) > 6
    same = all(share_within(s) >= 0.97 and worst(s) < 6 for s in scores.values())
    return verdict(can_fail and same, any(worst(s) >= 6 for s in scores.values()))


def plot_identity(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    shown = [s for name, s in results["scores"].items() if name != "control"]
    data = [score for scores in shown for score in scores], results["scores"]["control"]
    titles = "the path's own marginal velocity", "another path's: the control"
    for axis, scores, title in zip(axes, data, titles, strict=True):
        axis.hist(scores, bins=40, color=GREY)
        axis.set(xlabel="difference of gradients (standard errors)", title=title)
    axes[0].set_ylabel("parameters")
    save_plot(figure, path)


IDENTITY = Experiment(
    name="x-fm-0",
    claim="Regressing the velocity of single pairs of image and noise has the gradient of "
    "regressing the true velocity field, which nobody can compute.",
    source="Flow Matching, arXiv 2210.02747, theorem 2",
    measured="Three points in the plane, whose true field is known; OT, VP, cosine and VE. For "
    "each parameter of a small network, the difference of the two losses' gradients over 100 "
    "batches of 1000 draws, in standard errors. Control: the field of another path.",
    rule="Supported if for every path 97% of the differences are within 3 standard errors and all "
    "within 6, while the control has one beyond 6. Refuted if a path has one beyond 6.",
    minutes=0.5,
    run=identity,
    decide=decide_identity,
    plot=plot_identity,
)
