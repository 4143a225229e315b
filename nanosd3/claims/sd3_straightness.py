"""Are rectified flow's paths the straightest, and do they need the fewest steps? (arXiv 2403.03206)

On the exact field of a small data set all formulations share one set of trajectories: they only
draw them to different scales, and stop in different places. Trained networks each have a field of
their own.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.claims.data_sets import open_data_sets, sample_inputs
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.fm_straightness import images_and_noise, length_over_chord
from nanosd3.claims.sd3_networks import formulation_velocity, trained_formulation
from nanosd3.related.formulations import FORMULATIONS, deviation
from nanosd3.related.paths import PATHS, exact_velocity
from nanosd3.samplers import Velocity, euler
from nanosd3.training.plot_style import SERIES, label_counts, new_figure, plain_logarithm, save_plot

FORMULATIONS_COMPARED = {  # and the style of its line
    "rf": "-o",
    "rf/lognorm(0, 1)": "-^",
    "eps/linear": "--s",
    "v/cos": ":v",
    "edm(0, 0.6)": "-.D",
}
EXACT_AND_TRAINED = ("exact", "trained")
EULER_STEPS = (5, 10, 20, 50)
RECTIFIED = ("rf", "rf/lognorm(0, 1)")
OF_UNIT_VARIANCE = ("eps/linear", "v/cos")  # drawn to the data's scale all along


def own_scale(name: str) -> Callable[[Tensor], Tensor]:
    """The scale at which a formulation's authors draw z: rectified flow's as it is, diffusion's at
    unit variance, and EDM's such that the image stays as it is while noise is added."""
    if name in RECTIFIED:
        return torch.ones_like
    if name.startswith("edm"):
        return lambda t: 1 / (1 - t)
    return lambda t: 1 / deviation(t)


@torch.no_grad()
def straightness_and_errors(
    name: str, velocity: Velocity, noise: Tensor, fine: int
) -> tuple[float, list[float]]:
    """Length over chord in a formulation's own scale, and the errors (r.m.s.) of Euler's end points
    in few of its own steps."""
    steps = FORMULATIONS[name].steps
    z = steps(1)[0] * noise
    end, ratio = length_over_chord(velocity, z, steps(fine), own_scale(name))
    ends = [euler(velocity, z, steps(n)) for n in EULER_STEPS]
    return ratio, [float((each - end).square().mean().sqrt()) for each in ends]


def straightness_study(conditions: Conditions) -> dict:
    """Both, on both fields, by formulation and seed."""
    fine, (data, _) = 20 if conditions.fast else 125, open_data_sets(conditions)
    lengths: dict[str, dict[str, list[float]]] = {
        f: {n: [] for n in FORMULATIONS_COMPARED} for f in EXACT_AND_TRAINED
    }
    errors: dict[str, dict[str, list[list[float]]]] = {
        field: {name: [[] for _ in EULER_STEPS] for name in FORMULATIONS_COMPARED}
        for field in EXACT_AND_TRAINED
    }
    seconds = 0.0
    for seed in conditions.seeds:
        points, noise = images_and_noise(conditions, seed)
        points = (points - points.mean()) / points.std()
        exact = exact_velocity(PATHS["ot"], points)
        inputs = sample_inputs(data, seed, 20 if conditions.fast else 64)
        for name in FORMULATIONS_COMPARED:
            trained = trained_formulation(data, name, seed)
            seconds += trained.seconds
            velocity = formulation_velocity(FORMULATIONS[name], trained.average, inputs.pooled)
            for field, (v, start) in zip(
                EXACT_AND_TRAINED, ((exact, noise), (velocity, inputs.noise)), strict=True
            ):
                ratio, found = straightness_and_errors(name, v, start, fine)
                lengths[field][name].append(ratio)
                for row, error in zip(errors[field][name], found, strict=True):
                    row.append(error)
    rows = [
        [f"{name}, {field}", lengths[field][name], *errors[field][name]]
        for field in EXACT_AND_TRAINED
        for name in FORMULATIONS_COMPARED
    ]
    columns = ["field", "length / chord", *(f"error, {n} steps" for n in EULER_STEPS)]
    return {
        "lengths": lengths,
        "errors": errors,
        "training_seconds": seconds,
        "table": table_of(columns, rows),
    }


