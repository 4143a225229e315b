"""What `train_mnist.py` and `python -m nanosd3.train` have in common: options, and the way from
data to a trained transformer.

A config that is trained from nothing trains its own autoencoder and text encoders first. With
`--weights PATH` those of another model are taken as they are, and with `--init PATH` the
transformer's first weights as well: fine-tuning.
"""

import argparse
import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanosd3.audit import check, check_part
from nanosd3.checkpoint import Run
from nanosd3.config import CONFIGS, Config, Recipe, trainable
from nanosd3.costs import parameters
from nanosd3.features import Encoders, Features, encoded
from nanosd3.footprint import memory
from nanosd3.found import Found, find, find_transformer
from nanosd3.loop import DECAYS, obeying
from nanosd3.parallel import MODES, Compute, Placed, launched, team
from nanosd3.parts import Parts, State
from nanosd3.pipeline import Pipeline
from nanosd3.report import preview
from nanosd3.runtime import InputError, Parser, memory_found, positive, set_up
from nanosd3.sources import Source
from nanosd3.stages import Job, every_so_often, train_autoencoder
from nanosd3.states import sha256
from nanosd3.text import ENCODERS
from nanosd3.train_text import train_text_encoders
from nanosd3.weights import open_pipeline


def add_options(parser: Parser, config: str) -> None:
    """The options of training, whatever is trained on."""
    add = parser.add_argument
    names = tuple(CONFIGS)
    add("--config", default=config, choices=names, help="which size (default: %(default)s)")
    add("--out", type=Path, help="run folder (default: runs/NAME)")
    add("--fresh", action="store_true", help="start over, deleting the run in the folder")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--weights", type=Path, metavar="PATH", help="take text encoders and autoencoder from a "
        "file of official weights, a diffusers folder or a run, and train neither")  # fmt: skip
    add("--init", type=Path, metavar="PATH", help="start from the transformer in it: fine-tune")
    group = parser.add_argument_group("the transformer's training (defaults: the config's)")
    group.add_argument("--steps", type=positive)
    group.add_argument("--batch", type=positive, help="images in a step, over all processes")
    group.add_argument("--lr", type=float, help="largest learning rate")
    group.add_argument("--decay", choices=DECAYS, help="what the learning rate does after warm-up")
    group = parser.add_argument_group("how it is computed")
    add = group.add_argument
    add("--threads", type=positive, help="CPU threads (default: all usable cores)")
    add("--parallel", choices=MODES, help="with torchrun: whole copies of the network, or shares")
    add("--precision", choices=("float32", "bfloat16"), help="of products and activations "
        "(default: bfloat16 on a GPU; float32, always, on CPU)")  # fmt: skip
    add("--checkpointing", action="store_true", help="less memory: compute activations twice")
    add("--accumulate", type=positive, default=1, metavar="N", help="less memory: a process's "
        "share of the batch in N parts")  # fmt: skip
    add("--compile", action="store_true", help="through torch.compile")


@dataclass(frozen=True)
class Plan:
    """What is to be trained, before anything is computed."""

    config: Config
    frozen: Found | None  # text encoders and autoencoder that are taken as they are
    init: State | None  # the transformer's first weights
    identity: dict  # of the run, beside its data and seed


def make_plan(args: argparse.Namespace) -> Plan:
    """What the options ask for. Raises InputError for what does not fit together."""
    config, source = CONFIGS[args.config], args.weights
    identity, init, frozen = {}, None, None
    if args.init:
        init = find_transformer(args.init)
        wrong = check_part(config, "mmdit", init)
        for entry in (*wrong.missing, *wrong.misshapen):
            raise InputError(f"{args.init}: its transformer is not one of {config.name}: {entry}")
        identity["init"] = fingerprint({"mmdit": init})
        source = source or args.init
    if source:
        frozen = find(source)
        check(frozen)
        if missing := [name for name in ENCODERS if name not in frozen.parts]:
            raise InputError(f"{source}: holds no {', '.join(missing)}; name a PATH that holds "
                             "all text encoders with --weights")  # fmt: skip
        config = with_parts_of(config, frozen)
        identity |= {"weights": str(source.resolve()),
                     "encoders": fingerprint({n: p for n, p in frozen.parts.items()
                                              if n != "mmdit"})}  # fmt: skip
    config = with_recipe(trainable(config) if not frozen else config, args)
    return Plan(config, frozen, init, {"config": asdict(config), **identity})


def with_parts_of(config: Config, frozen: Found) -> Config:
    """The config with another model's text encoders and autoencoder."""
    text, vae, mmdit = frozen.config.text, frozen.config.vae, config.mmdit
    if vae.latent_channels != mmdit.latent_channels:
        raise InputError(f"{frozen.path}: its latents have {vae.latent_channels} channels, those "
                         f"of {config.name} {mmdit.latent_channels}")  # fmt: skip
    widths = (text.t5.width, text.clip_l.width + text.clip_g.width)
    if widths[0] > mmdit.context_dim or widths[1] > mmdit.pooled_dim:
        raise InputError(f"{frozen.path}: its text features are {widths[0]} and {widths[1]} wide; "
                         f"{config.name} has {mmdit.context_dim} and {mmdit.pooled_dim}"
                         )  # fmt: skip
    training = trainable(config).training
    return replace(config, text=text, vae=vae, padding=frozen.config.padding, training=training)


