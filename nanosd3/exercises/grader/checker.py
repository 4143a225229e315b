"""Judge an answer from its record and report the first thing that is wrong.

The checks, most helpful first: not attempted; an exception, with the student's own line; type;
shape; values, with the hint of the first mutant that gives the same results, else in what way they
differ; loops over elements; the gradient; inputs modified in place; a second call or non-contiguous
inputs giving another result; dtype and device not kept. A right answer is told why it matters and
where it is in the package.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.exercises.grader.comparison import REFUSED, close, describe, difference, kind_of
from nanosd3.exercises.grader.exercise import Case, Exercise
from nanosd3.exercises.grader.recording import (
    LINES,
    Field,
    attempt,
    copies,
    default_settings,
    flat,
    gradients,
    record,
    record_values,
    storable,
)

Result = tuple[Case, object, object]  # of a call: its case, what it gave, what was expected


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


@torch.random.fork_rng(devices=[])
@default_settings()
def judge(exercise: Exercise, answer: Callable) -> Verdict:
    """Check one answer in this process: its values, and if they are right, everything else. The
    caller's random numbers are not affected by draws, nor by an answer that sets a seed."""
    cases = [case.arguments for case in exercise.drawn()]
    values = record_values(answer, cases)
    verdict = assess(exercise, values, values_only=True)
    if verdict.status != "right":
        return verdict
    return assess(exercise, record(answer, cases, exercise.differentiable, values))


@default_settings()
def assess(exercise: Exercise, recorded: dict, values_only: bool = False) -> Verdict:
    """The verdict on a record made by `record`. Never raises, whatever the record holds."""
    status, points = "wrong", 0
    try:
        cases = exercise.drawn()
        check_values(exercise, cases, recorded["values"])
        check_effort(exercise, cases, recorded["values"])
        if not values_only:
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


def result_of(function: Callable, case: Case) -> object:
    """The result of a call, or REFUSED."""
    try:
        return function(*copies(case.arguments))
    except Exception:
        return REFUSED


def value_of(exercise: Exercise, entry: dict, case: Case, expected: object) -> object:
    """The value of a call, or REFUSED. Raises NotAttempted for a stub, Wrong if a value is
    missing that should be there."""
    if entry["kind"] == "not attempted":
        raise NotAttempted
    if entry["kind"] == "broken":
        raise Wrong(f"not defined: the file stopped early with {entry['text']}")
    if entry["kind"] == "raised":
        if expected is REFUSED:
            return REFUSED
        sizes = "size of tensor" in entry["text"] or "expanded size" in entry["text"]
        hint = f" {exercise.size_hint}" if sizes else ""
        raise Wrong(f"raised {entry['text']} (input: {case.label}){hint}")
    if entry["value"] is None:
        raise Wrong(f"returned None; is a return missing? (input: {case.label})")
    return entry["value"]


def check_form(got: object, expected: object, case: Case) -> None:
    """Check type and shape."""
    place = f"(input: {case.label})"
    if got is REFUSED:
        return
    if expected is REFUSED:
        raise Wrong(f"returned {describe(got)} where it should raise an error {place}")
    a, b = flat(got), flat(expected)
    tensors = any(isinstance(y, Tensor) for y in b)
    same_type = isinstance(got, tuple | list) == isinstance(expected, tuple | list)
    if not tensors:  # a tuple of symbols is a key of a dictionary, a list is not
        same_type = isinstance(got, tuple) == isinstance(expected, tuple) and same_type
    if not same_type or (tensors and len(a) != len(b)):
        raise Wrong(f"returned {describe(got)}, expected {describe(expected)} {place}")
    for n, (x, y) in enumerate(zip(a, b, strict=False)):  # lists of symbols may differ in length
        which = f" of result {n + 1}" if len(b) > 1 else ""
        if kind_of(x) != kind_of(y):
            raise Wrong(f"returned {describe(x)}, expected {describe(y)} {place}")
        if isinstance(y, Tensor) and x.shape != y.shape:
            raise Wrong(f"shape{which}: got {tuple(x.shape)}, expected {tuple(y.shape)} {place}")


