"""However a run is stopped, rerunning the command resumes it and ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from tqdm import tqdm

import train_mnist
from nanosd3.cli import run_main
from nanosd3.config_types import Recipe
from nanosd3.errors import InputError
from nanosd3.machine import signals
from nanosd3.machine.distributed import Compute, ParallelModel
from nanosd3.storage import training_state
from nanosd3.storage.run import Run
from nanosd3.training import ema, loop, stages

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(steps=8, batch=4, lr=1e-2, warmup=2, weight_decay=0.0)
CHILD = """
import sys
import pytest
import torch
import train_mnist
from nanosd3 import cli
from nanosd3.training import loop
from support.killer import counted, events
from support.short_runs import observe_less
torch.set_num_threads(1)
observe_less(pytest.MonkeyPatch())
loop.SAVE_EVERY = 2
def rng(*name):  # count steps, but not the rows of their noise
    return (step if len(name) == 3 else original)(*name)

original, step = loop.rng, counted(loop.rng)
loop.rng = rng
code = cli.run_main(lambda: train_mnist.main(["--config", "tiny", "--out", sys.argv[1]]))
print("events", events())
sys.exit(code)
"""


def train_until(folder: Path, event: int) -> subprocess.CompletedProcess:
    """Train in a process that kills itself at the event of this number: the start of a step, or
    just before a file is flushed, renamed or deleted."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", CHILD, str(folder), str(event)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def assert_same_end(folder: Path, other: Path) -> None:
    for name in ("judge", "autoencoder", "clip", "t5", "text", "flow"):
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file
    assert (folder / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}


def kill_and_finish(folder: Path, kills: int, seed: int) -> int:
    """Kill a run repeatedly, each time after a random number of events, then let it finish; return
    how often it was killed."""
    draw = random.Random(seed)
    for count in range(kills):
        done = train_until(folder, draw.randint(2, 150))
        if done.returncode == 0:
            return count
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = train_until(folder, 10**9)
    assert done.returncode == 0, done.stderr
    return kills


def test_killed_and_finished(tiny_run, tmp_path):
    assert kill_and_finish(tmp_path / "run", 1, seed=0) == 1
    assert_same_end(tmp_path / "run", tiny_run)


@pytest.mark.slow
def test_killed_at_thirty_points(tiny_run, tmp_path):
    killed, attempt = 0, 0
    while killed < 30:
        folder = tmp_path / f"run{attempt}"
        killed += kill_and_finish(folder, 30 - killed, seed=attempt + 1)
        assert_same_end(folder, tiny_run)
        attempt += 1


def test_sigterm_saves_and_exits_with_success(tiny_run, tmp_path, monkeypatch, capsys):
    command = ["--config", "tiny", "--out", str(tmp_path / "run")]
    original = loop.rng

    def rng(*name):
        if name[1:] == ("flow", 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*name)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "rng", rng)
        assert run_main(lambda: train_mnist.main(command)) == 0
    assert "flow: stopped after step 6 of 12" in capsys.readouterr().err
    assert run_main(lambda: train_mnist.main(command)) == 0
    assert_same_end(tmp_path / "run", tiny_run)


# --- a single small stage ------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))


def fit(folder: Path, module: nn.Module, spoil=lambda step, x: x, watch=None) -> Run:
    """Train on random points; `spoil` may modify the input of a step."""
    run = Run.open(folder, {"config": {"name": "x"}})

    def loss_of(step_rng):
        _, _, step = step_rng.name
        x = spoil(step, step_rng.take(torch.randn(RECIPE.batch, 3, generator=step_rng.generator())))
        return module(x).square().mean(1), {}

    average = ema.make_ema(module)
    loop.fit(run, "x", module, loss_of, RECIPE, 0, average, 0.9, watch)
    return run


def stop_at(step):
    def watch(now):
        if now == step:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("file", ["*.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "missing"])
def test_damaged_state_is_named_and_the_one_before_is_used(
    tmp_path, monkeypatch, capsys, damage, file
):
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    whole, broken = net(), net()
    fit(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", broken, watch=stop_at(6))
    newest, before = training_state.saved(tmp_path / "run")
    assert (newest.name, before.name) == ("state-00000006", "state-00000004")
    (path,) = newest.glob(file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-9], "a bit": content}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    fit(tmp_path / "run", broken)
    said = capsys.readouterr().out
    assert newest.name in said and path.name in said and f"the one before, {before.name}" in said
    assert "resuming from step 4" in said
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(),
                                                 strict=True))  # fmt: skip


