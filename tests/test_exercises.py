"""Every exercise: the reference and the loops pass, each mutant fails and is named, a stub is not
attempted; and the checker's feedback in its order."""

import inspect

import pytest
import torch

from nanosd3.exercises import EXERCISES, check
from nanosd3.exercises.checker import close, judge
from nanosd3.exercises.worker import copies

MUTANTS = [(e, m) for e in EXERCISES.values() for m in e.mutants]


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_entries(exercise):
    assert exercise.names == tuple(inspect.signature(exercise.specification).parameters)
    assert 3 <= len(exercise.mutants) <= 6 and exercise.points > 0
    assert exercise.difficulty in (1, 2, 3) and len(exercise.names) == len(
        exercise.drawn()[0].arguments
    )
    assert f"def {exercise.name}(" in exercise.signature
    labels = [case.label for case in exercise.drawn()]
    assert len(set(labels)) == len(labels) >= 2
    hints = [m.hint for m in exercise.mutants]
    assert len(set(hints)) == len(hints) and all(hint.endswith((".", "?")) for hint in hints)


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_reference_and_specification_pass(exercise):
    verdict = judge(exercise, exercise.reference)
    assert (verdict.status, verdict.points) == ("right", exercise.points), verdict.message
    assert exercise.why in verdict.message and exercise.where in verdict.message
    for case in exercise.drawn():
        spec = exercise.specification(*copies(case.arguments))
        expected = exercise.reference(*copies(case.arguments))
        assert close(spec, expected, max(exercise.tolerance, 1e-5)), case.label


@pytest.mark.parametrize(("exercise", "mutant"), MUTANTS, ids=lambda x: x.name)
def test_mutants_fail_and_are_named(exercise, mutant):
    verdict = judge(exercise, mutant.answer)
    assert (verdict.status, verdict.points) == ("wrong", 0)
    assert verdict.message.endswith(mutant.hint), verdict.message


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_stubs_are_not_attempted(exercise):
    def stub(*_):
        raise NotImplementedError("your code here")

    for answer in (stub, lambda *_: None, lambda *_: ...):
        assert judge(exercise, answer).status == "not attempted"


LINE = EXERCISES["interpolate"]


def raises(x0, noise, t):
    return x0 @ noise + undefined_name  # noqa: F821


def a_list(x0, noise, t):
    return [x0]


def not_a_tensor(x0, noise, t):
    return 3.0


def one_dimension_too_many(x0, noise, t):
    return LINE.reference(x0, noise, t)[None]


def detached(x0, noise, t):
    return LINE.reference(x0.detach(), noise, t)


def no_gradient(x0, noise, t):
    return torch.tensor(LINE.reference(x0, noise, t).tolist(), dtype=x0.dtype)


def float_only(x0, noise, t):
    return LINE.reference(x0, noise, t).float()


def on_the_cpu(x0, noise, t):
    return LINE.reference(x0, noise, t) + torch.zeros(x0.shape, dtype=x0.dtype)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raises, "raised"),
        (a_list, "returned list"),
        (not_a_tensor, "returned float 3.0, expected a tensor of shape (2, 3, 4, 5)"),
        (one_dimension_too_many, "shape: got (1, 2, 3, 4, 5), expected (2, 3, 4, 5)"),
        (detached, "gradient: the values are right, but not the gradient with respect to x0"),
        (no_gradient, "gradient: none can be taken through the answer"),
        (float_only, "dtype: for float64 inputs the result should be torch.float64"),
        (on_the_cpu, "device: fails for tensors that are not on the CPU"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_feedback(answer, message):
    verdict = judge(LINE, answer)
    assert verdict.status == "wrong"
    assert message in verdict.message


def test_damaged_inputs_are_seen():
    def answer(x0, noise):
        v = noise - x0
        x0.data.zero_()
        return v

    message = judge(EXERCISES["velocity_target"], answer).message
    assert message == "in place: x0 was changed by the call; work on a new tensor instead"


def test_a_raised_error_shows_the_line():
    def broken(x0, noise, t):
        return x0.view(10_000)  # the student's line

    message = judge(LINE, broken).message
    assert "raised RuntimeError in line" in message and "the student's line" in message


def test_right_for_some_cases_is_said():
    def only_images(x0, noise, t):
        return LINE.reference(x0, noise, t) if x0.ndim == 4 else x0

    message = judge(LINE, only_images).message
    assert message.startswith("values: right for: images (2, 3, 4, 5); wrong for: points (7, 2)")


def test_check_prints(capsys):
    check("interpolate", LINE.reference)
    check("interpolate", lambda *_: None)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("✓ interpolate (1/1): ") and said[1].startswith("· interpolate (0/1)")
    with pytest.raises(KeyError, match="no exercise 'x'; there are interpolate"):
        check("x", LINE.reference)
