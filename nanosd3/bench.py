"""Time and memory, measured in pairs: the same weights and inputs in this code and in another.

    python -m nanosd3.bench forward --against diffusers      one pass through each part
    python -m nanosd3.bench memory --config sd3-medium       a whole run, by its largest stage

Machines are noisy, so a time means little and a ratio of two taken side by side means more:
`forward` runs both in turn, several times, and gives the median of the ratios. Memory is that of
all tensors alive at the peak of a pass, with the weights and without. Outputs are compared too: a
fast wrong answer is not fast. Weights are random; text encoders have their full width but few
layers, as all layers cost the same.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nanosd3.audit import on_meta
from nanosd3.config import CONFIGS, Config
from nanosd3.export import diffusers_state, part_config
from nanosd3.layers import linear
from nanosd3.layouts import COMPONENTS, PREFIXES
from nanosd3.parts import stored
from nanosd3.runtime import InputError, Parser, positive, run_main, set_up
from nanosd3.text import ENCODERS
from nanosd3.weights import DTYPES

Forward = Callable[[], Tensor]
NAMES = {"mmdit": "transformer", "vae": "VAE decode", "clip_l": "CLIP-L", "clip_g": "CLIP-G",
         "t5": "T5"}  # fmt: skip


def randomly_filled(
    config: Config, part: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A part with weights of a size at which signals neither die nor explode."""
    module = on_meta(config, part).to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.01)
    return module.requires_grad_(False).eval()


def theirs(config: Config, part: str, ours: nn.Module) -> nn.Module:
    """The same part in diffusers or transformers, on the very tensors of ours where the layouts
    allow it."""
    import diffusers
    import transformers

    settings = {k: v for k, v in part_config(config, part).items() if k != "architectures"}
    with torch.device("meta"):
        if part in ("mmdit", "vae"):
            kind = diffusers.SD3Transformer2DModel if part == "mmdit" else diffusers.AutoencoderKL
            other = kind.from_config(settings)
        elif part == "t5":
            other = transformers.T5EncoderModel(transformers.T5Config(**settings))
        else:
            other = transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**settings)
            )
    state = {k: stored(k, t, Path()) for k, t in ours.state_dict().items()}
    like = next(ours.parameters())
    read = {key: t.read().to(like.device) for key, t in diffusers_state(part, state).items()}
    if part == "t5":  # tied, and asked for under both names
        read["encoder.embed_tokens.weight"] = read["shared.weight"]
    other.load_state_dict(read, assign=True)
    for name, buffer in other.named_buffers():  # not stored, so still without memory
        if buffer.is_meta:
            module, _, leaf = name.rpartition(".")
            fresh = torch.arange(buffer.shape[-1], device=like.device)
            setattr(other.get_submodule(module), leaf, fresh.expand(buffer.shape))
    return other.requires_grad_(False).eval()


def inputs(config: Config, part: str, size: int, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """What a part is given: latents and text for images of `size`, batch as with guidance."""
    text, mmdit = config.text, config.mmdit
    side = size // config.vae.factor
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, mmdit.latent_channels, side, side, generator=draw).to(like)
    tokens = text.clip_l.length + text.t5.length
    if part == "mmdit":
        context = torch.randn(batch, tokens, mmdit.context_dim, generator=draw).to(like)
        pooled = torch.randn(batch, mmdit.pooled_dim, generator=draw).to(like)
        return latents, torch.full((batch,), 0.5, device=like.device), context, pooled
    if part == "vae":
        return (latents[:1],)
    clip = getattr(text, part)
    ids = torch.randint(clip.vocab - 1, (batch, clip.length), generator=draw)
    if part != "t5":
        ids[:, -1] = clip.vocab - 1
    return (ids.to(like.device),)


def forward_of(module: nn.Module, part: str, given: tuple[Tensor, ...], foreign: bool) -> Forward:
    """One pass, by the calling convention of whoever wrote the module."""
    if part == "vae":
        if foreign:
            return lambda: module.decode(*given).sample
        return lambda: module.decode(*given)
    if not foreign:
        return lambda: module(*given)[0] if part.startswith("clip") else module(*given)
    if part == "mmdit":
        z, t, context, pooled = given
        return lambda: module(z, context, pooled, 1000 * t).sample
    if part == "t5":
        return lambda: module(*given).last_hidden_state
    return lambda: module(*given, output_hidden_states=True).hidden_states[-2]


def measured_config(args: argparse.Namespace) -> Config:
    """The config asked for, its text encoders cut to a few layers."""
    config = CONFIGS[args.config]
    text = config.text
    few = {
        name: replace(getattr(text, name), layers=min(args.layers, getattr(text, name).layers))
        for name in ENCODERS
    }
    return replace(config, text=replace(text, **few))


def seconds(forward: Forward, device: torch.device) -> float:
    begin = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def prepare(
    args: argparse.Namespace, part: str, device: torch.device
) -> tuple[Forward, Forward, int]:
    """Our forward and theirs, on the same weights and inputs, and the bytes of the weights."""
    config, dtype = measured_config(args), DTYPES[args.dtype]
    ours = randomly_filled(config, part, device, dtype)
    given = inputs(config, part, args.size, args.batch, next(ours.parameters()))
    other = theirs(config, part, ours) if args.against else ours
    made = [
        forward_of(ours, part, given, foreign=False),
        forward_of(other, part, given, foreign=other is not ours),
    ]
    if args.compile:
        made = [torch.compile(forward) for forward in made]
    weights = sum(t.numel() * t.element_size() for t in ours.state_dict().values())
    return made[0], made[1], weights


