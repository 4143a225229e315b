"""Do the tests test? Plant mistakes in the spine, one at a time, and see whether anything fails.

    python tests/mutation/run.py                     all of them: half an hour on one core
    python tests/mutation/run.py --only related      those of the related systems
    python tests/mutation/run.py --only euler        those whose file, function or text says "euler"
    python tests/mutation/run.py --head --verbose    in the committed state; name the failing tests

Coverage says which lines a test runs, not whether it would notice that they are wrong: a test
without an assertion covers everything. Here each entry of faults.py (a sign, an axis, a constant,
a forgotten term, a missing check) is written into a copy of the repository, the tests run there,
and a fault that they let pass is a hole in them, or no fault at all. Both are worth knowing.

The copy holds what git would: tracked files and new ones that are not ignored. The working tree
is never touched. Quick tests of the spine run first; what survives them meets the rest, except
those that take long and look at other things. First everything runs once without a fault, for
nothing can be learned from tests that fail anyway. A fault that makes the tests hang counts as
caught: whoever made it would notice. The exit status is 1 if fewer than 98% are caught.
"""

import ast
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as a program, only this folder is there

from mutation.faults import FAULTS, Fault  # noqa: E402
from nanosd3.cli import Parser, run_main  # noqa: E402
from nanosd3.errors import InputError  # noqa: E402

QUICK = (
    "model/test_flow.py",
    "model/test_model.py",
    "machine/test_matmul.py",
    "machine/test_accelerate.py",
    "machine/test_channels_last.py",
    "model/test_golden.py",
)
SECOND = (  # before all others
    "exercises/test_exercises.py",
    "model/test_parity.py",
    "official/test_against_diffusers.py",
)
LEFT_OUT = (  # minutes in all, and what they look at is not the core
    "data/",
    "exercises/test_grading.py",
    "exercises/test_pytest_plugin.py",
    "gpu/",
    "machine/test_distributed.py",
    "measure/test_cuda.py",
    "mutation/",
    "notebooks/",
    "official/test_bad_weights.py",
    "official/test_weights.py",
    "claims/",
    "related/",
    "storage/",
    "test_readme.py",
    "test_structure.py",
    "training/",
)
NEAR = {  # where a file or folder is tested besides, if not among the neighbours
    "data": ("data/",),
    "exercises": ("exercises/",),
    "few_steps.py": ("related/",),
    "torch_settings.py": ("model/test_one_process.py",),
    "lazy_modules.py": ("model/test_one_process.py", "official/test_weights.py", "training/"),
    "measure": ("measure/", "training/"),
    "official": ("official/", "training/"),
    "storage": ("storage/", "training/", "official/test_file_size.py", "model/test_one_process.py"),
    "training": ("training/", "related/", "storage/test_nothing_lost.py"),
    "unigram_training.py": ("model/test_tokenizers.py",),
}
NEEDED = 0.98
HANGS = "hangs"
Stages = Callable[[str], list[list[str]]]


# --- a copy -------------------------------------------------------------------------------------


def git(root: Path, *words: str) -> bytes:
    try:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode().strip() or error
        raise InputError(f"git {words[0]}: {said}") from None


def copy_tree(root: Path, to: Path, head: bool) -> None:
    """The working tree without what git ignores, or the last commit."""
    if head:
        with tarfile.open(fileobj=io.BytesIO(git(root, "archive", "HEAD"))) as archive:
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(to, **safely)  # early 3.11 has no filters
        return
    for name in git(root, "ls-files", "-co", "--exclude-standard", "-z").decode().split("\0"):
        if name and (root / name).is_file():  # not if it was deleted
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, to / name)


def stages_of(copy: Path) -> Stages:
    """Which test files run for a fault in a file, quick ones and those nearest to it first."""
    tests = copy / "tests"
    there = sorted(str(path.relative_to(tests)) for path in tests.rglob("test_*.py"))
    others = [n for n in there if n not in {*QUICK, *SECOND} and not n.startswith(LEFT_OUT)]

    def stages(file: str) -> list[list[str]]:
        if file.startswith("claims/"):
            claims = [n for n in there if n.startswith("claims/")]
            family = Path(file).stem.split("_")[0]
            nearest = [n for n in claims if f"_{family}_" in n]
            others_there = [n for n in claims if n not in nearest]
            return [[f"tests/{name}" for name in row] for row in (nearest, others_there) if row]
        folder = file.split("/")[0]
        if folder in ("related", "training", *NEAR) or file in NEAR:
            stem = Path(file).stem
            nearest = [n for n in there if Path(n).stem == f"test_{stem}"]
            near = [n for n in there if n.startswith(NEAR.get(folder, ("related/",)))]
            near = [n for n in near if n not in nearest]
            return [[f"tests/{name}" for name in row] for row in (nearest, near) if row]
        near = QUICK[:1] if file in ("flow.py", "samplers.py") else QUICK[1:2]
        rows = [dict.fromkeys(near + QUICK), (*SECOND, *others)]
        chosen = [[f"tests/{name}" for name in row if name in there] for row in rows]
        return [row for row in chosen if row]

    return stages


# --- a fault ------------------------------------------------------------------------------------


