"""Many processes train the same network as one, up to rounding; a killed run resumes to the same
bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import process_group as child

from nanosd3.cli import run_main, status_of
from nanosd3.errors import InputError
from nanosd3.machine import device
from nanosd3.machine.distributed import (
    SINGLE_PROCESS,
    Compute,
    ParallelModel,
    ProcessGroup,
    process_group,
)
from nanosd3.machine.signals import Interrupted
from nanosd3.mmdit import MMDiT
from nanosd3.storage import training_state
from nanosd3.storage.files import read_tensors
from nanosd3.training import stages, train_flow

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip
WAYS = [
    {"name": f"{mode}{accumulate}", "mode": mode, "accumulate": accumulate}
    for mode in ("ddp", "fsdp")
    for accumulate in (1, 2)
]
MUON = [
    {"name": "muon-ddp", "mode": "ddp", "optimizer": "muon"},
    {"name": "muon-fsdp", "mode": "fsdp", "optimizer": "muon"},
]


def torchrun(processes: int, folder: Path, scenarios: list[dict]) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "tests/support/process_group.py"),
        *(str(folder), json.dumps(scenarios)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def losses(folder: Path) -> list[float]:
    """Loss and gradient norm before clipping, for every step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "loss" in line for key in ("loss", "grad_norm")]