def peak_memory(forward: Forward, device: torch.device) -> int:
    """Bytes of tensors alive at the peak of one pass, beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        forward()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)))


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product: what this machine gives at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: linear(a, b), device) for _ in range(10))
    return 2 * n**3 / best


@torch.no_grad()
def bench_forward(args: argparse.Namespace) -> None:
    device = set_up(args.threads)
    peak = matrix_peak(device, DTYPES[args.dtype])
    print(f"{args.config}, {args.size}x{args.size}, batch {args.batch}, {args.dtype}, text "
          f"encoders of {args.layers} layers; matrix product {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    print("| part | ours | share of peak | time ratio | memory ratio | beyond weights | "
          "difference |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for part in args.parts or COMPONENTS:
        ours, other, weights = prepare(args, part, device)
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            ours()  # the counter knows the products that have gradients
        answer = ours()
        difference = (answer - other()).abs().max() / answer.abs().max()
        pairs = [(seconds(ours, device), seconds(other, device)) for _ in range(args.repeats)]
        best = min(mine for mine, _ in pairs)
        row = f"| {NAMES[part]} | {best:.3f} s | {counter.get_total_flops() / best / peak:.0%} | "
        if not args.against:
            print(row + "- | - | - | - |")
            continue
        time_ratio = statistics.median(mine / their for mine, their in pairs)
        mine, their = (peak_memory(forward, device) for forward in (ours, other))
        print(row + f"{time_ratio:.2f} | {(weights + mine) / (weights + their):.2f} | "
              f"{mine / their:.2f} | {difference:.0e} |", flush=True)  # fmt: skip


# --- a whole run --------------------------------------------------------------------------------


def status_of(field: str) -> int:
    """A line of this process's status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def alone(function: Callable, *arguments: object) -> object:
    """What a function returns in a process of its own, whose memory goes with it."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def write_random(config: Config, path: Path, without: list[str]) -> dict[str, int]:
    """A single file in float16 of a full-size model, filled at random; parameters by part."""
    state, counts = {}, {}
    for part in COMPONENTS:
        if part in without:
            continue
        module = randomly_filled(config, part, torch.device("cpu"), torch.float16)
        counts[part] = sum(tensor.numel() for tensor in module.state_dict().values())
        state |= {PREFIXES[part] + key: tensor for key, tensor in module.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return counts


CHILD = """
import sys
from nanosd3 import bench, generate
before = bench.status_of("VmHWM")
generate.main(sys.argv[1:])
print(before, bench.status_of("VmHWM"))
"""


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory of `generate` in a process of its own, beside the weights of each part."""
    if CONFIGS[args.config].training:
        raise InputError(f"memory: {args.config} is small; name one of the official models")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / f"{args.config}.safetensors"
        counts = alone(write_random, CONFIGS[args.config], path, args.without)
        options = ["a photo of a cat", "--weights", path, "--out", Path(folder) / "cat.png"]
        options += ["--height", args.size, "--width", args.size, "--steps", 2]
        options += [word for part in args.without for word in ("--drop", part)]
        command = [sys.executable, "-c", CHILD, *map(str, options)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"generate ended with status {done.returncode}")
        before, peak = map(int, done.stdout.split()[-2:])
    weights = {part: 4 * n for part, n in counts.items()}
    largest = max(weights, key=weights.get)
    for part, size in weights.items():
        print(f"{NAMES[part]:12}{size / 1e9:7.2f} GB in float32")
    print(f"program     {before / 1e9:7.2f} GB before any weights")
    print(f"peak        {peak / 1e9:7.2f} GB: {peak / (before + weights[largest]):.2f} of the "
          f"program and its largest part ({NAMES[largest]}); with all parts at once "
          f"{(before + sum(weights.values())) / 1e9:.2f} GB")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m nanosd3.bench", "Time and memory, measured in pairs.")
    add = parser.add_argument
    add("what", choices=("forward", "memory"), help="one pass of each part, or a whole run")
    add("--against", choices=("diffusers",), help="forward: the other side of each pair")
    add("--config", default="sd3-d15", choices=tuple(CONFIGS), help="(default: %(default)s)")
    add("--size", type=positive, default=256, help="pixels a side (default: %(default)s)")
    add("--batch", type=positive, default=2, help="(default: 2, as with guidance)")
    add("--layers", type=positive, default=4, help="forward: of the text encoders (default: 4)")
    add("--repeats", type=positive, default=5, help="forward: pairs (default: %(default)s)")
    add("--parts", nargs="+", choices=COMPONENTS, help="forward: which (default: all)")
    add("--dtype", default="float32", choices=tuple(DTYPES))
    add("--compile", action="store_true", help="forward: through torch.compile")
    add("--without", nargs="*", default=[], choices=ENCODERS, help="memory: leave out")
    add("--folder", type=Path, help="memory: where the weights go (default: the temporary folder)")
    add("--threads", type=positive, help="CPU threads (default: all usable cores)")
    args = parser.parse_args(arguments)
    if args.what == "forward":
        bench_forward(args)
    else:
        bench_memory(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