def check_values(exercise: Exercise, cases: list[Case], entries: list[dict]) -> None:
    """Compare the values of all cases with the reference."""
    results = []
    for case, entry in zip(cases, entries, strict=False):
        expected = result_of(exercise.reference, case)
        results.append((case, value_of(exercise, entry, case, expected), expected))
    check_results(exercise, [result for result in results if result[2] is not REFUSED])
    check_results(exercise, [result for result in results if result[2] is REFUSED])


def check_results(exercise: Exercise, results: list[Result]) -> None:
    """Compare results with those expected: form, then values, then dtype."""
    for case, got, expected in results:
        try:
            check_form(got, expected, case)
        except Wrong as error:
            raise Wrong(f"{error} {hint_of(exercise, results)}".strip()) from None
    right: list[str] = []  # labels of cases
    wrong = []
    for case, got, expected in results:
        if close(got, expected, exercise.tolerance, exercise.exact_zeros):
            right.append(case.label)
        else:
            wrong.append((case, got, expected))
    if wrong:
        labels = "; ".join(case.label for case, _, _ in wrong)
        place = f"right for: {'; '.join(right)}. Wrong for: {labels}." if right else ""
        hint = hint_of(exercise, results) or difference(
            wrong[0][0].label, [pair for _, *pair in wrong], exercise.tolerance
        )
        raise Wrong(f"values: {place} {hint}".replace("  ", " ").strip())
    for case, got, expected in results:
        check_dtype(got, expected, f"for these inputs ({case.label})")


def check_effort(exercise: Exercise, cases: list[Case], entries: list[dict]) -> None:
    """Check that the answer does not loop over elements, nor call the network too often."""
    for case, entry in zip(cases, entries, strict=False):
        if (limit := case.lines or LINES) < entry["lines"]:
            raise Wrong(
                f"speed: the values are right, but for {case.label} more than {limit} lines of "
                f"Python are run. {exercise.slow_hint}"
            )
        arguments = copies(case.arguments)
        attempt(exercise.reference, *arguments)
        calls = sum(a.calls for a in arguments if isinstance(a, Field))
        if entry["calls"] > calls:
            raise Wrong(
                f"speed: the values are right, but for {case.label} velocity is called "
                f"{entry['calls']} times instead of {calls}; each call runs the whole network"
            )
    if len(entries) != len(cases):
        raise ValueError("the record holds too few calls")


def check_dtype(got: object, expected: object, when: str) -> None:
    for x, y in zip(flat(got), flat(expected), strict=True):
        if isinstance(y, Tensor) and x.dtype != y.dtype:
            raise Wrong(f"dtype: {when} the result should be {y.dtype}, got {x.dtype}")


def hint_of(exercise: Exercise, results: list[Result]) -> str:
    """The hint of the first mutant with the same results on all cases; else of the first that
    differs in only one and shares two wrong ones, such as LayerNorm with another epsilon; else "".
    """
    tolerance, nearly = exercise.tolerance, ""
    for mutant in exercise.mutants:
        shared = [
            not close(got, expected, tolerance)
            for case, got, expected in results
            if close(got, result_of(mutant.answer, case), 10 * tolerance)
        ]
        if len(shared) == len(results):
            return mutant.hint
        if len(shared) == len(results) - 1 and sum(shared) >= 2:
            nearly = nearly or mutant.hint
    return nearly


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
            expected = result_of(exercise.reference, case)
            got = entry["value"] if entry["kind"] == "value" else REFUSED
            if not close(got, expected, exercise.tolerance):
                reason = f" ({entry['text']})" if entry["kind"] == "raised" else ""
                raise Wrong(message + reason)


def check_dtype_and_device(exercise: Exercise, case: Case, recorded: dict) -> None:
    """Check that results keep float64 and the device of the inputs."""
    expected = exercise.reference(*copies(case.arguments, torch.float64))
    got = value_of(exercise, recorded["double"], case, expected)
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
