"""The formulas of costs.py and footprint.py against what networks really take, and `bench`, which
shows them."""

import random
import re
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import is_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanosd3 import bench, costs, footprint, growth, pairs, products
from nanosd3.accelerate import accelerate
from nanosd3.audit import on_meta
from nanosd3.config import CONFIGS, MMDiTConfig
from nanosd3.mmdit import JointBlock, MMDiT
from nanosd3.parallel import Compute, Placed
from nanosd3.runtime import InputError

CPU = torch.device("cpu")
META = torch.device("meta")


def network(depth, qk_norm=False, dual=(), context=80, pooled=48, channels=4, patch=2):
    return MMDiTConfig(depth, channels, patch, context, pooled, 16, 8, 8, qk_norm, dual)


def any_network(seed):
    draw = random.Random(seed)
    depth = draw.randint(1, 4)
    dual = tuple(i for i in range(depth) if draw.random() < 0.4)
    sizes = {"context": draw.randint(3, 50), "pooled": draw.randint(3, 50)}
    shape = {"channels": draw.randint(1, 5), "patch": draw.choice([1, 2, 4])}
    return network(depth, seed % 2 == 0, dual, **sizes, **shape)


def given(config, batch, rows, columns, text):
    """What the network reads."""
    height, width = rows * config.patch_size, columns * config.patch_size
    return (
        torch.randn(batch, config.latent_channels, height, width),
        torch.rand(batch),
        torch.randn(batch, text, config.context_dim),
        torch.randn(batch, config.pooled_dim),
    )


# --- weights and arithmetic ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_configs(name):
    model = on_meta(CONFIGS[name], "mmdit")
    assert costs.parameters(CONFIGS[name].mmdit) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", range(8))
def test_parameters_of_any_network(seed):
    config = any_network(seed)
    with META:
        model = MMDiT(config)
    assert costs.parameters(config) == sum(p.numel() for p in model.parameters())
    for i, block in enumerate(model.joint_blocks):
        assert costs.block_parameters(config, i) == sum(p.numel() for p in block.parameters())


SHAPES = [(1, 1, 1, 1), (2, 4, 4, 7), (3, 2, 5, 1), (2, 5, 3, 11)]


@pytest.mark.parametrize("seed", range(8))
def test_flops(seed):
    """To the last one: forward, the gradient, and what is computed twice."""
    config, sizes = any_network(seed), SHAPES[seed % 4]
    with META:
        model, inputs = MMDiT(config), given(config, *sizes)
    forward = costs.forward_flops(config, *sizes)
    assert pairs.count_flops(lambda: model(*inputs)) == forward
    # What the network is given asks for no gradient: these products are done twice, not thrice.
    patches, context, time, _, pooled, _ = costs.embedders(config)
    batch, rows, columns, text = sizes
    spared = costs.multiplied([patches, context, time, pooled], batch, rows * columns, text)
    for twice in (False, True):
        placed = Placed(model, compute=Compute(checkpointing=twice), blocks=model.joint_blocks)
        counted = pairs.count_flops(lambda net=placed: net(*inputs).sum().backward())
        assert counted == costs.training_flops(config, *sizes, checkpointing=twice) - spared


# --- memory -------------------------------------------------------------------------------------


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module


def measured(model, forward):
    """Bytes of gradients and activations at the peak of a training step."""
    step = pairs.training_step(model, forward, torch.zeros(()))
    step()  # the optimizer makes its moments
    return pairs.peak_memory(step, CPU)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_what_a_block_keeps(plain, qk_norm, dual, last):
    """Tensors alive after its forward pass; a vector more or less for each token would be seen."""
    N, M, batch, depth = 64, 96, 2, 2
    config = network(depth, qk_norm, (0, 1) if dual else ())
    block = accelerate(JointBlock(config.width, qk_norm, dual, last), keep_activations=plain)
    shapes = (batch, N, config.width), (batch, M, config.width), (batch, config.width)
    x, y, c = (torch.randn(*shape, requires_grad=True) for shape in shapes)
    with torch.profiler.profile(profile_memory=True) as profiler:
        out = [part for part in block(x, y, c) if part is not None]
    events = profiler.profiler.kineto_results.events()
    alive = sum(e.nbytes() for e in events if e.name() == "[memory]") / 4
    step = footprint.Step(config, batch, N, M, 4, checkpointing=False, shards=None)
    kept = alive - sum(part.numel() for part in out)
    i = depth - 1 if last else 0
    expected = step.kept(i) + plain * step.also_kept(i)
    assert 0 <= kept - expected < 0.4 * batch * min(N, M) * config.width