def test_all_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, net(), watch=stop_at(6))
    for path in training_state.saved(tmp_path):
        (path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state-00000006: damaged .*delete it to repeat"):
        fit(tmp_path, net())


def test_states_left_by_a_finished_stage_are_deleted(tmp_path, monkeypatch, capsys):
    """A stage was killed just before deleting its states, whose steps may be later."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    for step in (90, 100):
        training_state.save_state(tmp_path / "run", "before", step, {"x": torch.ones(3)})
    (tmp_path / "run" / "run.json").write_text('{"config": {"name": "x"}, "stages": {}}')
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", net(), watch=stop_at(6))
    names = [path.name for path in training_state.saved(tmp_path / "run")]
    assert names == ["state-00000006", "state-00000004"]
    fit(tmp_path / "run", net())
    assert "resuming from step 6" in capsys.readouterr().out


def test_steps_that_are_not_finite_are_skipped(tmp_path, capsys):
    """Two in a row; weights and average stay unchanged."""

    def spoil(step, x):
        return x * torch.inf if step in (3, 4) else x

    seen = []
    module = net()
    run = fit(tmp_path, module, spoil, lambda _: seen.append(module[0].weight.clone()))
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[4])
    assert not torch.equal(seen[4], seen[5])
    assert [e["step"] for e in run.read_log("x")] == [0, 1, 2, 5, 6, 7]
    assert [e["skipped"] for e in run.read_log() if "skipped" in e] == [1, 2]
    assert "x: 2 steps skipped" in capsys.readouterr().out


class DivideByZero(nn.Module):
    def forward(self, x):
        return x / 0


def test_three_in_a_row_stop_the_run_and_are_located(tmp_path):
    module = net()
    with pytest.raises(InputError, match="steps 2 to 4 are not finite, first in the output of 0;"):
        fit(tmp_path / "a", module, lambda step, x: x * torch.nan if step >= 2 else x)
    assert all(p.isfinite().all() for p in module.parameters())
    module = nn.Sequential(nn.Linear(3, 3), DivideByZero(), nn.Linear(3, 1))
    with pytest.raises(InputError, match="steps 0 to 2 are not finite, first in the output of 1;"):
        fit(tmp_path / "b", module)
    module = net()
    module[2].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"not finite, the weight 2\.weight;"):
        fit(tmp_path / "c", module)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_too_short_for_three_in_a_row(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(sys.modules[__name__], "RECIPE", replace(RECIPE, steps=steps))
    with pytest.raises(InputError, match=f"steps 0 to {steps - 1} are not finite, first in the"):
        fit(tmp_path, net(), lambda step, x: x * torch.nan)


def test_not_finite_in_one_microbatch(tmp_path):
    """All of them run again, one at a time: every rank has to gather a sharded network as often."""
    seen = []

    def loss_of(step_rng):
        seen.append((step_rng.name[-1], [*step_rng.rows]))
        x = torch.ones(len(step_rng.rows), 3)
        return module(x / (step_rng.rows[0] - 2) if bad else x).square().mean(1), {}

    for bad, where in ((True, "first in the output of 0"), (False, r"the weight 2\.weight")):
        module = net()
        if not bad:
            module[2].weight.data[0, 0] = torch.nan
        parallel = ParallelModel(module, compute=Compute(accumulate=4))
        seen.clear()
        run = Run.open(tmp_path / str(bad), {"config": {"name": "x"}})
        with pytest.raises(InputError, match=f"steps 0 to 2 are not finite, {where};"):
            loop.fit(run, "x", module, loss_of, RECIPE, 0, parallel=parallel)
        assert seen[-4:] == [(2, [row]) for row in range(4)] and len(seen) == 16


def test_no_loss_in_the_log(tmp_path):
    job = stages.Job(fit(tmp_path, net()), None, None, torch.device("cpu"), 0)
    assert stages.last_loss(job, "x") > 0
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(InputError, match=r"log.jsonl: has no loss of x; start over with --fresh$"):
        stages.last_loss(job, "x")


def test_counting_resumes_after_an_interruption(tmp_path):
    """Bad steps before and after an interruption are counted together."""
    bad = {2, 3, 4}

    def spoil(step, x):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return x * torch.nan if step in bad else x

    with pytest.raises(signals.Interrupted):
        fit(tmp_path, net(), spoil)
    with pytest.raises(InputError, match="steps 2 to 4 are not finite"):
        fit(tmp_path, net(), lambda step, x: x * torch.nan)


def test_a_restart_in_the_same_process(tmp_path):
    """Gradients that are left, such as those of an interrupted step, are not part of the first;
    and the progress bar of the interrupted training makes room."""
    whole, module = net(), net()
    fit(tmp_path / "whole", whole)
    module(torch.ones(1, 3)).sum().backward()
    with pytest.raises(KeyboardInterrupt) as kept:
        fit(tmp_path / "run", module, watch=stop_at(2))
    assert kept and "x" not in [bar.desc for bar in tqdm._instances]
    module(torch.ones(1, 3)).sum().backward()
    module.load_state_dict(net().state_dict())
    fit(tmp_path / "run", module)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(),
                                                 strict=True))  # fmt: skip


def test_log_of_a_killed_run_is_readable(tmp_path):
    run = fit(tmp_path, net())
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": "x", "st')
    assert len(run.read_log("x")) == RECIPE.steps
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["step"] == 0
