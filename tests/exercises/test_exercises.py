"""Every exercise: reference and specification pass, each mutant fails and gets its hint, a stub
counts as not attempted. And the checker's feedback, in its order."""

import fractions
import inspect

import numpy as np
import pytest
import torch

from nanosd3.exercises import EXERCISES, check
from nanosd3.exercises.grader.checker import assess, close, judge, result_of
from nanosd3.exercises.grader.recording import record, record_values
from nanosd3.related.consistency import huber_constant, pseudo_huber, teacher_step

MUTANTS = [(e, m) for e in EXERCISES.values() for m in e.mutants]


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_entries(exercise):
    assert exercise.names == tuple(inspect.signature(exercise.specification).parameters)
    assert 3 <= len(exercise.mutants) <= 12 and exercise.points > 0
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
        spec = result_of(exercise.specification, case)
        expected = result_of(exercise.reference, case)
        assert close(spec, expected, max(exercise.tolerance, 1e-5)), case.label


@pytest.mark.parametrize(("exercise", "mutant"), MUTANTS, ids=lambda x: x.name)
def test_mutants_fail_with_their_hint(exercise, mutant):
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
        (a_list, "returned a list of 1 (a tensor of shape (2, 3, 4, 5)), expected a tensor"),
        (not_a_tensor, "returned float 3.0, expected a tensor of shape (2, 3, 4, 5)"),
        (one_dimension_too_many, "shape: got (1, 2, 3, 4, 5), expected (2, 3, 4, 5)"),
        (detached, "gradient: the values are right, but no gradient reaches x0"),
        (no_gradient, "gradient: cannot be computed through the answer"),
        (float_only, "dtype: for float64 inputs the result should be torch.float64"),
        (on_the_cpu, "device: fails for tensors that are not on the CPU"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_feedback(answer, message):
    verdict = judge(LINE, answer)
    assert verdict.status == "wrong"
    assert message in verdict.message


def test_modified_inputs_are_detected():
    def answer(x0, noise):
        v = noise - x0
        x0.data.zero_()
        return v

    message = judge(EXERCISES["velocity_target"], answer).message
    assert message == "in place: x0 was modified by the call; work on a copy"


def test_a_raised_error_shows_the_line():
    def broken(x0, noise, t):
        return x0.view(10_000)  # the student's line

    message = judge(LINE, broken).message
    assert "raised RuntimeError in line" in message and "the student's line" in message


def test_feedback_lists_the_right_cases():
    def only_images(x0, noise, t):
        return LINE.reference(x0, noise, t) if x0.ndim == 4 else x0

    message = judge(LINE, only_images).message
    assert message.startswith("values: right for: images (2, 3, 4, 5). Wrong for: points (7, 2); ")


def destroys_later_inputs(x0, noise, t):
    z = LINE.reference(x0, noise, t)
    if x0.ndim == 2:
        x0.zero_()
    return z


def always_double(x0, noise, t):
    return LINE.reference(x0, noise, t).double()


def returns_none_sometimes(x0, noise, t):
    if t.ndim:
        return LINE.reference(x0, noise, t)
    return None


def views(x0, noise, t):
    z = LINE.reference(x0, noise, t)
    return x0.view(-1).view(x0.shape) * 0 + z


@pytest.mark.parametrize(("answer", "message"), [
    (destroys_later_inputs, "in place: x0 was modified"),
    (always_double, "the result should be torch.float32, got torch.float64"),
    (returns_none_sometimes, "returned None; is a return missing? (input: one time for all)"),
    (views, "not contiguous in memory, as after a transpose; reshape accepts them, view does not"),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_mistakes_that_only_some_calls_show(answer, message):
    verdict = judge(LINE, answer)
    assert verdict.status == "wrong" and message in verdict.message, verdict.message


def test_a_second_call_must_give_the_same():
    exercise, total = EXERCISES["accumulate_gradient"], {}

    def keeps_accumulating(weight, x0, noise, t, size):
        gradient = exercise.reference(weight, x0, noise, t, size)
        total[weight.shape] = total.get(weight.shape, 0) + gradient
        return total[weight.shape].to(weight.dtype)

    assert "a second call" in judge(exercise, keeps_accumulating).message


def test_a_target_that_moves_is_found_by_its_gradient():
    """The same loss, but the target is trained as well."""

    def distillation_loss(student, teacher, z, t, s):
        z_s = teacher_step(teacher, z, t, s)
        answer, target = z - t * student(z, t), z_s - s * student(z_s, s)
        return pseudo_huber(answer, target, huber_constant(z[0].numel()))

    message = judge(EXERCISES["distillation_loss"], distillation_loss).message
    assert message.startswith("gradient: the values are right, but the gradient with respect to z")


@pytest.mark.parametrize("name", ["train_bpe", "best_split"])
def test_modified_dictionaries_are_detected(name):
    exercise = EXERCISES[name]

    def clears(first, second):
        result = exercise.reference(first, second)
        (first if isinstance(first, dict) else second).clear()
        return result

    assert judge(exercise, clears).message.startswith("in place: ")


@pytest.mark.parametrize("name", ["learning_rate", "frechet_distance"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", True])
def test_strange_numbers_are_wrong(name, value):
    assert judge(EXERCISES[name], lambda *_: [value][0]).points == 0


def test_numpy_numbers_are_numbers():
    rate = EXERCISES["learning_rate"]
    assert judge(rate, lambda *a: np.float64(rate.reference(*a))).status == "right"
    assert judge(rate, lambda *a: fractions.Fraction(rate.reference(*a))).status == "right"


def test_unusual_right_answers():
    """Reading tensor values in Python is no mistake, nor is `where` instead of a product."""

    def euler(velocity, z, ts):
        for i in range(len(ts) - 1):
            z = z + (float(ts[i + 1]) - float(ts[i])) * velocity(z, ts[i])
        return z

    def repaint(v, mask, x0, noise):
        return torch.where(mask.bool(), v, noise - x0)

    def pool_at_end(states, ids, end):
        return torch.stack([s[row.tolist().index(end)] for s, row in zip(states, ids, strict=True)])

    def attention(q, k, v):
        weights = (q.float() @ k.float().mT / 8).softmax(-1).to(q.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)

    for answer in (euler, repaint, pool_at_end, attention):
        verdict = judge(EXERCISES[answer.__name__], answer)
        assert verdict.status == "right", verdict.message


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_short_records_are_worth_nothing(exercise):
    """Records with fewer calls than there are cases, with none, or of another type."""
    cases = [c.arguments for c in exercise.drawn()]
    values = record_values(exercise.reference, cases)
    whole = record(exercise.reference, cases, exercise.differentiable, values)
    assert assess(exercise, whole).status == "right"
    for key in whole:
        for wrong in ([], {}, None, whole[key][:1] if isinstance(whole[key], list) else 3):
            if not (key == "gradients" and not exercise.differentiable) and wrong != whole[key]:
                assert assess(exercise, whole | {key: wrong}).points == 0 or (
                    key in ("devices", "gradients")
                ), key


def test_check_prints(capsys):
    check("interpolate", LINE.reference)
    check("interpolate", lambda *_: None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✓ interpolate (1/1): ")
    assert lines[1] == "nanosd3/flow.py, interpolate." and lines[2].startswith(
        "· interpolate (0/1)"
    )
    with pytest.raises(KeyError, match="no exercise 'x'; choose from interpolate"):
        check("x", LINE.reference)
