"""The run folder: its lock, partial files, --fresh; and errors of the command line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_mnist
from nanosd3.cli import run_main
from nanosd3.errors import InputError
from nanosd3.storage import training_state
from nanosd3.storage.run import Run

ROOT = Path(__file__).parents[2]


def test_partial_files_of_killed_processes_are_deleted(tmp_path):
    run = Run.open(tmp_path / "run", {"config": {"name": "x"}})
    mine = {"run.json", "notes.txt", ".notes.tmp", ".notes.txt.1.tmp"}
    for name in {".flow.safetensors.123.tmp", ".run.json.9.tmp", *mine} - {"run.json"}:
        (run.folder / name).write_text("half")
    (run.folder / ".state-00000002.tmp").mkdir()
    (run.folder / ".state-00000002.tmp" / "shard").write_text("half")
    with run.alone():
        assert {path.name for path in run.folder.iterdir()} == mine


def test_hidden_files_are_not_in_the_way_of_a_new_run(tmp_path):
    """As a process killed at its start leaves them, or macOS."""
    for name in (".run.json.1.tmp", ".DS_Store"):
        (tmp_path / name).write_text("half")
    with Run.open(tmp_path, {"config": {"name": "x"}}).alone():
        assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".DS_Store"}
    (tmp_path / "run.json").rename(tmp_path / "mine")
    with pytest.raises(InputError, match=r"is not empty and has no run\.json"):
        Run.open(tmp_path, {"config": {"name": "x"}})


def test_fresh_interrupted(tmp_path, monkeypatch):
    """A half-deleted run can be started over, and is not mistaken for one of another seed."""
    one, two = ({"config": {"name": "x"}, "seed": seed} for seed in (1, 2))
    run = Run.open(tmp_path, one)
    training_state.save_state(tmp_path, "x", 3, {"x": torch.ones(3)})
    run.finish("y", {})

    def interrupt(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Run.open(tmp_path, two, fresh=True)
    with pytest.raises(InputError, match="with seed 1, not 2"):
        Run.open(tmp_path, two)
    assert Run.open(tmp_path, one).stages == {} and not training_state.saved(tmp_path)
    run = Run.open(tmp_path, two, fresh=True)
    with run.alone():
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_two_runs_in_one_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from nanosd3.storage.run import Run\n"
        "folder = Path(sys.argv[1]); folder.mkdir()\n"
        "with Run(folder, {}, {}).alone(): print('ready', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "ready\n"
    command = ["--config", "tiny", "--out", str(folder)]
    assert run_main(lambda: train_mnist.main(command)) == 2
    assert "another process is training in this folder" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    (folder / "log.jsonl").write_text("{}\n")
    assert run_main(lambda: train_mnist.main([*command, "--fresh"])) == 2
    assert "another process is training in this folder" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"run.json", "log.jsonl"}
    holder.kill()  # the lock ends with the process
    holder.wait()
    with Run.read(folder).alone():
        pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_is_one_line(capsys, error):
    def main():
        raise error

    assert run_main(main) == 2
    assert capsys.readouterr().err.startswith("error: out of memory; ")
    with pytest.raises(RuntimeError, match="something else"):
        run_main(lambda: (_ for _ in ()).throw(RuntimeError("something else")))


def test_what_changed_in_the_data_is_said(tmp_path):
    """Which were added, which are missing, which have other pixels or captions."""

    def contents(**rows):
        return {"columns": ["pixels", "captions"], "rows": rows}

    def refusal(**rows) -> str:
        with pytest.raises(InputError) as error:
            Run.open(tmp_path / "run", identity | {"data": "1"}, contents=contents(**rows))
        return str(error.value).split("; choose")[0]

    identity = {"config": {"name": "x"}, "seed": 0, "data": "0"}
    before = {"a": ["1", "1"], "b": ["1", "1"], "c": ["1", "1"]}
    run = Run.open(tmp_path / "run", identity)
    held = f"{tmp_path / 'run'}: holds a run with different data"
    assert refusal(**before) == held  # of a version that did not note them
    run.remember(identity, contents(**before))
    assert refusal(**before, d=["1", "1"]) == f"{held}: 1 added (d)"
    assert refusal(a=["1", "1"], b=["2", "1"], c=["1", "2"]) == (
        f"{held}: 1 with other pixels (b), 1 with other captions (c)"
    )
    many = {f"new{i}": ["1", "1"] for i in range(2000)}
    assert refusal(**many) == (
        f"{held}: 2,000 added (new0, new1, new2 and 1,997 more), 3 missing (a, b, c)"
    )
    assert Run.open(tmp_path / "run", identity, contents=contents(**before)).identity == identity
    fresh = Run.open(tmp_path / "run", identity | {"data": "1"}, fresh=True)
    assert [path.name for path in fresh.folder.iterdir()] == ["run.json"]


def test_fingerprints_are_not_printed(tmp_path):
    """64 digits tell nobody anything."""
    one = {"config": {"name": "x"}, "data": "0" * 64, "encoders": "0" * 64, "init": "0" * 64}
    Run.open(tmp_path, one)
    reasons = {"data": "with different", "encoders": "with other encoders", "init": "started from"}
    for key, reason in reasons.items():
        with pytest.raises(InputError, match=f"holds a run {reason} ") as error:
            Run.open(tmp_path, one | {key: "1" * 64})
        assert "000" not in str(error.value) and "111" not in str(error.value)
