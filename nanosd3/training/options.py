"""The command-line options shared by `train_mnist.py` and `python -m nanosd3.train`.

Options become a job in two steps: `make_plan` resolves the config and opens the weights to start
from; `job_of` opens the run folder.

By default a run trains its own autoencoder and text encoders first. `--weights PATH` takes those of
another model instead, and `--init PATH` also starts from its transformer: fine-tuning.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanosd3.cli import Parser, command_line, positive
from nanosd3.config import CONFIGS, trainable
from nanosd3.config_types import Config
from nanosd3.data.sources import Source
from nanosd3.errors import InputError, shortened
from nanosd3.machine.device import set_up
from nanosd3.machine.distributed import MODES, Compute, launched_processes, process_group
from nanosd3.machine.signals import sigterm_interrupts
from nanosd3.measure.memory_check import refuse_large_autoencoder, refuse_too_large
from nanosd3.official.checkpoint import Checkpoint, open_checkpoint, open_transformer
from nanosd3.official.missing_keys import check, problems_of_part
from nanosd3.official.tensors import State, fingerprint
from nanosd3.storage.run import WEIGHTS, Run
from nanosd3.text import ENCODERS
from nanosd3.training.optimizer import DECAYS, OPTIMIZERS
from nanosd3.training.stages import Job, training_of


def add_options(parser: Parser, config: str) -> None:
    """Add the training options that do not depend on the data; `config` is the default config."""
    add = parser.add_argument
    names = tuple(name for name in CONFIGS if not name.endswith("-turbo"))  # distilled already
    add("--config", default=config, choices=names, help="model size (default: %(default)s)")
    add("--out", type=Path, help="run folder (default: runs/CONFIG)")
    add("--fresh", action="store_true", help="delete the run in the folder and start over")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--weights",
        type=Path,
        metavar="PATH",
        help="use the text encoders and autoencoder of PATH (a single-file checkpoint, a "
        "diffusers folder or a run) instead of training them",
    )
    add(
        "--init",
        type=Path,
        metavar="PATH",
        help="fine-tune: start from the transformer of PATH, and use its text encoders and "
        "autoencoder unless --weights names others",
    )

    add = parser.add_argument_group("transformer training (defaults: the config's)").add_argument
    add("--steps", type=positive, help="training steps")
    add("--batch", type=positive, help="images per step, over all processes")
    add("--lr", type=float, help="peak learning rate")
    add("--decay", choices=DECAYS, help="learning rate schedule after warm-up")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        help="muon trains the matrices of the joint blocks, and AdamW the rest at half the rate",
    )

    add = parser.add_argument_group("performance").add_argument
    add("--threads", type=positive, help="CPU threads (default: the usable cores, at most 8)")
    add(
        "--parallel",
        choices=MODES,
        help="with torchrun: replicate the transformer (ddp) or shard it (fsdp)",
    )
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of matrix products and activations (default: bfloat16 on a GPU; a CPU trains in "
        "float32 only)",
    )
    add(
        "--checkpointing",
        action="store_true",
        help="save memory: recompute activations in the backward pass",
    )
    add(
        "--accumulate",
        type=positive,
        default=1,
        metavar="N",
        help="save memory: split each process's share of the batch into N microbatches",
    )
    add("--compile", action="store_true", help="compile the transformer with torch.compile")


@dataclass(frozen=True)
class Plan:
    """What the options ask for, resolved; nothing is computed yet."""

    config: Config  # with a training recipe
    frozen: Checkpoint | None  # where text encoders and autoencoder come from, if not trained
    init: State | None  # initial weights of the transformer, if not random
    identity: dict  # of the run; data and seed are added later


def make_plan(args: argparse.Namespace) -> Plan:
    """Resolve the options. Raises InputError for weights that do not fit the config."""
    config, source = CONFIGS[args.config], args.weights
    identity, init, frozen = {}, None, None
    before = identity_before(args)
    if args.init:
        init = open_transformer(args.init)
        if problems := problems_of_part(config, "mmdit", init):
            raise InputError(
                f"{args.init}: its transformer does not fit config {config.name}: {problems[0]}"
            )
        identity["init"] = fingerprint({"mmdit": init}, like=before.get("init"))
        source = source or args.init
    if source:
        frozen = open_checkpoint(source)
        check(frozen)
        if missing := [name for name in ENCODERS if name not in frozen.parts]:
            raise InputError(
                f"{source}: holds no {', '.join(missing)}; use --weights to name a PATH with all "
                "text encoders"
            )
        config = with_parts_of(config, frozen)
        place = os.path.abspath(source)  # links are not resolved: their names may be looked for
        encoders = fingerprint(frozen.encoders, like=before.get("encoders"))
        identity |= {WEIGHTS: place, "encoders": encoders}
    config = with_recipe(trainable(config) if not frozen else config, args)
    return Plan(config, frozen, init, {"config": asdict(config), **identity})


def folder_of(args: argparse.Namespace) -> Path:
    """The run folder that the options ask for."""
    return args.out or Path("runs") / args.config


def identity_before(args: argparse.Namespace) -> dict:
    """The identity of the run to resume; empty if there is none."""
    folder = folder_of(args)
    if args.fresh or not (folder / "run.json").exists():
        return {}
    return Run.read(folder).identity


def with_parts_of(config: Config, frozen: Checkpoint) -> Config:
    """The config with another model's text encoders and autoencoder.

    Raises InputError if its transformer cannot take their outputs.
    """
    text, vae, mmdit = frozen.config.text, frozen.config.vae, config.mmdit
    if vae.latent_channels != mmdit.latent_channels:
        raise InputError(
            f"{frozen.path}: its latents have {vae.latent_channels} channels, config "
            f"{config.name} needs {mmdit.latent_channels}"
        )
    widths = (text.t5.width, text.clip_l.width + text.clip_g.width)
    if widths[0] > mmdit.context_dim or widths[1] > mmdit.pooled_dim:
        raise InputError(
            f"{frozen.path}: its text features are {widths[0]} and {widths[1]} wide; config "
            f"{config.name} takes at most {mmdit.context_dim} and {mmdit.pooled_dim}"
        )
    training = trainable(config).training
    return replace(config, text=text, vae=vae, padding=frozen.config.padding, training=training)


def with_recipe(config: Config, args: argparse.Namespace) -> Config:
    """The config with the options' changes to the recipe for the transformer."""
    training = training_of(config)
    options = {
        key: getattr(args, key, None) for key in ("steps", "batch", "lr", "decay", "optimizer")
    }
    changes = {key: value for key, value in options.items() if value is not None}
    recipe = replace(training.flow, **changes)
    if not 0 < recipe.lr < float("inf"):
        raise InputError(f"--lr must be a number above 0, got {recipe.lr}")
    recipe = replace(recipe, warmup=min(recipe.warmup, recipe.steps // 4))
    return replace(config, training=replace(training, flow=recipe))


def generate_command(prompt: str, folder: Path, out: str) -> str:
    """The command that draws a prompt, shortened if it is long, with the model in a run folder."""
    options, text = ("--model", folder, "--out", out), shortened(prompt)
    words = (*options, "--", text) if text.startswith("-") else (text, *options)
    return command_line("python", "-m", "nanosd3.generate", *words)


@contextlib.contextmanager
def job_of(args: argparse.Namespace, plan: Plan, source: Source) -> Iterator[Job | None]:
    """Join the process group, lock the run folder and yield the job; None if it is finished.

    Raises InputError if the options, the folder or the memory do not allow it.
    """
    folder = folder_of(args)
    identity = plan.identity | {"data": source.fingerprint, "seed": args.seed}
    device = set_up(args.threads)
    precision = args.precision or ("bfloat16" if device.type == "cuda" else "float32")
    if precision != "float32" and device.type == "cpu":
        raise InputError("--precision bfloat16 is for GPUs; use float32, which is faster on CPU")
    compute = Compute(precision, args.checkpointing, args.compile, args.accumulate)
    refuse_too_large(plan.config, max(1, launched_processes()), compute, args.parallel == "fsdp")
    if not plan.frozen and not (folder / "autoencoder.safetensors").exists():
        refuse_large_autoencoder(plan.config)
    with (
        process_group(args.parallel, device) as group,
        sigterm_interrupts(),
        contextlib.ExitStack() as stack,
    ):
        # Refuses a batch that cannot be divided, before the folder is touched.
        group.microbatches(training_of(plan.config).flow.batch, args.accumulate)
        if group.is_main:
            run = Run.open(folder, identity, args.fresh, source.contents)
            stack.enter_context(run.alone())
            run.remember(identity, source.contents)
        group.barrier()
        run = Run.read(folder)
        if "samples" in run.stages:
            if group.is_main:
                pictures = folder / "samples.png"
                print(f"{folder} is finished: see {pictures}, or start over with --fresh")
            yield None
            return
        yield Job(run, plan.config, source, group.device, args.seed, group, compute)