def decide_straightest(results: dict) -> Verdict:
    leads = [
        lead(by_name["rf"], by_name[name])
        for by_name in results["lengths"].values()
        for name in OF_UNIT_VARIANCE
    ]
    return verdict(all(m > s for m, s in leads), any(m < -2 * s for m, s in leads))


def decide_fewest(results: dict) -> Verdict:
    leads = [
        lead(by_name["rf"][k], by_name[name][k])
        for by_name in results["errors"].values()
        for name in FORMULATIONS_COMPARED
        if name not in RECTIFIED
        for k in (EULER_STEPS.index(5), EULER_STEPS.index(10))
    ]
    return verdict(all(m > s for m, s in leads), any(m < -2 * s for m, s in leads))


def plot_fields(results: dict, path: Path) -> None:
    figure, axes = new_figure(10, 3)
    for i, (field, style) in enumerate(zip(EXACT_AND_TRAINED, ("s", "o"), strict=True)):
        for k, name in enumerate(FORMULATIONS_COMPARED):
            excess = [ratio - 1 for ratio in results["lengths"][field][name]]
            label = "" if k else field
            colour = SERIES[k % len(SERIES)]
            face = "white" if i else colour
            place = [k + 0.15 * (2 * i - 1)] * len(excess)
            axes[0].plot(
                place, excess, style, color=colour, markerfacecolor=face, markersize=5, label=label
            )
    axes[0].set_xticks(
        range(len(FORMULATIONS_COMPARED)), list(FORMULATIONS_COMPARED), rotation=40, ha="right"
    )
    axes[0].set_yscale("log")
    axes[0].set(title="Length / chord - 1")
    axes[0].legend()
    for axis, field in zip(axes[1:], EXACT_AND_TRAINED, strict=True):
        for name, style in FORMULATIONS_COMPARED.items():
            means = [sum(each) / len(each) for each in results["errors"][field][name]]
            axis.plot(EULER_STEPS, means, style, markersize=5, label=name)
        label_counts(axis, EULER_STEPS)
        plain_logarithm(axis)
        axis.set(title=f"Error of end points, {field}", xlabel="steps (Euler)")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=5)
    save_plot(figure, path)


FIELDS_COMPARED = (
    "Two fields: the exact one of 1000 MNIST images (no training), and those of the networks of "
    "x-sd3-formulations in the main job's latents (averaged weights, no guidance). "
)

STRAIGHTEST = Experiment(
    name="x-sd3-straight",
    claim="Sampling trajectories are straightest with rectified flow.",
    source="SD3, arXiv 2403.03206, abstract and section 2",
    measured=FIELDS_COMPARED + "Trajectories by 125 midpoint steps: their length over the distance "
    "between their ends, each formulation in its own scale. EDM is shown beside: its trajectories "
    "start at 80 times the data's deviation, beside which any bend is small.",
    rule="Supported if on both fields rectified flow's (uniform times) is below that of eps/linear "
    "and v/cos by more than the spread over seeds. Refuted if on either field one of theirs is "
    "below its by more than twice the spread.",
    minutes=10,
    run=straightness_study,
    decide=decide_straightest,
    plot=plot_fields,
    remark="Straightness is a matter of scale. EDM starts from noise of 80 times the data's "
    "deviation, beside which every bend is small. Against diffusion drawn to unit variance, "
    "rectified flow's trajectories are straighter on the exact field, and less straight in trained "
    "networks.",
)

FEWEST = Experiment(
    name="x-sd3-straight-steps",
    claim="With rectified flow fewer steps are needed for the same accuracy.",
    source="SD3, arXiv 2403.03206, sections 1 and 2",
    measured=FIELDS_COMPARED + "The error (r.m.s.) of Euler's end points after 5 and 10 steps, "
    "where each formulation has them, against 125 midpoint steps.",
    rule="Supported if at 5 and at 10 steps and on both fields rectified flow's error (uniform "
    "times) is below that of eps/linear, v/cos and edm(0, 0.6) by more than the spread over seeds. "
    "Refuted if one of theirs is below its by more than twice that at either and on either field.",
    minutes=10,
    run=straightness_study,
    decide=decide_fewest,
    plot=plot_fields,
    remark="It is the exact field that refutes: there LDM's steps, which begin at t = 0.94 and lie "
    "closer near noise, are better placed. In trained networks rectified flow has the smallest "
    "error at 5 and at 10 steps, and with times from logit-normal(0, 1) a smaller one still.",
)