# depth, batch, rows, columns, text tokens, norms of q and k, dual attention
STEPS = [
    (1, 4, 8, 8, 17, True, (0,)),
    (1, 4, 4, 4, 154, False, ()),
    (2, 16, 4, 4, 17, False, ()),
    (2, 4, 4, 8, 154, True, (0, 1)),
    (4, 1, 16, 16, 17, True, (0, 1)),
    (4, 1, 4, 4, 154, True, ()),
    (6, 1, 4, 8, 17, False, (0,)),
    (4, 2, 8, 12, 77, False, (1,)),
]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_memory_of_a_step(monkeypatch, case, twice):
    """By oneDNN's products on every processor that has them."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: known)
    depth, batch, rows, columns, text, qk_norm, dual = case
    config = network(depth, qk_norm, dual)
    model, inputs = (
        randomised(accelerate(MMDiT(config), twice)),
        given(config, batch, rows, columns, text),
    )
    placed = Placed(model, compute=Compute(checkpointing=twice), blocks=model.joint_blocks)
    said = footprint.memory(config, batch, rows, columns, text, checkpointing=twice)
    took = measured(model, lambda: placed(*inputs))
    # At depth 1 there is a single head, and less is copied to join heads than elsewhere.
    near = 0.10 if depth == 1 else 0.02
    assert said.gradients + said.activations == pytest.approx(took, rel=near)


def test_memory_with_the_other_library(monkeypatch):
    monkeypatch.setattr(products, "onednn_multiplies_faster", lambda: False)
    config, sizes = network(3, True), (4, 8, 8, 20)
    model, inputs = randomised(accelerate(MMDiT(config))), given(config, *sizes)
    said = footprint.memory(config, *sizes)
    took = measured(model, lambda: model(*inputs))
    assert said.gradients + said.activations == pytest.approx(took, rel=0.05)


class Alive(TorchDispatchMode):
    """Bytes of all tensors made while it is open and still alive, and the most they were."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            if (key := storage._cdata) not in given and key not in self.made:
                gone = partial(self.forget, key, storage.nbytes())
                self.made[key] = weakref.ref(storage, gone)
                self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        return out

    def forget(self, key, size, _):
        del self.made[key]
        self.bytes -= size


class FusedNorm(torch.autograd.Function):
    """RMSNorm on CUDA: one operation, which keeps its input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Casts(TorchFunctionMode):
    """CUDA's autocast and its attention, on tensors without numbers."""

    def __init__(self):
        super().__init__()
        self.forward, self.cached = True, []

    def around(self, function):
        def run(*args):
            with self:
                return function(*args)

        return run

    def through(self):
        """The forward pass is; copies of weights live no longer than autograd wants them to."""
        self.forward, self.cached = False, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.linear, F.scaled_dot_product_attention):
            args = [x.bfloat16() for x in args]
            if function is F.linear:
                self.cached += args[1:] if self.forward else []
                return function(*args)
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        if function is F.layer_norm:
            return function(args[0].float(), *args[1:], **kwargs)
        if function is F.rms_norm:
            return FusedNorm.apply(args[0].float(), kwargs["weight"].float())
        if function in (torch.cat, torch.addcmul):
            parts = args[0] if function is torch.cat else args
            widest = (
                torch.float32 if any(x.dtype == torch.float32 for x in parts) else parts[0].dtype
            )
            parts = [x.to(widest) for x in parts]
            return function(parts, **kwargs) if function is torch.cat else function(*parts)
        return function(*args, **kwargs)


