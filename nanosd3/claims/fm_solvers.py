"""Off-the-shelf solvers on learned fields: evaluations that OT and VP take (arXiv 2210.02747)."""

from pathlib import Path

from nanosd3.claims.data_sets import open_latents
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.fm_networks import path_inputs, trained_path, training_seconds
from nanosd3.claims.fm_straightness import LABELS
from nanosd3.related.paths import PATHS
from nanosd3.related.train_paths import LEARNED, path_latents
from nanosd3.training.plot_style import SERIES, label_counts, new_figure, save_plot

TOLERANCES = (1e-3, 1e-5)
IMAGES = 64  # the step is common to a batch, so their number matters
BUDGETS = (8, 16, 32)  # evaluations
SOLVER_LABELS = {"Euler": "euler", "midpoint": "midpoint", "RK4": "rk4"}
MARKS = {"Euler": "-o", "midpoint": "--s", "RK4": ":^"}


def tolerances(conditions: Conditions) -> list[float]:
    """An untrained field is rough: its exact solution takes a minute."""
    return [1000 * x if conditions.fast else x for x in TOLERANCES]


def adaptive_study(conditions: Conditions) -> dict:
    """Evaluations of the adaptive solver."""
    data, count = open_latents(conditions), 10 if conditions.fast else IMAGES
    taken: dict[str, list[list[int]]] = {name: [[] for _ in TOLERANCES] for name in LEARNED}
    for seed in conditions.seeds:
        inputs = path_inputs(data, seed, count)
        for name in LEARNED:
            _, model = trained_path(data, name, seed)
            for k, tolerance in enumerate(tolerances(conditions)):
                way = ("dopri5", tolerance)
                _, evaluations = path_latents(PATHS[name], model, inputs.noise, inputs.pooled, *way)
                taken[name][k].append(evaluations)
    columns = ["evaluations, at a tolerance of", *(f"{x:g}" for x in TOLERANCES)]
    return {
        "taken": taken,
        "training_seconds": training_seconds(data, LEARNED),
        "table": table_of(columns, [[LABELS[name], *taken[name]] for name in LEARNED]),
    }


def order_study(conditions: Conditions) -> dict:
    """Errors of solvers with fixed steps, at equal evaluations, on OT networks."""
    data, count = open_latents(conditions), 10 if conditions.fast else IMAGES
    errors: dict[str, list[list[float]]] = {
        solver: [[] for _ in BUDGETS] for solver in SOLVER_LABELS
    }
    path = PATHS["ot"]
    for seed in conditions.seeds:
        inputs = path_inputs(data, seed, count)
        _, model = trained_path(data, "ot", seed)
        finest = tolerances(conditions)[-1]
        exact, _ = path_latents(path, model, inputs.noise, inputs.pooled, "dopri5", finest)
        for solver, name in SOLVER_LABELS.items():
            for k, budget in enumerate(BUDGETS):
                out, evaluations = path_latents(
                    path, model, inputs.noise, inputs.pooled, name, budget
                )
                assert evaluations == budget
                errors[solver][k].append(float((out - exact).square().mean().sqrt()))
    columns = ["error, after evaluations", *BUDGETS]
    return {
        "errors": errors,
        "training_seconds": training_seconds(data, ("ot",)),
        "table": table_of(columns, [[solver, *errors[solver]] for solver in SOLVER_LABELS]),
    }


def ot_over_vp(results: dict) -> list[list[float]]:
    """The ratio of evaluations for each tolerance, by seed."""
    pairs = zip(results["taken"]["ot"], results["taken"]["vp"], strict=True)
    return [[a / b for a, b in zip(ot, vp, strict=True)] for ot, vp in pairs]


def decide_adaptive(results: dict) -> Verdict:
    ratios = ot_over_vp(results)
    fewer = all(ratio <= 0.8 for each in ratios for ratio in each)
    return verdict(fewer, all(ratio >= 1 for ratio in ratios[-1]))


def decide_order(results: dict) -> Verdict:
    errors = results["errors"]
    leads = [
        lead(errors[solver][k], errors["Euler"][k])
        for solver in ("midpoint", "RK4")
        for k in range(len(BUDGETS))
    ]
    return verdict(all(m > s for m, s in leads), any(m < -s for m, s in leads))


def plot_adaptive(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(5.5, 1)
    width = 0.25
    for i, name in enumerate(LEARNED):
        means = [sum(each) / len(each) for each in results["taken"][name]]
        places = [k + width * (i - 1) for k in range(len(means))]
        axis.bar(places, means, width, color=SERIES[i], label=LABELS[name])
    axis.set_xticks(range(len(TOLERANCES)), [f"{x:g}" for x in TOLERANCES])
    axis.set(xlabel="tolerance", ylabel="evaluations", title="Dormand-Prince, adaptive")
    axis.legend()
    save_plot(figure, path)


def plot_order(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(5.5, 1)
    for solver, rows in results["errors"].items():
        means = [sum(row) / len(row) for row in rows]
        axis.loglog(BUDGETS, means, MARKS[solver], markersize=5, label=solver)
    label_counts(axis, BUDGETS)
    axis.set(
        xlabel="network evaluations an image",
        ylabel="error of the latents (r.m.s.)",
        title="Solvers at equal cost, on OT paths",
    )
    axis.legend()
    save_plot(figure, path)


ADAPTIVE = Experiment(
    name="x-fm-5",
    claim="An adaptive solver samples a network trained along OT paths with fewer evaluations than "
    "one trained along VP's.",
    source="Flow Matching, arXiv 2210.02747, table 1: 0.63 to 0.78 times VP's",
    measured="The networks of x-fm-1; evaluations of Dormand-Prince 5(4) for a batch of 64 "
    "prompted images, tolerances 1e-3 and 1e-5, VP from t = 1 to 1e-3 only.",
    rule="Supported if OT takes at most 0.8 times the evaluations of VP at both tolerances and in "
    "every seed. Refuted if it takes at least as many in every seed at 1e-5.",
    minutes=5,
    run=adaptive_study,
    decide=decide_adaptive,
    plot=plot_adaptive,
    remark="At 1e-5 the solver mostly follows the network's own timestep features, the fastest of "
    "which turns 160 times on the way: after 4 steps of training it takes some 300 evaluations, "
    "on any path. At 1e-3 it takes 5 or 6 steps.",
)

ORDER = Experiment(
    name="x-fm-5-order",
    claim="Off-the-shelf solvers of higher order sample faster: at equal evaluations midpoint and "
    "RK4 come nearer to the exact solution than Euler.",
    source="Flow Matching, arXiv 2210.02747, section 6.2",
    measured="The OT networks of x-fm-1, 64 prompted images; the error of the latents against "
    "Dormand-Prince at 1e-5, at 8, 16 and 32 evaluations.",
    rule="Supported if midpoint's and RK4's error are both below Euler's by more than the spread "
    "over seeds at all three. Refuted if either is above Euler's by more than that at any.",
    minutes=5,
    run=order_study,
    decide=decide_order,
    plot=plot_order,
)
