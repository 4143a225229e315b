"""Judging an answer from its record: what is wrong, in the order in which one wants to know.

Not attempted; raised, with the student's own line; another type; another shape; other values,
with the mistake that behaves the same if there is one in the list, else with the cases that are
right; no gradient, or a wrong one; inputs damaged; a second call, or inputs with other strides,
that give something else; float64 or another device not kept. The first finding ends the check. A
right answer is told why it matters and where it stands.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.exercises.base import Case, Exercise
from nanosd3.exercises.worker import copies, flat, gradients, record, storable


@dataclass(frozen=True)
class Verdict:
    """What came of one answer."""

    name: str
    status: str  # "right", "wrong" or "not attempted"
    points: int
    out_of: int
    message: str


class Finding(Exception):
    """Carries the message of the first thing that is wrong."""


class Stub(Exception):
    """Not attempted."""


def judge(exercise: Exercise, answer: Callable) -> Verdict:
    """Check one answer, here and now."""
    cases = [case.arguments for case in exercise.drawn()]
    return assess(exercise, record(answer, cases, exercise.differentiable))


def assess(exercise: Exercise, found: dict) -> Verdict:
    """The verdict on what `record` wrote down. Never raises for what the record holds."""
    status, points = "wrong", 0
    try:
        cases = exercise.drawn()
        check_values(exercise, cases, found["values"])
        check_gradient(exercise, cases[0], found["gradients"])
        check_inputs_are_kept(exercise, cases, found["after"])
        check_other_calls(exercise, cases, found)
        check_dtype_and_device(exercise, cases[0], found)
        status, points = "right", exercise.points
        message = f"{exercise.why} In the package: {exercise.where}."
    except Stub:
        status, message = "not attempted", "not attempted yet"
    except Finding as finding:
        message = str(finding)
    except Exception as error:  # a record that no honest answer leaves
        message = f"the record of this answer makes no sense ({type(error).__name__})"
    return Verdict(exercise.name, status, points, exercise.points, message)


def value_of(entry: dict, case: Case) -> object:
    """The value of a call. Raises Stub for a stub, Finding for what it raised."""
    if entry["kind"] == "not attempted":
        raise Stub
    if entry["kind"] == "broken":
        raise Finding(f"not defined: running the file ended before, with {entry['text']}")
    if entry["kind"] == "raised":
        raise Finding(f"raised {entry['text']} (input: {case.label})")
    if entry["value"] is None:
        raise Finding(f"returned None; is a return missing? (input: {case.label})")
    return entry["value"]


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"an object of type {value.get('type')}"
    if isinstance(value, tuple | list) and any(isinstance(x, Tensor) for x in value):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(describe, value))})"
    return f"{type(value).__name__} {value!r:.60}"


def check_form(got: object, expected: object, case: Case) -> None:
    """Type and shape."""
    a, b = flat(got), flat(expected)
    place = f"(input: {case.label})"
    counted = len(a) != len(b) and any(isinstance(y, Tensor) for y in b)
    if isinstance(got, tuple | list) != isinstance(expected, tuple | list) or counted:
        raise Finding(f"returned {describe(got)}, expected {describe(expected)} {place}")
    for n, (x, y) in enumerate(zip(a, b, strict=False)):  # lists of symbols may differ in length
        which = f" of result {n + 1}" if len(b) > 1 else ""
        if kind_of(x) != kind_of(y):
            raise Finding(f"returned {describe(x)}, expected {describe(y)} {place}")
        if isinstance(y, Tensor) and x.shape != y.shape:
            raise Finding(f"shape{which}: got {tuple(x.shape)}, expected {tuple(y.shape)} {place}")


def kind_of(value: object) -> str:
    """Numbers are of one kind, whole or not."""
    return "number" if isinstance(value, int | float) else type(value).__name__


def close(got: object, expected: object, tolerance: float) -> bool:
    if len(flat(got)) != len(flat(expected)):
        return False
    for x, y in zip(flat(got), flat(expected), strict=True):
        if isinstance(y, Tensor):
            if not isinstance(x, Tensor) or x.shape != y.shape:
                return False
            near = {"atol": tolerance, "rtol": tolerance, "equal_nan": True}  # as a mutant's may be
            if not torch.allclose(x.double(), y.double(), **near):
                return False
        elif isinstance(y, float) and kind_of(x) == "number":
            both_nan = x != x and y != y
            if not (both_nan or abs(x - y) <= tolerance * max(1, abs(y))):
                return False
        elif x != y:
            return False
    return True


def check_values(exercise: Exercise, cases: list[Case], entries: list[dict]) -> None:
    results = []
    for case, entry in zip(cases, entries, strict=False):
        got, expected = value_of(entry, case), exercise.reference(*copies(case.arguments))
        results.append((case, got, expected))
    if len(results) != len(cases):
        raise ValueError("a record of fewer calls than there were")
    for case, got, expected in results:
        try:
            check_form(got, expected, case)
        except Finding as finding:
            raise Finding(f"{finding} {hint_of(exercise, results)}".strip()) from None
    judged = [(case, got, close(got, y, exercise.tolerance)) for case, got, y in results]
    wrong = [case.label for case, _, is_right in judged if not is_right]
    right = [case.label for case, _, is_right in judged if is_right]
    if wrong:
        place = f"right for: {'; '.join(right)}. Wrong for: {'; '.join(wrong)}." if right else ""
        hint = hint_of(exercise, judged) or ("" if right else "Compare with the specification.")
        raise Finding(f"values: {place} {hint}".replace("  ", " ").strip())
    for case, got, expected in results:
        check_dtype(got, expected, f"for these inputs ({case.label})")


def check_dtype(got: object, expected: object, when: str) -> None:
    for x, y in zip(flat(got), flat(expected), strict=True):
        if isinstance(y, Tensor) and x.dtype != y.dtype:
            raise Finding(f"dtype: {when} the result should be {y.dtype}, got {x.dtype}")


def hint_of(exercise: Exercise, results: list[tuple[Case, object, object]]) -> str:
    """What to say of the mutant that gives the same answers to all cases; "" if there is none."""
    for mutant in exercise.mutants:
        try:
            answers = [mutant.answer(*copies(case.arguments)) for case, _, _ in results]
        except Exception:  # a mutant may not take every case
            continue
        pairs = zip(results, answers, strict=True)
        if all(close(got, theirs, exercise.tolerance) for (_, got, _), theirs in pairs):
            return mutant.hint
    return ""


def check_gradient(exercise: Exercise, case: Case, got: list | dict | None) -> None:
    if not exercise.differentiable:
        return
    if isinstance(got, dict):
        raise Finding(f"gradient: none can be taken through the answer ({got['error']}); is a "
                      "tensor turned into numbers, detached or changed in place?")  # fmt: skip
    names = [
        name for name, a in zip(exercise.names, case.arguments, strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]  # fmt: skip
    expected = gradients(exercise.reference, case.arguments)
    for name, x, y in zip(names, got, expected, strict=True):
        if y is None or name in exercise.constants:
            continue
        if x is None:
            raise Finding(f"gradient: the values are right, but none reaches {name}; is something "
                          "detached?")  # fmt: skip
        if x.shape != y.shape or not torch.allclose(x, y, atol=1e-4, rtol=1e-4):
            raise Finding(f"gradient: the values are right, but the gradient for {name} is "
                          "another; is something detached, or rounded?")  # fmt: skip


def check_inputs_are_kept(exercise: Exercise, cases: list[Case], after: list) -> None:
    for case, entries in zip(cases, after, strict=True):
        before = [None if callable(a) else storable(a) for a in copies(case.arguments)]
        for name, x, y in zip(exercise.names, entries, before, strict=True):
            same = torch.equal(x, y) if isinstance(y, Tensor) else x == y
            if not same:
                raise Finding(f"in place: {name} was changed by the call; work on a copy")


def check_other_calls(exercise: Exercise, cases: list[Case], found: dict) -> None:
    """A second call, and inputs that lie otherwise in memory, should give the same."""
    for kind, message in (
        ("again", "a second call with the same input gives another result; is something kept "
                  "from the first?"),
        ("transposed", "fails for inputs that lie otherwise in memory, as after a transpose; "
                       "reshape takes them, view does not"),
    ):  # fmt: skip
        for case, entry in zip(cases, found[kind], strict=True):
            expected = exercise.reference(*copies(case.arguments))
            right = entry["kind"] == "value"
            if not right or not close(entry["value"], expected, exercise.tolerance):
                reason = f" ({entry['text']})" if entry["kind"] == "raised" else ""
                raise Finding(message + reason)


def check_dtype_and_device(exercise: Exercise, case: Case, found: dict) -> None:
    expected = exercise.reference(*copies(case.arguments, torch.float64))
    got = value_of(found["double"], case)
    check_form(got, expected, case)
    check_dtype(got, expected, "for float64 inputs")
    if not exercise.other_devices:
        return
    devices = found["devices"]
    if isinstance(devices, dict):  # to ask for a value is not possible there, but no mistake
        if "device" in devices["error"] and "item()" not in devices["error"]:
            raise Finding(f"device: fails for tensors that are not on the CPU ({devices['error']})"
                          "; do new tensors take the device of the inputs?")  # fmt: skip
    elif any(device != "meta" for device in devices):
        raise Finding("device: the result is not where the inputs are")
