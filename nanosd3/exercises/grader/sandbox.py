"""Run answers and record the results; nothing is judged here.

`record` calls an answer on all test cases and stores what happened: return values, exceptions,
gradients, the inputs after the call, and the results of a second call, with transposed inputs, in
float64 and on the meta device. checker.py judges from that record alone, so `main` can run in a
separate process (this file imports nothing from the package), where whatever an answer patches
changes only the values it claims to return.

`main` first restricts its own process: limits on memory and file size, and an audit hook, which
cannot be removed, that refuses network access, subprocesses, the package (unless open book) and
writes outside its folder. That stops accidents and the usual tricks, but it is no security
boundary: C code is not audited. Grade untrusted files in a container.
"""

import contextlib
import copy
import numbers
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 2))
SITE = os.path.dirname(os.path.dirname(torch.__file__))  # may be the user's own
LIBRARIES = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), SITE, "<frozen")
LINES = 20_000  # of Python that an answer may run in one call, if a case does not say less
FIELD = "@velocity"  # stands for a `Field` in the arguments of a case, which must be plain data


class Field:
    """A velocity that depends on position and time, for the exercises on solvers."""

    calls = 0

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return torch.sin(3 * z + 2 * t) - 0.5 * z * t


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Gradients on, float32, on the CPU, no autocast, whatever the caller has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device().type
    on_cpu = contextlib.nullcontext() if device == "cpu" else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            with on_cpu:
                yield
    finally:
        torch.set_default_dtype(dtype)


def copies(arguments: tuple, dtype: torch.dtype | None = None, transposed: bool = False) -> list:
    """Copy arguments, float tensors to `dtype` if given. With `transposed`, tensors have their
    last two axes swapped in memory: the same values, but not contiguous."""

    def copied(a: object) -> object:
        if not isinstance(a, Tensor):
            return Field() if isinstance(a, str) and a == FIELD else copy.deepcopy(a)
        a = a.clone() if dtype is None or not a.is_floating_point() else a.to(dtype, copy=True)
        return a.mT.contiguous().mT if transposed and a.ndim > 1 else a

    return [copied(a) for a in arguments]


def storable(value: object) -> object:
    """Convert a result to tensors, numbers, lists and tuples, anything else to a description."""
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor)
        return plain.to_dense().clone() if plain.is_sparse else plain.clone()
    if isinstance(value, tuple):
        return tuple(storable(x) for x in value)
    if isinstance(value, list):
        return [storable(x) for x in value]
    if isinstance(value, dict):
        return {"type": "dict", "items": repr(sorted(map(repr, value.items())))[:10_000]}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)[:10_000]
    if isinstance(value, numbers.Integral) and abs(int(value)) < 2**63:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return float(value)  # includes NumPy scalars
    return {"type": type(value).__name__}


def outcome(answer: Callable, arguments: list) -> dict:
    """The outcome of one call: its value, "not attempted", or what it raised and where."""
    try:
        value = answer(*arguments)
        if (value is None or value is ...) and is_stub(answer):
            return {"kind": "not attempted"}
        return {"kind": "value", "value": storable(value)}
    except (Exception, SystemExit) as error:
        text = str(error).lower()
        if isinstance(error, NotImplementedError) and (not text or "your code" in text):
            return {"kind": "not attempted"}
        return {"kind": "raised", "text": describe_error(error)}


def counted(answer: Callable, arguments: list) -> dict:
    """`outcome`, with counts: lines of Python outside of libraries, calls of the velocity."""
    lines = 0

    def count(frame: types.FrameType, event: str, _: object) -> Callable | None:
        nonlocal lines
        if event == "call" and frame.f_code.co_filename.startswith(LIBRARIES):
            return None
        lines += event == "line"
        if lines > LINES:  # enough
            sys.settrace(None)
        return count

    before = sys.gettrace()  # a debugger's
    sys.settrace(count)
    try:
        result = outcome(answer, arguments)
    finally:
        sys.settrace(before)
    calls = sum(a.calls for a in arguments if isinstance(a, Field))
    return result | {"lines": lines, "calls": calls}


def is_stub(answer: Callable) -> bool:
    """Whether the body of a function does nothing: `pass`, `...`, a docstring."""
    code = getattr(answer, "__code__", None)
    return code is not None and not code.co_names and len(code.co_code) <= 12


def describe_error(error: BaseException) -> str:
    """The error and the student's own line: the last one that is not inside a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((PACKAGE, *LIBRARIES))]
    place = f' in line {own[-1].lineno}: "{own[-1].line}"' if own and own[-1].lineno else ""
    return f"{type(error).__name__}{place}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error message, of limited length, with printable characters only."""
    return "".join(c if c.isprintable() else "?" for c in str(error).partition("\n")[0][:300])


def flat(value: object) -> list:
    """The elements of a tuple or list; anything else as a list of one."""
    return list(value) if isinstance(value, tuple | list) else [value]


