"""What a pass costs as images grow: HDiT, a flat DiT and a U-Net (arXiv 2401.11605)."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nanosd3.claims.experiment import Conditions, Experiment, Verdict, table_of, verdict
from nanosd3.measure.meters import count_flops
from nanosd3.related.consistency_decoder import ConsistencyDecoder
from nanosd3.related.dit import DiT, DiTConfig
from nanosd3.related.hdit import HDiT, HDiTConfig, HDiTLevel
from nanosd3.training.plot_style import label_counts, new_figure, save_plot

COST_SIDES = (16, 32, 64, 128, 256)  # of square images of one channel, in pixels
FIRST, LAST = 64, 256  # slopes are between these
MIDDLE_GRID, COST_PATCH, TEXT_FEATURES = 8, 2, 96
PASSES = 3  # the fastest counts
COST_MARKS = {"HDiT": "-o", "flat DiT": "--s", "U-Net": ":^"}
Pass = Callable[[], Tensor]


def hourglass_for(side: int) -> HDiTConfig:
    """An 8x8 middle of width 128, and for each doubling one more level of width 64 around it."""
    outer = round(math.log2(side / COST_PATCH / MIDDLE_GRID))
    levels = (HDiTLevel(64, 1, 5),) * outer + (HDiTLevel(128, 2, None),)
    return HDiTConfig(1, COST_PATCH, levels, 32, 128, 2, TEXT_FEATURES)


def flat_for(side: int) -> DiTConfig:
    """Four blocks of width 64 over the same patches."""
    return DiTConfig(4, 64, 2, COST_PATCH, side, 1, 10, False, "adaln_zero", None)


@torch.random.fork_rng(devices=[])
def pass_of(name: str, side: int, seed: int) -> Pass:
    """One forward pass on one image of random numbers, on the current device."""
    torch.manual_seed(seed)
    z, t = torch.randn(1, 1, side, side), torch.rand(1)
    network: nn.Module
    if name == "HDiT":
        network, condition = HDiT(hourglass_for(side)), torch.randn(1, TEXT_FEATURES)
    elif name == "flat DiT":
        network, condition = DiT(flat_for(side)), torch.zeros(1, dtype=torch.long)
    else:
        network, condition = ConsistencyDecoder(1, 1, (16, 32, 64)), torch.randn(1, 1, 8, 8)
    network.requires_grad_(False).eval()
    return lambda: network(z, t, condition)


def multiply_adds_of(name: str, side: int) -> float:
    """Millions for one image; nothing is computed."""
    with torch.device("meta"):
        return count_flops(pass_of(name, side, 0)) / 2e6


def seconds_of(name: str, side: int, seed: int) -> float:
    """Of a core, for one image."""
    forward, times = pass_of(name, side, seed), []
    for _ in range(PASSES):
        begin = time.process_time()
        forward()
        times.append(time.process_time() - begin)
    return min(times)


def slope(sides: Sequence[int], costs: Sequence[float], first: int, last: int) -> float:
    """Between two sizes, in the logarithms of cost and of pixels: 1 if both grow alike."""
    a, b = (costs[list(sides).index(side)] for side in (first, last))
    return math.log(b / a) / math.log((last / first) ** 2)


def cost_study(conditions: Conditions) -> dict:
    """Multiply-adds, and seconds for each seed's network and image."""
    sides = COST_SIDES[:3] if conditions.fast else COST_SIDES
    costs = {name: [multiply_adds_of(name, side) for side in sides] for name in COST_MARKS}
    seconds = {
        name: [[seconds_of(name, side, seed) for seed in conditions.seeds] for side in sides]
        for name in COST_MARKS
    }
    rows = []
    for name in COST_MARKS:
        rows.append([f"{name}, 10^6 multiply-adds", *(round(cost, 1) for cost in costs[name])])
        rows.append([f"{name}, seconds", *seconds[name]])
    table = table_of(["pixels on a side", *sides], rows)
    return {"sides": sides, "multiply_adds": costs, "seconds": seconds, "table": table}


def slopes_of(results: dict, name: str) -> tuple[float, float]:
    """Of multiply-adds, and of the seconds' mean over seeds."""
    means = [sum(each) / len(each) for each in results["seconds"][name]]
    return (
        slope(results["sides"], results["multiply_adds"][name], FIRST, LAST),
        slope(results["sides"], means, FIRST, LAST),
    )


def decide_costs(results: dict) -> Verdict:
    if LAST not in results["sides"]:
        return "undecided"
    counted, timed = slopes_of(results, "HDiT")
    flat_counted, _ = slopes_of(results, "flat DiT")
    ours, theirs = (sum(results["seconds"][name][-1]) for name in ("HDiT", "flat DiT"))
    linear = counted <= 1.0 and timed <= 1.1
    supported = linear and flat_counted >= 1.6 and theirs >= 10 * ours
    return verdict(supported, counted > 1.1 or theirs < ours)


def plot_costs(results: dict, path: Path) -> None:
    figure, axes = new_figure(9, 2)
    sides = results["sides"]
    for name, mark in COST_MARKS.items():
        means = [1e3 * sum(each) / len(each) for each in results["seconds"][name]]
        for axis, costs in zip(axes, (results["multiply_adds"][name], means), strict=True):
            axis.loglog(sides, costs, mark, markersize=5, label=name)
    for axis in axes:
        label_counts(axis, sides)
        axis.set_xlabel("pixels on a side")
    axes[0].set(ylabel="10^6 multiply-adds", title="Counted")
    axes[1].set(ylabel="milliseconds of a core", title="Measured")
    axes[0].legend()
    save_plot(figure, path)


COSTS = Experiment(
    name="x-hd-1",
    claim="The cost of HDiT grows with the number of pixels; a flat DiT's, over the same patches, "
    "grows towards its square.",
    source="HDiT, arXiv 2401.11605, abstract",
    measured="One forward pass on one image of 16 to 256 pixels on a side, in patches of 2: HDiT "
    "with an 8x8 middle and one more level for each doubling, windows of 5x5; a DiT of four blocks "
    "of width 64; and a small U-Net of convolutions. Multiply-adds, as computed (halos of the "
    "tiles included), and seconds of a core, the fastest of three passes.",
    rule="Supported if from 64 to 256 pixels the slope of HDiT's cost against pixels, both as "
    "logarithms, is at most 1.0 in multiply-adds and 1.1 in seconds, that of the DiT's "
    "multiply-adds at least 1.6, and at 256 pixels HDiT is at least 10 times faster. Refuted if "
    "HDiT's slope in multiply-adds is above 1.1, or it is slower at 256 pixels.",
    minutes=2,
    run=cost_study,
    decide=decide_costs,
    plot=plot_costs,
    remark="At 32 pixels and below the hourglass gains nothing. From 64 pixels on the U-Net "
    "multiplies half as much again. It takes as long at 64 and two thirds of the time at 256: "
    "convolutions make better use of a processor than attention in tiles.",
)