# depth, batch, rows, columns, text tokens, norms of q and k, dual attention, width of text
AUTOCAST = [
    (2, 1, 16, 16, 333, False, (), 4096),
    (2, 16, 16, 16, 77, True, (0,), 2048),
    (3, 2, 64, 64, 154, True, (0, 1, 2), 4096),
    (3, 4, 64, 64, 333, False, (), 4096),
    (4, 4, 8, 8, 1024, True, (1,), 512),
    (6, 1, 16, 16, 154, False, (0, 1), 4096),
    (12, 1, 64, 64, 333, True, (), 4096),
    (24, 8, 16, 16, 333, True, tuple(range(13)), 4096),
]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("case", AUTOCAST, ids=str)
def test_memory_of_autocast(case, twice):
    depth, batch, rows, columns, text, qk_norm, dual, context = case
    config = MMDiTConfig(depth, 16, 2, context, 2048, 64, 64, 64, qk_norm, dual)
    with META:
        model, inputs = MMDiT(config), given(config, batch, rows, columns, text)
    casts = Casts()
    for block in model.joint_blocks:  # when they are computed again, nothing else is open
        block.forward = casts.around(block.forward)
    placed = Placed(model, compute=Compute(checkpointing=twice), blocks=model.joint_blocks)
    with Alive() as alive:
        velocity = casts.around(placed)(*inputs)
        casts.through()
        loss = velocity.square().mean()
        del velocity
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    how = {"precision": "bfloat16", "checkpointing": twice}
    said = footprint.memory(config, batch, rows, columns, text, **how)
    held = said.optimizer // 2 + 4 * config.grid**2 * config.width  # weights and positions
    copies = said.parameters - held
    assert copies + said.gradients + said.activations == pytest.approx(alive.most, rel=0.05)


