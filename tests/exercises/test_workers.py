"""The processes that run answers are forked, and have nothing in common."""

import inspect
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nanosd3 import flow
from nanosd3.errors import InputError
from nanosd3.exercises import EXERCISES
from nanosd3.exercises.grader import grading, workers

ROOT = Path(__file__).parents[2]
RIGHT = f"import torch\nfrom torch import Tensor\n{inspect.getsource(flow.velocity_target)}"
TARGET = [EXERCISES["velocity_target"]]


@pytest.fixture(scope="module")
def servers():
    """A list of this file's own for the server in use; a test that ends one leaves the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_server", [])
        yield workers._server
        for started in workers._server:
            started.close()


@pytest.fixture
def server(servers):
    return workers.fork_server()


def status_of(folder: Path, source: str) -> str:
    (folder / "hw.py").write_text(source)
    return grading.grade(folder / "hw.py", TARGET)[0].status


def processes_of(server: workers.ForkServer) -> list[str]:
    tasks = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return tasks.read_text().split()


def test_all_files_of_a_class_are_run_by_one_server(server, tmp_path):
    for _ in range(3):
        assert status_of(tmp_path, RIGHT) == "right"
    assert workers.fork_server() is server and processes_of(server) == []


def test_what_a_file_changes_is_not_there_for_the_next(server, tmp_path):
    change = "torch.Tensor.__sub__ = lambda a, b: a\nimport os; os.environ['LEFT'] = '1'\n"
    seen = RIGHT.replace("    return", "    import os; assert 'LEFT' not in os.environ\n    return")
    assert status_of(tmp_path, RIGHT + change) == "wrong"
    assert status_of(tmp_path, seen) == "right"


def test_random_numbers_of_a_file_do_not_depend_on_those_before(server, tmp_path):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    texts = []
    for _ in range(2):
        report = f"assert False, [float(torch.rand(())), {RIGHT.count('x')}]\n"
        (tmp_path / "hw.py").write_text(RIGHT.replace("    return", f"    {report}    return"))
        texts.append(grading.grade(tmp_path / "hw.py", TARGET)[0].message)
    assert texts[0] == texts[1] and "AssertionError" in texts[0]


def test_an_answer_may_write_files_of_its_own(server, tmp_path):
    writes = "    import tempfile\n    open('notes.txt', 'w').write('x')\n"
    writes += "    tempfile.TemporaryFile()\n    return"
    assert status_of(tmp_path, RIGHT.replace("    return", writes)) == "right"
    assert [path.name for path in tmp_path.iterdir()] == ["hw.py"]


def test_one_that_hangs_is_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "LOAD_LIMIT", 1)
    assert status_of(tmp_path, "while True: pass") == "timed out"
    assert processes_of(server) == []


def test_it_survives_what_the_system_refuses(server, tmp_path):
    with pytest.raises(InputError, match="No child processes"):
        server.ask("poll", os.getpid())
    assert status_of(tmp_path, RIGHT) == "right" and workers.fork_server() is server


def test_threads_share_it(server, tmp_path):
    folders = [tmp_path / str(i) for i in range(6)]
    for folder in folders:
        folder.mkdir()
    wrong = RIGHT.replace("noise - x0", "x0 - noise")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(status_of, folders, [RIGHT, wrong] * 3))
    assert found == ["right", "wrong"] * 3 and workers.fork_server() is server


def test_another_is_started_if_it_ends(server, tmp_path):
    server.process.kill()
    server.process.wait()
    assert status_of(tmp_path, RIGHT) == "right" and workers.fork_server() is not server


def test_a_fork_of_the_grader_has_a_server_of_its_own(server, tmp_path, monkeypatch):
    """And leaves the other one alone."""
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_server", [server])
        patch.setattr(server, "owner", os.getpid() + 1)
        own = workers.fork_server()
        assert own is not server and server.process.poll() is None
        own.close()
    assert status_of(tmp_path, RIGHT) == "right" and workers.fork_server() is server


def test_an_interrupted_request_is_not_answered_by_the_next_reply(server, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workers.select, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            status_of(tmp_path, RIGHT)
    assert status_of(tmp_path, RIGHT) == "right" and workers.fork_server() is not server


@pytest.mark.parametrize("has_group", [True, False])
def test_who_still_uses_a_server_that_failed_reads_no_late_reply(
    server, tmp_path, monkeypatch, has_group
):
    """Such as another thread; it can stop its answer all the same, even one that is so young that
    it has no group of processes yet."""
    (tmp_path / "answer.py").write_text("for _ in range(10**9): pass")
    torch.save({}, tmp_path / "cases.pt")
    worker = workers.start_worker(tmp_path, False)
    assert worker.poll() is None
    monkeypatch.setattr(server, "failed", True)
    with pytest.raises(InputError, match="did not start"):
        worker.poll()
    if not has_group:
        monkeypatch.delattr(workers.os, "killpg")
    worker.stop()
    monkeypatch.undo()
    worker.wait(10)
    assert worker.poll() == -signal.SIGKILL


def test_it_ends_with_the_grader(tmp_path):
    """Even if that is killed."""
    (tmp_path / "hw.py").write_text(RIGHT)
    code = (
        "import os, signal\nfrom pathlib import Path\n"
        "from nanosd3.exercises import EXERCISES\n"
        "from nanosd3.exercises.grader import grading, workers\n"
        f"grading.grade(Path({str(tmp_path / 'hw.py')!r}), [EXERCISES['velocity_target']])\n"
        "print(workers.fork_server().process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for _ in range(500):  # it ends when it reads the end of its input
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{int(done.stdout)}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the server outlived its grader")
