"""The process that runs a file of answers, and does nothing else.

It restricts itself first: limits on memory, file size and time, and an audit hook, which cannot be
removed, that refuses network access, subprocesses, the package (unless open book) and changes
outside its folder. That stops accidents and the usual tricks, but it is no security boundary: C
code is not audited. Grade untrusted files in a container.
"""

import __future__

import ast
import contextlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from recording import describe_error, first_line, record, record_values  # by its path

sys.path.pop()

FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
FORBIDDEN = tuple(
    "socket. subprocess. os.system os.exec os.fork os.posix_spawn os.spawn os.kill os.remove "
    "os.rmdir os.chmod os.chown os.link os.symlink os.truncate os.utime shutil. ctypes. "
    "pty. ftplib. smtplib. urllib. http. webbrowser. sqlite3. signal.pthread_kill gc.get_".split()
)  # prefixes of audit events
CPU_LIMIT = 600  # seconds, in case the grader is killed and nobody stops the process


class ForbiddenError(PermissionError):
    """The answer tried something that no exercise needs."""


def restrict_process(folder: str, package: str, open_book: bool, memory: int) -> None:
    """Restrict this process for good: its memory in bytes, writes to `folder` only, no access to
    `package` unless open book."""
    with contextlib.suppress(ImportError):  # Windows has no limits; the grader says so
        import resource

        for name, limit in (("AS", memory), ("FSIZE", 2**28), ("CORE", 0), ("CPU", CPU_LIMIT)):
            with contextlib.suppress(AttributeError, ValueError, OSError):  # nor macOS all of them
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    folder, package = os.path.realpath(folder) + os.sep, os.path.realpath(package) + os.sep
    paths = {"os.mkdir": 1, "os.rename": 2}  # how many paths these events begin with
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
        for path in arguments[: paths.get(event, 0)]:
            elsewhere = any(fd != -1 for fd in arguments[-paths[event] :])  # not the current folder
            if elsewhere or not realpath(fsdecode(path)).startswith(folder):
                raise error(f"{event} of {path} is not allowed in an answer")
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


def run_file(path: Path, module: types.ModuleType) -> tuple[dict, dict]:
    """Run the statements of a file in a module, each even if those before it have failed. Returns
    the outcome of answers that are not there then, and what `import *` has bound."""
    source = path.read_bytes()  # in any encoding
    flags = compile(source, path, "exec").co_flags & FUTURE
    failures: list[str] = []
    starred: dict[str, object] = {}
    for statement in ast.parse(source, path).body:
        stars = isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*"
        before = vars(module).copy() if stars else {}
        try:
            part = ast.Module([statement], [])
            exec(compile(part, path, "exec", flags, dont_inherit=True), vars(module))
        except BaseException as error:
            failures.append(describe_error(error))
            if not isinstance(error, Exception):  # SystemExit: it wants to stop here
                break
        if stars:
            starred |= {k: v for k, v in vars(module).items() if v is not before.get(k)}
    if failures:
        return {"kind": "broken", "text": failures[0]}, starred
    return {"kind": "not attempted"}, starred


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
    missing, starred = run_file(path, module)
    Path(folder, "loaded").write_bytes(b"")
    for name, entry in cases.items():
        target = os.path.join(folder, f"{name}.pt")
        answer, result = getattr(module, name, None), {"values": [missing]}
        if callable(answer) and answer is not starred.get(name):
            values = record_values(answer, entry["cases"])
            result = record(answer, entry["cases"], entry["differentiable"], values)
        try:
            torch.save(result, target + ".part")
        except Exception as error:  # too large, or no space left, which the grader looks into
            result = {"values": [{"kind": "raised", "text": first_line(error)}]}
            torch.save(result, target + ".part")
        os.replace(target + ".part", target)  # os.rename replaces no file on Windows


if __name__ == "__main__":
    main(*sys.argv[1:5])