def with_recipe(config: Config, args: argparse.Namespace) -> Config:
    """The config with what the options say of the transformer's training."""
    recipe: Recipe = config.training.flow
    given = {key: getattr(args, key) for key in ("steps", "batch", "lr", "decay")}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if not 0 < recipe.lr < float("inf"):
        raise InputError(f"--lr must be a number above 0, got {recipe.lr}")
    recipe = replace(recipe, warmup=min(recipe.warmup, recipe.steps // 4))
    return replace(config, training=replace(config.training, flow=recipe))


def fingerprint(parts: dict[str, State]) -> str:
    """Of networks that may be too large to read: names, shapes, and the numbers of all vectors
    (biases and norms), which any training changes."""
    digest = hashlib.sha256()
    for part in sorted(parts):
        for name, tensor in sorted(parts[part].items()):
            digest.update(f"{part} {name} {tensor.shape} {tensor.dtype}".encode())
            if len(tensor.shape) == 1:
                digest.update(tensor.read().float().numpy().tobytes())
    return digest.hexdigest()


def enough_memory(config: Config, processes: int, compute: Compute, sharded: bool) -> None:
    """Raises InputError where a step needs more than there is, before anything is allocated."""
    mmdit, text, recipe = config.mmdit, config.text, config.training.flow
    side = config.image_size // config.vae.factor // mmdit.patch_size
    batch = max(1, recipe.batch // (processes * compute.accumulate))
    tokens = text.clip_l.length + text.t5.length
    need = memory(mmdit, batch, side, side, tokens, precision=compute.precision,
                  processes=processes, checkpointing=compute.checkpointing,
                  sharded=sharded)  # fmt: skip
    found, where = memory_found()
    if found < need.total / 1e9:
        raise InputError(f"{config.name}: training its {parameters(mmdit) / 1e9:.1f}B parameters "
                         f"needs {need.total / 1e9:.0f} GB of memory in a process, "
                         f"{need.activations / 1e9:.0f} GB of it activations; found {found:.0f} GB "
                         f"{where}: not enough (see --checkpointing, --accumulate, "
                         "--parallel fsdp)")  # fmt: skip


@contextlib.contextmanager
def job_of(args: argparse.Namespace, plan: Plan, source: Source) -> Iterator[Job | None]:
    """While open, a run folder with a team at work in it, and no other; None if it is finished."""
    folder = args.out or Path("runs") / plan.config.name
    identity = plan.identity | {"data": source.fingerprint, "seed": args.seed}
    device = set_up(args.threads)
    precision = args.precision or ("bfloat16" if device.type == "cuda" else "float32")
    if precision != "float32" and device.type == "cpu":
        raise InputError("--precision bfloat16 is for GPUs: processors multiply it far slower")
    compute = Compute(precision, args.checkpointing, args.compile, args.accumulate)
    enough_memory(plan.config, max(1, launched()), compute, args.parallel == "fsdp")
    with team(args.parallel, device) as members, contextlib.ExitStack() as stack:
        stack.enter_context(obeying())
        members.shares(plan.config.training.flow.batch, args.accumulate)  # refuses what cannot be
        if members.leads:
            run = Run.open(folder, identity, args.fresh)
            stack.enter_context(run.alone())
        members.wait()
        run = Run.read(folder)
        if "samples" in run.stages:
            if members.leads:
                print(f"{folder} is finished: see {folder / 'samples.png'}, or start over with "
                      "--fresh")  # fmt: skip
            yield None
            return
        yield Job(run, plan.config, source, members.device, args.seed, members, compute)


def get_encoders(job: Job, frozen: Found | None) -> Encoders:
    """Train them, or open those that are `frozen` when they are needed."""
    if frozen:
        name, others = job.run.identity["encoders"], dict(frozen.parts)
        others.pop("mmdit")
        found = replace(frozen, config=job.config, parts=others)
        return Encoders(job.config, name, lambda: open_pipeline(found, job.device, None, False))
    vae, text = train_autoencoder(job), train_text_encoders(job)
    config = replace(job.config, vae=vae.config)
    pipeline = Pipeline(config, text.tokenizers, Parts({**text.parts, "vae": vae}, job.device))
    files = [job.run.folder / f"{name}.safetensors" for name in ("autoencoder", "text")]
    return Encoders(config, "-".join(sha256(file) for file in files), lambda: pipeline)


def get_features(job: Job, encoders: Encoders, prompts: list[str]) -> Features:
    """What the encoders say of all images, captions and prompts, computed where it is missing."""
    return encoded(job.run.folder / "cache", job.source, encoders, prompts, job.team)


def previews(job: Job, features: Features, prompts: list[str]) -> Callable[[int, Placed], None]:
    """To be called after every step: draws the prompts every so often."""
    every = every_so_often(job.config.training.flow.steps)

    def watch(step: int, average: Placed) -> None:
        if (step + 1) % every == 0:
            pipeline = features.pipeline(average, job.device)
            preview(pipeline, step + 1, prompts, job.run.folder, job.team.leads)

    return watch
