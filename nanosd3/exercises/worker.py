"""Calling answers, and nothing else: no judgement happens here.

`record` calls an answer on all cases and writes down what came of it: values, what was raised,
gradients, inputs after the call, what happens on a second call, with inputs laid out otherwise in
memory, in float64 and on another device. Judging is left to checker.py, from the record alone. So
student code can run in a process of its own, where this file is the program (it imports nothing of
the package): whatever the answer does there, to torch or to this file, it can only change what it
says its values are.

As a program it first shuts itself in: limits on memory and file size, and an audit hook, which
cannot be taken off again, that refuses the network, other processes, the package (unless the book
is open) and writing anywhere but in its folder. That stops accidents and the usual tricks. It is
no jail: code in C is not asked, and whoever grades files of enemies should do so in a container.
"""

import copy
import numbers
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable

import torch
from torch import Tensor

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


FIELD = "@velocity"  # stands for `field` among the arguments of a case, which are only data


def field(z: Tensor, t: Tensor) -> Tensor:
    """A velocity that depends on place and time, for exercises on solvers."""
    return torch.sin(3 * z + 2 * t) - 0.5 * z * t


def copies(arguments: tuple, dtype: torch.dtype | None = None, transposed: bool = False) -> list:
    """The arguments, copied; tensors of floats in `dtype` if one is given, and all with their last
    two axes exchanged in memory if asked for: the same numbers for everyone but `view`."""

    def copied(a: object) -> object:
        if not isinstance(a, Tensor):
            return field if isinstance(a, str) and a == FIELD else copy.deepcopy(a)
        a = a.clone() if dtype is None or not a.is_floating_point() else a.to(dtype, copy=True)
        return a.mT.contiguous().mT if transposed and a.ndim > 1 else a

    return [copied(a) for a in arguments]


def storable(value: object) -> object:
    """A result as tensors, numbers, lists and tuples; anything else as a description of it."""
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
        return float(value)  # numpy's numbers too
    return {"type": type(value).__name__}


def outcome(answer: Callable, arguments: list) -> dict:
    """What one call comes to: its value, "not attempted", or what it raised and where."""
    try:
        value = answer(*arguments)
        if (value is None or value is ...) and is_stub(answer):
            return {"kind": "not attempted"}
        return {"kind": "value", "value": storable(value)}
    except NotImplementedError as error:
        if not str(error) or "your code" in str(error).lower():
            return {"kind": "not attempted"}
        return {"kind": "raised", "text": raised(error)}
    except (Exception, SystemExit) as error:
        return {"kind": "raised", "text": raised(error)}


def is_stub(answer: Callable) -> bool:
    """Whether a function only returns a constant: `pass`, `...`, a docstring."""
    code = getattr(answer, "__code__", None)
    return code is not None and not code.co_names and len(code.co_code) <= 12


def raised(error: BaseException) -> str:
    """The error and the student's own line: the last one that is not inside a library."""
    libraries = (PACKAGE, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*libraries, "<frozen"))
    ]
    place = f' in line {own[-1].lineno}: "{own[-1].line}"' if own and own[-1].lineno else ""
    return f"{type(error).__name__}{place}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an error says, fit for a terminal: one line, not endless, nothing unprintable."""
    line = (str(error).splitlines() or [""])[0][:300]
    return "".join(c if c.isprintable() else "?" for c in line)


def flat(value: object) -> list:
    """A result as a list: of a tuple or list, its elements."""
    return list(value) if isinstance(value, tuple | list) else [value]


