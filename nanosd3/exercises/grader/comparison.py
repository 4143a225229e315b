"""Compare results with those expected, and describe how they differ."""

import torch
from torch import Tensor

from nanosd3.exercises.grader.recording import flat

REFUSED = object()  # stands for the result where a function raises an error


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"an object of type {value.get('type')}"
    if isinstance(value, tuple | list) and any(isinstance(x, Tensor) for x in value):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(describe, value))})"
    return f"{type(value).__name__} {value!r:.60}"


def kind_of(value: object) -> str:
    """The type name; int and float both count as "number"."""
    return "number" if isinstance(value, int | float) else type(value).__name__


def close(got: object, expected: object, tolerance: float, exact_zeros: bool = False) -> bool:
    """Whether two results agree; NaNs are equal, since a mutant may produce them."""
    if got is REFUSED or expected is REFUSED:
        return got is expected
    if len(flat(got)) != len(flat(expected)):
        return False
    for x, y in zip(flat(got), flat(expected), strict=True):
        if isinstance(y, Tensor):
            if not isinstance(x, Tensor) or x.shape != y.shape:
                return False
            a, b = x.double(), y.double()
            if not torch.allclose(a, b, atol=tolerance, rtol=tolerance, equal_nan=True):
                return False
            if exact_zeros and a[b == 0].any():
                return False
        elif isinstance(y, float) and kind_of(x) == "number":
            both_nan = x != x and y != y
            if not (both_nan or abs(x - y) <= tolerance * max(1, abs(y))):
                return False
        elif isinstance(x, Tensor) or x != y:
            return False
    return True


def difference(label: str, pairs: list[list], tolerance: float) -> str:
    """How results (got, expected) differ; the label is that of the first pair."""
    parts = [p for got, wanted in pairs for p in zip(flat(got), flat(wanted), strict=False)]
    if not all(isinstance(x, Tensor | int | float) for part in parts for x in part):
        return f"For {label}: {describe(pairs[0][0])}, expected {describe(pairs[0][1])}."
    sides = zip(*parts, strict=True)
    got, expected = ([torch.as_tensor(x).double().flatten() for x in side] for side in sides)
    x, y = torch.cat(got), torch.cat(expected)
    if not x.isfinite().all():
        return "Some values are NaN or infinite: is there a division by 0, or a root below 0?"
    factor, offset = float(x @ y / (y @ y)), float((x - y).mean())
    if abs(factor - 1) > 1e-3 and close(x, factor * y, tolerance):
        return f"All values are {factor:.4g} times those expected."
    if close(x, y + offset, tolerance):
        return f"All values are off by {offset:.4g}."
    if all(close(a.sort()[0], b.sort()[0], tolerance) for a, b in zip(got, expected, strict=True)):
        return "These are the right values, in another order: which axis goes where?"
    a, b = (torch.as_tensor(x).double() for x in parts[0])
    apart = ~torch.isclose(a, b, tolerance, tolerance)
    index = tuple((apart if apart.any() else a == a).nonzero()[0].tolist())
    share = f"{int(apart.sum())} of {a.numel()} values differ for {label}"
    where = f"at {list(index)} it is {a[index]:.4g}, not {b[index]:.4g}"
    return f"Compare with the specification: {share}; {where}."
