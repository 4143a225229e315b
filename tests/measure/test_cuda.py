"""`bench cuda` on a machine without a GPU: every check at toy size, the budget, refused options."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nanosd3
from nanosd3 import bench
from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.measure.cuda import command, correct, sampling, training, worker
from nanosd3.measure.cuda.result import (
    Check,
    Row,
    Setting,
    Unavailable,
    at_least,
    at_most,
    relative_error,
)
from nanosd3.measure.random_models import random_inputs, random_model

CPU = torch.device("cpu")
ROOT = Path(nanosd3.__file__).parent.parent
SMALL = ["cuda", "--device", "cpu", "--config", "tiny", "--threads", "1"]


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory):
    """Results of all checks at toy size, but for the main job, which is a run like `tiny_run`."""
    out = tmp_path_factory.mktemp("cuda") / "cuda.json"
    names = [check.name for check in command.CHECKS if not check.name.startswith("main-job")]
    options = ["--out", str(out), "--budget", "9999", "--run", str(tiny_run), "--only", *names]
    patient = [replace(check, seconds=2000) for check in command.CHECKS]  # on a busy machine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "CHECKS", patient)
        status = bench.main([*SMALL, *options])
    content = json.loads(out.read_text())
    assert status == 0, content
    return out, {entry["name"]: entry for entry in content["checks"]}


def test_every_check_passes(results):
    out, entries = results
    assert len(entries) == len(command.CHECKS) - 2
    for name, entry in entries.items():
        assert entry["state"] == "passed", (name, entry["reason"], out.with_suffix(".log"))
        assert entry["rows"] and entry["seconds"] > 0
        assert all(isinstance(row["value"], float | int) for row in entry["rows"])


def test_correctness_has_limits_and_small_configs_have_no_goals(results):
    _, entries = results
    for check in correct.CORRECTNESS:
        assert all(row["aim"] for row in entries[check.name]["rows"])
    assert not any(row["goal"] for entry in entries.values() for row in entry["rows"])


def test_main_job(tiny_run, tmp_path, monkeypatch):
    """The command it starts, and the rows it reads from the run."""
    started = []

    def finished(command, env, check):
        started.append((command, env))
        shutil.copytree(tiny_run, tmp_path / "run")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(training.subprocess, "run", finished)
    setting = Setting(CPU, tmp_path, "tiny")
    rows = {row.what: row for row in training.train_mnist(setting, "bfloat16", tmp_path / "run")}
    ((words, environment),) = started
    assert words[:2] == [sys.executable, str(ROOT / "train_mnist.py")]
    assert words[2:] == [*("--out", str(tmp_path / "run"), "--fresh", "--no-turbo"),
                         *("--config", "tiny"),
                         *("--threads", "1")]  # fmt: skip
    assert environment["PYTHONPATH"] == str(ROOT) and environment["CUDA_VISIBLE_DEVICES"] == ""
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert rows["float32: flow"].value == metrics["stages"]["flow"]["seconds"]
    assert rows["float32: prompt accuracy"].value == metrics["prompt_accuracy"]
    distance = rows["float32: Frechet distance, relative to real images"]
    assert distance.value == metrics["frechet_ratio_to_real"]
    monkeypatch.setattr(
        training.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3)
    )
    with pytest.raises(RuntimeError, match="failed with exit status 3"):
        list(training.main_job(setting))
    with pytest.raises(Unavailable, match="scenes are measured otherwise"):
        list(training.main_job(Setting(CPU, tmp_path, "tiny-scenes")))


def test_the_commit_is_recorded(results):
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    content = json.loads(results[0].read_text())
    if (ROOT / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        assert commit[:7] in content["commit"]
    else:
        assert content["commit"] is None


def test_profile_is_written(results):
    out, entries = results
    assert "aten::" in out.with_name("cuda-profile.txt").read_text()
    assert sum(row["value"] for row in entries["profile"]["rows"]) == pytest.approx(1)


def test_budget_stops_a_check(tmp_path, capsys):
    """A stopped check is reported, the rest is skipped, and the results file is complete."""
    out = tmp_path / "cuda.json"
    options = ["--out", str(out), "--budget", "6", "--only", "main-job", "picture"]
    assert bench.main([*SMALL, *options]) == 0
    job, picture = json.loads(out.read_text())["checks"]
    assert (job["state"], job["reason"]) == ("skipped", "stopped after 6 s: budget used up")
    assert (picture["state"], picture["reason"]) == ("skipped", "budget used up")
    line = "| main-job | skipped: stopped after 6 s: budget used up | | |"
    assert line in capsys.readouterr().out


def exits(setting):
    """A check that kills its process."""
    os._exit(7)


def test_a_check_that_kills_its_process_failed_whatever_the_budget(tmp_path):
    """Only running out of time is excused by the budget."""
    check = Check("exits", exits, 1000)
    setting = Setting(CPU, tmp_path, "tiny")
    (result,) = command.run([check], setting, 60, tmp_path / "cuda.json", 1)
    assert result["state"] == "failed"
    assert result["reason"] == "the worker process exited with status 7"


def test_step_timer_counts_the_images_of_a_step(monkeypatch):
    """Five images, computed two at a time: steps across two parts and of the last part, which is
    smaller, are not timed."""
    clock = iter([0, 1, 3, 5, 100, 101, 103, 105, 200, 200.1, 200.2, 200.3])
    monkeypatch.setattr(sampling.time, "perf_counter", lambda: next(clock))
    timer = sampling.StepTimer(Setting(CPU, None, "tiny"))
    for images in (2, 2, 1):
        for step in range(4):
            timer(step, torch.zeros(()), torch.zeros(images, 1), torch.zeros(()))
    assert timer.images == 2
    assert timer.step_seconds() == 2


def test_random_t5_is_well_conditioned():
    """Queries are small enough for T5, which does not divide its logits by sqrt(head_dim):
    rounding to bfloat16 changes little at realistic widths."""
    t5 = replace(CONFIGS["tiny"].text.t5, width=768, heads=12, head_dim=64, hidden=1024, layers=4)
    config = replace(CONFIGS["tiny"], text=replace(CONFIGS["tiny"].text, t5=t5))
    model = random_model(config, "t5", CPU, torch.float32)
    inputs = random_inputs(config, "t5", 32, 2, torch.zeros(()))
    exact = correct.output(model, "t5", inputs, CPU, torch.float32)
    rounded = correct.output(model, "t5", inputs, CPU, torch.bfloat16)
    assert relative_error(rounded, exact) < 0.03


def test_random_models_are_never_larger_than_their_type(monkeypatch):
    """Weights are created in the type asked for, not converted afterwards: at 8B parameters the
    float32 copy would be the peak of the whole measurement."""
    made = []
    to_empty = torch.nn.Module.to_empty

    def watched(module, **options):
        made.extend(p.dtype for p in module.parameters())
        return to_empty(module, **options)

    monkeypatch.setattr(torch.nn.Module, "to_empty", watched)
    random_model(CONFIGS["tiny"], "mmdit", CPU, torch.bfloat16)
    assert set(made) == {torch.bfloat16}


def test_outcomes():
    """How rows, exceptions and missed limits are counted."""
    sent = []

    class Connection:
        send = sent.append

    def ended(rows):
        sent.clear()
        return worker.outcome(Check("x", rows, 1), Setting(CPU, None, "tiny"), Connection)

    assert ended(lambda s: iter([at_most("a", 1, 2), Row("b", 3)])) == ("passed", "")
    assert [message[1].what for message in sent] == ["a", "b"]
    assert ended(lambda s: iter([at_most("a", 3, 2), at_least("b", 1, 2)])) == (
        "wrong", "wrong answers: 2",
    )  # fmt: skip
    assert ended(lambda s: iter([at_most("a", float("nan"), 2)]))[0] == "wrong"
    assert ended(lambda s: iter([Row("a", 3, "s", "<= 2", False, goal=True)]))[0] == "missed"
    state, reason = ended(lambda s: [1 / 0])
    assert state == "failed" and reason == "ZeroDivisionError: division by zero"

    def no_memory(setting):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert ended(no_memory) == ("skipped", "out of memory")


def test_results_table():
    rows = [
        vars(at_most("a", 0.5, 1)),
        vars(at_least("b", 12345.6, 1e6, "1/s")),
    ]
    entries = [
        {"name": "x", "rows": rows, "state": "missed", "reason": ""},
        {"name": "y", "rows": [], "state": "skipped", "reason": "no diffusers"},
    ]
    assert command.results_table(entries).splitlines()[2:] == [
        "| x | a | 0.5 | <= 1 met |",
        "| x | b | 12,346 1/s | >= 1e+06 **missed** |",
        "| y | skipped: no diffusers | | |",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(InputError, match="no CUDA device is available; try --device cpu"):
        bench.main(["cuda"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device cpu", "--device cpu needs a small --config"),
        ("--device cpu --config sd3-medium", "invalid choice: 'sd3-medium'"),
        ("--device cpu --config tiny --only paint", "invalid choice: 'paint'"),
        (
            "--device cpu --config tiny --out cuda.txt",
            "cuda.txt: expected a .json file in an existing folder",
        ),
        ("--device cpu --config tiny --out nowhere/x.json", "expected a .json file in an existing"),
        ("--device cpu --config tiny --run nowhere", "nowhere: expected a finished run"),
        ("--device cpu --config tiny --budget 0", "must be at least 1"),
    ],
)
def test_refused_options(words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        bench.main(["cuda", *words.split()])
