"""Train the core's transformer along any path in a finished run's latents: OT, VP or cosine.

    python -m nanosd3.related paths --path vp --solver dopri5 --tolerance 1e-3

Times are uniform from the path's first to 1, as in the paper, for all paths: SD3's densities of t
and its guidance are left out, as they are independent of the path. The network is conditioned on
the pooled text alone, which halves its cost.
"""

import argparse
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanosd3.cli import Parser, positive
from nanosd3.config_types import Config, Recipe
from nanosd3.errors import InputError
from nanosd3.flow import stratified
from nanosd3.mmdit import MMDiT
from nanosd3.related.command import Study, System, size_of, with_flow_recipe
from nanosd3.related.finished_run import FinishedRun
from nanosd3.related.paths import PATHS, ProbabilityPath, path_loss
from nanosd3.related.scoring import SHOWN_OF_EACH, score_samples
from nanosd3.related.solvers import dopri5, midpoint, rk4
from nanosd3.samplers import Velocity, euler
from nanosd3.storage.files import load_weights, save_weights, write_file
from nanosd3.training.cached_features import Features
from nanosd3.training.evaluation import Draw
from nanosd3.training.grids_and_gifs import grid_of, png, side_by_side
from nanosd3.training.loop import StepRNG
from nanosd3.training.report import shown_prompts
from nanosd3.training.stages import Job, build, finish_or_load, fit_average, training_of

LEARNED = ("ot", "vp", "cosine")  # VE's latents grow to 80: a network for it would scale its inputs
FIXED_SOLVERS = {"euler": (euler, 1), "midpoint": (midpoint, 2), "rk4": (rk4, 4)}  # cost of a step
DEFAULT_EVALUATIONS, DEFAULT_TOLERANCE, FINEST = 16, 1e-3, 1e-6
PATH_RECIPES = {
    "mnist": Recipe(600, batch=64, lr=8e-3, warmup=50, weight_decay=0.0),
    "tiny": Recipe(4, batch=16, lr=8e-3, warmup=1, weight_decay=0.0),
}
PATH_EMA_DECAY = 0.99
EVALUATIONS_SHOWN = (4, 16)  # by the solver's fixed steps, or by Euler beside an adaptive one