def gradients(answer: Callable, arguments: tuple) -> list[Tensor | None]:
    """Of the sum of squares of the result, for every float input, in float64."""
    given = copies(arguments, torch.float64)
    leaves = [a for a in given if isinstance(a, Tensor) and a.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    total = sum(x.square().sum() for x in flat(answer(*given)) if isinstance(x, Tensor))
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def attempt(function: Callable, *arguments: object) -> object:
    """The result, or the first line of what went wrong, as {"error": ...}."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": first_line(error) or type(error).__name__}


def devices_of(answer: Callable, arguments: tuple) -> list[str]:
    """Where the results are if the inputs are on a device without memory."""
    elsewhere = [a.to("meta") if isinstance(a, Tensor) else a for a in copies(arguments)]
    return [x.device.type for x in flat(answer(*elsewhere)) if isinstance(x, Tensor)]


def record(answer: Callable, cases: list[tuple], differentiable: bool) -> dict:
    """Everything the checker wants to know of an answer."""
    values = []
    for arguments in cases:
        values.append(outcome(answer, copies(arguments)))
        if values[-1]["kind"] != "value":
            return {"values": values}
    again, after = [], []
    for arguments in cases:  # a second time, looking at what is left of the inputs
        given = copies(arguments)
        again.append(outcome(answer, given))
        after.append([None if callable(a) else storable(a) for a in given])
    return {
        "values": values,
        "again": again,
        "after": after,
        "transposed": [outcome(answer, copies(a, transposed=True)) for a in cases],
        "gradients": attempt(gradients, answer, cases[0]) if differentiable else None,
        "double": outcome(answer, copies(cases[0], torch.float64)),
        "devices": attempt(devices_of, answer, cases[0]),
    }


# --- as a program -------------------------------------------------------------------------------

FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
             "os.spawn", "os.kill", "os.remove", "os.rmdir", "os.chmod", "os.chown",
             "os.link", "os.symlink", "os.truncate", "os.utime", "os.mkdir", "shutil.", "ctypes.",
             "pty.", "ftplib.", "smtplib.", "urllib.", "http.", "webbrowser.", "sqlite3.",
             "signal.pthread_kill", "gc.get_")  # fmt: skip


class ForbiddenError(PermissionError):
    """The answer tried something that is not part of any exercise."""


def shut_in(folder: str, package: str, open_book: bool, memory: int) -> None:
    """Limit this process; cannot be undone."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not every system has every limit
        pass
    folder, package = os.path.realpath(folder) + os.sep, os.path.realpath(package) + os.sep
    write = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    # Whatever the hook needs it holds itself: names of this file could be given other meanings.
    def hook(
        event: str, arguments: tuple, forbidden: tuple = FORBIDDEN, error: type = ForbiddenError,
        realpath: Callable = os.path.realpath, fsdecode: Callable = os.fsdecode,
        is_a: Callable = isinstance, number: type = int,
    ) -> None:  # fmt: skip
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
            if writes and not path.startswith(folder):
                raise error(f"writing {path} is not allowed in an answer")
            if path.startswith(package) and not open_book:
                raise error("closed book: an answer may not read the package nanosd3")

    sys.addaudithook(hook)


def mark(folder: str, name: str) -> None:
    """Tell the grader how far it went."""
    with open(os.path.join(folder, name), "w"):
        pass


def main() -> None:
    """worker.py FOLDER PACKAGE BOOK MEMORY: grade FOLDER/answer.py by FOLDER/cases.pt."""
    folder, package, book, memory = sys.argv[1:5]
    torch.set_num_threads(1)
    cases = torch.load(os.path.join(folder, "cases.pt"), weights_only=True)
    path = os.path.join(folder, "answer.py")
    with open(path, "rb") as file:
        source = file.read()  # bytes: Python finds out their encoding itself
    if book == "open":
        sys.path.insert(0, os.path.dirname(package))
    2.0 * torch.ones(1, device="meta")  # imports what such tensors need, which must be before
    shut_in(folder, package, book == "open", int(memory))
    mark(folder, "begun")
    module = sys.modules["answer"] = types.ModuleType("answer")
    module.__file__ = path
    missing = {"values": [{"kind": "not attempted"}]}
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException as error:  # what was defined before it stands
        missing = {"values": [{"kind": "broken", "text": raised(error)}]}
    mark(folder, "loaded")
    for name, entry in cases.items():
        target = os.path.join(folder, f"{name}.pt")
        answer, result = getattr(module, name, None), missing
        imported = str(getattr(answer, "__module__", "")).startswith("torch")
        if callable(answer) and not imported:
            result = record(answer, entry["cases"], entry["differentiable"])
        try:
            torch.save(result, target + ".part")
        except Exception as error:
            result = {"values": [{"kind": "raised", "text": first_line(error)}]}
            torch.save(result, target + ".part")
        os.rename(target + ".part", target)


if __name__ == "__main__":
    main()
