"""Many processes train what one trains: the same losses and weights but for rounding, and after a
kill the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import team_child
import torch

from nanosd3 import stages, states
from nanosd3.checkpoint import read_tensors
from nanosd3.parallel import ALONE, Compute, Placed, Team, team
from nanosd3.runtime import InputError

ROOT = Path(__file__).parent.parent
WAYS = [
    {"name": f"{mode}{accumulate}", "mode": mode, "accumulate": accumulate}
    for mode in ("ddp", "fsdp")
    for accumulate in (1, 2)
]


def torchrun(processes: int, folder: Path, scenarios: list[dict]) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
               "--standalone", "tests/team_child.py", str(folder),
               json.dumps(scenarios)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False, timeout=200)  # fmt: skip


def losses(folder: Path) -> list[float]:
    """The loss and the gradient's norm, before clipping, of every step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "loss" in line for key in ("loss", "grad_norm")]


def validation(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [x for line in lines for x in line.get("validation_ema", [])]


def fresh() -> dict[str, torch.Tensor]:
    """The weights that every run begins with."""
    job = stages.Job(None, team_child.CONFIG, None, torch.device("cpu"), 0)
    return stages.start(job, None).state_dict()


def length(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Of the way from some weights to others."""
    return sum((tensors[k] - others[k]).square().sum().item() for k in others) ** 0.5


def alike(a: Path, b: Path, rounding: float = 1e-5) -> None:
    """Losses agree to rounding, and the averaged weights to ten times that share of the way they
    have gone. (Not each to rounding: Adam makes a full step of a gradient that is zero but for
    rounding, such as that of the keys' biases.)"""
    torch.testing.assert_close(losses(a), losses(b), rtol=rounding, atol=0)
    torch.testing.assert_close(validation(a), validation(b), rtol=0, atol=2e-5)  # five digits
    ours, theirs = (read_tensors(folder / "flow.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    assert length(ours, theirs) < 10 * rounding * length(ours, fresh())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, monkeypatch_module) -> Path:
    """The run of one process, which the others are held against."""
    folder = tmp_path_factory.mktemp("alone")
    team_child.train(folder, ALONE, "run")
    return folder / "run"


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team_child.loop, "SAVE_EVERY", 2)
        yield patch


def trained_by(processes: int, folder: Path, ways: list[dict] = WAYS) -> Path:
    done = torchrun(processes, folder, ways)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return trained_by(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return trained_by(4, tmp_path_factory.mktemp("four"))


def test_made_up_data_is_of_two_sizes(alone):
    """Both buckets are drawn, so that what follows is true of them."""
    made = team_child.Made()
    drawn = [made.draw(8, team_child.rng(0, "flow", step)) for step in range(team_child.STEPS)]
    assert {team_child.SIZES[int(index[0])] for index in drawn} == {(8, 8), (4, 10)}
    assert max(losses(alone)[1::2]) > team_child.loop.CLIP_NORM  # and gradients are clipped
    held_out = validation(alone)
    assert sum(held_out[-8:]) < sum(held_out[:8])


@pytest.mark.parametrize("processes", ["two", "four"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["name"])
def test_many_processes_train_what_one_trains(alone, request, processes, way):
    alike(request.getfixturevalue(processes) / way["name"], alone)


@pytest.mark.parametrize("how", [
    {"accumulate": 2}, {"accumulate": 8}, {"checkpointing": True},
    {"accumulate": 2, "checkpointing": True},
], ids=str)  # fmt: skip
def test_how_it_is_computed_changes_nothing(alone, tmp_path, how):
    team_child.train(tmp_path, ALONE, "run", **how)
    alike(tmp_path / "run", alone)


@pytest.mark.slow
def test_compiled(alone, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("the compiler needs g++")
    torch.compiler.reset()
    team_child.train(tmp_path, ALONE, "run", compiled=True)
    alike(tmp_path / "run", alone, 1e-4)


def test_bfloat16_is_near_and_weights_stay_float32(alone, tmp_path):
    team_child.train(tmp_path, ALONE, "run", precision="bfloat16")
    ours = losses(tmp_path / "run")
    assert ours != losses(alone)
    torch.testing.assert_close(ours, losses(alone), rtol=2e-2, atol=0)
    weights = read_tensors(tmp_path / "run" / "flow.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    last = weights["joint_blocks.1.x_block.mlp.fc1.weight"]
    assert not last.equal(last.bfloat16().float())  # finer than bfloat16 can say


def test_killed_and_continued_to_the_same_bytes(two, tmp_path):
    """SIGKILL of one of two processes. What they saved, one goes on with in its own way."""
    ways = [way for way in WAYS if way["accumulate"] == 1]
    for way in ways:
        assert (
            torchrun(
                2, tmp_path / "killed", [{**way, "stop_at": 3, "stop_by": "SIGKILL"}]
            ).returncode
            != 0
        )
        assert (tmp_path / "killed" / way["name"] / "state-00000002" / "state.json").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    trained_by(2, tmp_path / "killed", ways)
    for way in ways:
        for file in ("flow.safetensors", "log.jsonl"):
            ours, theirs = (folder / way["name"] / file for folder in (tmp_path / "killed", two))
            assert ours.read_bytes() == theirs.read_bytes(), (way, file)
        team_child.train(tmp_path / "other", ALONE, way["name"])
        alike(tmp_path / "other" / way["name"], two / way["name"])


def test_a_signal_to_one_stops_all_with_everything_saved(two, tmp_path):
    """SIGTERM reaches one of two processes in the middle of a step; both stop after it."""
    way = {"name": "fsdp2", "mode": "fsdp", "accumulate": 2}
    stopped = torchrun(2, tmp_path / "run", [{**way, "stop_at": 2, "stop_by": "SIGTERM"}])
    assert stopped.returncode == 0 and "stopped after step 3 of 6" in stopped.stderr
    assert (tmp_path / "run" / "fsdp2" / "state-00000003" / "state.json").exists()
    trained_by(2, tmp_path / "run", [way])
    for file in ("flow.safetensors", "log.jsonl"):
        ours, theirs = (folder / "fsdp2" / file for folder in (tmp_path / "run", two))
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_saved_by_four_loaded_by_two_and_by_one(four, tmp_path):
    way = {"name": "fsdp1", "mode": "fsdp"}
    assert (
        torchrun(4, tmp_path / "4", [{**way, "stop_at": 4, "stop_by": "SIGKILL"}]).returncode != 0
    )
    state = tmp_path / "4" / "fsdp1" / "state-00000004"
    assert len(list(state.glob("*.safetensors"))) == 4
    for name in ("2", "1"):
        shutil.copytree(tmp_path / "4", tmp_path / name)
    so_far = states.averages(tmp_path / "4" / "fsdp1", "flow")  # whole, as for export
    end = read_tensors(four / "fsdp1" / "flow.safetensors")
    assert length(end, so_far) < length(fresh(), so_far)
    trained_by(2, tmp_path / "2", [way])
    team_child.train(tmp_path / "1", ALONE, "fsdp1")
    for name in ("2", "1"):
        alike(tmp_path / name / "fsdp1", four / "fsdp1")


# --- without other processes ----------------------------------------------------------------------


def test_shares_cover_the_batch_once():
    for size in (1, 2, 3):
        for accumulate in (1, 2, 4):
            shares = [Team(rank, size).shares(24, accumulate) for rank in range(size)]
            rows = [i for share in shares for part in share for i in part]
            assert rows == list(range(24))
    with pytest.raises(InputError, match="a batch of 10 cannot be divided among 3 processes x 2"):
        Team(0, 3).shares(10, 2)


def test_torchrun_and_parallel_belong_together(monkeypatch):
    with (
        pytest.raises(InputError, match="--parallel fsdp needs processes: start with `torchrun"),
        team("fsdp", torch.device("cpu")),
    ):
        pass
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match="has started 2 processes; say --parallel"),
        team(None, torch.device("cpu")),
    ):
        pass


def test_checkpointing_keeps_less():
    """Fewer bytes wait for the gradient, and the gradients are the same to the bit."""
    sizes, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = team_child.stages.MMDiT(team_child.CONFIG.mmdit)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        placed = Placed(model, ALONE, Compute(checkpointing=checkpointing), model.joint_blocks)
        kept = 0

        def pack(x):
            nonlocal kept
            kept += x.numel()
            return x

        z, t = torch.randn(4, 4, 8, 8), torch.rand(4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = placed(z, t, torch.randn(4, 24, 48), torch.randn(4, 32)).square().mean()
        loss.backward()
        sizes.append(kept)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert sizes[1] < 0.5 * sizes[0]
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
