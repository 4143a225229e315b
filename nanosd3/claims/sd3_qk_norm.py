"""Does QK-norm keep attention in bounds, and does that matter? (arXiv 2403.03206, section 5.3.2)

A logit of attention is the product of a query and a key. Nothing bounds either, and at a high
learning rate both may grow until the softmax attends to a single token and has no gradient. RMSNorm
on queries and keys fixes their lengths, up to a learned scale. The paper met the growth in
bfloat16, whose 8 significant bits leave an error of a whole logit at 200.
"""

from itertools import product
from pathlib import Path

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.claims.runs import open_encoded
from nanosd3.claims.sd3_attention import trained_with
from nanosd3.training.plot_style import new_figure, plain_logarithm, save_plot

NORM_PRECISIONS = ("float32", "bfloat16")
ARMS_OF_NORM = [(precision, norm) for precision in NORM_PRECISIONS for norm in ("with", "without")]
NORM_STYLES = {
    "float32, with": "-o",
    "float32, without": "-s",
    "bfloat16, with": ":o",
    "bfloat16, without": ":s",
}


def norm_study(conditions: Conditions) -> dict:
    """Largest logits and entropies during training, and the last losses, by arm and seed."""
    finished, features = open_encoded(conditions)
    found: dict[str, dict[str, list]] = {}
    seconds = 0.0
    for arm, seed in product(ARMS_OF_NORM, conditions.seeds):
        run = trained_with(conditions, finished, features, arm, seed)
        seconds += run.stages["flow"]["thread_seconds"]
        measured = [entry for entry in run.read_log() if "largest" in entry]
        one = found.setdefault(", ".join(arm), {"steps": [e["step"] + 1 for e in measured]})
        for key in ("largest", "entropy"):
            one.setdefault(key, []).append([entry[key] for entry in measured])
        one.setdefault("loss", []).append(run.stages["flow"]["loss"])
    rows = [
        [arm, *([series[-1] for series in one[key]] for key in ("largest", "entropy")), one["loss"]]
        for arm, one in found.items()
    ]
    columns = ["QK-norm", "largest logit, at the end", "entropy, of 1", "loss"]
    return {"arms": found, "training_seconds": seconds, "table": table_of(columns, rows)}


def ends(results: dict, precision: str, norm: str) -> list[float]:
    """The largest logit of each seed after training."""
    return [series[-1] for series in results["arms"][f"{precision}, {norm}"]["largest"]]


def decide_growth(results: dict) -> Verdict:
    pairs = [
        list(zip(ends(results, p, "without"), ends(results, p, "with"), strict=True))
        for p in NORM_PRECISIONS
    ]
    enough = len(pairs[0]) > 1
    twice = all(without >= 2 * with_norm for seeds in pairs for without, with_norm in seeds)
    no_larger = any(all(without <= with_norm for without, with_norm in seeds) for seeds in pairs)
    return verdict(enough and twice, enough and no_larger)


def decide_stability(results: dict) -> Verdict:
    losses = {arm: one["loss"] for arm, one in results["arms"].items()}
    gain, spread = lead(losses["bfloat16, with"], losses["bfloat16, without"])
    exact, rounded = (
        [a - b for a, b in zip(losses[f"{p}, without"], losses[f"{p}, with"], strict=True)]
        for p in NORM_PRECISIONS
    )  # gains of each seed
    more, wobble = lead(exact, rounded)
    no_more = len(exact) > 1 and all(b <= a for a, b in zip(exact, rounded, strict=True))
    return verdict(gain > spread and more > wobble, gain < -spread or no_more)


def plot_norm(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    for arm, one in results["arms"].items():
        for axis, key in zip(axes, ("largest", "entropy"), strict=True):
            means = [sum(each) / len(each) for each in zip(*one[key], strict=True)]
            style = NORM_STYLES[arm]
            axis.plot(one["steps"], means, style, markersize=4, markevery=5, label=arm)
            axis.set_xlabel("training steps")
    plain_logarithm(axes[0])
    axes[0].set(title="Largest logit of attention")
    axes[1].set(title="Entropy of attention (1: even)")
    axes[1].set_ylim(0, 1)
    axes[1].legend(title="precision, QK-norm", loc="lower right", bbox_to_anchor=(1, 0.12))
    save_plot(figure, path)


NORM_COMPARED = (
    "The main job's transformer with and without QK-norm, in float32 and in bfloat16 (products and "
    "activations), 120 steps of AdamW at 3e-2, a high rate. "
)

LOGITS = Experiment(
    name="x-sd3-qk-norm",
    claim="Without QK-norm the logits of attention grow in training; with it they stay in bounds.",
    source="SD3, arXiv 2403.03206, section 5.3.2 and figure 5",
    measured=NORM_COMPARED + "For 32 images held out, at times spread evenly: the largest logit "
    "of the image's queries over both blocks, and the entropy of their softmax, during training.",
    rule="Supported if in every seed and in both precisions the largest logit after training is at "
    "least twice as large without as with it. Refuted if in either precision it is no larger "
    "without in any seed. (One seed decides nothing.)",
    minutes=3,
    run=norm_study,
    decide=decide_growth,
    plot=plot_norm,
)

STABILITY = Experiment(
    name="x-sd3-qk-norm-bf16",
    claim="QK-norm is what makes training in bfloat16 stable.",
    source="SD3, arXiv 2403.03206, section 5.3.2",
    measured=NORM_COMPARED + "The mean loss of the last tenth of the steps.",
    rule="Supported if in bfloat16 the loss with it is lower by more than the spread over seeds, "
    "and the gain is larger than in float32 by more than the spread of that difference. Refuted if "
    "in bfloat16 the loss with it is higher by more than the spread, or the gain is larger than in "
    "float32 in no seed. (One seed decides nothing.)",
    minutes=3,
    run=norm_study,
    decide=decide_stability,
    plot=plot_norm,
    remark="In float32 the loss gains as much by the norm: at this size it is the large logits "
    "that do harm, whatever the precision. (An earlier rule compared losses in bfloat16 alone, and "
    "called the claim supported.)",
)