def by_pooled_text(model: MMDiT, z: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
    """The velocity (B, C, h, w) with one zero text token."""
    return model(z, t, pooled.new_zeros(len(z), 1, model.config.context_dim), pooled)


def velocity_for(model: MMDiT, pooled: Tensor) -> Velocity:
    """The velocity field of each image of a batch, for solvers."""
    return lambda z, t: by_pooled_text(model, z, t, pooled)


def path_step(
    path: ProbabilityPath, job: Job, features: Features, model: MMDiT, step_rng: StepRNG
) -> Tensor:
    """The loss of a training step for each row of a batch, (B,)."""
    size, generator = job.training.flow.batch, step_rng.generator()
    images = step_rng.take(job.source.draw(size, generator))
    captions = job.source.captions(images, step_rng.take(torch.rand(size, generator=generator)))
    t = path.first + (1 - path.first) * step_rng.take(stratified(size, generator))
    x0, noise = features.latents_and_noise(images, step_rng)  # (B, C, h, w) each
    _, pooled = features.text(captions)
    x0, noise, t, pooled = (x.to(job.device) for x in (x0, noise, t, pooled))
    velocity = by_pooled_text(model, path.interpolate(x0, noise, t), t, pooled)
    return path_loss(path, velocity, x0, noise, t)


def train_path(
    path: ProbabilityPath, job: Job, features: Features, kept: Collection[int] = ()
) -> MMDiT:
    """Train a network along a path, or load the one that the run has: the average of its weights.

    The averages after the steps in `kept` are written too, see `kept_file`.
    """
    model = build(job, "flow", lambda: MMDiT(job.config.mmdit)).to(job.device)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return path_step(path, job, features, model, step_rng), {}

    def keep(step: int, average: nn.Module) -> None:
        if step + 1 in kept:
            save_weights(average, kept_file(job, step + 1))

    train = partial(fit_average, job, "flow", model, loss_of, job.training.ema_decay, keep)
    finish_or_load(job, "flow", model, train)
    return model


def kept_file(job: Job, step: int) -> Path:
    """The average of the weights after some steps."""
    return job.run.folder / f"flow-{step}.safetensors"


def load_kept(job: Job, step: int) -> MMDiT:
    model = build(job, "flow", lambda: MMDiT(job.config.mmdit)).to(job.device)
    load_weights(model, kept_file(job, step))
    return model.requires_grad_(False).eval()


# --- the command ----------------------------------------------------------------------------------


@torch.no_grad()
def path_latents(
    path: ProbabilityPath, model: MMDiT, noise: Tensor, pooled: Tensor, solver: str, cost: float
) -> tuple[Tensor, int]:
    """Latents (B, C, h, w) from noise, and the evaluations that they took. `cost` is their number
    for solvers with fixed steps, and the tolerance for dopri5."""
    evaluated, velocity = 0, velocity_for(model, pooled)

    def counted(z: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluated
        evaluated += 1
        return velocity(z, t)

    z = path.prior_std * noise
    if solver == "dopri5":
        z = dopri5(counted, z, torch.tensor([1.0, path.first]), rtol=cost, atol=cost)
    else:
        solve, each = FIXED_SOLVERS[solver]
        z = solve(counted, z, torch.linspace(1, path.first, int(cost) // each + 1))
    return z, evaluated


def cost_of(args: argparse.Namespace) -> float:
    """The solver's evaluations or tolerance. Raises InputError for options that do not apply to
    it."""
    if args.solver == "dopri5":
        if args.evaluations is not None:
            raise InputError("--evaluations: dopri5 finds their number; use --tolerance")
        tolerance = DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance
        if not FINEST <= tolerance < float("inf"):
            finest = f"{FINEST:g}, what float32 can tell apart"
            raise InputError(f"--tolerance must be a number from {finest}, got {tolerance}")
        return tolerance
    if args.tolerance is not None:
        raise InputError(f"--tolerance: {args.solver} has none; use --evaluations, or dopri5")
    evaluations, each = args.evaluations or DEFAULT_EVALUATIONS, FIXED_SOLVERS[args.solver][1]
    if evaluations % each:
        steps = f"{args.solver}, which takes so many a step"
        raise InputError(f"--evaluations must be a multiple of {each} for {steps}: {evaluations}")
    return evaluations


class Paths(System):
    name = "paths"
    what = "Flow Matching: learn along OT, VP or cosine paths, sample with any ODE solver."
    paper = "arXiv 2210.02747"

    def add_options(self, parser: Parser) -> None:
        add = parser.add_argument
        solvers = (*FIXED_SOLVERS, "dopri5")
        add("--path", choices=LEARNED, default="ot", help="the path (default: %(default)s)")
        text = "the ODE solver for samples (default: %(default)s)"
        add("--solver", choices=solvers, default="euler", help=text)
        text = f"network evaluations an image (default: {DEFAULT_EVALUATIONS})"
        add("--evaluations", type=positive, metavar="N", help=text)
        text = f"of dopri5, which adapts its steps (default: {DEFAULT_TOLERANCE:g})"
        add("--tolerance", type=float, metavar="X", help=text)

    def config(self, args: argparse.Namespace, finished: FinishedRun) -> Config:
        cost_of(args)
        config = with_flow_recipe(finished.config, PATH_RECIPES[size_of(args, finished)], args)
        return replace(config, training=replace(training_of(config), ema_decay=PATH_EMA_DECAY))

    def identity(self, args: argparse.Namespace, finished: FinishedRun) -> dict:
        given = "tolerance" if args.solver == "dopri5" else "evaluations"
        return {"path": args.path, "solver": args.solver, given: cost_of(args)}

    def train(self, study: Study) -> dict:
        job, finished, args = study.job, study.finished, study.args
        path, cost = PATHS[args.path], cost_of(args)
        features, pipeline = study.features, finished.pipeline
        model = train_path(path, job, features)
        size = job.config.image_size // job.config.vae.factor
        taken: list[int] = []

        def draw(prompts: list[str], seed: int, solver: str, cost: float) -> np.ndarray:
            pooled = torch.stack([features[text][1] for text in prompts]).to(job.device)
            noise = pipeline.noise(len(prompts), seed, (size, size)).to(job.device)
            latents, evaluated = path_latents(path, model, noise, pooled, solver, cost)
            taken.append(evaluated)
            return pipeline.decode(latents)

        def generate(d: Draw, seed: int) -> np.ndarray:
            return draw(d.prompts, seed, args.solver, cost)

        scores = score_samples(finished, generate, job.training.evaluate, 0)
        scores["evaluations"] = round(sum(taken) / len(taken))
        draw_grids(job, finished, args.solver, draw)
        return scores | {"training_seconds": job.run.stages["flow"]["seconds"]}


def draw_grids(
    job: Job,
    finished: FinishedRun,
    solver: str,
    draw: Callable[[list[str], int, str, float], np.ndarray],
) -> None:
    """Write samples.png: the same prompts from the same noise in few steps, in more, and with
    dopri5."""
    prompts, columns = shown_prompts(finished.source), []
    fixed = "euler" if solver == "dopri5" else solver
    ways = [(fixed, float(n), f"{fixed}, {n} evaluations") for n in EVALUATIONS_SHOWN]
    ways.append(("dopri5", DEFAULT_TOLERANCE, f"dopri5, tolerance {DEFAULT_TOLERANCE:g}"))
    for name, cost, title in ways:
        images = draw([p for p in prompts for _ in range(SHOWN_OF_EACH)], 0, name, cost)
        columns.append((title, grid_of(prompts, images)))
    write_file(job.run.folder / "samples.png", png(side_by_side(columns)))
