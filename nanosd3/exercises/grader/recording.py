"""Call answers and record the results; nothing is judged here.

`record` calls an answer on all test cases and stores what happened: return values, exceptions,
gradients, the inputs after the call, and the results of a second call, with transposed inputs, in
float64 and on the meta device. checker.py judges from that record alone, so answers can run in a
separate process (sandbox.py; this file imports nothing from the package), where whatever an answer
patches changes only the values it claims to return.
"""

import contextlib
import copy
import numbers
import os
import site
import sys
import sysconfig
import threading
import traceback
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PACKAGE = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 2))
SITE = os.path.dirname(os.path.dirname(torch.__file__))  # may be the user's own
INSTALLED = (SITE, *site.getsitepackages(), site.getusersitepackages())
LIBRARIES = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), *INSTALLED, "<frozen")
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


def outcome(answer: Callable, arguments: list, first: bool = False) -> dict:
    """The outcome of one call: its value, or what it raised and where; or, of the first call, "not
    attempted", since an answer may refuse what it does not handle as a stub does."""
    try:
        value = answer(*arguments)
        if first and (value is None or value is ...) and is_stub(answer):
            return {"kind": "not attempted"}
        return {"kind": "value", "value": storable(value)}
    except (Exception, SystemExit) as error:
        text = str(error).lower()
        stub = isinstance(error, NotImplementedError) and (not text or "your code" in text)
        if first and stub:
            return {"kind": "not attempted"}
        return {"kind": "raised", "text": describe_error(error)}


def counted(answer: Callable, arguments: list, first: bool) -> dict:
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

    before, in_threads = sys.gettrace(), threading.gettrace()  # a debugger's
    sys.settrace(count)
    threading.settrace(count)
    try:
        result = outcome(answer, arguments, first)
    finally:
        sys.settrace(before)
        threading.settrace(in_threads)  # type: ignore[arg-type]
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
        values.append(counted(answer, copies(arguments), first=not values))
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
