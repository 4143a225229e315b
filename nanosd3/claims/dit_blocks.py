"""DiT's blocks: how a transformer is best conditioned on time and class (arXiv 2212.09748)."""

from dataclasses import replace
from pathlib import Path

from nanosd3.claims.dit_networks import DiTTrainer
from nanosd3.claims.experiment import Conditions, Experiment, Verdict, lead, table_of, verdict
from nanosd3.related.dit import BLOCKS, DIT_CONFIGS, multiply_adds
from nanosd3.related.train_dit import DiTLoss, steps_evenly
from nanosd3.training.plot_style import INK, new_figure, save_plot

BLOCK_LABELS = {
    "in_context": "in-context",
    "cross_attention": "cross-attention",
    "adaln": "adaLN",
    "adaln_gates": "adaLN, gates not zero",
    "adaln_zero": "adaLN-Zero",
}
FOUR = [block for block in BLOCKS if block != "adaln_gates"]


def blocks(conditions: Conditions) -> dict:
    """The validation error of each kind of block, seed by seed."""
    trainer, loss = DiTTrainer(conditions), DiTLoss("ddpm", steps_evenly)
    errors: dict[str, list[float]] = {block: [] for block in BLOCKS}
    seconds = 0.0
    for seed in conditions.seeds:
        for block in BLOCKS:
            config = trainer.config(block=block)
            trained = trainer.trained(f"block-{block}", seed, config, loss, 600, 2e-3)
            errors[block].append(trained.error)
            seconds += trained.seconds
    xl = DIT_CONFIGS["DiT-XL/2"]
    costs = {block: multiply_adds(replace(xl, block=block)) / 1e9 for block in BLOCKS}
    columns = ["block", "validation error", "x 10^9 multiply-adds at XL/2"]
    rows = [[BLOCK_LABELS[block], errors[block], round(costs[block], 1)] for block in BLOCKS]
    return {"errors": errors, "training_seconds": seconds, "table": table_of(columns, rows)}


def decide_blocks(results: dict) -> Verdict:
    errors = results["errors"]
    best, second, *others = FOUR[::-1]
    pairs = [(best, second), *((second, other) for other in others)]
    leads = [lead(errors[a], errors[b]) for a, b in pairs]
    lowest = [min(FOUR, key=lambda b: errors[b][i]) == best for i in range(len(errors[best]))]
    refuted = 2 * sum(lowest) <= len(lowest)
    return verdict(not refuted and all(mean > spread for mean, spread in leads), refuted)


def decide_gates(results: dict) -> Verdict:
    errors = results["errors"]
    zeros, spread = lead(errors["adaln_zero"], errors["adaln_gates"])
    gates, gates_spread = lead(errors["adaln_gates"], errors["adaln"])
    return verdict(zeros > spread and zeros > gates, gates > gates_spread and gates > zeros)


def plot_blocks(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(7, 1)
    for i, block in enumerate(BLOCKS):
        errors = results["errors"][block]
        axis.plot(errors, [i] * len(errors), "o", color=INK, fillstyle="none")
        axis.plot([sum(errors) / len(errors)], [i], "|", color=INK, markersize=18)
    axis.margins(y=0.1)
    axis.set_yticks(range(len(BLOCKS)), [BLOCK_LABELS[block] for block in BLOCKS])
    axis.set(xlabel="validation error (each seed, and the mean)", title="DiT's blocks")
    save_plot(figure, path)


MEASURED = (
    "Class-conditional DiTs of width 128 and depth 2 in the main job's latents, 16 tokens, trained "
    "600 steps as the paper does (DDPM with a learned variance, AdamW), from the same seeds with "
    "the same images and noise. The error of the predicted noise on 256 images held out, with the "
    "moving average of the weights."
)

DIT_BLOCKS = Experiment(
    name="x-dit-1",
    claim="adaLN-Zero learns best, then adaLN, then cross-attention and in-context conditioning.",
    source="DiT, arXiv 2212.09748, section 5 and figure 5",
    measured=MEASURED,
    rule="Supported if the error of adaLN-Zero is below that of adaLN, and that below both others, "
    "each by more than the spread over seeds, and adaLN-Zero is the lowest of the four in most "
    "seeds. Refuted if it is not.",
    minutes=8,
    run=blocks,
    decide=decide_blocks,
    plot=plot_blocks,
    remark="The paper's order has cross-attention before in-context conditioning; the rule leaves "
    "that open. One reads that adaLN-Zero costs less than adaLN: it costs a little more.",
)

GATES = Experiment(
    name="x-dit-1-gates",
    claim="adaLN-Zero is better than adaLN because blocks start as the identity, not because they "
    "have gates.",
    source="DiT, arXiv 2212.09748, section 3.2, which gives that reason and does not test it",
    measured=MEASURED + " A fifth kind of block has the gates, started like any other layer.",
    rule="Supported if starting at zero lowers the error of the network with gates by more than "
    "the spread over seeds, and by more than adding the gates does. Refuted if adding gates that "
    "do not start at zero lowers it by more than the spread, and by more than the zeros do.",
    minutes=8,
    run=blocks,
    decide=decide_gates,
    plot=plot_blocks,
    remark="What is started like any other layer are the gates, and the shifts and scales with "
    "them; adaLN's shifts and scales start at zero. So more than gates differs.",
)
