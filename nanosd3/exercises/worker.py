"""Calling answers, and nothing else: no judgement happens here.

`record` calls an answer on all cases and writes down what came of it: values, what was raised,
gradients, inputs after the call, what happens in float64 and on another device. Judging is left
to checker.py, from the record alone. So student code can run in a process of its own, where this
file is the program (it imports nothing of the package): whatever the answer does there, to torch
or to this file, it can only change what it says its values are.

As a program it first shuts itself in: limits on memory and file size, and an audit hook, which
cannot be taken off again, that refuses the network, other processes, the package (unless the book
is open) and writing anywhere but in its folder.
"""

import copy
import os
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

LEAVES = (bool, int, float, str)
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


FIELD = "@velocity"  # stands for `field` among the arguments of a case, which are only data


def field(z: Tensor, t: Tensor) -> Tensor:
    """A velocity that depends on place and time, for exercises on solvers."""
    return torch.sin(3 * z + 2 * t) - 0.5 * z * t


def copies(arguments: tuple, dtype: torch.dtype | None = None) -> list:
    """The arguments, tensors copied, those of floats in `dtype` if one is given."""

    def copied(a: object) -> object:
        if not isinstance(a, Tensor):
            return field if isinstance(a, str) and a == FIELD else copy.deepcopy(a)
        return a.clone() if dtype is None or not a.is_floating_point() else a.to(dtype, copy=True)

    return [copied(a) for a in arguments]


def storable(value: object) -> object:
    """A result as tensors, numbers, lists and tuples; anything else as a description of it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(storable(x) for x in value) if type(value) in (tuple, list) else [
            storable(x) for x in value]  # fmt: skip
    if value is None or isinstance(value, LEAVES):
        return value
    return {"type": type(value).__name__}


def outcome(answer: Callable, arguments: list) -> dict:
    """What one call comes to: its value, "not attempted", or what it raised and where."""
    try:
        value = answer(*arguments)
        if value is None or value is ...:
            return {"kind": "not attempted"}
        return {"kind": "value", "value": storable(value)}
    except NotImplementedError as error:
        if not str(error) or "your code" in str(error).lower():
            return {"kind": "not attempted"}
        return {"kind": "raised", "text": raised(error)}
    except (Exception, SystemExit) as error:
        return {"kind": "raised", "text": raised(error)}


def raised(error: BaseException) -> str:
    """The error and the student's own line: the last one that is not inside a library."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith(PACKAGE)
    ]
    place = f' in line {own[-1].lineno}: "{own[-1].line}"' if own else ""
    return f"{type(error).__name__}{place}: {(str(error).splitlines() or [''])[0]}"


def flat(value: object) -> list:
    """A result as a list: of a tuple or list, its elements."""
    return list(value) if isinstance(value, tuple | list) else [value]


def gradients(answer: Callable, arguments: tuple) -> list[Tensor | None]:
    """Of the sum of squares of the result, with respect to every float input, in float64."""
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
        return {"error": (str(error).splitlines() or [type(error).__name__])[0]}


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
    given = copies(cases[0])
    kept = attempt(lambda: [answer(*given), given][1])
    return {
        "values": values,
        "gradients": attempt(gradients, answer, cases[0]) if differentiable else None,
        "after": kept if isinstance(kept, dict) else [storable(a) for a in kept],
        "double": outcome(answer, copies(cases[0], torch.float64)),
        "devices": attempt(devices_of, answer, cases[0]),
    }


# --- as a program -------------------------------------------------------------------------------

FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
             "os.spawn", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.link",
             "os.symlink", "os.truncate", "os.putenv", "shutil.", "ctypes.", "pty.", "ftplib.",
             "smtplib.", "urllib.", "http.", "webbrowser.")  # fmt: skip


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

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(FORBIDDEN):
            raise ForbiddenError(f"{event} is not allowed in an answer")
        if event == "import" and arguments[0].split(".")[0] == "nanosd3" and not open_book:
            raise ForbiddenError("closed book: an answer may not use the package nanosd3")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            if writes and not path.startswith(folder):
                raise ForbiddenError(f"writing {path} is not allowed in an answer")
            if path.startswith(package) and not open_book:
                raise ForbiddenError("closed book: an answer may not read the package nanosd3")

    sys.addaudithook(hook)


def mark(folder: str, name: str) -> None:
    """Tell the grader how far it went."""
    with open(os.path.join(folder, name), "w"):
        pass


def main() -> None:
    """worker.py FOLDER PACKAGE BOOK MEMORY: grade FOLDER/answer.py by FOLDER/cases.pt, leaving
    out what FOLDER has a record of already."""
    folder, package, book, memory = sys.argv[1:5]
    torch.set_num_threads(1)
    cases = torch.load(os.path.join(folder, "cases.pt"), weights_only=True)
    path = os.path.join(folder, "answer.py")
    with open(path, encoding="utf-8") as file:
        source = file.read()
    if book == "open":
        sys.path.insert(0, os.path.dirname(package))
    2.0 * torch.ones(1, device="meta")  # imports what such tensors need, which must be before
    shut_in(folder, package, book == "open", int(memory))
    mark(folder, "begun")
    names: dict = {"__name__": "answer", "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)
        broken = None
    except BaseException as error:
        broken = {"values": [{"kind": "raised", "text": raised(error)}]}
    mark(folder, "loaded")
    for name, entry in cases.items():
        target = os.path.join(folder, f"{name}.pt")
        if os.path.exists(target):
            continue
        answer = names.get(name)
        if broken or callable(answer):
            result = broken or record(answer, entry["cases"], entry["differentiable"])
        else:
            result = {"values": [{"kind": "not attempted"}]}
        torch.save(result, target)


if __name__ == "__main__":
    main()