def validation(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [x for line in lines for x in line.get("validation_ema", [])]


def fresh() -> dict[str, torch.Tensor]:
    """The initial weights of every run."""
    task = stages.Job(None, child.CONFIG, None, torch.device("cpu"), 0)
    return train_flow.start(task, None).state_dict()


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean distance between two sets of weights."""
    return sum((a[key] - b[key]).square().sum().item() for key in b) ** 0.5


def assert_same_run(a: Path, b: Path, rounding: float = 1e-5) -> None:
    """Losses agree up to rounding, averaged weights to within ten times that share of the distance
    trained. (Single weights may not: Adam takes a full step along a gradient that is only rounding
    error, such as that of the keys' biases.)"""
    torch.testing.assert_close(losses(a), losses(b), rtol=rounding, atol=0)
    torch.testing.assert_close(validation(a), validation(b), rtol=0, atol=2e-5)  # five digits
    ours, theirs = (read_tensors(folder / "flow.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    assert distance(ours, theirs) < 10 * rounding * distance(ours, fresh())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, monkeypatch_module) -> Path:
    """The run of a single process, to which the others are compared."""
    folder = tmp_path_factory.mktemp("alone")
    child.train(folder, SINGLE_PROCESS, "run")
    return folder / "run"


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child.loop, "SAVE_EVERY", 2)
        yield patch


def trained_by(processes: int, folder: Path, ways: list[dict] = WAYS) -> Path:
    done = torchrun(processes, folder, ways)
    assert done.returncode == 0, done.stderr
    return folder


STOPPED = {"name": "stopped", "mode": "fsdp", "accumulate": 2}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Every way, and two runs that were stopped and resumed: by SIGKILL of one of two processes
    (killed/fsdp1; alone/fsdp1 is as the signal left it) and by SIGTERM (stopped). Processes are
    started three times; each start takes some ten seconds."""
    folder = tmp_path_factory.mktemp("two")
    first = next(way for way in WAYS if way["name"] == "fsdp1")
    killed(folder / "killed", first)
    shutil.copytree(folder / "killed" / "fsdp1", folder / "alone" / "fsdp1")
    shutil.copytree(folder / "killed" / "fsdp1", folder / "resumed")
    resumed = {**first, "name": "resumed"}
    stopped = torchrun(2, folder, [resumed, {**STOPPED, "stop_at": 2, "stop_by": "SIGTERM"}])
    assert stopped.returncode == 0 and "stopped after step 3 of 6" in stopped.stderr
    assert (folder / "stopped" / "state-00000003" / "state.json").exists()
    return trained_by(2, folder, [*WAYS, *MUON, STOPPED])


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return trained_by(4, tmp_path_factory.mktemp("four"), [*WAYS, *MUON])


def test_synthetic_data_exercises_everything(alone):
    """Both buckets are drawn, gradients are clipped and the network learns."""
    data = child.SyntheticData()
    drawn = [data.draw(8, child.rng(0, "flow", step)) for step in range(child.STEPS)]
    assert {child.SIZES[int(index[0])] for index in drawn} == {(8, 8), (4, 10)}
    assert max(losses(alone)[1::2]) > child.loop.CLIP_NORM
    held_out, times = validation(alone), train_flow.VALIDATION_TIMES
    assert sum(held_out[-times:]) < sum(held_out[:times])


@pytest.mark.parametrize("processes", ["two", pytest.param("four", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["name"])
def test_many_processes_train_what_one_trains(alone, request, processes, way):
    assert_same_run(request.getfixturevalue(processes) / way["name"], alone)


@pytest.fixture(scope="module")
def muon_alone(tmp_path_factory, monkeypatch_module) -> Path:
    """The same training with Muon, in a single process."""
    folder = tmp_path_factory.mktemp("muon")
    child.train(folder, SINGLE_PROCESS, "run", optimizer="muon")
    return folder / "run"


@pytest.mark.parametrize("processes", ["two", pytest.param("four", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", MUON, ids=lambda way: way["name"])
def test_muon_sees_whole_matrices_however_they_are_sharded(muon_alone, request, processes, way):
    """The halves or quarters of a matrix, each made orthogonal by itself, would be another step."""
    assert_same_run(request.getfixturevalue(processes) / way["name"], muon_alone)


def test_muon_is_another_training_and_resumes_to_the_same_bytes(alone, muon_alone, tmp_path):
    assert losses(muon_alone) != losses(alone)
    with pytest.raises(Interrupted):
        child.train(tmp_path, SINGLE_PROCESS, "run", 3, "SIGTERM", optimizer="muon")
    child.train(tmp_path, SINGLE_PROCESS, "run", optimizer="muon")
    for file in ("flow.safetensors", "log.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (muon_alone / file).read_bytes(), file


@pytest.mark.parametrize(
    "compute",
    [
        {"accumulate": 2},
        {"accumulate": 8},
        {"checkpointing": True},
        {"accumulate": 2, "checkpointing": True},
    ],
    ids=str,
)
def test_accumulation_and_checkpointing_change_nothing(alone, tmp_path, compute):
    child.train(tmp_path, SINGLE_PROCESS, "run", **compute)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_compiled(alone, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("the compiler needs g++")
    torch.compiler.reset()
    child.train(tmp_path, SINGLE_PROCESS, "run", compiled=True)
    assert_same_run(tmp_path / "run", alone, 1e-4)


def test_bfloat16_is_close_and_weights_stay_float32(alone, tmp_path):
    child.train(tmp_path, SINGLE_PROCESS, "run", precision="bfloat16")
    ours = losses(tmp_path / "run")
    assert ours != losses(alone)
    torch.testing.assert_close(ours, losses(alone), rtol=2e-2, atol=0)
    weights = read_tensors(tmp_path / "run" / "flow.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    last = weights["joint_blocks.1.x_block.mlp.fc1.weight"]
    assert not last.equal(last.bfloat16().float())  # not representable in bfloat16


def killed(folder: Path, way: dict) -> None:
    """Train until SIGKILL of one of two processes."""
    assert torchrun(2, folder, [{**way, "stop_at": 3, "stop_by": "SIGKILL"}]).returncode != 0
    assert (folder / way["name"] / "state-00000002" / "state.json").exists()


def assert_same_bytes(a: Path, b: Path) -> None:
    for file in ("flow.safetensors", "log.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def test_killed_and_resumed_to_the_same_bytes(two):
    """SIGKILL of one of two processes; two processes resume from the saved state, or one does."""
    assert_same_bytes(two / "resumed", two / "fsdp1")
    child.train(two / "alone", SINGLE_PROCESS, "fsdp1")
    assert_same_run(two / "alone" / "fsdp1", two / "fsdp1")


def test_a_signal_to_one_stops_all_with_everything_saved(two):
    """SIGTERM reaches one of two processes during a step; both stop after that step."""
    assert_same_bytes(two / "stopped", two / "fsdp2")


@pytest.mark.slow
def test_killed_and_resumed_with_ddp(two, tmp_path):
    way = WAYS[0]
    killed(tmp_path / "killed", way)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    trained_by(2, tmp_path / "killed", [way])
    assert_same_bytes(tmp_path / "killed" / "ddp1", two / "ddp1")
    child.train(tmp_path / "alone", SINGLE_PROCESS, "ddp1")
    assert_same_run(tmp_path / "alone" / "ddp1", two / "ddp1")


@pytest.mark.slow
def test_saved_by_four_loaded_by_two_and_by_one(four, tmp_path):
    way = {"name": "fsdp1", "mode": "fsdp"}
    scenario = {**way, "stop_at": 4, "stop_by": "SIGKILL"}
    assert torchrun(4, tmp_path / "4", [scenario]).returncode != 0
    state = tmp_path / "4" / "fsdp1" / "state-00000004"
    assert len(list(state.glob("*.safetensors"))) == 4
    for name in ("2", "1"):
        shutil.copytree(tmp_path / "4", tmp_path / name)
    so_far = training_state.averages(tmp_path / "4" / "fsdp1", "flow")  # unsharded, as for export
    end = read_tensors(four / "fsdp1" / "flow.safetensors")
    assert distance(end, so_far) < distance(fresh(), so_far)
    trained_by(2, tmp_path / "2", [way])
    child.train(tmp_path / "1", SINGLE_PROCESS, "fsdp1")
    for name in ("2", "1"):
        assert_same_run(tmp_path / name / "fsdp1", four / "fsdp1")


# --- in this process ------------------------------------------------------------------------------


def test_microbatches_cover_the_batch_once():
    for size in (1, 2, 3):
        for accumulate in (1, 2, 4):
            shares = [ProcessGroup(rank, size).microbatches(24, accumulate) for rank in range(size)]
            rows = [i for share in shares for part in share for i in part]
            assert rows == list(range(24))
    with pytest.raises(InputError, match="a batch of 10 cannot be divided among 3 processes x 2"):
        ProcessGroup(0, 3).microbatches(10, 2)


def test_torchrun_and_parallel_require_each_other(monkeypatch):
    with (
        pytest.raises(InputError, match="--parallel fsdp needs torchrun: start with `torchrun"),
        process_group("fsdp", torch.device("cpu")),
    ):
        pass
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(InputError, match="torchrun started 2 processes; add --parallel"),
        process_group(None, torch.device("cpu")),
    ):
        pass


def test_checkpointing_saves_less():
    """Less is saved for the backward pass, and the gradients are the same to the bit."""
    sizes, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = MMDiT(child.CONFIG.mmdit)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        parallel = ParallelModel(
            model, SINGLE_PROCESS, Compute(checkpointing=checkpointing), model.joint_blocks
        )
        saved = 0

        def pack(x):
            nonlocal saved
            saved += x.numel()
            return x

        z, t = torch.randn(4, 4, 8, 8), torch.rand(4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = parallel(z, t, torch.randn(4, 24, 48), torch.randn(4, 32)).square().mean()
        loss.backward()
        sizes.append(saved)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert sizes[1] < 0.5 * sizes[0]
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "left",
    [{"RANK": ""}, {"RANK": "1"}, {"RANK": "x"}, {"LOCAL_RANK": ""}, {"LOCAL_RANK": "0"},
     {"WORLD_SIZE": ""}, {"WORLD_SIZE": "4"}, {"LOCAL_WORLD_SIZE": ""}, {"LOCAL_WORLD_SIZE": "4"},
     {"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1", "WORLD_SIZE": "2"},
     {**TORCHRUN, "RANK": ""}, {**TORCHRUN, "RANK": "1", "MASTER_ADDR": ""},
     {**TORCHRUN, "RANK": "-1"}],
    ids=str,
)  # fmt: skip
def test_what_is_left_in_the_environment_does_no_harm(monkeypatch, capsys, left):
    """Without torchrun, or with half of its variables, a process is alone, and prints."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert run_main(lambda: print("heard")) == 0 and capsys.readouterr().out == "heard\n"
    device.set_up()
    assert f"{min(device.cores(), 8)} threads" in capsys.readouterr().out
    with process_group(None, torch.device("cpu")) as group:
        assert group.size == 1 and group.is_main


def test_only_the_main_process_prints(monkeypatch, capsys):
    for name, value in (TORCHRUN | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    assert status_of(lambda: print("not heard")) == 0
    assert capsys.readouterr().out == ""
