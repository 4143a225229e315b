"""Arguments of the Python interface, validated.

1, np.int64(1) and torch.tensor(1) are the same whole number; strings, floats and booleans
("1", 1.0, True) are rejected.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanosd3.errors import InputError, shown

LARGEST = 14_000  # bits of a whole number; Python refuses to print integers much longer


def scalar(value: object) -> object:
    """The Python value of a NumPy scalar or of an array or tensor (); anything else unchanged."""
    if value is np.ma.masked:
        return value
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        with contextlib.suppress(RuntimeError):  # a tensor on the meta device holds none
            return value.item()
    return value


def whole_number(name: str, value: object) -> int:
    """The value as an int. Raises InputError if it is not a whole number."""
    number = scalar(value)
    if isinstance(number, int) and not isinstance(number, bool):
        if number.bit_length() <= LARGEST:
            return int(number)
    raise InputError(f"{name} must be a whole number, got {shown(value)}")


def positive_number(name: str, value: object) -> int:
    """The value as an int above 0. Raises InputError if it is not one."""
    with contextlib.suppress(InputError):
        if (number := whole_number(name, value)) > 0:
            return number
    raise InputError(f"{name} must be a positive whole number, got {shown(value)}")


def two_sides(name: str, value: object) -> tuple[int, int]:
    """The value as two ints above 0. Raises InputError if it is anything else."""
    with contextlib.suppress(ValueError):  # also if there are more or fewer
        height, width = (positive_number(name, side) for side in several(name, value, ""))
        return height, width
    raise InputError(f"{name} must be two positive whole numbers, got {shown(value)}")


def real_number(name: str, value: object) -> float:
    """The value as a float. Raises InputError if it is not a number."""
    number = scalar(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        with contextlib.suppress(OverflowError):
            return float(number)
    raise InputError(f"{name} must be a number, got {shown(value)}")


def truth_value(name: str, value: object) -> bool:
    """The value as a bool. Raises InputError if it is neither True nor False."""
    if isinstance(flag := scalar(value), bool):
        return flag
    raise InputError(f"{name} must be True or False, got {shown(value)}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises InputError for a tensor that does not store all its elements."""
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise InputError(f"{name}: expected a dense tensor, got one {kind}")


def batch_of(name: str, value: object, channels: int, step: int = 1, border: int = 0) -> Tensor:
    """The value, a tensor (B, channels, H, W) of floating-point numbers whose H and W, with a
    border, are multiples of `step`. Raises InputError if it is not one."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor, got {shown(value)}")
    check_dense(name, value)
    if not value.is_floating_point():
        raise InputError(f"{name} must be floating-point numbers, got {value.dtype}")
    if value.ndim != 4 or value.shape[1] != channels or not value.numel():
        expected = f"(B, {channels}, H, W), none of them 0"
        raise InputError(f"{name}: has shape {tuple(value.shape)}, expected {expected}")
    if any((side + border) % step for side in value.shape[2:]):
        padded = f", with {border} of padding," if border else ""
        sides = tuple(value.shape[2:])
        raise InputError(f"{name}: height and width {sides}{padded} must be multiples of {step}")
    return value


def path_of(name: str, value: object) -> Path:
    """The value as a path. Raises InputError if it is not one."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise InputError(f"{name} must be a path, got {shown(value)}")


def several(name: str, values: object, what: str) -> list:
    """The values as a list; a single string becomes a list of one. Raises InputError for anything
    that cannot be iterated over, and for bytes and mappings."""
    values = scalar(values)  # 0-d arrays and tensors define __iter__, but raise
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Iterable) or isinstance(values, bytes | Mapping):
        raise InputError(f"{name} must be {what}, got {shown(values)}")
    return list(values)
