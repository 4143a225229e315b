"""User-facing errors, the values of arguments, and named random number generators.

A number is its value, not how it is written: 1, np.int64(1) and torch.tensor(1) are one seed, and
what is no whole number is none ("1", 1.0, True).

Random numbers come from `rng(...)`, a CPU generator named after its purpose, such as
`rng(seed, "flow", step)`. Its stream depends on the name alone, not on what was drawn before: a run
that is interrupted after step 700 resumes with the numbers it would have drawn anyway, and one seed
gives one image on every device (up to rounding).
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHOWN = 80  # characters of a value in a message
LARGEST = 14_000  # bits of a whole number; Python does not write out integers much longer


class InputError(ValueError):
    """Invalid user input. The message is one line that says which file, key or option is wrong,
    what was expected, and what to do."""


# --- values in messages ---------------------------------------------------------------------------


def shortened(text: str, limit: int = SHOWN) -> str:
    """A text for display: on one line, cut at `limit` characters, nothing in it unprintable."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3].rstrip()}..."


def shown(value: object) -> str:
    """`repr` for a message: on one line, and cut, with its length, if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond LARGEST
        text = f"{type(value).__name__} of thousands of digits"
    if len(text) <= SHOWN and "\n" not in text:
        return text
    if isinstance(value, str):
        return f"{value[:SHOWN]!r}... ({len(value):,} characters)"
    return shortened(text)


def listed(items: list[str], limit: int = 3) -> str:
    """The first of some items, and how many more there are."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


# --- values given ---------------------------------------------------------------------------------


def scalar(value: object) -> object:
    """The Python number in a NumPy number or in an array or tensor (); anything else as it is."""
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


def real_number(name: str, value: object) -> float:
    """The value as a float. Raises InputError if it is not a number."""
    number = scalar(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        with contextlib.suppress(OverflowError):
            return float(number)
    raise InputError(f"{name} must be a number, got {shown(value)}")


def path_of(name: str, value: object) -> Path:
    """The value as a path. Raises InputError if it is none."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise InputError(f"{name} must be a path, got {shown(value)}")


def several(name: str, values: object, what: str) -> list:
    """A list of the values, of which one text is one. Raises InputError for what is no list."""
    if isinstance(values, str):
        return [values]
    values = scalar(values)  # which can be iterated over in name only
    if not isinstance(values, Iterable) or isinstance(values, bytes | Mapping):
        raise InputError(f"{name} must be {what}, got {shown(values)}")
    return list(values)


# --- random numbers -------------------------------------------------------------------------------


def rng(*name: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `name` alone.

    Raises InputError for a name that is not made of texts and whole numbers.
    """
    values = tuple(
        str(part) if isinstance(part, str) else whole_number("a random stream's name", part)
        for part in name
    )
    digest = hashlib.sha256(repr(values).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