@pytest.fixture
def team_of():
    """Joins a team of so many processes, the others of which are only pretended: what is exchanged
    has the right sizes and no content."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def join(size):
        dist.init_process_group("fake", rank=0, world_size=size, store=fake.FakeStore())

    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [(8, 4, 4, 4, 60), (2, 4, 8, 4, 20), (1, 1, 2, 2, 9)], ids=str)
def test_memory_of_fsdp(team_of, case, precision, twice):
    """PyTorch's own FSDP2, in one process of several. (Without norms, which on a CPU in bfloat16
    keep more than on the GPU that the formula is for.)"""
    processes, *sizes = case
    config, dtype = network(4, context=2048), getattr(torch, precision)
    team_of(processes)
    model = randomised(accelerate(MMDiT(config), twice))
    Placed(model, compute=Compute(checkpointing=twice), blocks=model.joint_blocks)
    types = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in (*model.joint_blocks, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (processes,)), mp_policy=types)
    z, t, context, pooled = given(config, *sizes)
    took = measured(
        model, lambda: model(z.to(dtype), t, context.to(dtype), pooled.to(dtype)).float()
    )
    how = {"precision": precision, "checkpointing": twice, "processes": processes}
    said = footprint.memory(config, *sizes, **how, sharded=True)
    held = said.optimizer // 2 + 4 * config.grid**2 * config.width  # share and positions
    gathered = said.parameters - held
    assert gathered + said.gradients + said.activations == pytest.approx(took, rel=0.05)


def test_memory_of_ddp():
    config, sizes = network(3), (1, 4, 4, 9)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model, inputs = randomised(accelerate(MMDiT(config))), given(config, *sizes)

        def steps():
            # Without copying weights from the first process, whose copies another thread frees.
            bound = DistributedDataParallel(model, init_sync=False)
            step = pairs.training_step(model, lambda: bound(*inputs), torch.zeros(()))
            for _ in range(3):  # the buckets are made anew after the first
                step()

        took = pairs.peak_memory(steps, CPU)
    finally:
        dist.destroy_process_group()
    said = footprint.memory(config, *sizes, processes=4)
    assert said.gradients + said.activations + said.optimizer == pytest.approx(took, rel=0.02)


def test_shares():
    """Weights, moments and averages are divided by FSDP2 and by nothing else; positions never."""
    config, sizes = CONFIGS["sd3.5-large"].mmdit, (1, 64, 64, 333)
    positions, whole = 4 * config.grid**2 * config.width, 4 * costs.parameters(config)
    alone, ddp = (footprint.memory(config, *sizes, processes=n) for n in (1, 8))
    assert (alone.parameters, alone.average) == (whole + positions,) * 2
    assert ddp.optimizer == alone.optimizer == 2 * whole
    assert ddp.gradients - alone.gradients == whole  # buckets
    shared = footprint.memory(config, *sizes, processes=8, sharded=True)
    assert shared.optimizer == whole / 4 and shared.average == whole / 8 + positions
    assert alone.total == sum(vars(alone).values())
    lower = footprint.memory(config, *sizes, precision="bfloat16")
    assert (lower.optimizer, lower.average) == (alone.optimizer, alone.average)
    assert lower.activations < alone.activations
    with pytest.raises(InputError, match="memory in float16: known are"):
        footprint.memory(config, *sizes, precision="float16", sharded=True)


# --- bench --------------------------------------------------------------------------------------


def test_table(capsys):
    sizes = ["--config", "sd3.5-large", "--size", "1024", "--processes", "8", "64"]
    assert bench.main(["table", *sizes, "--precision", "bfloat16", "--checkpointing"]) == 0
    first, head, *rows, here = capsys.readouterr().out.splitlines()
    assert "8.057 billion" in first and "4096 image tokens, 333 of text" in first
    assert head.split()[-2:] == ["8", "64"] and "available" in here
    how = {"precision": "bfloat16", "checkpointing": True, "sharded": True}
    mmdit = CONFIGS["sd3.5-large"].mmdit
    said = [footprint.memory(mmdit, 1, 64, 64, 333, **how, processes=n) for n in (8, 64)]
    for row in rows:
        name, *numbers = row.split()
        assert numbers == [f"{getattr(memory, name) / 1e9:.2f}" for memory in said]
    assert [row.split()[0] for row in rows] == [*vars(said[0]), "total"]
    words = ["--config", "sd3-medium", "--processes", "1", "--precision", "bfloat16"]
    assert bench.main(["table", *words]) == 0  # one process: autocast
    sd3 = CONFIGS["sd3-medium"].mmdit
    alone = footprint.memory(sd3, 1, 16, 16, 154, precision="bfloat16")
    said = capsys.readouterr().out.splitlines()
    assert said[-2].split() == ["total", f"{alone.total / 1e9:.2f}"]
    assert bench.main(["table"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-3:] == ["1", "8", "64"]


def test_growth(capsys, tmp_path):
    """Every point is printed, measured memory is near the formula, the picture is there."""
    out = tmp_path / "growth.png"
    largest = ["--size", "32", "--depth", "2", "--batch", "3", "--repeats", "1", "--threads", "1"]
    assert bench.main(["growth", "--config", "tiny", *largest, "--out", str(out)]) == 0
    table = [line.strip("|") for line in capsys.readouterr().out.splitlines() if line[0] == "|"]
    rows = [[float(cell) for cell in line.split("|")] for line in table[2:]]
    assert [tuple(row[:3]) for row in rows] == [
        (1, 4, 1), (2, 4, 1),
        (1, 1, 1), (1, 9, 1), (1, 16, 1),
        (1, 4, 2), (1, 4, 3),
    ]  # fmt: skip
    assert all(0.9 < row[-1] < 1.1 for row in rows)
    with Image.open(out) as picture:
        assert picture.width > picture.height > 700


def test_points():
    assert growth.points(8) == [1, 2, 4, 6, 8] and growth.points(1) == [1]
    most = growth.Setting(8, 16, 4)
    assert growth.sweep(most, "side", [3]) == [growth.Setting(4, 3, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("forward --depth 2", "unrecognized arguments: --depth 2"),
        ("train --layers 2", "unrecognized arguments: --layers 2"),
        ("memory --batch 2", "unrecognized arguments: --batch 2"),
        ("growth --out x.png --dtype float32", "unrecognized arguments: --dtype float32"),
        ("table --repeats 2", "unrecognized arguments: --repeats 2"),
        ("table --size 100", "--size 100: sizes of sd3-d15 go in steps of 16 up to 3072"),
        ("train --size 4000", "--size 4000: sizes of sd3-d15"),
        ("forward --size 8", "--size 8: sizes of sd3-d15"),
        ("memory --size 100", "--size 100: sizes of sd3-d15"),
        ("growth", "required: --out"),
        ("growth --out x.jpg", "x.jpg: expected a .png in a folder that exists"),
        ("growth --out nowhere/x.png", "expected a .png in a folder that exists"),
        ("paint", "invalid choice: 'paint'"),
        ("", "required: what"),
    ],
)
def test_options_that_do_not_act_are_refused(words, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        bench.main(words.split())
    assert "\n" not in str(error.value)
