"""Checking an answer: what is wrong, in the order in which one would want to know.

Not attempted; raised, with the student's own line; another type; another shape; other values,
with the mistake that behaves the same if there is one in the list, else with the cases that are
right; no gradient, or a wrong one; inputs damaged; float64 or another device not kept. The
first finding ends the check. A right answer is told why it matters and where it stands.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosd3.exercises.base import Case, Exercise


@dataclass(frozen=True)
class Verdict:
    """What came of one answer."""

    name: str
    status: str  # "right", "wrong" or "not attempted"
    points: int
    out_of: int
    message: str


class Finding(Exception):
    """Carries the message of the first finding."""


class Stub(Exception):
    pass


def judge(exercise: Exercise, answer: Callable) -> Verdict:
    """Check one answer. Never raises for what the answer does, Ctrl-C excepted."""
    status, points = "wrong", 0
    try:
        cases = exercise.drawn()
        check_values(exercise, answer, cases)
        if exercise.differentiable:
            check_gradient(exercise, answer, cases[0])
        check_inputs_are_kept(exercise, answer, cases[0])
        check_dtype_and_device(exercise, answer, cases[0])
        status, points = "right", exercise.points
        message = f"{exercise.why} In the package: {exercise.where}."
    except Stub:
        status, message = "not attempted", "not attempted yet"
    except Finding as finding:
        message = str(finding)
    return Verdict(exercise.name, status, points, exercise.points, message)


def call(answer: Callable, case: Case, dtype: torch.dtype | None = None) -> object:
    """The answer to a case. Raises Stub for a stub, Finding for what it raises."""
    try:
        result = answer(*case.fresh(dtype))
    except NotImplementedError as error:
        if not str(error) or "your code" in str(error).lower():
            raise Stub from None
        raise Finding(raised(error, case)) from None
    except (Exception, SystemExit) as error:
        raise Finding(raised(error, case)) from None
    if result is None or result is ...:
        raise Stub
    return result


def raised(error: BaseException, case: Case) -> str:
    """The error and the student's own line, the last one that is not inside a library."""
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and "nanosd3" not in frame.filename
    ]  # fmt: skip
    place = f' in line {own[-1].lineno}: "{own[-1].line}"' if own else ""
    text = (str(error).splitlines() or [""])[0]
    return f"raised {type(error).__name__}{place}: {text} (input: {case.label})"


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"


def flat(value: object) -> list:
    """A result as a list of leaves: of a tuple or list, its elements."""
    return list(value) if isinstance(value, tuple | list) else [value]


def check_form(got: object, expected: object, case: Case) -> None:
    """Type and shape."""
    if isinstance(got, tuple | list) != isinstance(expected, tuple | list):
        raise Finding(f"returned {describe(got)}, expected {describe(expected)} "
                      f"(input: {case.label})")  # fmt: skip
    a, b = flat(got), flat(expected)
    if len(a) != len(b):
        raise Finding(f"returned {len(a)} values, expected {len(b)} (input: {case.label})")
    for x, y in zip(a, b, strict=True):
        if isinstance(y, Tensor) != isinstance(x, Tensor):
            raise Finding(f"returned {describe(x)}, expected {describe(y)} (input: {case.label})")
        if isinstance(y, Tensor) and x.shape != y.shape:
            raise Finding(
                f"shape: got {tuple(x.shape)}, expected {tuple(y.shape)} (input: {case.label})"
            )


def close(got: object, expected: object, tolerance: float) -> bool:
    for x, y in zip(flat(got), flat(expected), strict=True):
        if isinstance(y, Tensor):
            if not isinstance(x, Tensor) or x.shape != y.shape:
                return False
            if not torch.allclose(x.double(), y.double(), atol=tolerance, rtol=tolerance):
                return False
        elif isinstance(y, float):
            if not isinstance(x, int | float) or abs(x - y) > tolerance * max(1, abs(y)):
                return False
        elif x != y:
            return False
    return True


def check_values(exercise: Exercise, answer: Callable, cases: list[Case]) -> None:
    results = []
    for case in cases:
        got, expected = call(answer, case), exercise.reference(*case.fresh())
        check_form(got, expected, case)
        results.append((case, got, close(got, expected, exercise.tolerance)))
    wrong = [case.label for case, _, right in results if not right]
    if not wrong:
        return
    hint = hint_of(exercise, results)
    right = [case.label for case, _, right in results if right]
    place = f"right for: {', '.join(right)}; wrong for: {', '.join(wrong)}" if right else ""
    raise Finding(
        "values: " + " ".join(filter(None, [f"{place}." if place else "", hint]))
        if place or hint
        else f"values: not those expected (input: {wrong[0]}); compare with the specification"
    )


def hint_of(exercise: Exercise, results: list[tuple[Case, object, bool]]) -> str:
    """What to say of the mutant that gives the same answers to all cases; "" if there is none."""
    for mutant in exercise.mutants:
        try:
            answers = [mutant.answer(*case.fresh()) for case, _, _ in results]
        except Exception:  # a mutant may not take every case
            continue
        pairs = zip(results, answers, strict=True)
        if all(close(got, theirs, exercise.tolerance) for (_, got, _), theirs in pairs):
            return mutant.hint
    return ""


def check_gradient(exercise: Exercise, answer: Callable, case: Case) -> None:
    """The gradient of the sum of squares of the result, with respect to every float input."""

    def gradients(function: Callable) -> list[Tensor | None]:
        arguments = case.fresh(torch.float64)
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_()
        total = sum(x.square().sum() for x in flat(function(*arguments)) if isinstance(x, Tensor))
        return torch.autograd.grad(total, leaves, allow_unused=True)

    expected = gradients(exercise.reference)
    try:
        got = gradients(answer)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise Finding(f"gradient: none can be taken through the answer ({text}); is a tensor "
                    "turned into numbers, detached or changed in place?") from None  # fmt: skip
    for name, x, y in zip(exercise.names or map(str, range(9)), got, expected, strict=False):
        if y is not None and (x is None or not torch.allclose(x, y, atol=1e-6, rtol=1e-5)):
            raise Finding(f"gradient: the values are right, but not the gradient with respect to "
                        f"{name}; is something detached?")  # fmt: skip


def check_inputs_are_kept(exercise: Exercise, answer: Callable, case: Case) -> None:
    before, arguments = case.fresh(), case.fresh()
    answer(*arguments)
    for i, (x, y) in enumerate(zip(arguments, before, strict=True)):
        if isinstance(x, Tensor) and not torch.equal(x, y):
            name = exercise.names[i] if i < len(exercise.names) else f"argument {i + 1}"
            raise Finding(f"in place: {name} was changed by the call; work on a new tensor instead")


def check_dtype_and_device(exercise: Exercise, answer: Callable, case: Case) -> None:
    expected = flat(exercise.reference(*case.fresh(torch.float64)))
    for x, y in zip(flat(call(answer, case, torch.float64)), expected, strict=True):
        if isinstance(y, Tensor) and x.dtype != y.dtype:
            raise Finding(f"dtype: for float64 inputs the result should be {y.dtype}, got "
                        f"{x.dtype}; do new tensors take the type of the inputs?")  # fmt: skip
    if not exercise.other_devices:
        return
    elsewhere = [a.to("meta") if isinstance(a, Tensor) else a for a in case.fresh()]
    try:
        result = flat(answer(*elsewhere))
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise Finding(f"device: fails for tensors that are not on the CPU ({text}); do new tensors "
                    "take the device of the inputs?") from None  # fmt: skip
    if any(isinstance(x, Tensor) and x.device.type != "meta" for x in result):
        raise Finding("device: the result is not where the inputs are")
