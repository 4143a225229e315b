"""Attention's logits, measured while a network trains, with and without QK-norm."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import network_job
from nanosd3.config_types import Recipe
from nanosd3.flow import interpolate
from nanosd3.machine.distributed import Compute, ParallelModel
from nanosd3.mmdit import MMDiT
from nanosd3.random_streams import rng
from nanosd3.related.finished_run import FinishedRun
from nanosd3.storage.run import Run
from nanosd3.training.cached_features import Features
from nanosd3.training.loop import StepRNG, fit
from nanosd3.training.stages import Job, build, finish, last_loss, training_of
from nanosd3.training.train_flow import flow_step

HIGH_RATE = Recipe(steps=120, batch=32, lr=3e-2, warmup=20, weight_decay=0.0, decay="constant")
MEASUREMENTS = 30  # of attention, during training
ATTENTION_IMAGES = 32  # images
QueriesAndKeys = dict[str, Tensor]  # queries and keys by the name of their norm, (B, heads, L, 64)


@contextmanager
def record_queries_and_keys(model: MMDiT) -> Iterator[QueriesAndKeys]:
    """Collect the queries and keys of the next pass, after their norm if there is one."""
    recorded: QueriesAndKeys = {}
    modules = {n: m for n, m in model.named_modules() if n.endswith(("ln_q", "ln_k"))}

    def keep(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, __, out: recorded.update({name: out.float()}))

    handles = [keep(name, module) for name, module in modules.items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def attention_logits(model: MMDiT, recorded: QueriesAndKeys) -> list[Tensor]:
    """Of the image's queries with all keys, (B, heads, N, M + N) for each block."""
    found = []
    for i in range(len(model.joint_blocks)):
        block = f"joint_blocks.{i}"
        keys = [recorded[f"{block}.{stream}.attn.ln_k"] for stream in ("context_block", "x_block")]
        q, k = recorded[f"{block}.x_block.attn.ln_q"], torch.cat(keys, dim=2)
        found.append(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]))
    return found


def largest_and_entropy(logits: list[Tensor]) -> tuple[float, float]:
    """The largest logit in absolute value, and the mean entropy of the softmax over that of a
    uniform one: 1 attends to all tokens equally, 0 to a single one."""
    largest = max(x.abs().max().item() for x in logits)
    entropies = [
        -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean().item() / math.log(x.shape[-1])
        for x in logits
    ]
    return largest, sum(entropies) / len(entropies)


@torch.no_grad()
def measure_attention(
    job: Job, features: Features, model: MMDiT, network: ParallelModel
) -> tuple[float, float]:
    """Attention on held-out images, with their captions, at evenly spread times."""
    images = torch.arange(job.source.trained, job.source.count)[:ATTENTION_IMAGES]
    x0 = features.normalise(features.latents(images)[0])
    noise = torch.randn(x0.shape, generator=rng("validation", "attention"))
    t = (torch.arange(len(images)) + 0.5) / len(images)
    context, pooled = features.text(job.source.captions(images, torch.zeros(len(images))))
    with record_queries_and_keys(model) as recorded:
        network(interpolate(x0, noise, t), t, context, pooled)
    return largest_and_entropy(attention_logits(model, recorded))


def train_and_measure(job: Job, features: Features, precision: str) -> None:
    """Train, and log attention on the way."""
    model, recipe = build(job, "flow", lambda: MMDiT(job.config.mmdit)), job.training.flow
    network = ParallelModel(model, compute=Compute(precision))
    interval = -(-recipe.steps // MEASUREMENTS)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        return flow_step(job, features, network, step_rng), {}

    def watch(step: int) -> None:
        if (step + 1) % interval == 0:
            largest, entropy = measure_attention(job, features, model, network)
            job.run.log(stage="flow", step=step, largest=largest, entropy=entropy)

    fit(job.run, "flow", model, loss_of, recipe, job.seed, watch=watch, parallel=network)


def trained_with(
    conditions: Conditions,
    finished: FinishedRun,
    features: Features,
    arm: tuple[str, str],
    seed: int,
) -> Run:
    """The run of a network that was trained in this precision, with the norm or without; its log
    has the measurements of attention."""
    (precision, norm), config = arm, finished.config
    recipe = replace(HIGH_RATE, steps=4, batch=8, warmup=1) if conditions.fast else HIGH_RATE
    mmdit = replace(config.mmdit, qk_norm=norm == "with", dual_attention=())
    config = replace(config, mmdit=mmdit, training=replace(training_of(config), flow=recipe))
    name = f"{norm}-qk-norm-{precision}"
    job = network_job(conditions, finished, name, config, seed, precision=precision)
    run = job.run
    with run.alone():
        if "flow" not in run.stages:
            print(f"{precision}, {norm} QK-norm, seed {seed}", flush=True)
            begin, used = time.perf_counter(), time.process_time()
            train_and_measure(job, features, precision)
            seconds = round(time.process_time() - used, 1)
            finish(job, "flow", {"loss": last_loss(job, "flow"), "thread_seconds": seconds}, begin)
    return run
