"""Samples, metrics and pictures of a run: some while it trains, all at its end.

Metrics, on samples prompted with captions drawn as in training (as many for each class):
prompt accuracy by the judge, the Frechet distance in its features with the two floors that give
it a scale, and whether what the caption says of weight and slant can be measured in the image.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from nanosd3 import figures
from nanosd3.checkpoint import write_file, write_json
from nanosd3.data import DIGITS, SIDE, bins, measure, to_model, to_uint8
from nanosd3.metrics import JUDGED, ConvNet, frechet_distance, thumbnails
from nanosd3.pipeline import Pipeline
from nanosd3.runtime import peak_memory, rng
from nanosd3.sources import Digits
from nanosd3.stages import Job, in_chunks

REBUILT = 50  # images at once
SHADED = 5  # samples shown in a terminal
COSTS = (5, 9, 17, 33)  # network evaluations at which solvers are compared; odd, for Heun
SHOWN = (
    "a handwritten zero", "1", "a bold two leaning right", "the digit 3", "a thin 4 leaning left",
    "the number five", "an upright six", "a bold handwritten seven leaning right", "8",
    "a thin nine",
)  # fmt: skip


def shown_prompts(source: Digits) -> list[str]:
    """One prompt for each class, of many kinds."""
    if source.images.names is DIGITS:
        return list(SHOWN)
    choices = source.described.captions.choices
    return [source.texts[int(choices[c, 1, 1, c % choices.shape[3]])] for c in range(len(choices))]


def preview(pipeline: Pipeline, step: int, prompts: list[str], folder: Path, leads: bool) -> None:
    """Early samples: a picture in the run's folder, and small grey ones in the terminal too. All
    processes of a team sample, one of them draws."""
    latents = pipeline(prompts, seed=1, output="latent")
    if not leads:
        return
    images = pipeline.decode(latents)
    rows = [(prompt, images[i : i + 1]) for i, prompt in enumerate(prompts)]
    write_file(folder / f"preview-{step:08d}.png", figures.png(figures.grid(rows)))
    if images.ndim == 3 and images.shape[1] <= SIDE:
        drawn = figures.shades(images[:SHADED])
        said = ", ".join(prompts[:SHADED])
        print(f"\n  step {step}: {said}\n{drawn}\n", file=sys.stderr)


def to_digits(images: Tensor) -> Tensor:
    """Samples of any size and colour, uint8 (B, H, W) or (B, H, W, 3), as digits (B, 28, 28)."""
    if images.shape[1:] == (SIDE, SIDE):
        return images
    x = images.float() if images.ndim == 3 else images.float().mean(3)
    edge = (JUDGED - SIDE) // 2
    x = to_uint8(thumbnails(x[:, None] / 127.5 - 1))
    return x[:, edge:-edge, edge:-edge]


def balanced(labels: Tensor, classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices of about `count` items, the same number of each class, drawn at random."""
    order = torch.randperm(len(labels), generator=generator)
    each = [order[labels[order] == label] for label in range(classes)]
    return torch.cat([ids[: max(2, count // classes)] for ids in each])


def followed(prompts: list[str], words: dict[str, int], measured: Tensor, values: Tensor) -> dict:
    """Of the prompts that say one of `words`: how many samples have that third of the measure,
    and the mean of the measure for each word (None for a word that no prompt says)."""
    said = torch.tensor([
        next((n for word, n in words.items() if f" {word} " in f" {prompt} "), -1)
        for prompt in prompts
    ])  # fmt: skip
    means = {word: mean_or_none(values[said == n]) for word, n in words.items()}
    return {"accuracy": mean_or_none((measured == said)[said >= 0].float()), "mean_by_word": means}


def mean_or_none(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


@torch.no_grad()
def evaluate(job: Job, source: Digits, judge: ConvNet, pipeline: Pipeline) -> dict:
    """Everything in metrics.json that is measured on images."""
    images, described = source.images, source.described
    classes = len(images.names)

    def features(x: Tensor) -> Tensor:
        return in_chunks(
            lambda chunk: judge.features(to_model(chunk, JUDGED).to(job.device)).cpu(), x
        )

    generator = rng(job.seed, "evaluate")
    chosen = balanced(images.train_labels, classes, job.config.training.evaluate, generator)
    labels = images.train_labels[chosen]
    u = torch.rand(len(chosen), generator=generator)
    prompts = [source.texts[i] for i in source.captions(chosen, u).tolist()]

    begin = time.perf_counter()
    samples = to_digits(torch.from_numpy(pipeline(prompts, seed=job.seed)))
    seconds = time.perf_counter() - begin
    rebuilt = to_digits(torch.cat([
        torch.from_numpy(pipeline.decode(pipeline.vae.normalise(pipeline.posterior(x)[0])))
        for x in (source.pixels(some) for some in chosen.split(REBUILT))
    ]))  # fmt: skip
    test, seen = features(images.test_images), features(samples)
    read = in_chunks(judge.head, seen.to(job.device)).argmax(1).cpu()
    weight, slant = measure(samples)
    floor = frechet_distance(features(images.train_images[chosen]), test)
    distance = frechet_distance(seen, test)
    return {
        "samples": len(chosen),
        "prompt_accuracy": (read == labels).float().mean().item(),
        "frechet_distance": distance,
        "frechet_floor_real": floor,
        "frechet_floor_reconstructions": frechet_distance(features(rebuilt), test),
        "frechet_ratio_to_real": distance / floor,
        "weight": followed(prompts, {"thin": 0, "bold": 2},
                           bins(weight, labels, described.weight_limits), weight),
        "slant": followed(prompts, {"leaning left": 0, "upright": 1, "leaning right": 2},
                          bins(slant, labels, described.slant_limits), slant),
        "images_per_second": len(chosen) / seconds,
    }  # fmt: skip


@torch.no_grad()
def solver_errors(pipeline: Pipeline, prompts: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Distance of each solver's latents from those of a fine solution, at equal evaluations."""
    exact = pipeline(prompts, sampler="heun", steps=100, output="latent")
    errors: dict[str, list[tuple[int, float]]] = {}
    for sampler in ("euler", "heun", "dpmpp_2m"):
        for cost in COSTS:
            steps = (cost + 1) // 2 if sampler == "heun" else cost
            latents = pipeline(prompts, sampler=sampler, steps=steps, output="latent")
            error = (latents - exact).square().mean().sqrt().item()
            errors.setdefault(sampler, []).append((cost, error))
    return errors


@torch.no_grad()
def draw_trajectory(pipeline: Pipeline, prompts: list[str], path: Path) -> None:
    """Two rows a frame: the noisy latents, decoded, and the clean image they point to."""
    frames = []

    def record(step: int, t: Tensor, z: Tensor, x0: Tensor) -> None:
        frames.append(figures.grid([
            (f"t = {float(t):.2f}, decoded as it is", pipeline.decode(z)),
            ("where its velocity points", pipeline.decode(x0)),
        ]))  # fmt: skip

    final = pipeline(prompts, seed=2, callback=record)
    captions = ("t = 0.00, decoded as it is", "where its velocity points")
    frames.append(figures.grid([(caption, final) for caption in captions]))
    figures.save_animation(frames, path)


def draw_samples(pipeline: Pipeline, prompts: list[str], columns: int, path: Path) -> None:
    """A grid with a row for each prompt."""
    images = pipeline([prompt for prompt in prompts for _ in range(columns)])
    rows = [(p, images[i * columns : (i + 1) * columns]) for i, p in enumerate(prompts)]
    write_file(path, figures.png(figures.grid(rows)))


def about_training(job: Job) -> dict:
    """What metrics.json says of any run."""
    validation = [e for e in job.run.read_log() if "validation" in e]
    last = validation[-1] if validation else {}
    return {
        "validation": last.get("validation"),
        "validation_ema": last.get("validation_ema"),
        "stages": job.run.stages,
        "threads": torch.get_num_threads(),
        "peak_memory_gb": peak_memory(job.device),
    }


def report_digits(job: Job, source: Digits, judge: ConvNet, pipeline: Pipeline) -> dict:
    """Write samples.png, trajectory.gif, loss.png, samplers.png and metrics.json; the metrics."""
    folder = job.run.folder
    prompts = shown_prompts(source)
    metrics = evaluate(job, source, judge, pipeline)
    draw_samples(pipeline, prompts, 8, folder / "samples.png")
    draw_trajectory(pipeline, prompts, folder / "trajectory.gif")
    figures.plot_loss(job.run.read_log(), folder / "loss.png")
    errors = solver_errors(pipeline, prompts)
    figures.plot_samplers(errors, folder / "samplers.png")
    metrics |= {"solver_errors": errors, **about_training(job)}
    write_json(folder / "metrics.json", metrics)
    return metrics


def report_pictures(job: Job, prompts: list[str], pipeline: Pipeline) -> None:
    """Write samples.png, loss.png and metrics.json."""
    folder = job.run.folder
    draw_samples(pipeline, prompts, 8, folder / "samples.png")
    figures.plot_loss(job.run.read_log(), folder / "loss.png")
    write_json(folder / "metrics.json", about_training(job))
