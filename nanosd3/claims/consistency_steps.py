"""What distillation to a consistency model gives, and whether more steps help it
(arXiv 2303.01469)."""

from pathlib import Path

from nanosd3.claims.consistency_students import (
    STUDENT_SAMPLERS,
    STUDENT_STEPS,
    TEACHER_STEPS,
    consistency_study,
)
from nanosd3.claims.experiment import Experiment, Verdict, verdict
from nanosd3.training.plot_style import label_counts, new_figure, plain_logarithm, save_plot

SAMPLER_STYLES = {"teacher": ":^", "fresh": "--s", "kept": "-o"}


def ratios(results: dict, sampler: str, steps: int) -> list[float]:
    return [ratio for _, ratio in results["scores"][sampler][str(steps)]]


def decide_distillation(results: dict) -> Verdict:
    one, two = ratios(results, "fresh", 1), ratios(results, "fresh", 2)
    euler_one, euler_two = ratios(results, "teacher", 1), ratios(results, "teacher", 2)
    wins = [a <= b / 2 and c < d for a, b, c, d in zip(one, euler_one, two, euler_two, strict=True)]
    return verdict(all(wins), not any(wins))


def decide_more_steps(results: dict) -> Verdict:
    by_seed = list(zip(*(ratios(results, "fresh", n) for n in STUDENT_STEPS), strict=True))
    falls = all(a > b > c for a, b, c in by_seed)
    rises = all(a < b < c for a, b, c in by_seed)
    return verdict(falls, rises)


def decide_consistent(results: dict) -> Verdict:
    spreads = results["spreads"]
    gains = [b / a for a, b in zip(spreads["student"], spreads["teacher"], strict=True)]
    return verdict(all(gain >= 10 for gain in gains), all(gain < 2 for gain in gains))


def plot_steps(
    results: dict,
    path: Path,
    labels: dict[str, str] = STUDENT_SAMPLERS,
    styles: dict[str, str] = SAMPLER_STYLES,
    counts: tuple[int, ...] = TEACHER_STEPS,
    steps_are: str = "steps (the teacher's have two evaluations)",
) -> None:
    """Distance and accuracy against steps, means over seeds."""
    figure, axes = new_figure(9, 2)
    for sampler, by_steps in results["scores"].items():
        steps = [int(n) for n in by_steps]
        for axis, i, unit in ((axes[0], 1, 1), (axes[1], 0, 100)):
            means = [unit * sum(s[i] for s in found) / len(found) for found in by_steps.values()]
            axis.plot(steps, means, styles[sampler], markersize=5, label=labels[sampler])
    for axis in axes:
        label_counts(axis, counts)
        axis.set_xlabel(steps_are)
    plain_logarithm(axes[0])
    axes[0].set(ylabel="Frechet distance / that of real images", title="Frechet distance")
    axes[1].set(ylabel="samples read as asked (%)", title="Accuracy")
    axes[0].legend()
    save_plot(figure, path)


def plot_spreads(results: dict, path: Path) -> None:
    figure, (axis,) = new_figure(4.5, 1)
    for i, values in enumerate(results["spreads"].values()):
        axis.semilogy([i] * len(values), values, "o")
    axis.set_xticks(range(2), list(results["spreads"]))
    axis.margins(0.3)
    axis.set(ylabel="variance / that of images", title="Answers along a trajectory")
    save_plot(figure, path)


STUDENTS_MEASURED = (
    "The main job's transformer distilled as by `python -m nanosd3.related consistency`, guidance "
    "built in; 1,000 samples, a fresh draw for each seed. "
)

DISTILLATION = Experiment(
    name="x-cm-1",
    claim="Distilled to a consistency model, a diffusion model draws in one or two steps what its "
    "solver cannot draw in as few.",
    source="Consistency Models, arXiv 2303.01469, section 6.1",
    measured=STUDENTS_MEASURED
    + "Frechet distance relative to that of real images, of one and two steps, "
    "against as many of Euler's of the teacher, with guidance.",
    rule="Supported if in every seed one step has at most half of Euler's ratio, and two steps are "
    "below Euler's two. Refuted if that holds in no seed.",
    minutes=9,
    run=consistency_study,
    decide=decide_distillation,
    plot=plot_steps,
    remark="Accuracy alone would say the opposite: one Euler step gives the mean of a class, which "
    "is read as asked every time and looks like no digit.",
)

MORE_STEPS = Experiment(
    name="x-cm-1-steps",
    claim="More steps of a consistency model give better samples.",
    source="Consistency Models, arXiv 2303.01469, section 3 (multistep sampling, algorithm 1)",
    measured=STUDENTS_MEASURED
    + "Frechet distance relative to that of real images, of 1, 2 and 4 steps at "
    "even times, each with fresh noise; beside it, steps that keep part of the noise.",
    rule="Supported if in every seed it falls from 1 to 2 and from 2 to 4 steps. Refuted if in "
    "every seed it rises at both.",
    minutes=9,
    run=consistency_study,
    decide=decide_more_steps,
    plot=plot_steps,
    remark="A pilot had shown it before. Each step applies the built-in guidance once more, to an "
    "image drawn already: with fresh noise images become clearer and alike. Steps that keep part "
    "of the noise that they come from (few_steps.py) lose less of their variety.",
)

CONSISTENT = Experiment(
    name="x-cm-0",
    claim="A consistency model gives the same answer along a whole trajectory.",
    source="Consistency Models, arXiv 2303.01469, definition 1",
    measured=STUDENTS_MEASURED
    + "Ten points of 64 trajectories of the teacher (100 Euler steps): the "
    "variance of the clean images that the student points to, and of those that the teacher's "
    "velocity points to, both relative to the variance of the images.",
    rule="Supported if in every seed the student's is at most a tenth of the teacher's. Refuted if "
    "in every seed it is more than half.",
    minutes=9,
    run=consistency_study,
    decide=decide_consistent,
    plot=plot_spreads,
)