def functions(source: str) -> dict[str, range]:
    """The lines of each top-level function and of each method of a top-level class."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = range(node.lineno, node.end_lineno + 1)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    name = f"{node.name}.{inner.name}"
                    found[name] = range(inner.lineno, inner.end_lineno + 1)
    return found


def place(fault: Fault, source: str) -> tuple[int, str]:
    """The line where a fault begins, and the function around it ("" outside of all)."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(fault.old, fault.new, strict=False))
    line = source.count("\n", 0, source.index(fault.old) + len(list(same))) + 1
    return line, next((name for name, lines in functions(source).items() if line in lines), "")


def told(fault: Fault, copy: Path) -> str:
    """Where and what, in one line. Raises InputError if the fault does not fit its file."""
    path = copy / "nanosd3" / fault.file
    source = path.read_text() if path.is_file() else ""
    if source.count(fault.old) != 1:
        count = source.count(fault.old)
        raise InputError(f"faults.py: {fault.old!r} is {count} times in {fault.file}, not once")
    line, function = place(fault, source)
    return " ".join(filter(None, (f"nanosd3/{fault.file}:{line}", function))) + f": {fault.what}"


@contextmanager
def planted(fault: Fault, copy: Path) -> Iterator[None]:
    path = copy / "nanosd3" / fault.file
    source = path.read_text()
    path.write_text(source.replace(fault.old, fault.new))
    try:
        yield
    finally:
        path.write_text(source)


# --- the tests ----------------------------------------------------------------------------------


def first_failure(copy: Path, tests: list[str], limit: float) -> str | None:
    """Run test files in the copy: what failed first, None if nothing did. After `limit` seconds
    they are stopped. Raises InputError if it was not a test that failed, but pytest."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    command += [f"--basetemp={copy.parent / 'pytest'}"]
    # slow, many processes
    command += ["--deselect", "tests/measure/test_bench.py::test_bench_memory"]
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # an old .pyc would hide a change of the same length
        "PYTHONPATH": str(copy),  # before a package of that name that may be installed
        "CI": "1",  # hypothesis draws the same examples each time, without a time limit
    }
    output = copy.parent / "output.txt"
    with (
        output.open("w") as out,
        subprocess.Popen(command, cwd=copy, env=environ, stdin=subprocess.DEVNULL, stdout=out,
                         stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):  # fmt: skip
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(limit)
        finally:
            if hung := process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with all that the tests started
    if hung:
        return f"{HANGS}: stopped after {limit:.0f} s"
    if process.returncode == 0:
        return None
    lines = output.read_text(errors="replace").split("\n")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if process.returncode > 0 and not failed:
        raise InputError(f"pytest did not get as far as the tests: {' '.join(lines[-3:]).strip()}")
    return failed[0] if failed else f"ended by signal {-process.returncode}"


def baseline(copy: Path, stages: Stages) -> float:
    """Seconds to wait for a stage, from a run without a fault. Raises InputError if that fails."""
    slowest = 0.0
    for tests in stages(""):
        begin = time.perf_counter()
        if failure := first_failure(copy, tests, limit=3600):
            raise InputError(f"the tests fail without any fault: {failure}")
        slowest = max(slowest, time.perf_counter() - begin)
    return 60 + 5 * slowest


def catch(fault: Fault, copy: Path, stages: Stages, limit: float) -> str | None:
    """What failed with the fault in place; None if it survived all tests."""
    with planted(fault, copy):
        for tests in stages(fault.file):
            if failure := first_failure(copy, tests, limit):
                return failure
    return None


def hunt(copy: Path, faults: list[Fault], stages: Stages, verbose: bool) -> int:
    """Try every fault and print the survivors and a summary. Returns the exit status."""
    labels = [told(fault, copy) for fault in faults]
    tqdm.write("running the tests without a fault")
    limit = baseline(copy, stages)
    survivors, hung, done = [], 0, 0
    bar = tqdm(zip(faults, labels, strict=True), "faults", len(faults), leave=False)
    try:
        for fault, label in bar:
            failure = catch(fault, copy, stages, limit)
            done += 1
            if failure is None:
                survivors.append(label)
                tqdm.write(f"survives: {label}")
            elif verbose:
                tqdm.write(f"caught: {label}: {failure}")
            hung += failure is not None and failure.startswith(HANGS)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped after {done} of {len(faults)} faults, {len(survivors)} survived"
        ) from None
    finally:
        bar.close()
    caught = done - len(survivors)
    by_hanging = f", {hung} of them because the tests hung" if hung else ""
    print(f"{caught} of {done} faults caught ({caught / done:.1%}){by_hanging}")
    for label in survivors:
        print(f"  survives: {label}")
    return 0 if caught >= NEEDED * done else 1


def main(
    arguments: list[str] | None = None, root: Path = ROOT, faults: list[Fault] = FAULTS
) -> int:
    parser = Parser("python tests/mutation/run.py", "Plant faults in the spine and run the tests.")
    add = parser.add_argument
    add("--only", metavar="TEXT", default="", help="faults whose file, function or what has it")
    add("--head", action="store_true", help="the last commit, not the working tree")
    add("--verbose", action="store_true", help="name the test that catches each fault")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        copy_tree(root, copy, args.head)
        chosen = [f for f in faults if args.only.lower() in told(f, copy).lower()]
        if not chosen:
            raise InputError(f"--only {args.only}: none of {len(faults)} faults")
        return hunt(copy, chosen, stages_of(copy), args.verbose)


if __name__ == "__main__":
    sys.exit(run_main(main))