def gradients(answer: Callable, arguments: tuple) -> list[Tensor | None]:
    """Gradients of the sum of squares of the result for each float input, in float64."""
    inputs = copies(arguments, torch.float64)
    floats = [a for a in inputs if isinstance(a, Tensor) and a.is_floating_point()]
    leaves = [a.requires_grad_() for a in floats]
    results = [x for x in flat(answer(*inputs)) if isinstance(x, Tensor)]
    total = sum((x.square().sum() for x in results), torch.zeros((), dtype=torch.float64))
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def attempt(function: Callable, *arguments: object) -> object:
    """The result, or {"error": the first line of the message}."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        return {"error": first_line(error) or type(error).__name__}


def devices_of(answer: Callable, arguments: tuple) -> list[str]:
    """The devices of the results when the inputs are on the meta device."""
    inputs = [a.to("meta") if isinstance(a, Tensor) else a for a in copies(arguments)]
    return [x.device.type for x in flat(answer(*inputs)) if isinstance(x, Tensor)]


@default_settings()
def record_values(answer: Callable, cases: list[tuple]) -> dict:
    """The outcomes of the calls, up to one that shows a stub or takes far too long."""
    values: list[dict] = []
    for arguments in cases:
        values.append(counted(answer, copies(arguments)))
        if values[-1]["kind"] == "not attempted" or values[-1]["lines"] > LINES:
            break
    return {"values": values}


@default_settings()
def record(answer: Callable, cases: list[tuple], differentiable: bool, values: dict) -> dict:
    """Everything the checker needs to know about an answer, given its `record_values`."""
    if len(values["values"]) < len(cases):
        return values
    inputs = [copies(arguments) for arguments in cases]
    return values | {
        "again": [outcome(answer, arguments) for arguments in inputs],  # modified, perhaps
        "after": [[None if callable(a) else storable(a) for a in i] for i in inputs],
        "transposed": [outcome(answer, copies(a, transposed=True)) for a in cases],
        "gradients": attempt(gradients, answer, cases[0]) if differentiable else None,
        "double": outcome(answer, copies(cases[0], torch.float64)),
        "devices": attempt(devices_of, answer, cases[0]),
    }


# --- main program -------------------------------------------------------------------------------
FORBIDDEN = tuple(
    "socket. subprocess. os.system os.exec os.fork os.posix_spawn os.spawn os.kill os.remove "
    "os.rmdir os.chmod os.chown os.link os.symlink os.truncate os.utime os.mkdir shutil. ctypes. "
    "pty. ftplib. smtplib. urllib. http. webbrowser. sqlite3. signal.pthread_kill gc.get_".split()
)  # prefixes of audit events


class ForbiddenError(PermissionError):
    """The answer tried something that no exercise needs."""


def restrict_process(folder: str, package: str, open_book: bool, memory: int) -> None:
    """Restrict this process for good: its memory in bytes, writes to `folder` only, no access to
    `package` unless open book."""
    with contextlib.suppress(ImportError):  # Windows has no limits; the grader says so
        import resource

        for name, limit in (("AS", memory), ("FSIZE", 2**28), ("CORE", 0)):
            with contextlib.suppress(AttributeError, ValueError, OSError):  # nor macOS all of them
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    folder, package = os.path.realpath(folder) + os.sep, os.path.realpath(package) + os.sep
    write, sep = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, os.sep

    # Defaults bind everything the hook uses: an answer could rebind the names of this module.
    def hook(
        event: str,
        arguments: tuple,
        forbidden: tuple[str, ...] = FORBIDDEN,
        error: type[Exception] = ForbiddenError,
        realpath: Callable = os.path.realpath,
        fsdecode: Callable = os.fsdecode,
        is_a: Callable = isinstance,
        number: type = int,
    ) -> None:
        if event.startswith(forbidden):
            raise error(f"{event} is not allowed in an answer")
        if event == "import" and arguments[0].split(".")[0] == "nanosd3" and not open_book:
            raise error("closed book: an answer may not use the package nanosd3")
        if event == "os.rename":
            for path in arguments[:2]:
                if not realpath(fsdecode(path)).startswith(folder):
                    raise error(f"renaming {path} is not allowed in an answer")
        if event == "open" and not is_a(arguments[0], number):
            path = realpath(fsdecode(arguments[0]))
            writes = is_a(arguments[2], number) and arguments[2] & write
            if writes and not (path + sep).startswith(folder):  # unnamed files open the folder
                raise error(f"writing {path} is not allowed in an answer")
            if path.startswith(package) and not open_book:
                raise error("closed book: an answer may not read the package nanosd3")

    sys.addaudithook(hook)


def load() -> None:
    """Import what torch would import only later, when that is forbidden."""
    torch.set_num_threads(1)
    2.0 * torch.ones(1, device="meta")


def main(folder: str, package: str, book: str, memory: str) -> None:
    """sandbox.py FOLDER PACKAGE open|closed MEMORY: record FOLDER/answer.py on FOLDER/cases.pt."""
    load()
    cases = torch.load(os.path.join(folder, "cases.pt"), weights_only=True)
    path = Path(folder, "answer.py")
    if book == "open":
        sys.path.insert(0, os.path.dirname(package))
    restrict_process(folder, package, book == "open", int(memory))
    Path(folder, "begun").write_bytes(b"")  # tells the grader how far this process has come
    module = sys.modules["answer"] = types.ModuleType("answer")
    module.__file__ = str(path)
    missing = {"values": [{"kind": "not attempted"}]}
    try:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)  # of any encoding
    except BaseException as error:  # answers defined before it still count
        missing = {"values": [{"kind": "broken", "text": describe_error(error)}]}
    Path(folder, "loaded").write_bytes(b"")
    for name, entry in cases.items():
        target = os.path.join(folder, f"{name}.pt")
        answer, result = getattr(module, name, None), missing
        imported = str(getattr(answer, "__module__", "")).startswith("torch")
        if callable(answer) and not imported:
            values = record_values(answer, entry["cases"])
            result = record(answer, entry["cases"], entry["differentiable"], values)
        try:
            torch.save(result, target + ".part")
        except Exception as error:
            result = {"values": [{"kind": "raised", "text": first_line(error)}]}
            torch.save(result, target + ".part")
        os.replace(target + ".part", target)  # os.rename replaces no file on Windows


if __name__ == "__main__":
    main(*sys.argv[1:5])
