"""Judge an answer from its record and report the first thing that is wrong.

The checks, in the order in which a student wants to hear of them: not attempted; an exception,
with the student's own line; type; shape; values, with the hint of the first mutant that gives the
same results, else the cases that are right; the gradient; inputs modified in place; a second call
or non-contiguous inputs giving another result; dtype and device not kept. A right answer is told
why it matters and where it is in the package.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise
from nanosd3.exercises.grader.sandbox import copies, flat, gradients, record, storable


@dataclass(frozen=True)
class Verdict:
    """The result of checking one answer."""

    name: str
    status: str  # "right", "wrong", "not attempted"; of whole files also "timed out", "refused"
    points: int
    out_of: int
    message: str


class Wrong(Exception):
    """The answer is wrong; carries the message."""


class NotAttempted(Exception):
    """The answer is still a stub."""


def judge(exercise: Exercise, answer: Callable) -> Verdict:
    """Check one answer in this process."""
    cases = [case.arguments for case in exercise.drawn()]
    return assess(exercise, record(answer, cases, exercise.differentiable))


def assess(exercise: Exercise, recorded: dict) -> Verdict:
    """The verdict on a record made by `record`. Never raises, whatever the record holds."""
    status, points = "wrong", 0
    try:
        cases = exercise.drawn()
        check_values(exercise, cases, recorded["values"])
        check_gradient(exercise, cases[0], recorded["gradients"])
        check_inputs_unmodified(exercise, cases, recorded["after"])
        check_other_calls(exercise, cases, recorded)
        check_dtype_and_device(exercise, cases[0], recorded)
        status, points = "right", exercise.points
        message = f"{exercise.why} In the package: {exercise.where}."
    except NotAttempted:
        status, message = "not attempted", "not attempted yet"
    except Wrong as wrong:
        message = str(wrong)
    except Exception as error:  # a record that no honest answer leaves
        message = f"the record of this answer is invalid ({type(error).__name__})"
    return Verdict(exercise.name, status, points, exercise.points, message)


def value_of(entry: dict, case: Case) -> object:
    """The value of a call. Raises NotAttempted for a stub, Wrong if there is no value."""
    if entry["kind"] == "not attempted":
        raise NotAttempted
    if entry["kind"] == "broken":
        raise Wrong(f"not defined: the file stopped early with {entry['text']}")
    if entry["kind"] == "raised":
        raise Wrong(f"raised {entry['text']} (input: {case.label})")
    if entry["value"] is None:
        raise Wrong(f"returned None; is a return missing? (input: {case.label})")
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
    """Check type and shape."""
    a, b = flat(got), flat(expected)
    place = f"(input: {case.label})"
    counted = len(a) != len(b) and any(isinstance(y, Tensor) for y in b)
    if isinstance(got, tuple | list) != isinstance(expected, tuple | list) or counted:
        raise Wrong(f"returned {describe(got)}, expected {describe(expected)} {place}")
    for n, (x, y) in enumerate(zip(a, b, strict=False)):  # lists of symbols may differ in length
        which = f" of result {n + 1}" if len(b) > 1 else ""
        if kind_of(x) != kind_of(y):
            raise Wrong(f"returned {describe(x)}, expected {describe(y)} {place}")
        if isinstance(y, Tensor) and x.shape != y.shape:
            raise Wrong(f"shape{which}: got {tuple(x.shape)}, expected {tuple(y.shape)} {place}")


def kind_of(value: object) -> str:
    """The type name; int and float both count as "number"."""
    return "number" if isinstance(value, int | float) else type(value).__name__


def close(got: object, expected: object, tolerance: float) -> bool:
    """Whether two results agree; NaNs are equal, since a mutant may produce them."""
    if len(flat(got)) != len(flat(expected)):
        return False
    for x, y in zip(flat(got), flat(expected), strict=True):
        if isinstance(y, Tensor):
            if not isinstance(x, Tensor) or x.shape != y.shape:
                return False
            a, b = x.double(), y.double()
            if not torch.allclose(a, b, atol=tolerance, rtol=tolerance, equal_nan=True):
                return False
        elif isinstance(y, float) and kind_of(x) == "number":
            both_nan = x != x and y != y
            if not (both_nan or abs(x - y) <= tolerance * max(1, abs(y))):
                return False
        elif x != y:
            return False
    return True


def check_values(exercise: Exercise, cases: list[Case], entries: list[dict]) -> None:
    """Compare the values of all cases with the reference."""
    results = []
    for case, entry in zip(cases, entries, strict=False):
        got, expected = value_of(entry, case), exercise.reference(*copies(case.arguments))
        results.append((case, got, expected))
    if len(results) != len(cases):
        raise ValueError("the record holds too few calls")
    for case, got, expected in results:
        try:
            check_form(got, expected, case)
        except Wrong as error:
            raise Wrong(f"{error} {hint_of(exercise, results)}".strip()) from None
    right: list[str] = []  # labels of cases
    wrong: list[str] = []
    for case, got, expected in results:
        (right if close(got, expected, exercise.tolerance) else wrong).append(case.label)
    if wrong:
        place = f"right for: {'; '.join(right)}. Wrong for: {'; '.join(wrong)}." if right else ""
        hint = hint_of(exercise, results) or ("" if right else "Compare with the specification.")
        raise Wrong(f"values: {place} {hint}".replace("  ", " ").strip())
    for case, got, expected in results:
        check_dtype(got, expected, f"for these inputs ({case.label})")


def check_dtype(got: object, expected: object, when: str) -> None:
    for x, y in zip(flat(got), flat(expected), strict=True):
        if isinstance(y, Tensor) and x.dtype != y.dtype:
            raise Wrong(f"dtype: {when} the result should be {y.dtype}, got {x.dtype}")


def hint_of(exercise: Exercise, results: list[tuple[Case, object, object]]) -> str:
    """The hint of the first mutant with the same results on all cases; "" if there is none."""
    for mutant in exercise.mutants:
        try:
            outputs = [mutant.answer(*copies(case.arguments)) for case, _, _ in results]
        except Exception:  # a mutant may fail on some cases
            continue
        pairs = zip(results, outputs, strict=True)
        if all(close(got, output, exercise.tolerance) for (_, got, _), output in pairs):
            return mutant.hint
    return ""


def check_gradient(exercise: Exercise, case: Case, got: list | dict | None) -> None:
    """Compare the gradients with the reference's, for the first case."""
    if not exercise.differentiable:
        return
    if got is None:
        raise ValueError("the record holds no gradients")
    if isinstance(got, dict):
        raise Wrong(
            f"gradient: cannot be computed through the answer ({got['error']}); is a tensor "
            "converted to numbers, detached or modified in place?"
        )
    names = [
        name
        for name, a in zip(exercise.names, case.arguments, strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    expected = gradients(exercise.reference, case.arguments)
    for name, x, y in zip(names, got, expected, strict=True):
        if y is None or name in exercise.constants:
            continue
        if x is None:
            raise Wrong(
                f"gradient: the values are right, but no gradient reaches {name}; is something "
                "detached?"
            )
        if x.shape != y.shape or not torch.allclose(x, y, atol=1e-4, rtol=1e-4):
            raise Wrong(
                "gradient: the values are right, but the gradient with respect to "
                f"{name} is wrong; is something detached or rounded?"
            )


def check_inputs_unmodified(exercise: Exercise, cases: list[Case], after: list) -> None:
    for case, entries in zip(cases, after, strict=True):
        before = [None if callable(a) else storable(a) for a in copies(case.arguments)]
        for name, x, y in zip(exercise.names, entries, before, strict=True):
            same = torch.equal(x, y) if isinstance(y, Tensor) else x == y
            if not same:
                raise Wrong(f"in place: {name} was modified by the call; work on a copy")


OTHER_CALLS = {
    "again": "a second call with the same input gives a different result; is state kept from the "
    "first call?",
    "transposed": "fails for inputs that are not contiguous in memory, as after a transpose; "
    "reshape accepts them, view does not",
}


def check_other_calls(exercise: Exercise, cases: list[Case], recorded: dict) -> None:
    """Check that a second call and transposed inputs give the same results."""
    for kind, message in OTHER_CALLS.items():
        for case, entry in zip(cases, recorded[kind], strict=True):
            expected = exercise.reference(*copies(case.arguments))
            right = entry["kind"] == "value"
            if not right or not close(entry["value"], expected, exercise.tolerance):
                reason = f" ({entry['text']})" if entry["kind"] == "raised" else ""
                raise Wrong(message + reason)


def check_dtype_and_device(exercise: Exercise, case: Case, recorded: dict) -> None:
    """Check that results keep float64 and the device of the inputs."""
    expected = exercise.reference(*copies(case.arguments, torch.float64))
    got = value_of(recorded["double"], case)
    check_form(got, expected, case)
    check_dtype(got, expected, "for float64 inputs")
    if not exercise.other_devices:
        return
    devices = recorded["devices"]
    if isinstance(devices, dict):  # reading a value fails on the meta device, but is no mistake
        if "device" in devices["error"] and "item()" not in devices["error"]:
            raise Wrong(
                f"device: fails for tensors that are not on the CPU ({devices['error']}); are new "
                "tensors created on the device of the inputs?"
            )
    elif any(device != "meta" for device in devices):
        raise Wrong("device: the result is not on the device of the inputs")
