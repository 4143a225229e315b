"""The trained model that comes with the notebooks is the one that lab.py describes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanosd3.storage.run import Run

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
LESSON = NOTEBOOKS / "lesson"
STAGES = ["judge", "autoencoder", "clip", "t5", "flow"]

LOAD = """
import sys
sys.path[:0] = ["..", "."]
import lab
lesson = lab.trained()
shards = lesson.texts.latent_rows.folder
assert not shards.exists(), "images encoded before any are asked for"
lab.get_features = lambda job, encoders, prompts: (job.config.name, *job.run.stages)
sys.exit(" ".join(lesson.features))
"""


def run(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-c", code], {**os.environ, **environment}
    env |= {"NANOSD3_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=NOTEBOOKS, env=env, capture_output=True, text=True)


def test_it_is_loaded_and_not_trained(tmp_path):
    """Its config, data and seed are those of today, and no stage is missing."""
    done = run(LOAD, tmp_path, NANOSD3_FAST="")
    assert done.stderr.splitlines()[-1] == " ".join(["mnist", *STAGES])
    assert {p.name for p in (tmp_path / "full/model").iterdir()} > {p.name for p in files()}
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["model"]  # nothing temporary


def files() -> list[Path]:
    return sorted(LESSON.iterdir())


OVERTAKEN = """
import shutil, sys
sys.path[:0] = ["..", "."]
import lab
copyfile = shutil.copyfile
def late(*names):  # before the first file is copied, another process has unpacked all of them
    shutil.copyfile = copyfile
    shutil.copytree(lab.LESSON, lab.CACHE / "model")
    return copyfile(*names)
shutil.copyfile = late
lab.unpack_lesson()
"""


def test_several_notebooks_begin_at_once(tmp_path):
    """As in a class that shares a cache: who comes second uses what is there."""
    done = run(OVERTAKEN, tmp_path, NANOSD3_FAST="")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["model"]
    assert {p.name for p in (tmp_path / "full/model").iterdir()} == {p.name for p in files()}


def test_it_can_be_used_from_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """As where it is installed for all: the copy is the user's own."""
    lesson, cache = tmp_path / "lesson", tmp_path / "cache"
    lesson.mkdir()
    (lesson / "run.json").write_text("{}")
    (lesson / "run.json").chmod(0o444)
    lesson.chmod(0o555)
    code = "import sys; sys.path[:0] = ['..', '.']; import lab, pathlib; "
    code += f"lab.LESSON = pathlib.Path({str(lesson)!r}); lab.unpack_lesson()"
    assert run(code, cache, NANOSD3_FAST="").returncode == 0
    lesson.chmod(0o755)
    for path in (cache / "full/model", cache / "full/model/run.json"):
        assert path.stat().st_mode & 0o200, path


def test_it_is_small_and_complete():
    weights = [f"{stage}.safetensors" for stage in STAGES]
    others = ["log.jsonl", "run.json", "tokenizers.json"]  # 05 and 09 read the log
    assert [p.name for p in files()] == sorted([*weights, *others])
    assert sum(p.stat().st_size for p in files()) < 10e6
    stages = json.loads((LESSON / "run.json").read_text())["stages"]
    assert list(stages) == STAGES and stages["judge"]["accuracy"] > 0.98


def test_its_log_is_that_of_the_whole_training():
    """Notebooks 05 and 09 draw it."""
    log = Run.read(LESSON).read_log()
    losses = [entry["loss"] for entry in log if entry["stage"] == "flow" and "loss" in entry]
    held_out = [entry["validation_ema"] for entry in log if "validation_ema" in entry]
    assert len(losses) == 900 and [len(row) for row in held_out] == [8] * 5
    assert sum(losses[-50:]) / 50 == pytest.approx(0.7, abs=0.05)


def test_a_model_of_other_notebooks_is_named(tmp_path):
    """One line says what to do, and the folder is left as it was."""
    (tmp_path / "full/model").mkdir(parents=True)
    other = json.loads((LESSON / "run.json").read_text()) | {"seed": 1}
    (tmp_path / "full/model/run.json").write_text(json.dumps(other))
    done = run(LOAD, tmp_path, NANOSD3_FAST="")
    assert "holds a model of another version of the notebooks; delete" in done.stderr
    assert [p.name for p in (tmp_path / "full/model").iterdir()] == ["run.json"]


@pytest.mark.slow
def test_it_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(NOTEBOOKS)
    import execute

    monkeypatch.setenv("NANOSD3_FAST", "1")
    (tmp_path / "lesson").mkdir()
    (tmp_path / "lesson/old").touch()
    assert execute.make_lesson(tmp_path / "lesson", 1)
    assert [p.name for p in sorted((tmp_path / "lesson").iterdir())] == [p.name for p in files()]
